"""What waits for a limiter when a batch, a stream or a dict ends is called off, and is never run."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import Runnable

from asyncify import Dual, Limiter, concurrency, dual, each
from asyncify.permits import Permit
from asyncify.scopes import CancelScope, get_scope
from asyncify.testing import FakeClock
from tests.waiting import SAFETY_NET, until


class RefusalError(Exception):
    """What the call raises that was admitted."""


class Calls:
    """Counts calls; the first waits until others wait for the limiter, and is refused then."""

    def __init__(self, limiter: Limiter, waiting: int) -> None:
        self.limiter = limiter
        self.waiting = waiting
        self.made: list[Any] = []

    def __call__(self, value: Any) -> Any:
        self.made.append(value)
        self.wait_for_others()
        raise RefusalError

    def wait_for_others(self) -> None:
        """Wait until so many others wait."""
        for _ in range(SAFETY_NET * 1000):
            if self.limiter.stats().waiting >= self.waiting:
                return
            threading.Event().wait(0.001)
        pytest.fail("nobody waits")


@pytest.fixture
def limiter(clock: FakeClock) -> Limiter:
    """A limiter that admits one call, and never another, as its clock stands still."""
    return Limiter(per_minute=1, clock=clock)


@pytest.fixture(params=["native", "bridged"])
def refused(request: pytest.FixtureRequest, limiter: Limiter) -> tuple[Any, Calls]:
    """Return a pair whose calls are counted, and its calls: on its sync side, or on an async one by the loop."""
    calls = Calls(limiter, waiting=2)

    def fetch(value: Any) -> Any:
        return calls(value)

    async def fetch_async(value: Any) -> Any:
        return await asyncio.to_thread(calls, value)

    fn: Any = fetch if request.param == "native" else fetch_async
    return concurrency(limiter=limiter)(Dual(fn)), calls


def first_alone(pair: Any) -> Iterator[int]:
    """Yield an input, and others when it has been admitted: an error of theirs is raised behind its result only."""
    yield 1
    while not pair.limiter.stats().admitted:
        threading.Event().wait(0.001)
    yield from (2, 3)


RUNS: dict[str, Callable[[Runnable[Any, Any]], object]] = {
    "batch": lambda pair: pair.batch([1, 2, 3]),
    "batch with configs": lambda pair: pair.batch([1, 2, 3], [{}, {}, {}]),
    "as completed": lambda pair: list(pair.batch_as_completed([1, 2, 3])),
    "each": lambda pair: list(each(pair, first_alone(pair))),
    "each, as completed": lambda pair: list(each(pair, [1, 2, 3], ordered=False)),
    "dict": lambda pair: ({"a": pair, "b": pair, "c": pair} | pair).invoke(1),
    "stream of a dict": lambda pair: list(({"a": pair, "b": pair, "c": pair} | pair).stream(1)),
}


def run_with_timeout(run: Callable[[], object]) -> None:
    """Run in a thread of its own, so that a wait that is not called off is a failure and does not hang."""
    outcome: list[BaseException | None] = []

    def attempt() -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001  (it is raised where it is awaited)
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(attempt,), daemon=True)
    thread.start()
    thread.join(SAFETY_NET)
    assert outcome, "it still waits"
    if outcome[0] is not None:
        raise outcome[0]


class TestAnError:
    @pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
    def test_ends_the_waits_of_the_others(
        self, run: Callable[[Any], object], refused: tuple[Any, Calls], limiter: Limiter
    ) -> None:
        """It comes at once, the others never run, and the limiter has nobody waiting."""
        pair, calls = refused
        with pytest.raises(RefusalError):
            run_with_timeout(lambda: run(pair))

        assert len(calls.made) == 1
        assert (limiter.stats().waiting, limiter.stats().rejected) == (0, 0)

    @pytest.mark.parametrize(("inside", "waiting"), [("batch", 4), ("loop", 2)])
    def test_ends_the_waits_of_what_an_item_runs(self, inside: str, waiting: int, limiter: Limiter) -> None:
        """An item may run a batch itself, or an event loop of its own, whose calls wait."""
        calls = Calls(limiter, waiting)
        fetch = concurrency(limiter=limiter)(Dual(calls.made.append))

        def work(value: int) -> None:
            if not value:
                calls.wait_for_others()
                raise RefusalError
            if inside == "batch":
                fetch.batch([1, 2, 3])
            else:
                asyncio.run(pass_through())

        async def pass_through() -> None:
            async with limiter:
                calls.made.append("admitted")

        limiter.acquire()
        with pytest.raises(RefusalError):
            run_with_timeout(lambda: Dual(work).batch([0, 1, 2]))

        assert calls.made == []
        assert limiter.stats().waiting == 0

    def test_leaves_calls_that_run_alone(self, clock: FakeClock) -> None:
        """A call that was admitted is waited for, and ends as if nothing had been."""
        limiter = Limiter(per_minute=2, burst=2, clock=clock)
        calls, ended = Calls(limiter, waiting=1), list[int]()
        admitted: list[int] = []  # whichever these are, as threads race
        failed = threading.Event()

        def fetch(value: int) -> None:
            admitted.append(value)
            if value == admitted[0]:
                calls.wait_for_others()
                failed.set()
                raise RefusalError
            failed.wait(SAFETY_NET)
            ended.append(value)

        with pytest.raises(RefusalError):
            run_with_timeout(lambda: concurrency(limiter=limiter)(Dual(fetch)).batch([0, 1, 2]))

        assert len(admitted) == 2
        assert ended == admitted[1:]
        assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)


class TestLeaving:
    @pytest.mark.parametrize("path", ["batch_as_completed", "each"])
    def test_ends_the_waits_of_the_others(self, path: str, limiter: Limiter) -> None:
        """Who breaks out of the loop waits for nobody who waits."""
        made: list[int] = []
        fetch = concurrency(limiter=limiter)(Dual(made.append))

        def first() -> None:
            results: Any = (
                fetch.batch_as_completed([1, 2, 3])
                if path == "batch_as_completed"
                else each(fetch, [1, 2, 3], ordered=False)
            )
            with closing(results):
                next(results)

        run_with_timeout(first)

        assert len(made) == 1
        assert limiter.stats().waiting == 0

    def test_an_interrupt_ends_the_waits_of_all(self, limiter: Limiter) -> None:
        """Ctrl-C in the thread that waits for the batch ends it, though no call has come to an end."""
        calls = Calls(limiter, waiting=2)
        fetch = concurrency(limiter=limiter)(Dual(calls.made.append))
        limiter.acquire()

        class Source(list[int]):
            def __iter__(self) -> Generator[int]:
                yield from (1, 2)
                calls.wait_for_others()
                raise KeyboardInterrupt

        def interrupted() -> None:
            list(each(fetch, iter(Source()), window=9))

        with pytest.raises(KeyboardInterrupt):
            run_with_timeout(interrupted)

        assert calls.made == []
        assert limiter.stats().waiting == 0

    def test_a_stream_of_a_dict_ends_the_waits_of_its_branches(self) -> None:
        """A branch that waits for the slot of another ends with the reader."""
        limiter = Limiter(limit=1)

        def chunks(value: int) -> Generator[int]:
            yield value
            yield value

        pair = concurrency(limiter=limiter)(Dual(chunks))
        pipe: Any = {"a": pair, "b": pair} | pair

        def first() -> None:
            with closing(pipe.first.stream(1)) as stream:
                next(stream)

        run_with_timeout(first)

        assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)


def test_the_error_of_a_dict_is_that_of_its_first_branch_that_fails() -> None:
    """Whichever fails first, and as it is where somebody watches."""
    failed = threading.Event()

    def slow(value: int) -> int:
        failed.wait(SAFETY_NET)
        raise ValueError(value)

    def quick(value: int) -> int:
        failed.set()
        raise KeyError(value)

    pipe = {"a": dual(slow), "b": dual(quick)} | dual(str)
    for config in ({}, {"callbacks": [BaseCallbackHandler()]}):
        with pytest.raises(ValueError, match="1"):
            pipe.invoke(1, config)  # type: ignore[arg-type]
        failed.clear()


class LeftBehind:
    """A thread that an item starts and leaves running, in its own context: it waits for a limiter when it may."""

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self.go_on = threading.Event()
        self.ends: list[str] = []

    def start(self) -> None:
        """Start it, in a copy of this context."""
        self.thread = threading.Thread(target=contextvars.copy_context().run, args=(self.report,))
        self.thread.start()

    def report(self) -> None:
        """Note how the wait ends."""
        self.go_on.wait(SAFETY_NET)
        try:
            with self.limiter:
                self.ends.append("in")
        except asyncio.CancelledError:
            self.ends.append("called off")

    def wait_until_it_waits(self) -> None:
        """Let it wait for the limiter, and return when it does."""
        self.go_on.set()
        while not self.limiter.stats().waiting and not self.ends:
            self.thread.join(0.001)


class TestWhatIsLeftRunning:
    def test_a_wait_under_way_outlives_a_batch_that_ends_well(self) -> None:
        """Nothing is in the way of its end."""
        left = LeftBehind(Limiter(limit=1))

        def work(value: int) -> None:
            if value == 0:
                left.start()
                left.wait_until_it_waits()

        holder = left.limiter.enter()
        Dual(work).batch([0, 1, 2])
        holder.leave()
        left.thread.join(SAFETY_NET)

        assert left.ends == ["in"]

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_wait_that_begins_later_is_its_own(self, *, fails: bool) -> None:
        """However the batch has ended: it knows nothing of it."""
        left = LeftBehind(Limiter(limit=1))

        def work(value: int) -> None:
            if value == 0:
                left.start()
                if fails:
                    raise RefusalError

        holder = left.limiter.enter()
        with pytest.raises(RefusalError) if fails else nullcontext():
            Dual(work).batch([0, 1, 2])
        left.wait_until_it_waits()
        holder.leave()
        left.thread.join(SAFETY_NET)

        assert left.ends == ["in"]

    @pytest.mark.parametrize("alive", [[None], [[], []]], ids=["one input", "two inputs"])
    def test_a_batch_leaves_no_scope_in_a_context(self, alive: list[Any]) -> None:
        """Or rounds of batches, each started by the one before, would be in all of theirs; one input needs none."""
        scopes: list[CancelScope | None] = []
        Dual(lambda value: scopes.append(get_scope())).batch(alive)

        assert [None if scope is None else list(scope._alive()) for scope in scopes] == alive


class Refusable:
    """A wait that notes that it is called off."""

    is_called_off = False

    def call_off(self) -> None:
        """Give up."""
        self.is_called_off = True


def nested(depth: int) -> list[CancelScope]:
    """Return scopes that lie in each other, the outermost first."""
    scopes: list[CancelScope] = []

    def make() -> None:
        for _ in range(depth):
            scopes.append(CancelScope())
            scopes[-1].enter()

    contextvars.Context().run(make)
    return scopes


class TestScope:
    def test_a_wait_in_a_scope_that_has_ended_does_not_begin(self, limiter: Limiter) -> None:
        """A thread that comes late is told so at once, and leaves nothing in the queue."""
        scope = CancelScope()
        context = contextvars.Context()
        context.run(scope.enter)
        limiter.acquire()
        scope.cancel()
        with pytest.raises(asyncio.CancelledError, match="has ended while it waited"):
            context.run(limiter.enter)

        assert (limiter.stats().waiting, limiter.stats().in_flight) == (0, 0)

    @pytest.mark.parametrize("path", ["thread", "task"])
    async def test_a_wait_in_a_scope_that_ends_is_told_so(self, path: str, limiter: Limiter) -> None:
        """It raises what a wait raises that comes late."""
        scope = CancelScope()
        context = contextvars.Context()
        context.run(scope.enter)
        limiter.acquire()
        if path == "thread":
            waiter = asyncio.create_task(asyncio.to_thread(context.run, limiter.enter))
        else:
            waiter = asyncio.create_task(limiter.aenter(), context=context)
        await until(lambda: limiter.stats().waiting == 1)
        scope.cancel()
        with pytest.raises(asyncio.CancelledError, match="has ended while it waited"):
            await waiter

        assert limiter.stats().waiting == 0

    def test_who_is_called_off_is_out_of_the_queue_at_once(self) -> None:
        """A slot that comes free before its thread has heard of it goes to somebody else."""
        limiter = Limiter(limit=1)
        holder = limiter.enter()
        waits = [Permit().ask(limiter, 1, 1) for _ in range(2)]
        scope = CancelScope()
        for permit in waits:
            assert not limiter._admit(permit)
        assert scope.watch(waits[0])
        scope.cancel()
        holder.leave()

        assert [permit.at is None for permit in waits] == [True, False]
        assert (limiter.stats().in_flight, limiter.stats().waiting) == (1, 0)

    def test_a_chain_of_scopes_keeps_none_that_has_ended(self) -> None:
        """A task whose batch starts the next task, and so on, has the scopes of all before in its context."""
        scope = CancelScope()

        def go_on() -> CancelScope:
            scope.enter()
            return CancelScope()

        for _ in range(3000):
            following = contextvars.copy_context().run(go_on)
            scope.end()
            scope = following
        assert scope.watch(Permit().ask(Limiter(limit=1), 1, 1))

        assert len(list(scope._alive())) == 1
        assert scope._outer is None

    @pytest.mark.parametrize("cancelled", [0, 1, 2])
    def test_a_wait_is_in_all_scopes_around_it(self, cancelled: int) -> None:
        """Whichever of them is cancelled, before it begins or while it lasts."""
        scopes = nested(3)
        before, later = Refusable(), Refusable()
        assert scopes[-1].watch(before)
        scopes[cancelled].cancel()

        assert before.is_called_off
        assert not scopes[-1].watch(later)

    def test_one_that_has_ended_hides_none_around_it(self) -> None:
        """A batch has ended whose item has left a thread running, in a batch that goes on."""
        outer, ended, inner = nested(3)
        ended.end()
        wait = Refusable()
        assert inner.watch(wait)
        outer.cancel()

        assert wait.is_called_off

    def test_waits_that_are_over_are_forgotten(self) -> None:
        """A batch of a million keeps none of them."""
        scope = CancelScope()
        for _ in range(100):
            assert scope.watch(Refusable())

        assert not scope._waits

    def test_who_is_admitted_meanwhile_keeps_the_books_right(self) -> None:
        """Calls that are admitted and called off in the same moment either run or give their slots back."""
        for _ in range(200):
            limiter = Limiter(limit=1)
            holder = contextvars.Context().run(limiter.enter)
            scope = CancelScope()
            ends: list[str] = []

            def wait(limiter: Limiter = limiter, scope: CancelScope = scope, ends: list[str] = ends) -> None:
                scope.enter()
                try:
                    with limiter:
                        ends.append("in")
                except asyncio.CancelledError:
                    ends.append("off")

            threads = [threading.Thread(target=contextvars.Context().run, args=(wait,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            threads.append(threading.Thread(target=holder.end))
            threads[-1].start()
            scope.cancel()
            for thread in threads:
                thread.join(SAFETY_NET)

            assert len(ends) == 3
            assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)
