"""`each` and `aeach`: any runnable over any iterable."""

import asyncio
import itertools
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, suppress
from contextvars import ContextVar
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, ensure_config

from asyncify import Dual, aeach, concurrency, each
from asyncify.loop_tasks import LoopTasks
from asyncify.progress import Progress
from tests.obvious_loop import Document, OddError, numbers, obvious, refuse, refuse_async, steps, steps_async
from tests.waiting import SAFETY_NET, until

Pair = Dual[Any, Any]

THREADS, LOOP, TASKS, SOURCE = WAYS = ["each in threads", "each via async", "aeach", "aeach over an async source"]
SYNC_WAYS = [THREADS, LOOP]
ASYNC_WAYS = [TASKS, SOURCE]


def same(value: Any) -> Any:
    """Return the value."""
    return value


async def same_async(value: Any) -> Any:
    """Return the value a turn of the loop later."""
    await asyncio.sleep(0)
    return value


async def slowly(inputs: Iterable[Any]) -> AsyncIterator[Any]:
    """Yield the inputs, a turn of the loop before each."""
    for value in inputs:
        await asyncio.sleep(0)
        yield value


def collect(way: str, runnable: Any, inputs: Iterable[Any], **options: Any) -> list[Any]:
    """Return all that a stream yields; as many as `take` says, and then leave it, if there is such an option."""
    take = options.pop("take", None)
    if way in SYNC_WAYS:
        via: Literal["threads", "async"] = "async" if way == LOOP else "threads"
        results = each(runnable, inputs, via=via, **options)
        try:
            return list(itertools.islice(results, take))
        finally:
            results.close()
    return asyncio.run(_acollect(runnable, slowly(inputs) if way == SOURCE else inputs, take, options))


async def _acollect(runnable: Any, inputs: Any, take: int | None, options: dict[str, Any]) -> list[Any]:
    results = aeach(runnable, inputs, **options)
    found: list[Any] = []
    try:
        if take != 0:
            async for result in results:
                found.append(result)
                if len(found) == take:
                    break
    finally:
        await results.aclose()
    assert len(asyncio.all_tasks()) == 1, "a task was left behind"
    return found


# --- the obvious loop ---

windows = st.one_of(st.none(), st.integers(1, 5))


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None)
@given(inputs=numbers, window=windows)
def test_a_stream_gives_what_the_loop_gives(way: str, inputs: list[int], window: int | None) -> None:
    """With `return_exceptions`, outputs and errors come in the order of the inputs."""
    found = collect(way, Pair(steps, steps_async), inputs, window=window, return_exceptions=True)

    assert found == obvious(inputs)


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None)
@given(inputs=numbers, window=windows)
def test_an_unordered_stream_gives_what_the_loop_gives(way: str, inputs: list[int], window: int | None) -> None:
    """With `ordered=False` each index comes once, with the output or the error that the loop gives."""
    found = collect(way, Pair(steps, steps_async), inputs, window=window, ordered=False, return_exceptions=True)

    assert sorted(found, key=lambda item: item[0]) == list(enumerate(obvious(inputs)))


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None)
@given(inputs=numbers, window=windows)
def test_a_stream_raises_where_the_loop_raises(way: str, inputs: list[int], window: int | None) -> None:
    """Everything before the first error is yielded, then that error is raised."""
    found: list[Any] = []
    expected = list(itertools.takewhile(lambda output: not isinstance(output, OddError), obvious(inputs)))

    def remember(value: Any) -> None:
        found.append(value.done)

    try:
        outputs = collect(way, Pair(steps, steps_async), inputs, window=window, progress=remember)
    except OddError as error:
        assert error == obvious(inputs)[len(expected)]  # noqa: PT017  (whether it is raised depends on the inputs)
        assert len(found) == len(expected) + 1
    else:
        assert outputs == expected == obvious(inputs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [RunnableLambda, Pair, lambda f, g: Pair(f, g) | Pair(f, g), lambda f, _: Pair(f)])
@pytest.mark.filterwarnings("ignore::asyncify.BridgedWarning")  # of the last
def test_any_runnable_goes(way: str, kind: Callable[..., Any]) -> None:
    """A RunnableLambda, a pair, a pipe and a pair with one side stream alike."""
    assert collect(way, kind(same, same_async), range(20), window=3) == list(range(20))


class Foreign(Runnable[int, int]):
    """A runnable whose `ainvoke` is no async function."""

    def invoke(self, input: int, config: RunnableConfig | None = None, **kwargs: Any) -> int:
        if input == 1:
            raise OddError(input)
        return input

    def ainvoke(  # type: ignore[override]  # that is the point
        self, input: int, config: RunnableConfig | None = None, **kwargs: Any
    ) -> "asyncio.Future[int]":
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self.invoke(input))
        return answer


@pytest.mark.parametrize("way", WAYS)
def test_a_runnable_that_raises_before_it_can_be_awaited(way: str) -> None:
    """Its error is that of one input, and an awaitable that is no coroutine is awaited."""
    assert collect(way, Foreign(), range(3), return_exceptions=True) == [0, OddError(1), 2]


def test_an_input_that_can_not_be_started_is_a_failure() -> None:
    """The caller of the background loop is told, instead of waiting for ever."""

    def start(index: int, value: Any) -> "asyncio.Task[Any]":
        if index == 1:
            raise OddError(index)
        return asyncio.get_running_loop().create_task(same_async(value))

    found: list[Any] = []

    def run() -> None:
        with LoopTasks(start, lambda: 2, return_exceptions=False, ordered=True) as fan:
            fan.run(enumerate("abc"))
            while group := fan.take():
                found.extend(group)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(SAFETY_NET)

    assert sorted(found, key=lambda ended: ended[0]) == [(0, "a", None), (1, None, OddError(1))]


@pytest.mark.parametrize("way", WAYS)
def test_a_config_that_keeps_an_input_from_being_started_is_its_failure(way: str) -> None:
    """It is told of in the place of each output, on both paths."""
    unreadable: Any = {"metadata": ["a list"]}

    found = collect(way, Pair(same, same_async), range(3), config=unreadable, return_exceptions=True)

    assert [type(output) for output in found] == [TypeError] * 3


# --- sources ---


@pytest.mark.parametrize("way", WAYS)
def test_an_endless_source_is_read_as_far_as_the_window_goes(way: str) -> None:
    """After ten results of an endless source no more than the window has been read ahead."""
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        for read in itertools.count(1):  # noqa: UP028  (what is counted is how far the loop has come)
            yield read

    found = collect(way, Pair(same, same_async), endless(), window=5, take=10)

    assert found == list(range(1, 11))
    assert read <= 10 + 5


class Indexed:
    """A sequence of the old kind, which has neither a length nor an `__iter__`."""

    def __getitem__(self, index: int) -> int:
        return [1, 2, 3][index]


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_loop_takes_is_a_source(way: str) -> None:
    """A sequence that has nothing but its items is one."""
    source: Any = Indexed()

    assert collect(way, Pair(same, same_async), source) == [1, 2, 3]


class Both:
    """Inputs that can be read on either path."""

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])

    def __aiter__(self) -> AsyncIterator[int]:
        return slowly([3, 4])


@pytest.mark.parametrize(("way", "expected"), [(THREADS, [1, 2]), (LOOP, [1, 2]), (TASKS, [3, 4])])
def test_inputs_of_both_paths_are_read_on_that_of_the_stream(way: str, expected: list[int]) -> None:
    """`each` reads them as a loop does, and `aeach` as an `async for`."""
    assert collect(way, Pair(same, same_async), Both()) == expected


@pytest.mark.parametrize("way", [THREADS, LOOP, TASKS])
def test_leaving_early_closes_the_source(way: str) -> None:
    """A generator that was the source has been closed when the stream is, though somebody still holds it."""
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append("closed")

    held = source()
    collect(way, Pair(same, same_async), held, window=3, take=2)

    assert closed == ["closed"]
    assert next(held, "ended") == "ended"


async def test_leaving_early_closes_an_async_source() -> None:
    """An async generator that was the source has been closed when the stream is."""
    closed: list[str] = []

    async def source() -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
        finally:
            await asyncio.sleep(0)
            closed.append("closed")

    held = source()
    results = aeach(Pair(same, same_async), held, window=3)
    assert await anext(results) == 0
    await results.aclose()

    assert closed == ["closed"]
    assert await anext(held, "ended") == "ended"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_in_the_source_comes_after_the_results_before_it(way: str, ordered: bool) -> None:  # noqa: FBT001
    """All inputs that the source gave are run and yielded, then its error is raised as itself."""
    boom = OddError("source")
    done: list[int] = []

    def source() -> Iterator[int]:
        yield from range(7)
        raise boom

    with pytest.raises(OddError) as raised:
        collect(
            way,
            Pair(same, same_async),
            source(),
            window=3,
            ordered=ordered,
            return_exceptions=True,
            progress=lambda state: done.append(state.done),
        )

    assert raised.value is boom
    assert done == list(range(1, 8))


class Numbers(AsyncGenerator[int, None]):
    """An async generator by its methods, as compiled ones are; it knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = False
        self._numbers = itertools.count()

    async def asend(self, value: None, /) -> int:
        return next(self._numbers)

    async def athrow(self, *_: Any) -> int:
        self.closed = True
        raise StopAsyncIteration


def test_leaving_early_closes_an_async_source_of_another_kind() -> None:
    """What has the methods of an async generator is closed as one, as on the sync path."""
    numbers: Any = Numbers()
    collect(TASKS, Pair(same, same_async), numbers, take=2)

    assert numbers.closed


def closing_badly() -> Iterator[int]:
    """Yield numbers, and raise when that is to end."""
    try:
        yield from itertools.count()
    finally:
        raise OSError("the cursor is gone")


async def closing_badly_async() -> AsyncIterator[int]:
    """Do the same on the other path."""
    try:
        for number in itertools.count():
            yield number
    finally:
        raise OSError("the cursor is gone")


closing_ways = pytest.mark.parametrize(
    ("way", "source"),
    [*itertools.product([THREADS, LOOP, TASKS], [closing_badly]), (TASKS, closing_badly_async)],
    ids=WAYS,
)


@closing_ways
def test_what_a_source_raises_as_it_is_closed_is_raised(way: str, source: Callable[[], Any]) -> None:
    """Who leaves a stream early is told."""
    with pytest.raises(OSError, match="the cursor is gone"):
        collect(way, Pair(same, same_async), source(), take=2)


@closing_ways
def test_what_a_source_raises_as_it_is_closed_hides_no_error(way: str, source: Callable[[], Any]) -> None:
    """The error that the source is closed for is raised, with a note of the other."""
    with pytest.raises(OddError) as raised:
        collect(way, Foreign(), source())

    assert "the cursor is gone" in raised.value.__notes__[0]


async def test_a_source_that_swallows_its_cancellation_is_left_at_once() -> None:
    """What it gives then is not called, and it is asked for no more."""
    started: list[int] = []
    asked = 0

    async def source() -> AsyncIterator[int]:
        nonlocal asked
        for value in itertools.count():
            asked += 1
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0 if value == 0 else SAFETY_NET)
            yield value

    async def call(value: int) -> int:
        started.append(value)
        return value

    async with asyncio.timeout(SAFETY_NET / 2), aclosing(aeach(Pair(same, call, name="call"), source())) as results:
        async for _ in results:
            break

    assert started == [0]
    assert asked == 2


async def test_results_come_out_while_an_async_source_waits() -> None:
    """The source gives its second input only when the result of the first has been seen."""
    seen = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        await asyncio.wait_for(seen.wait(), SAFETY_NET)
        yield 2

    found = []
    async for result in aeach(Pair(same, same_async), source()):
        found.append(result)
        seen.set()

    assert found == [1, 2]


@pytest.mark.parametrize("way", SYNC_WAYS)
def test_a_source_is_read_in_the_callers_thread(way: str) -> None:
    """What the source holds may belong to one thread, as a database cursor does."""

    def source() -> Iterator[int]:
        for _ in range(10):
            yield threading.get_ident()

    assert collect(way, Pair(same, same_async), source(), window=2) == [threading.get_ident()] * 10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bound", [2, None])
def test_nothing_begins_after_an_error_that_will_be_raised(way: str, bound: int | None) -> None:
    """While a slow call before it holds the error back, the source is read no further and no call starts."""
    started: list[int] = []
    read: list[int] = []

    def begin(value: int) -> float:
        started.append(value)
        if value == 1:
            raise OddError(value)
        return 0.5 if value == 0 else 0.0

    def call(value: int) -> None:
        time.sleep(begin(value))

    async def call_async(value: int) -> None:
        await asyncio.sleep(begin(value))

    def source() -> Iterator[int]:
        for value in range(1000):
            read.append(value)
            if value > 2:
                time.sleep(0.02)
            yield value

    config: RunnableConfig = {"max_concurrency": bound} if bound else {}
    with pytest.raises(OddError):
        collect(way, Pair(call, call_async, name="call"), source(), window=500, config=config)

    if bound:
        assert sorted(started) == [0, 1]
    assert len(read) < 15


class _Failing:
    """A pair with a limit of two, whose first call waits until it may end, and whose second fails."""

    def __init__(self, *, limited: bool = True) -> None:
        self.began: list[int] = []
        self.ended: list[int] = []
        self.has_failed = threading.Event()
        self.may_end = threading.Event()

        async def call(value: int) -> int:
            self.began.append(value)
            if value == 1:
                self.has_failed.set()
                raise OddError(value)
            try:
                while value > 1 or not self.may_end.is_set():  # noqa: ASYNC110  (another thread may set it)
                    await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)
                self.ended.append(value)
                raise
            return value

        self.pair: Any = concurrency(limit=2)(call) if limited else Dual(call)

    def let_end(self) -> None:
        """Let the first end some time after the second has failed."""
        self.has_failed.wait(SAFETY_NET)
        time.sleep(0.1)
        self.may_end.set()


@pytest.mark.parametrize("way", [LOOP, TASKS, SOURCE])
@pytest.mark.parametrize("limited", [False, True])
def test_calls_behind_an_error_that_will_be_raised_are_cancelled_at_once(way: str, *, limited: bool) -> None:
    """What is before it is still wanted; who waits for the limiter behind it never begins, but the one next in line."""
    failing = _Failing(limited=limited)
    thread = threading.Thread(target=failing.let_end)
    thread.start()
    seen: list[int] = []

    def note(progress: Progress) -> None:
        seen.append(progress.done)
        if progress.done == 1:
            assert len(failing.ended) == len(failing.began) - 2

    with pytest.raises(OddError):
        collect(way, failing.pair, range(8), window=8, progress=note)
    thread.join()

    assert seen[:3] == [0, 1, 2] or seen[:2] == [1, 2]
    assert failing.began[:2] == [0, 1]
    assert set(failing.began) <= ({0, 1, 2} if limited else set(range(8)))
    assert len(failing.ended) == len(set(failing.ended))


@pytest.mark.parametrize("way", [LOOP, TASKS, SOURCE])
def test_of_two_errors_the_first_in_order_is_raised(way: str) -> None:
    """Also if it comes later; what is between them is cancelled then."""
    later = threading.Event()
    began: list[int] = []
    cancelled: list[int] = []

    async def call(value: int) -> int:
        began.append(value)
        if value == 5:
            while len(began) < 8:  # noqa: ASYNC110  (each of them adds to it)
                await asyncio.sleep(0)
            later.set()
            raise OddError("later")
        try:
            await (asyncio.to_thread(later.wait, SAFETY_NET) if value == 2 else asyncio.sleep(0.1 if value < 2 else 30))
        except asyncio.CancelledError:
            cancelled.append(value)
            raise
        if value == 2:
            raise OddError("first")
        return value

    with pytest.raises(OddError, match="first"):
        collect(way, Dual(call), range(8), window=8)

    assert sorted(cancelled) == [3, 4, 6, 7]


# --- how many at once ---


class InFlight:
    """Counts calls that are in flight, and holds each back until it is let go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = 0
        self.peak = 0

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.peak = max(self.peak, self.now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1


def meeting(parties: int) -> tuple[InFlight, Pair]:
    """Return a pair each of whose calls waits until so many are in flight, and the count of them."""
    seen = InFlight()
    met = threading.Barrier(parties)
    waiting: list[asyncio.Future[None]] = []

    def meet(value: int) -> int:
        with seen:
            met.wait(SAFETY_NET)
        return value

    async def meet_async(value: int) -> int:
        with seen:
            mine = asyncio.get_running_loop().create_future()
            waiting.append(mine)
            if len(waiting) == parties:
                for one in waiting:
                    one.set_result(None)
                waiting.clear()
            await asyncio.wait_for(mine, SAFETY_NET)
        return value

    return seen, Pair(meet, meet_async)


@pytest.mark.parametrize("way", WAYS)
def test_a_window_of_calls_is_in_flight(way: str) -> None:
    """With `window=3` three calls meet again and again, and never a fourth."""
    seen, pair = meeting(3)

    assert collect(way, pair, range(12), window=3) == list(range(12))
    assert seen.peak == 3


@pytest.mark.parametrize("way", WAYS)
def test_max_concurrency_holds_within_the_window(way: str) -> None:
    """The config bounds the calls, the window what is read ahead."""
    seen, pair = meeting(2)

    assert collect(way, pair, range(12), window=6, config={"max_concurrency": 2}) == list(range(12))
    assert seen.peak == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "bind",
    [
        lambda pair: pair.with_config(max_concurrency=2),
        lambda pair: pair.with_config(max_concurrency=2).with_retry(),
        lambda pair: pair.with_config(max_concurrency=1).with_config(max_concurrency=2),
        lambda pair: pair.with_config(max_concurrency=0).with_config(max_concurrency=2).bind(),
    ],
    ids=["one", "within another", "the outer one", "the outer one within another"],
)
def test_max_concurrency_of_a_binding_holds(way: str, bind: Callable[[Pair], Any]) -> None:
    """What `with_config` gives bounds a stream as it does a batch; the outer one counts."""
    seen, pair = meeting(2)

    assert collect(way, bind(pair), range(12)) == list(range(12))
    assert seen.peak == 2


@pytest.mark.parametrize("way", WAYS)
def test_max_concurrency_of_the_call_counts_for_more_than_a_bindings(way: str) -> None:
    """As in a batch."""
    seen, pair = meeting(3)

    bound = pair.with_config(max_concurrency=2)
    assert collect(way, bound, range(12), config={"max_concurrency": 3}) == list(range(12))
    assert seen.peak == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "bind",
    [lambda pair: pair, lambda pair: pair.bind(), lambda pair: pair.with_config(tags=["t"]).with_retry()],
    ids=["the pair", "a binding", "bindings"],
)
def test_the_window_is_twice_the_limit(way: str, bind: Callable[[Pair], Any]) -> None:
    """So much is read ahead of the results, and no more, of a pair behind bindings too."""
    far_ahead = threading.Event()
    ahead: list[int] = []
    done = 0

    def call(value: int) -> int:
        assert far_ahead.wait(SAFETY_NET)
        return value

    async def call_async(value: int) -> int:
        async with asyncio.timeout(SAFETY_NET):
            while not far_ahead.is_set():  # noqa: ASYNC110  (a threading.Event serves all four ways)
                await asyncio.sleep(0)
        return value

    def source() -> Iterator[int]:
        for number in range(20):
            ahead.append(number + 1 - done)
            if number == 3:
                far_ahead.set()
            yield number

    def count(state: Progress) -> None:
        nonlocal done
        done = state.done

    limited: Any = concurrency(limit=2)(Pair(call, call_async, name="call"))

    assert collect(way, bind(limited), source(), progress=count) == list(range(20))
    assert max(ahead) == 4


@pytest.mark.parametrize("way", WAYS)
def test_the_limit_of_a_pair_gives_the_window(way: str) -> None:
    """Without a window all slots of a limit are used, and never more."""
    seen, pair = meeting(4)

    collect(way, concurrency(limit=4)(pair), range(40))

    assert seen.peak == 4


@pytest.mark.parametrize("way", WAYS)
def test_the_window_grows_with_the_limit(way: str) -> None:
    """A limit that is raised during a run lets more calls in, as an adaptive one has to be."""
    all_in = threading.Barrier(8)
    inside = 0
    all_in_async: asyncio.Event | None = None

    def call(value: int) -> int:
        if value:
            all_in.wait(SAFETY_NET)
        else:
            limited.limiter.resize(limit=8)
        return value

    async def call_async(value: int) -> int:
        nonlocal inside, all_in_async
        all_in_async = all_in_async or asyncio.Event()
        if not value:
            limited.limiter.resize(limit=8)
            return value
        inside += 1
        if inside == 8:
            all_in_async.set()
        async with asyncio.timeout(SAFETY_NET):
            await all_in_async.wait()
        return value

    limited: Any = concurrency(limit=1)(Pair(call, call_async, name="call"))

    assert collect(way, limited, range(9)) == list(range(9))


@pytest.mark.parametrize("way", WAYS)
def test_a_slow_head_does_not_idle_the_others(way: str) -> None:
    """In order, behind a first call that takes long, the rest of the window is run meanwhile."""
    others_ran = threading.Event()
    ran: list[int] = []
    ahead: list[int] = []
    done = 0

    def call(value: int) -> int:
        if value == 0:
            assert others_ran.wait(SAFETY_NET)
        else:
            ran.append(value)
            if len(ran) == 3:
                others_ran.set()
        return value

    async def call_async(value: int) -> int:
        if value == 0:
            async with asyncio.timeout(SAFETY_NET):
                while not others_ran.is_set():  # noqa: ASYNC110  (a threading.Event serves all four ways)
                    await asyncio.sleep(0)
            return value
        return call(value)

    def source() -> Iterator[int]:
        for number in range(10):
            ahead.append(number + 1 - done)
            yield number

    def count(state: Progress) -> None:
        nonlocal done
        done = state.done

    options: Any = {"window": 4, "config": {"max_concurrency": 2}, "progress": count}
    assert collect(way, Pair(call, call_async), source(), **options) == list(range(10))
    assert max(ahead) == 4, "the source was read further than the window"


async def test_a_caller_that_takes_no_result_holds_the_source_back_a() -> None:
    """While nobody asks for the second result, the source is read no further than the window."""
    read: list[int] = []

    def source() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    results = aeach(Pair(same, same_async), source(), window=4)
    await anext(results)
    for _ in range(100):
        await asyncio.sleep(0)
    await results.aclose()

    assert len(read) == 1 + 4


# --- leaving ---


async def test_leaving_early_cancels_the_calls_and_waits_for_them_a() -> None:
    """When `aclose` of a stream returns, no call is in flight."""
    seen = InFlight()
    cancelled: list[int] = []

    async def call(value: int) -> int:
        with seen:
            try:
                if value:
                    await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                cancelled.append(value)
                raise
        return value

    results = aeach(Pair(same, call), itertools.count(), window=4)
    assert await anext(results) == 0
    await results.aclose()

    assert seen.now == 0
    assert sorted(cancelled)[:3] == [1, 2, 3]
    assert len(asyncio.all_tasks()) == 1


def test_leaving_early_cancels_the_calls_on_the_background_loop() -> None:
    """`via="async"` leaves no task on the background loop."""
    seen = InFlight()

    async def call(value: int) -> int:
        with seen:
            if value == 0:
                await second_runs.wait()
                return value
            second_runs.set()
            try:
                await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
            except asyncio.CancelledError:
                cancelled.append(value)
                raise
        return value

    second_runs = asyncio.Event()
    cancelled: list[int] = []
    results = each(Pair(same, call), itertools.count(), window=4, via="async")
    assert next(results) == 0
    results.close()

    assert seen.now == 0
    assert cancelled


def test_leaving_early_waits_for_the_calls_in_threads() -> None:
    """A thread can't be cancelled: `close` returns when the calls in flight have ended."""
    seen = InFlight()
    left = threading.Event()
    second_runs = threading.Event()

    def call(value: int) -> int:
        with seen:
            if value:
                second_runs.set()
                assert left.wait(SAFETY_NET)
            assert second_runs.wait(SAFETY_NET)
        return value

    results = each(Pair(call), itertools.count(), window=4)
    assert next(results) == 0
    closing = threading.Thread(target=results.close)
    closing.start()
    left.set()
    closing.join(SAFETY_NET)

    assert not closing.is_alive()
    assert seen.now == 0


async def test_cancelling_a_stream_leaves_nothing_behind() -> None:
    """A task that is cancelled while it waits for a result takes its calls and the source with it."""
    closed: list[str] = []
    started = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
        finally:
            closed.append("source")

    async def forever(value: int) -> int:
        started.set()
        return await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)

    async def consume() -> None:
        async for _ in aeach(Pair(same, forever), source(), window=3):
            pass

    running = asyncio.create_task(consume())
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0)

    assert closed == ["source"]
    assert len(asyncio.all_tasks()) == 1


async def test_a_cancellation_while_a_stream_is_left_is_not_lost() -> None:
    """Who waits for the end of the calls and is cancelled sees it when they have ended."""
    cancelled, may_end = asyncio.Event(), asyncio.Event()

    async def call(value: int) -> int:
        if value:
            try:
                await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
            except asyncio.CancelledError:
                cancelled.set()
                await asyncio.wait_for(may_end.wait(), SAFETY_NET)
                raise
        return value

    results = aeach(Pair(same, call), range(2))
    assert await anext(results) == 0
    leaving = asyncio.ensure_future(results.aclose())
    await cancelled.wait()
    leaving.cancel()
    await asyncio.sleep(0)
    assert not leaving.done()
    may_end.set()

    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("way", SYNC_WAYS)
def test_an_interrupt_in_the_source_is_raised_at_once(way: str) -> None:
    """What is no `Exception` does not wait until the results before it are yielded."""
    may_end = threading.Event()
    told: list[Progress] = []

    def call(value: int) -> int:
        assert may_end.wait(SAFETY_NET)
        return value

    async def call_async(value: int) -> int:
        return await asyncio.to_thread(call, value)

    def source() -> Iterator[int]:
        yield from range(2)
        may_end.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(way, Pair(call, call_async, name="call"), source(), progress=told.append)

    assert told == []


class Interrupted(LoopTasks):
    """A fan-out to which the caller gives items just when the loop has seen that there are none."""

    is_told = False

    @property
    def _drain_is_due(self) -> bool:
        return self._is_due

    @_drain_is_due.setter
    def _drain_is_due(self, is_due: bool) -> None:
        if not is_due and not self.is_told and hasattr(self, "_loop"):
            self.is_told = True
            self.run([(1, "late")])
        self._is_due = is_due


def test_an_item_that_comes_as_the_loop_looks_away_is_not_lost() -> None:
    """The loop looks again when it has said that it is not on its way: no task may be alive whose end it would see."""

    def start(index: int, value: Any) -> "asyncio.Task[Any]":
        if index == 0:
            raise OddError(index)
        return asyncio.get_running_loop().create_task(same_async(value))

    found: list[Any] = []

    def run() -> None:
        with Interrupted(start, lambda: 2, return_exceptions=True) as fan:
            fan.run([(0, "early")])
            while group := fan.take():
                found.extend(group)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(SAFETY_NET)

    assert found == [(0, None, OddError(0)), (1, "late", None)]


def leave_early(way: str, inputs: list[Document]) -> None:
    """Take one result of a stream."""
    collect(way, Pair(same, same_async), inputs, window=2, take=1)


def run_to_an_error(way: str, inputs: list[Document]) -> None:
    """Have the first call fail, with others in flight and others that never start."""
    _see_it_fail(way, Pair(refuse, refuse_async), inputs, window=2)


def run_to_an_error_in_the_source(way: str, inputs: list[Document]) -> None:
    """Have the source fail after the inputs."""

    def source() -> Iterator[Document]:
        yield from inputs
        raise OddError(0)

    _see_it_fail(way, Pair(same, same_async), source())


def leave_before_an_error_in_the_source(way: str, inputs: list[Document]) -> None:
    """Take one result of a stream whose source has failed by then."""
    failed = threading.Event()

    def source() -> Iterator[Document]:
        yield from inputs
        failed.set()
        raise OddError(0)

    def call(document: Document) -> Document:
        assert failed.wait(SAFETY_NET)
        return document

    async def call_async(document: Document) -> Document:
        await until(failed.is_set)
        return document

    collect(way, Pair(call, call_async), source(), take=1)


def _see_it_fail(way: str, pair: Pair, inputs: Iterable[Document], **options: Any) -> None:
    async def main() -> None:
        with suppress(OddError):  # here, for `asyncio.run` itself keeps what it raises
            await _acollect(pair, slowly(inputs) if way == SOURCE else inputs, None, options)

    if way in ASYNC_WAYS:
        asyncio.run(main())
        return
    with suppress(OddError):
        collect(way, pair, inputs, **options)


def run_to_the_end(way: str, inputs: list[Document]) -> None:
    """Take all results of a stream."""
    collect(way, Pair(same, same_async), inputs)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "run",
    [
        run_to_the_end,
        run_to_an_error,
        run_to_an_error_in_the_source,
        leave_before_an_error_in_the_source,
        leave_early,
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_is_over_lets_its_inputs_go(way: str, run: Callable[[str, list[Document]], None]) -> None:
    """However it has ended, they are not left to a garbage collection."""
    gone = threading.Event()
    inputs = [Document() for _ in range(9)]
    weakref.finalize(inputs[-1], gone.set)
    run(way, inputs)
    del inputs

    assert gone.wait(SAFETY_NET)  # a thread may still be on its way out


# --- contexts, kinds of argument ---

seen_by_caller: ContextVar[str] = ContextVar("seen_by_caller", default="nobody")


@pytest.mark.parametrize("way", WAYS)
def test_each_call_has_a_context_of_its_own(way: str) -> None:
    """A call sees the caller's context variables, and what it sets there nobody else sees."""

    def read_and_write(value: int) -> str:
        before = seen_by_caller.get()
        seen_by_caller.set(f"item {value}")
        return before

    async def read_and_write_async(value: int) -> str:
        return read_and_write(value)

    token = seen_by_caller.set("caller")
    try:
        found = collect(way, Pair(read_and_write, read_and_write_async), range(5), window=1)
    finally:
        seen_by_caller.reset(token)

    assert found == ["caller"] * 5


@pytest.mark.parametrize("way", WAYS)
def test_the_config_goes_to_every_run(way: str) -> None:
    """A tag of the config is seen in each run."""

    def tags(_: int, config: Any) -> list[str]:
        return list(config["tags"])

    async def tags_async(_: int, config: Any) -> list[str]:
        return list(config["tags"])

    assert collect(way, Pair(tags, tags_async), range(3), config={"tags": ["t"]}) == [["t"]] * 3


@pytest.mark.parametrize("way", WAYS)
def test_the_run_id_is_the_first_ones_alone(way: str) -> None:
    """As in a batch, with LangChain's warning: two runs can't have one id."""
    run_id = uuid.uuid4()

    def parent(_: int) -> Any:
        return ensure_config()["callbacks"].parent_run_id  # type: ignore[union-attr]

    async def parent_async(value: int) -> Any:
        return parent(value)

    with pytest.warns(RuntimeWarning, match="run_id"):
        found = collect(way, Pair(parent, parent_async), range(3), config={"run_id": run_id})

    assert found[0] == run_id
    assert len(set(found)) == 3


def test_via_async_runs_the_native_async_side_for_a_sync_caller() -> None:
    """1,000 calls wait at the same time with no event loop in the caller's code and one thread for them all."""
    seen, pair = meeting(1000)

    assert collect(LOOP, pair, range(1000), window=1000) == list(range(1000))
    assert seen.peak == 1000


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"window": 0}, ValueError, "window=0"),
        ({"window": 2.5}, TypeError, "window=2.5"),
        ({"config": {"max_concurrency": 0}}, ValueError, "max_concurrency=0"),
        ({"codec": "yaml"}, ValueError, "codec='yaml'"),
        ({"key": str}, TypeError, "checkpoint="),
        ({"key": "id", "checkpoint": "run.sqlite"}, TypeError, "key='id': .* key=lambda"),
        ({"codec": "pickle"}, TypeError, 'checkpoint="run.sqlite"'),
        ({"config": [{"tags": ["t"]}]}, TypeError, "one config for all inputs"),
        ({"config": "tags"}, TypeError, "config='tags'"),
        ({"progress": None}, TypeError, "progress=None: .* progress=print"),
        ({"progress": 0}, TypeError, "progress=0"),
        ({"progress": "no"}, TypeError, "progress='no'"),
        ({"progress": same_async}, TypeError, "not awaited"),
        ({"checkpoint": True}, TypeError, 'checkpoint=True: .* checkpoint="run.sqlite"'),
        ({"checkpoint": ""}, ValueError, "checkpoint='': .* checkpoint=\"run.sqlite\""),
        ({"checkpoint": ":memory:"}, ValueError, "checkpoint=':memory:'"),
    ],
)
def test_a_wrong_option_is_refused(way: str, options: Any, error: type[Exception], says: str) -> None:
    """The message names the argument and what to write instead, when the stream is made."""
    with pytest.raises(error, match=says):
        (each if way in SYNC_WAYS else aeach)(Pair(same, same_async), [1], **options)


def test_a_wrong_argument_is_refused_by_the_call_itself() -> None:
    """Nobody has to iterate to learn of it."""
    with pytest.raises(TypeError, match="each\\(dual\\(fetch\\), inputs\\)"):
        each(same, [1])  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="must be an iterable"):
        aeach(Pair(same), 1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="aeach"):
        each(Pair(same), slowly([1]))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="via='processes'"):
        each(Pair(same), [1], via="processes")  # type: ignore[call-overload]


def test_a_stream_that_is_never_iterated_does_nothing() -> None:
    """Neither the source nor a thread nor a file is touched before the first result is asked for."""
    read: list[int] = []

    def source() -> Iterator[int]:
        read.append(0)
        yield 0

    results = each(Pair(same), source())
    del results

    assert read == []
