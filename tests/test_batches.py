"""The four batch methods of a pair: LangChain's meaning, and nothing left behind."""

import asyncio
import itertools
import linecache
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from operator import itemgetter
from types import FrameType
from typing import Any, Self, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, ensure_config

from asyncify import Dual, UnboundedWarning, concurrency, dual, each, fanout, registry
from asyncify.pools import ThreadPool
from tests.obvious_loop import Document, OddError, numbers, obvious, refuse, refuse_async, steps, steps_async
from tests.waiting import SAFETY_NET, until

PATHS = ["sync", "async"]
Pair = Dual[Any, Any]


def times_ten(value: int) -> int:
    """Return ten times the value."""
    return value * 10


async def times_ten_async(value: int) -> int:
    """Do the same a turn of the loop later."""
    await asyncio.sleep(0)
    return value * 10


def a_tenth(value: int) -> int:
    """Return a tenth of the value."""
    return value // 10


async def a_tenth_async(value: int) -> int:
    """Do the same on the other path."""
    return value // 10


def batch(
    path: str, runnable: Runnable[Any, Any], inputs: Sequence[Any], config: Any = None, **options: Any
) -> list[Any]:
    """Run a batch on one of the two paths."""
    given = inputs if isinstance(inputs, list) else list(inputs)
    if path == "sync":
        return runnable.batch(given, config, **options)
    return asyncio.run(runnable.abatch(given, config, **options))


def completed(
    path: str, runnable: Runnable[Any, Any], inputs: Sequence[Any], config: Any = None, **options: Any
) -> list[tuple[int, Any]]:
    """Return what `batch_as_completed` yields, or its async twin."""

    async def collect() -> list[tuple[int, Any]]:
        return [pair async for pair in runnable.abatch_as_completed(inputs, config, **options)]

    if path == "sync":
        return list(runnable.batch_as_completed(inputs, config, **options))
    return asyncio.run(collect())


# --- the obvious loop ---

bounds = st.one_of(st.none(), st.integers(1, 5))


def config_of(bound: int | None) -> RunnableConfig:
    """Return a config with this bound, if there is one."""
    return {} if bound is None else {"max_concurrency": bound}


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None)
@given(inputs=numbers, bound=bounds)
def test_a_batch_gives_what_the_loop_gives(path: str, inputs: list[int], bound: int | None) -> None:
    """With `return_exceptions`, outputs and errors stand in the order of the inputs."""
    pair = Pair(steps, steps_async)

    assert batch(path, pair, inputs, config_of(bound), return_exceptions=True) == obvious(inputs)


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None)
@given(inputs=numbers, bound=bounds)
def test_as_completed_gives_what_the_loop_gives(path: str, inputs: list[int], bound: int | None) -> None:
    """Each index comes out once, with the output or the error that the loop gives."""
    pair = Pair(steps, steps_async)

    found = completed(path, pair, inputs, config_of(bound), return_exceptions=True)

    assert sorted(found, key=lambda item: item[0]) == list(enumerate(obvious(inputs)))


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None)
@given(inputs=numbers, bound=bounds)
def test_a_batch_raises_what_the_loop_raises(path: str, inputs: list[int], bound: int | None) -> None:
    """The error is one of those that the loop meets, the very first if one runs at a time."""
    pair = Pair(steps, steps_async)
    errors = [output for output in obvious(inputs) if isinstance(output, OddError)]
    possible = errors[:1] if bound == 1 else errors

    if errors:
        with pytest.raises(OddError) as raised:
            batch(path, pair, inputs, config_of(bound))
        assert raised.value in possible
    else:
        assert batch(path, pair, inputs, config_of(bound)) == obvious(inputs)


@pytest.mark.parametrize("run", [batch, completed])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("config", [None, {}, [], [{}]])
def test_no_inputs_give_no_outputs(path: str, run: Callable[..., list[Any]], config: Any) -> None:
    """An empty batch calls nothing, whatever configs it is given."""
    assert run(path, Pair(steps, steps_async), [], config) == []


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_bound_is_refused_without_inputs_too(path: str) -> None:
    """An empty batch checks its config, so that the mistake is seen before there is any input."""
    with pytest.raises(ValueError, match="max_concurrency=0"):
        batch(path, Pair(steps, steps_async), [], {"max_concurrency": 0})


# --- how many at once ---


class InFlight:
    """A function of both colours that counts how many of its calls are in flight."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = 0
        self.peak = 0
        self.started = 0

    def enter(self) -> None:
        with self._lock:
            self.started += 1
            self.now += 1
            self.peak = max(self.peak, self.now)

    def leave(self) -> None:
        with self._lock:
            self.now -= 1


def rendezvous(parties: int) -> tuple[InFlight, Pair]:
    """Return a pair each of whose calls waits until so many are in flight, and the count of them."""
    seen = InFlight()
    met = threading.Barrier(parties)
    waiting: list[asyncio.Future[None]] = []

    def meet(value: int) -> int:
        seen.enter()
        met.wait(SAFETY_NET)
        seen.leave()
        return value

    async def meet_async(value: int) -> int:
        seen.enter()
        mine = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        if len(waiting) == parties:
            for one in waiting:
                one.set_result(None)
            waiting.clear()
        await asyncio.wait_for(mine, SAFETY_NET)
        seen.leave()
        return value

    return seen, Pair(meet, meet_async)


@pytest.mark.parametrize("run", [batch, completed])
@pytest.mark.parametrize("path", PATHS)
def test_max_concurrency_calls_are_in_flight(path: str, run: Callable[..., list[Any]]) -> None:
    """With `max_concurrency=3` three calls meet again and again, and never a fourth."""
    seen, pair = rendezvous(3)

    run(path, pair, range(12), {"max_concurrency": 3})

    assert (seen.peak, seen.started, seen.now) == (3, 12, 0)


def test_abatch_without_a_bound_has_all_in_flight() -> None:
    """Nothing caps an async batch that has neither `max_concurrency` nor a limit; its caller is told so."""
    seen, pair = rendezvous(1234)

    with pytest.warns(UnboundedWarning, match="1,234 calls"):
        found = batch("async", pair, range(1234))

    assert found == list(range(1234))
    assert seen.peak == 1234


def test_batch_without_a_bound_has_as_many_in_flight_as_there_are_default_threads() -> None:
    """A sync batch that has neither `max_concurrency` nor a limit uses 64 threads."""
    seen, pair = rendezvous(64)

    batch("sync", pair, range(128))

    assert seen.peak == 64


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_uses_the_limit_of_the_pair(path: str) -> None:
    """As many calls run at once as the limit says, without `max_concurrency`."""
    seen, pair = rendezvous(5)
    limited = concurrency(limit=5)(pair)

    batch(path, limited, range(20))

    assert seen.peak == 5


@pytest.mark.parametrize("path", PATHS)
def test_max_concurrency_holds_beside_a_higher_limit(path: str) -> None:
    """The lower of the two bounds holds."""
    seen, pair = rendezvous(2)
    limited = concurrency(limit=5)(pair)

    batch(path, limited, range(20), {"max_concurrency": 2})

    assert seen.peak == 2


@pytest.mark.parametrize("run", [batch, completed])
def test_a_batch_in_threads_grows_with_the_limit(run: Callable[..., list[Any]]) -> None:
    """A limit that is raised during a batch lets more calls in, as an adaptive one has to be."""
    all_in = threading.Barrier(8)

    def call(value: int) -> int:
        if value:
            all_in.wait(SAFETY_NET)
        else:
            limited.limiter.resize(limit=8)
        return value

    limited: Any = concurrency(limit=1)(Pair(call, name="call"))

    assert len(run("sync", limited, range(9))) == 9


async def test_the_limit_holds_over_batches_together() -> None:
    """Two batches of 3 at once over a pair limited to 4, one on each path, never run more than 4 calls."""
    seen, pair = rendezvous(1)
    limited = concurrency(limit=4)(pair)

    bound: RunnableConfig = {"max_concurrency": 3}
    in_thread = asyncio.to_thread(limited.batch, list(range(50)), bound)
    await asyncio.gather(in_thread, limited.abatch(list(range(50)), bound), limited.abatch(list(range(50)), bound))

    assert seen.peak <= 4
    assert seen.started == 150


async def test_tasks_are_made_as_slots_come_free() -> None:
    """Over a limit of 5, some ten tasks are alive at any moment, not one for each of 500 inputs."""
    alive: list[int] = []

    @concurrency(limit=5)
    @dual(sync=times_ten)
    async def watched(value: int) -> int:
        alive.append(len(asyncio.all_tasks()))
        await asyncio.sleep(0)
        return value

    await watched.abatch(list(range(500)))

    assert max(alive) <= 5 + 5 + 2


async def test_tasks_are_made_as_the_slots_of_a_dict_come_free() -> None:
    """The inputs of a pipe with a dict in it are about as many as its limits together admit, not 500."""
    alive: list[int] = []

    async def watched(value: int) -> int:
        alive.append(len(asyncio.all_tasks()))
        await asyncio.sleep(0)
        return value

    def limited() -> Any:
        return concurrency(limit=3)(Pair(times_ten, watched))

    await (limited() | {"a": limited(), "b": limited()}).abatch(list(range(500)))

    assert max(alive) <= 3 * (3 * 7) + 2


async def test_unbounded_items_that_end_at_once_never_pile_up() -> None:
    """Of 3,000 inputs some hundreds are alive at any moment."""
    alive: list[int] = []

    async def watched(value: int) -> int:
        if value % 50 == 0:
            alive.append(len(asyncio.all_tasks()))
        return value

    await Pair(times_ten, watched, name="watched").abatch(list(range(3000)), {"max_concurrency": 10_000})

    assert max(alive) <= 300


async def test_unbounded_items_that_wait_have_soon_all_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 of them within a dozen turns of the event loop, so that none waits for another's answer to be handled."""
    monkeypatch.setattr(fanout, "_STRIDE_SECONDS", 60)
    may_end = asyncio.Event()
    begun = 0

    async def wait(value: int) -> int:
        nonlocal begun
        begun += 1
        await may_end.wait()
        return value

    batch = asyncio.create_task(
        Pair(times_ten, wait, name="wait").abatch(list(range(3000)), {"max_concurrency": 10_000})
    )
    for _ in range(12):
        await asyncio.sleep(0)
    seen = begun
    may_end.set()

    assert await batch == list(range(3000))
    assert seen == 3000


async def test_a_source_that_takes_its_time_never_holds_the_event_loop_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stride ends when its time is up, however many inputs there is room for; none is lost."""
    now = itertools.count()
    monkeypatch.setattr(fanout, "monotonic", lambda: next(now) / 1000)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    outputs = await Pair(times_ten, times_ten_async).abatch(list(range(1000)), {"max_concurrency": 10_000})
    counting.cancel()

    assert outputs == [value * 10 for value in range(1000)]
    assert turns >= 1000 / 20


def test_a_stop_iteration_is_raised_as_itself() -> None:
    """A batch of several does as a batch of one does."""

    def stop(value: int) -> int:
        raise StopIteration(value)

    for inputs in ([1], [1, 2]):
        with pytest.raises(StopIteration):
            Pair(stop).batch(inputs)


async def test_an_unobserved_item_is_one_task() -> None:
    """Beside the items' own tasks there are the caller's and the one that starts them."""
    alive: list[int] = []

    async def watched(value: int) -> int:
        await asyncio.sleep(0)
        alive.append(len(asyncio.all_tasks()))
        return value

    await Pair(times_ten, watched).abatch([1, 2, 3])

    assert max(alive) <= 3 + 2


def test_a_batch_of_one_uses_the_callers_thread() -> None:
    """A sync batch of one input needs no thread."""
    pair = Pair(lambda _: threading.get_ident())

    assert pair.batch([0]) == [threading.get_ident()]


@pytest.mark.parametrize("run", [batch, completed])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bound", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_bound_that_bounds_nothing_is_refused(
    path: str, run: Callable[..., list[Any]], bound: object, error: type[Exception]
) -> None:
    """`max_concurrency` is a whole number of at least 1, on all four methods, in each config of a list too."""
    wrong = {"max_concurrency": bound}
    for config in (wrong, [wrong, {}], [{}, wrong]):
        with pytest.raises(error, match="max_concurrency="):
            run(path, Pair(times_ten, times_ten_async), [1, 2], config)


def test_a_bound_of_a_dict_that_bounds_nothing_is_refused() -> None:
    """Of a dict of pairs too, whose stream would wait for ever for the first of no threads."""
    pair = Pair(times_ten, times_ten_async)
    pipe: Any = pair | {"a": pair, "b": pair}
    for run in (pipe.invoke, lambda *args: list(pipe.stream(*args))):
        with pytest.raises(ValueError, match="max_concurrency=0: must be at least 1"):
            run(1, {"max_concurrency": 0})


def test_a_bound_may_be_any_whole_number() -> None:
    """NumPy's too."""
    pair, one = Pair(times_ten, times_ten_async), cast("int", np.int64(1))

    assert pair.batch([1, 2], {"max_concurrency": one}) == [10, 20]
    assert list(each(pair, [1, 2], window=one)) == [10, 20]


@pytest.mark.parametrize("path", PATHS)
def test_the_ambient_bound_holds_for_a_nested_batch(path: str) -> None:
    """A batch inside a run takes `max_concurrency` from the config of that run."""
    seen, pair = rendezvous(2)

    def outer(values: list[int]) -> list[int]:
        return pair.batch(values)

    async def outer_async(values: list[int]) -> list[int]:
        return await pair.abatch(values)

    batch(path, Pair(outer, outer_async), [list(range(10))], {"max_concurrency": 2})

    assert seen.peak == 2


# --- errors, cancellation, leaving early ---


async def test_the_first_error_cancels_the_rest_and_waits_for_them_a() -> None:
    """When `abatch` raises, all other calls have been cancelled and have ended."""
    ended: list[int] = []
    all_started = asyncio.Event()
    boom = OddError("boom")

    async def call(value: int) -> int:
        if value == 9:
            all_started.set()
            raise boom
        try:
            await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append(value)
            raise
        return value

    with pytest.raises(OddError) as raised:
        await Pair(times_ten, call).abatch(list(range(10)))

    assert raised.value is boom
    assert sorted(ended) == list(range(9))
    assert len(asyncio.all_tasks()) == 1


async def test_the_first_error_cancels_the_rest_while_the_reader_is_busy() -> None:
    """`abatch_as_completed` does not wait until it is asked for the error."""
    ended: list[int] = []

    async def call(value: int) -> int:
        if value > 1:
            try:
                await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)
                ended.append(value)
                raise
        await asyncio.sleep(0.02 * value)
        if value == 1:
            raise OddError("boom")
        return value

    results: Any = Pair(times_ten, call).abatch_as_completed(list(range(6)))
    assert await anext(results) == (0, 0)
    async with asyncio.timeout(SAFETY_NET):
        while len(ended) < 4:  # noqa: ASYNC110  (each of them adds to it)
            await asyncio.sleep(0.001)
    with pytest.raises(OddError):
        await anext(results)

    assert sorted(ended) == [2, 3, 4, 5]


def test_the_first_error_stops_the_rest_and_waits_for_them() -> None:
    """When `batch` raises, the call that was running has ended and no other has started."""
    failed = threading.Event()
    started: list[int] = []
    ended: list[int] = []
    both_run = threading.Barrier(2)
    boom = OddError("boom")

    def call(value: int) -> int:
        started.append(value)
        both_run.wait(SAFETY_NET)
        if value == 0:
            failed.set()
            raise boom
        failed.wait(SAFETY_NET)
        ended.append(value)
        return value

    with pytest.raises(OddError) as raised:
        Pair(call).batch(list(range(100)), {"max_concurrency": 2})

    assert raised.value is boom
    assert ended == [1]
    assert len(started) == 2


class Interrupt:
    """Raises a `KeyboardInterrupt` in this thread, at one of the places where Ctrl-C may come: it counts them."""

    def __init__(self, place: int) -> None:
        self._left = place
        self.has_come = False

    def __enter__(self) -> Self:
        self._tracer = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._tracer)

    def _trace(self, frame: FrameType, event: str, arg: object) -> "Callable[..., Any] | None":
        entering = frame.f_code is threading.Condition.__enter__.__code__
        if frame.f_code.co_filename != fanout.__file__ and not entering:
            return None
        # The line of a `with` comes again where its block is left, in the midst of which no interrupt comes.
        is_with = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")
        if event == ("return" if entering else "line") and not is_with:
            self._left -= 1
            if not self._left:
                self.has_come = True
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize("run", ["batch", "batch_as_completed", "each"])
def test_an_interrupt_at_any_line_ends_a_batch(run: str) -> None:
    """Ctrl-C, wherever it comes, is raised, and nothing waits for what will never happen."""
    pair = Pair(times_ten)
    inputs, bound = list(range(6)), RunnableConfig(max_concurrency=2)
    runs: dict[str, Callable[[], Any]] = {
        "batch": lambda: pair.batch(inputs, bound),
        "batch_as_completed": lambda: list(pair.batch_as_completed(inputs, bound)),
        "each": lambda: list(each(pair, inputs, config=bound)),
    }
    ends: list[str] = []

    def interrupt_at_each_place() -> None:
        for place in itertools.count(1):
            interrupt = Interrupt(place)
            try:
                with interrupt:
                    runs[run]()
            except KeyboardInterrupt:
                ends.append("interrupted")
            if not interrupt.has_come:
                ends.append("ran to its end")
                return

    thread = threading.Thread(target=interrupt_at_each_place, daemon=True)
    thread.start()
    thread.join(SAFETY_NET)

    assert ends[-1:] == ["ran to its end"]
    assert ends.count("interrupted") > 20


def test_a_stream_that_is_collected_in_its_own_thread_does_not_wait_for_itself() -> None:
    """A garbage collector runs anywhere: the thread goes on with its call, and its slot comes free."""
    held: list[Any] = []
    has_begun = threading.Event()

    def call(value: int) -> int:
        if value:
            assert has_begun.wait(SAFETY_NET)
            held.clear()
        return value

    pair = concurrency(limit=1)(Pair(call))
    held.append(iter(pair.batch_as_completed([0, 1, 2])))
    next(held[0])
    has_begun.set()
    following = threading.Thread(target=pair.invoke, args=(0,), daemon=True)
    following.start()
    following.join(SAFETY_NET)

    assert not following.is_alive()


def test_a_stream_that_is_collected_by_a_thread_with_the_lock_of_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on the garbage collector may run between any two steps, those of a thread's `_next` too."""
    held: list[Any] = []
    may_end, collected = threading.Event(), threading.Event()

    def call(value: int) -> int:
        if value:
            assert may_end.wait(SAFETY_NET)
        return value

    def suppressing(*errors: type[Exception]) -> suppress:  # called by `_next`, with the lock held
        if may_end.is_set() and held:
            held.clear()
            collected.set()
        return suppress(*errors)

    held.append(iter(concurrency(limit=2)(Pair(call)).batch_as_completed(range(100))))
    next(held[0])
    monkeypatch.setattr(fanout, "suppress", suppressing)
    others = set(threading.enumerate())
    may_end.set()

    assert collected.wait(SAFETY_NET)
    end = time.monotonic() + SAFETY_NET
    while any(thread.name == "call" for thread in others & set(threading.enumerate())) and time.monotonic() < end:
        time.sleep(0.01)
    assert not [thread for thread in others & set(threading.enumerate()) if thread.name == "call"]


@pytest.mark.parametrize("act", [lambda inputs: inputs.clear(), lambda inputs: inputs.append(7)], ids=["fewer", "more"])
@pytest.mark.parametrize("run", [batch, completed])
@pytest.mark.parametrize("path", PATHS)
def test_inputs_are_those_that_were_given(
    path: str, run: Callable[..., list[Any]], act: Callable[[list[int]], None]
) -> None:
    """A list that its owner changes while the batch runs is taken as it was."""
    inputs = list(range(20))

    def call(value: int) -> int:
        if value == 1:
            act(inputs)
        return value

    async def call_async(value: int) -> int:
        await asyncio.sleep(0)
        return call(value)

    outputs = run(path, Pair(call, call_async), inputs, {"max_concurrency": 2})

    expected: list[Any] = list(range(20))
    assert sorted(outputs) == (expected if run is batch else list(zip(expected, expected, strict=True)))


@pytest.mark.parametrize("path", PATHS)
def test_an_override_that_raises_as_it_is_called_is_one_input_of_many(path: str) -> None:
    """An `ainvoke` need not be an `async def`: it may raise at once, or give a future."""

    class Checked(Pair):
        def invoke(self, input: int, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
            self.check(input)
            return super().invoke(input, config, **kwargs)

        def ainvoke(self, input: int, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
            self.check(input)
            return asyncio.ensure_future(super().ainvoke(input, config, **kwargs))

        def check(self, input: int) -> None:
            if input == 2:
                raise OddError(input)

    outputs = batch(path, Checked(times_ten, times_ten_async), [1, 2, 3], return_exceptions=True)

    assert [type(output) for output in outputs] == [int, OddError, int]


async def test_an_override_that_raises_as_it_is_called_ends_the_other_branches_a() -> None:
    """Of a dict: none of them runs on."""

    async def wait(value: int) -> int:
        await asyncio.sleep(SAFETY_NET)
        return value

    class Refusing(Pair):
        def ainvoke(self, input: int, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
            raise OddError(input)

    pipe: Any = Pair(times_ten, times_ten_async) | {"a": Pair(times_ten, wait), "b": Refusing(times_ten)}
    with pytest.raises(OddError):
        await pipe.ainvoke(1)

    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("path", PATHS)
def test_an_error_that_is_no_exception_ends_a_batch_with_return_exceptions(path: str) -> None:
    """`return_exceptions` returns exceptions; a `SystemExit` is none."""

    def leave(value: int) -> int:
        raise SystemExit(value)

    async def leave_async(value: int) -> int:
        raise asyncio.CancelledError(value)

    with pytest.raises((SystemExit, asyncio.CancelledError)):
        batch(path, Pair(leave, leave_async), [1, 2, 3], return_exceptions=True)


async def test_cancelling_abatch_cancels_the_calls_and_waits_for_them() -> None:
    """A cancelled `abatch` ends when its calls have ended, even if it is cancelled again meanwhile."""
    started = asyncio.Semaphore(0)
    may_end = asyncio.Event()
    ended: list[int] = []

    async def call(value: int) -> int:
        try:
            started.release()
            await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
        except asyncio.CancelledError:
            await may_end.wait()
            ended.append(value)
            raise
        return value

    running = asyncio.create_task(Pair(times_ten, call).abatch([1, 2, 3]))
    for _ in range(3):
        await started.acquire()
    running.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    running.cancel()
    for _ in range(5):
        await asyncio.sleep(0)

    assert not running.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(ended) == [1, 2, 3]
    assert len(asyncio.all_tasks()) == 1


async def test_leaving_the_loop_cancels_the_rest_a() -> None:
    """Breaking out of `abatch_as_completed` cancels the other calls, without a word to close it."""
    ended: list[int] = []
    cancelled = asyncio.Event()

    async def call(value: int) -> int:
        if value:
            try:
                await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
            except asyncio.CancelledError:
                ended.append(value)
                if len(ended) == 3:
                    cancelled.set()
                raise
        else:
            await asyncio.sleep(0)
        return value

    async for index, _ in Pair(times_ten, call).abatch_as_completed([0, 1, 2, 3]):
        assert index == 0
        break
    await asyncio.wait_for(cancelled.wait(), SAFETY_NET)
    await until(lambda: len(asyncio.all_tasks()) == 1)

    assert sorted(ended) == [1, 2, 3]


def test_leaving_the_loop_stops_the_rest() -> None:
    """Breaking out of `batch_as_completed` waits for the calls that run and starts no other."""
    seen = InFlight()

    def call(value: int) -> int:
        seen.enter()
        if value:
            left.wait(SAFETY_NET)
        seen.leave()
        return value

    left = threading.Event()
    for index, _ in (results := Pair(call).batch_as_completed(list(range(100)), {"max_concurrency": 2})):
        assert index == 0
        break
    closing = threading.Thread(target=results.close)  # type: ignore[attr-defined]
    closing.start()
    left.set()
    closing.join(SAFETY_NET)

    assert not closing.is_alive()
    assert seen.now == 0
    assert seen.started < 100


@pytest.mark.parametrize("run", [batch, completed])
def test_a_batch_has_no_more_threads_than_inputs(
    run: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they take to begin."""
    start, may_begin, started = ThreadPool.start, threading.Event(), 0

    def start_late(pool: ThreadPool, job: Callable[[], object]) -> None:
        nonlocal started
        started += 1
        if started == 2:
            threading.Timer(0.05, may_begin.set).start()
        start(pool, lambda: may_begin.wait(SAFETY_NET) and job())

    monkeypatch.setattr(ThreadPool, "start", start_late)

    assert len(run("sync", Pair(times_ten), [1, 2])) == 2
    assert started == 2


@pytest.mark.parametrize("run", [batch, completed])
def test_a_batch_for_which_there_is_no_thread_says_so(
    run: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one at least it goes on; with none nobody would end it."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    caught: list[BaseException] = []

    def call() -> None:
        try:
            run("sync", Pair(times_ten), [1, 2])
        except RuntimeError as error:
            caught.append(error)

    monkeypatch.setattr(ThreadPool, "start", refuse)
    running = threading.Thread(target=call, daemon=True)
    running.start()
    running.join(SAFETY_NET)

    assert [str(error) for error in caught] == ["can't start new thread"]


async def test_the_calls_go_on_while_the_loop_body_is_busy() -> None:
    """`abatch_as_completed` starts the next calls whether or not its caller asks for results."""
    seen, pair = rendezvous(2)

    async for _ in pair.abatch_as_completed(list(range(10)), {"max_concurrency": 2}):
        await until(lambda: seen.started == 10 and not seen.now)

    assert seen.peak == 2


def test_no_error_of_another_call_is_reported_when_one_is_raised(recwarn: pytest.WarningsRecorder) -> None:
    """Of two calls that fail together one is raised; the other is not "never retrieved"."""
    reports: list[Any] = []

    async def call(value: int) -> int:
        raise OddError(value)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
        with pytest.raises(OddError):
            await Pair(times_ten, call).abatch([1, 2, 3])

    asyncio.run(main())

    assert reports == []
    assert not recwarn.list


def same(document: object) -> object:
    """Return the document."""
    return document


async def same_async(document: object) -> object:
    """Return the document."""
    return document


def fail_in_batch(path: str, pair: Any, inputs: list[Document], bound: RunnableConfig) -> None:
    """Have the calls of a batch fail."""

    async def main() -> None:
        with suppress(OddError):  # here, for `asyncio.run` itself keeps what it raises
            await pair.abatch(inputs, bound)

    if path == "async":
        asyncio.run(main())
        return
    with suppress(OddError):
        pair.batch(inputs, bound)


def fail_as_completed(path: str, pair: Any, inputs: list[Document], bound: RunnableConfig) -> None:
    """Do the same with `batch_as_completed`."""

    async def main() -> None:
        with suppress(OddError):
            await anext(pair.abatch_as_completed(inputs, bound))

    if path == "async":
        asyncio.run(main())
        return
    with suppress(OddError):
        next(pair.batch_as_completed(inputs, bound))


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("shape", ["pair", "dict"])
@pytest.mark.parametrize("fail", [fail_in_batch, fail_as_completed])
@pytest.mark.parametrize("path", PATHS)
def test_a_batch_that_has_failed_lets_its_inputs_go(
    path: str, fail: Callable[[str, Any, list[Document], RunnableConfig], None], shape: str, size: int
) -> None:
    """Neither the error nor the cancellation of the others leaves them to a garbage collection."""
    runnable: Any = Pair(refuse, refuse_async)
    bound = RunnableConfig(max_concurrency=2)  # so that of nine some never start
    if shape == "dict":
        runnable = Pair(same, same_async) | {"one": runnable, "two": runnable}
    gone = threading.Event()
    inputs = [Document() for _ in range(size)]
    weakref.finalize(inputs[-1], gone.set)
    fail(path, runnable, inputs, bound)
    del inputs

    assert gone.wait(SAFETY_NET)  # a thread may still be on its way out


def in_batch(pair: Pair, document: Document) -> Any:
    """Run a pair in a batch."""
    return pair.abatch([document])


def in_dict(pair: Pair, document: Document) -> Any:
    """Run a pair in a dict."""
    return (Pair(same, same_async) | {"one": pair}).ainvoke(document)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("run", [in_batch, in_dict])
def test_what_is_cancelled_again_as_it_ends_lets_its_inputs_go(run: Callable[[Pair, Document], Any]) -> None:
    """The second cancellation, which is the one that is raised, leaves nothing to a garbage collection either."""
    has_begun, is_ending, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def end_slowly(document: object) -> None:
        has_begun.set()
        try:
            await asyncio.sleep(SAFETY_NET)
        finally:
            is_ending.set()
            await may_end.wait()

    async def main() -> weakref.ref[Document]:
        document = Document()
        gone = weakref.ref(document)
        running = asyncio.ensure_future(run(Pair(same, end_slowly), document))
        await has_begun.wait()
        running.cancel()
        await is_ending.wait()
        running.cancel()
        await asyncio.sleep(0)
        may_end.set()
        with suppress(asyncio.CancelledError):
            await running
        return gone

    assert asyncio.run(main())() is None


# --- configs, kwargs, contexts ---


class Runs(BaseCallbackHandler):
    """Remember the id and the tags of every run."""

    def __init__(self) -> None:
        self.ids: list[uuid.UUID] = []
        self.tags: list[list[str]] = []
        self.ended = 0

    def on_chain_start(self, *_: Any, run_id: uuid.UUID, tags: list[str] | None = None, **__: Any) -> None:
        self.ids.append(run_id)
        self.tags.append(tags or [])

    def on_chain_end(self, *_: Any, **__: Any) -> None:
        self.ended += 1


@pytest.mark.parametrize("run", [batch, completed])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [Dual, RunnableLambda])
def test_an_observed_batch_reports_each_run(kind: Any, path: str, run: Callable[..., list[Any]]) -> None:
    """A handler hears of the start and the end of each item, as with LangChain's own."""
    runs = Runs()

    run(path, kind(times_ten, times_ten_async), [1, 2, 3], {"callbacks": [runs], "tags": ["t"]})

    assert (len(set(runs.ids)), runs.ended, runs.tags) == (3, 3, [["t"]] * 3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [Dual, RunnableLambda])
def test_the_run_id_is_the_first_ones_alone(kind: Any, path: str) -> None:
    """A `run_id` for a whole batch goes to its first item, with LangChain's warning."""
    runs = Runs()
    run_id = uuid.uuid4()

    with pytest.warns(RuntimeWarning, match="run_id"):
        batch(path, kind(times_ten, times_ten_async), [1, 2, 3], {"callbacks": [runs], "run_id": run_id})

    assert runs.ids.count(run_id) == 1
    assert len(set(runs.ids)) == 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [Dual, RunnableLambda])
def test_the_run_id_is_the_first_ones_alone_unobserved(kind: Any, path: str) -> None:
    """Where nobody watches, it is what the first item hands down."""
    run_id = uuid.uuid4()

    def parent(_: int) -> Any:
        return ensure_config()["callbacks"].parent_run_id  # type: ignore[union-attr]

    async def parent_async(value: int) -> Any:
        return parent(value)

    with pytest.warns(RuntimeWarning, match="run_id"):
        found = batch(path, kind(parent, parent_async), range(3), {"run_id": run_id})

    assert found[0] == run_id
    assert len(set(found)) == 3


def tags_of(_: int, config: RunnableConfig) -> tuple[str, ...]:
    """Return the tags that this run has."""
    return tuple(config["tags"])


async def tags_of_async(_: int, config: RunnableConfig) -> tuple[str, ...]:
    """Do the same on the other path."""
    return tuple(config["tags"])


@pytest.mark.parametrize("run", [batch, completed])
@pytest.mark.parametrize("path", PATHS)
def test_each_item_has_its_own_config_of_a_list(path: str, run: Callable[..., list[Any]]) -> None:
    """A list of configs gives one to each input, in order."""
    configs = [{"tags": [str(number)]} for number in range(5)]

    found = run(path, Pair(tags_of, tags_of_async), range(5), configs)

    expected = [(str(number),) for number in range(5)]
    assert sorted(found) == (expected if run is batch else list(enumerate(expected)))


@pytest.mark.parametrize("run", [batch, completed])
@pytest.mark.parametrize("path", PATHS)
def test_a_config_that_keeps_an_input_from_being_started_is_its_failure(path: str, run: Callable[..., Any]) -> None:
    """The others go on, as they do in a batch of LangChain's."""
    unreadable: Any = {"metadata": ["a list"]}
    configs: list[RunnableConfig] = [{}, unreadable, {}]

    found = run(path, Pair(times_ten, times_ten_async), [1, 2, 3], configs, return_exceptions=True)
    outputs = found if run is batch else [output for _, output in sorted(found, key=itemgetter(0))]

    assert [outputs[0], type(outputs[1]), outputs[2]] == [10, TypeError, 30]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("configs", [1, 3])
def test_a_list_of_configs_of_another_length_is_refused(path: str, configs: int) -> None:
    """Two inputs need two configs or a single one that is no list."""
    with pytest.raises(ValueError, match="same length"):
        batch(path, Pair(times_ten, times_ten_async), [1, 2], [{}] * configs)


@pytest.mark.parametrize("path", PATHS)
def test_an_observed_item_among_unobserved_ones_is_reported(path: str) -> None:
    """Of a list of configs one has a handler, which hears of that item alone."""
    runs = Runs()

    batch(path, Pair(times_ten, times_ten_async), [1, 2, 3], [{}, {"callbacks": [runs]}, {}])

    assert len(runs.ids) == 1


@pytest.mark.parametrize("path", PATHS)
def test_kwargs_go_to_the_function(path: str) -> None:
    """What a batch is given besides goes to every call."""

    def add(value: int, more: int = 0) -> int:
        return value + more

    async def add_async(value: int, more: int = 0) -> int:
        return value + more

    assert batch(path, Pair(add, add_async), [1, 2], more=10) == [11, 12]
    assert sorted(completed(path, Pair(add, add_async), [1, 2], more=10)) == [(0, 11), (1, 12)]


seen_by_caller: ContextVar[str] = ContextVar("seen_by_caller", default="nobody")


@pytest.mark.parametrize("path", PATHS)
def test_each_item_has_a_context_of_its_own(path: str) -> None:
    """An item sees the caller's context variables, and what it sets there nobody else sees."""

    def read_and_write(value: int) -> str:
        before = seen_by_caller.get()
        seen_by_caller.set(f"item {value}")
        return before

    async def read_and_write_async(value: int) -> str:
        return read_and_write(value)

    token = seen_by_caller.set("caller")
    try:
        found = batch(path, Pair(read_and_write, read_and_write_async), range(10), {"max_concurrency": 1})
        after = seen_by_caller.get()
    finally:
        seen_by_caller.reset(token)

    assert found == ["caller"] * 10
    assert after == "caller"


@pytest.mark.parametrize("path", PATHS)
def test_items_share_nothing_that_can_change(path: str) -> None:
    """What a function does to its config is not seen by the next item."""

    def spoil(value: int, config: RunnableConfig) -> tuple[Any, ...]:
        manager: Any = config["callbacks"]
        lists = (list(config["tags"]), list(manager.tags))
        dicts = (dict(config["metadata"]), dict(manager.metadata), dict(config["configurable"]))
        config["tags"].append(str(value))
        config["metadata"][str(value)] = value
        config["configurable"][str(value)] = value
        manager.add_tags([str(value)])
        manager.add_metadata({str(value): value})
        return *lists, *dicts

    async def spoil_async(value: int, config: RunnableConfig) -> tuple[Any, ...]:
        return spoil(value, config)

    shared: RunnableConfig = {
        "tags": ["t"],
        "metadata": {"m": 1},
        "configurable": {"c": 1},
        "max_concurrency": 1,
    }
    found = batch(path, Pair(spoil, spoil_async), range(3), shared)

    assert found == [(["t"], ["t"], {"m": 1}, {"m": 1}, {"c": 1})] * 3


@pytest.mark.parametrize("path", PATHS)
def test_each_item_is_a_run_of_its_own_to_what_runs_inside(path: str) -> None:
    """The parent's run id that nested runnables see differs from item to item and stays within one."""

    def parent(_: int) -> tuple[Any, Any]:
        manager: Any = ensure_config()["callbacks"]
        return manager.parent_run_id, manager.parent_run_id

    async def parent_async(value: int) -> tuple[Any, Any]:
        return parent(value)

    found = batch(path, Pair(parent, parent_async), range(3))

    assert len({first for first, _ in found}) == 3
    assert all(first == second and isinstance(first, uuid.UUID) for first, second in found)


@pytest.fixture
def pair() -> Pair:
    """Return a pair that can be overridden."""
    return Pair(times_ten, times_ten_async)


@pytest.mark.parametrize("path", PATHS)
def test_a_fake_stands_in_a_batch(path: str, pair: Pair) -> None:
    """A batch runs the fake while there is one."""
    with registry.override(pair, lambda value: -value):
        found = batch(path, pair, [1, 2, 3])

    assert found == [-1, -2, -3]
    assert batch(path, pair, [1, 2, 3]) == [10, 20, 30]


@pytest.mark.parametrize("path", PATHS)
def test_a_returned_runnable_runs(path: str) -> None:
    """As on a single call, a runnable that the function returns is run on the same input."""
    inner = Pair(times_ten, times_ten_async)

    async def choose(_: int) -> Any:
        return inner

    assert batch(path, Pair(lambda _: inner, choose), [1, 2]) == [10, 20]


@pytest.mark.parametrize("path", PATHS)
def test_generators_fold_in_a_batch(path: str) -> None:
    """A generator's chunks add up to its output, for each input."""

    def count(value: int) -> Iterator[int]:
        yield from range(value)

    async def count_async(value: int) -> Any:
        for number in range(value):
            yield number

    assert batch(path, Pair(count, count_async), [3, 5]) == [3, 10]


def test_a_side_made_from_the_other_runs_a_batch() -> None:
    """An async-only pair has `batch`, a sync-only one has `abatch`."""
    assert batch("sync", Pair(times_ten_async), [1, 2]) == [10, 20]
    assert batch("async", Pair(times_ten), [1, 2]) == [10, 20]


async def test_map_runs_a_batch() -> None:
    """`pair.map()` goes over a list by the pair's own batch."""
    mapped = Pair(times_ten, times_ten_async).map()

    assert mapped.invoke([1, 2]) == [10, 20]
    assert await mapped.ainvoke([1, 2]) == [10, 20]


# --- pipes of pairs ---


async def test_an_input_goes_on_in_a_pipe_without_waiting_for_the_others_a() -> None:
    """The second step of one input runs while the first step of another still does."""
    second_step_ran = asyncio.Event()

    async def first(value: int) -> int:
        if value:
            await asyncio.wait_for(second_step_ran.wait(), SAFETY_NET)
        return value

    async def second(value: int) -> int:
        second_step_ran.set()
        return value * 10

    pipe: Runnable[Any, Any] = Pair(times_ten, first) | Pair(times_ten, second)

    assert await pipe.abatch([0, 1, 2]) == [0, 10, 20]


def test_an_input_goes_on_in_a_pipe_without_waiting_for_the_others() -> None:
    """The same for the sync sides, in threads."""
    second_step_ran = threading.Event()

    def first(value: int) -> int:
        if value:
            assert second_step_ran.wait(SAFETY_NET)
        return value

    def second(value: int) -> int:
        second_step_ran.set()
        return value * 10

    pipe: Runnable[Any, Any] = Pair(first) | Pair(second)

    assert pipe.batch([0, 1, 2], {"max_concurrency": 2}) == [0, 10, 20]


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None)
@given(inputs=numbers, bound=bounds)
def test_a_batch_of_a_pipe_gives_what_the_loop_gives(path: str, inputs: list[int], bound: int | None) -> None:
    """Outputs and errors stand in the order of the inputs, whichever step they come from."""
    pipe: Runnable[Any, Any] = (
        Pair(times_ten, times_ten_async) | Pair(a_tenth, a_tenth_async) | Pair(steps, steps_async)
    )

    assert batch(path, pipe, inputs, config_of(bound), return_exceptions=True) == obvious(inputs)


@pytest.mark.parametrize("path", PATHS)
def test_an_observed_batch_of_a_pipe_reports_the_pipe_and_its_steps(path: str) -> None:
    """A handler hears of three runs for each input: the pipe's and two steps'."""
    runs = Runs()
    pipe: Runnable[Any, Any] = Pair(times_ten, times_ten_async) | Pair(times_ten, times_ten_async)

    assert batch(path, pipe, [1, 2], {"callbacks": [runs]}) == [100, 200]
    assert (len(set(runs.ids)), runs.ended) == (6, 6)


async def test_a_batch_of_a_pipe_makes_tasks_as_slots_come_free() -> None:
    """With a limit on every step, the inputs in flight are about as many as the limits together admit."""
    seen = InFlight()

    async def watched(value: int) -> int:
        seen.enter()
        await asyncio.sleep(0)
        seen.leave()
        return value

    def half() -> Any:
        return concurrency(limit=3)(Pair(times_ten, watched))

    alive: list[int] = []

    async def count(value: int) -> int:
        alive.append(len(asyncio.all_tasks()))
        return value

    await (half() | half() | concurrency(limit=1)(Pair(times_ten, count))).abatch(list(range(300)))

    assert max(alive) <= 2 * (2 * 7) + 2
    assert seen.peak <= 6
