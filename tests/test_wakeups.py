"""Tasks of a loop that are woken, many by one callback: in order, none twice, none lost, and all else gets its turn."""

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from itertools import pairwise
from textwrap import dedent
from typing import Any, cast

import pytest
import uvloop

from asyncify import Limiter
from asyncify.wakeups import Wakeups, wakeups_of
from tests.interrupts import At, interrupt
from tests.waiting import SAFETY_NET, run_program, until

Future = asyncio.Future[None]
MakeTask = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


def future() -> Future:
    """Make one of the running loop."""
    return asyncio.get_running_loop().create_future()


class Sleeper:
    """Who waits by a future."""

    def __init__(self, ready: Future) -> None:
        self.ready: Future | None = ready
        self.has_given_up = False

    def give_up(self) -> None:
        self.has_given_up = True


def rouse(wakeups: Wakeups, *sleepers: Sleeper) -> None:
    """Wake them in a loop, from any thread."""
    for sleeper in sleepers:
        wakeups.woken.append(sleeper)
        wakeups.ask_for_round()


def wake(*awaited: Future) -> None:
    """Wake who awaits them, in the running loop."""
    rouse(wakeups_of(asyncio.get_running_loop()), *map(Sleeper, awaited))


class Queue:
    """Calls that wait for one slot, of which each lets the next one in."""

    def __init__(self) -> None:
        self.limiter = Limiter(limit=1)
        self.passed: list[int] = []

    async def call(self, number: int) -> None:
        async with self.limiter:
            self.passed.append(number)

    async def start(self, length: int, make_task: MakeTask = asyncio.create_task) -> Sequence[asyncio.Task[None]]:
        """Let so many calls come, and then the first of them in."""
        async with self.limiter:
            tasks = [make_task(self.call(number)) for number in range(length)]
            await asyncio.sleep(0)
        return tasks

    async def run(self, length: int, make_task: MakeTask = asyncio.create_task) -> None:
        """Let so many calls come and go."""
        await asyncio.wait_for(asyncio.gather(*await self.start(length, make_task)), SAFETY_NET)


class Crowd:
    """Tasks that each await a future, and note that they go on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *acts: Callable[[], object] | None) -> None:
        self.went_on: list[int] = []
        self.futures: list[Future] = [loop.create_future() for _ in acts]
        self.tasks = [
            loop.create_task(self._wait(number, awaited, act))
            for number, (awaited, act) in enumerate(zip(self.futures, acts, strict=True))
        ]

    async def _wait(self, number: int, awaited: Awaitable[None], act: Callable[[], object] | None) -> None:
        await awaited
        self.went_on.append(number)
        if act is not None:
            act()

    async def end(self) -> list[str]:
        """Wait for all, and tell how they ended."""
        ends = await asyncio.wait_for(asyncio.gather(*self.tasks, return_exceptions=True), SAFETY_NET)
        return [type(end).__name__ for end in ends]

    def abandon(self) -> None:
        """Let tasks go whose loop will never run again."""
        for task in self.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # they are meant to be
            cast("Coroutine[Any, Any, None]", task.get_coro()).close()


@pytest.fixture(autouse=True)
async def nothing_goes_wrong() -> AsyncIterator[None]:
    """No callback of the loop fails, unless a test takes the errors itself."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
    yield
    assert told == []


class TestGoingOn:
    async def test_once_and_in_its_context(self) -> None:
        """A task that goes on is the running task, and sees its own variables."""
        variable = contextvars.ContextVar("variable", default="outside")
        seen: list[object] = []

        async def wait(name: str, awaited: Future) -> None:
            variable.set(name)
            await awaited
            seen.append((name, variable.get(), asyncio.current_task() is tasks[name]))

        futures = {name: future() for name in "abc"}
        tasks = {name: asyncio.create_task(wait(name, awaited)) for name, awaited in futures.items()}
        await asyncio.sleep(0)
        wake(*futures.values())
        await asyncio.gather(*tasks.values())

        assert seen == [(name, name, True) for name in "abc"]
        assert variable.get() == "outside"

    async def test_not_within_the_call_that_wakes_it(self) -> None:
        """Who wakes a task goes on first."""
        crowd = Crowd(asyncio.get_running_loop(), None)
        await asyncio.sleep(0)
        wake(*crowd.futures)

        assert crowd.went_on == []
        await crowd.end()
        assert crowd.went_on == [0]

    async def test_first_woken_first_on(self) -> None:
        """Who is woken by one that goes on does so behind all that were woken before."""
        crowd = Crowd(asyncio.get_running_loop(), lambda: wake(*crowd.futures[3:]), None, None, None, None)
        await asyncio.sleep(0)
        wake(*crowd.futures[:2])
        wake(crowd.futures[2])
        await crowd.end()

        assert crowd.went_on == [0, 1, 2, 3, 4]

    async def test_woken_by_another_thread(self) -> None:
        """It keeps the order in which they were woken, wherever that was."""
        crowd = Crowd(asyncio.get_running_loop(), *[None] * 6)
        wakeups = wakeups_of(asyncio.get_running_loop())
        await asyncio.sleep(0)
        for awaited in crowd.futures:
            if len(wakeups.woken) % 2:
                wake(awaited)
            else:
                thread = threading.Thread(target=rouse, args=(wakeups, Sleeper(awaited)))
                thread.start()
                thread.join()
        await crowd.end()

        assert crowd.went_on == [0, 1, 2, 3, 4, 5]

    async def test_a_sleeping_loop_is_woken_by_another_thread(self) -> None:
        """The thread that wakes a task has its loop look, each time anew."""
        wakeups = wakeups_of(asyncio.get_running_loop())
        for _ in range(50):
            awaited = future()
            thread = threading.Thread(target=rouse, args=(wakeups, Sleeper(awaited)))
            thread.start()
            await asyncio.wait_for(awaited, SAFETY_NET)
            thread.join()

    async def test_nobody_awaits_it_yet(self) -> None:
        """The future is done then when somebody does."""
        awaited = future()
        wake(awaited)
        await asyncio.sleep(0)

        assert awaited.done()
        await awaited

    async def test_woken_twice(self) -> None:
        """The second time changes nothing, before it goes on and after."""
        crowd = Crowd(asyncio.get_running_loop(), lambda: wake(crowd.futures[0]))
        await asyncio.sleep(0)
        wake(*crowd.futures * 2)
        await crowd.end()
        await asyncio.sleep(0)

        assert crowd.went_on == [0]

    async def test_several_await_it(self) -> None:
        """All of them go on."""
        awaited = future()

        async def wait() -> str:
            await awaited
            return "went on"

        tasks = [asyncio.create_task(wait()) for _ in range(3)]
        await asyncio.sleep(0)
        wake(awaited)

        assert await asyncio.gather(*tasks) == ["went on"] * 3

    async def test_cancelled_between_being_woken_and_going_on(self) -> None:
        """It is cancelled, and those behind it go on."""
        crowd = Crowd(asyncio.get_running_loop(), None, None, None)
        await asyncio.sleep(0)
        wake(*crowd.futures)
        crowd.tasks[1].cancel()

        assert await crowd.end() == ["NoneType", "CancelledError", "NoneType"]
        assert crowd.went_on == [0, 2]

    async def test_cancelled_by_a_task_that_goes_on_before_it(self) -> None:
        """It was woken already, and does not go on twice."""

        def cancel_next() -> None:
            crowd.tasks[1].cancel()

        crowd = Crowd(asyncio.get_running_loop(), cancel_next, None, None)
        await asyncio.sleep(0)
        wake(*crowd.futures)

        assert await crowd.end() == ["NoneType", "CancelledError", "NoneType"]
        assert crowd.went_on == [0, 2]

    @pytest.mark.parametrize("kind", ["_CTask", "_PyTask"])
    async def test_tasks_in_c_and_in_python(self, kind: str) -> None:
        """A task factory may make either."""
        make: Callable[..., asyncio.Task[None]] = getattr(asyncio.tasks, kind)
        queue = Queue()
        await queue.run(5, lambda coroutine: make(coroutine, loop=asyncio.get_running_loop()))

        assert queue.passed == [0, 1, 2, 3, 4]


class TestTurns:
    async def test_tasks_that_wake_each_other_share_a_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A queue for one slot takes no turn of the loop for each, as long as there is time."""
        monkeypatch.setattr("asyncify.wakeups.monotonic", lambda: 0.0)
        queue = Queue()
        tasks = await queue.start(500)
        await asyncio.sleep(0)

        assert queue.passed == list(range(500))
        await asyncio.gather(*tasks)

    async def test_all_else_gets_its_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the time is up, the rest waits until the loop has done what else it has to do."""
        times = iter(range(1_000_000))
        monkeypatch.setattr("asyncify.wakeups.monotonic", lambda: next(times) / 4000)  # four to a millisecond
        queue = Queue()
        tasks = await queue.start(100)
        seen = [len(queue.passed)]
        while seen[-1] < 100:
            await asyncio.sleep(0)
            seen.append(len(queue.passed))
        await asyncio.gather(*tasks)

        passed = [after - before for before, after in pairwise(seen)]
        assert {*passed[:-1]} <= {3, 4, 5}
        assert queue.passed == list(range(100))

    async def test_all_that_were_woken_before_go_on_in_one_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As they would by callbacks of their own, however long that takes."""
        times = iter(range(1_000_000))
        monkeypatch.setattr("asyncify.wakeups.monotonic", lambda: float(next(times)))
        crowd = Crowd(asyncio.get_running_loop(), lambda: wake(crowd.futures[-1]), *[None] * 100)
        await asyncio.sleep(0)
        wake(*crowd.futures[:-1])
        await asyncio.sleep(0)

        assert crowd.went_on == list(range(100))
        await crowd.end()

    async def test_a_callback_for_all_that_are_woken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The loop is asked for one, by this thread and by others."""
        loop = asyncio.get_running_loop()
        asked: list[str] = []
        for name in ("call_soon", "call_soon_threadsafe"):
            real = getattr(loop, name)

            def note(callback: Any, *args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
                if "_round" in repr(args):
                    asked.append(name)
                return real(callback, *args, **kwargs)

            monkeypatch.setattr(loop, name, note)
        crowd = Crowd(loop, *[None] * 20)
        await asyncio.sleep(0)
        wakeups = wakeups_of(loop)
        early = [Sleeper(awaited) for awaited in crowd.futures[:10]]
        thread = threading.Thread(target=rouse, args=(wakeups, *early))
        thread.start()
        thread.join()
        wake(*crowd.futures[10:])
        await asyncio.sleep(0)

        # the one that was asked for, and one for those who are left when the first of them goes on
        assert asked == ["call_soon_threadsafe", "call_soon"]
        await crowd.end()


class TestErrors:
    async def test_a_callback_that_fails_stops_nobody(self) -> None:
        """The loop is told of its error, as of any callback's."""
        told: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: told.append(what["exception"]))
        error = ValueError("by the callback")
        failing = future()

        def fail(_: Future) -> None:
            raise error

        failing.add_done_callback(fail)
        crowd = Crowd(loop, None, None)
        await asyncio.sleep(0)
        wake(failing, *crowd.futures)
        await crowd.end()

        assert told == [error]

    def test_a_task_that_ends_the_program_stops_nobody(self) -> None:
        """Its error comes out of the loop; when that is run again, the others go on."""
        loop = asyncio.new_event_loop()
        crowd = Crowd(loop, lambda: wake(crowd.futures[3]), interrupt, None, None)
        loop.run_until_complete(asyncio.sleep(0))
        loop.call_soon(lambda: wake(*crowd.futures[:3]))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.sleep(SAFETY_NET))
        loop.run_until_complete(asyncio.wait(crowd.tasks, timeout=SAFETY_NET))
        with pytest.raises(KeyboardInterrupt):
            crowd.tasks[1].result()
        loop.close()

        assert crowd.went_on == [0, 1, 2, 3]

    def test_interrupted_anywhere(self) -> None:
        """Wherever an interrupt comes, it takes one wake with it at most, and those after it arrive."""
        lost: set[int] = set()
        for chain in chains_with(lambda _: interrupt):
            lost.add(len(chain.woken - {*chain.crowd.went_on}))
            assert {8, 9} <= {*chain.crowd.went_on}
        assert lost == {0, 1}

    @pytest.mark.parametrize("number", range(6))
    def test_cancelled_anywhere(self, number: int) -> None:
        """A signal's handler, such as asyncio's own of Ctrl-C, may cancel a task without raising anything."""
        ends: set[bool] = set()
        for chain in chains_with(lambda chain: chain.crowd.tasks[number].cancel):
            cancelled = chain.crowd.tasks[number]
            assert cancelled.done()
            ends.add(cancelled.cancelled())
            others = chain.woken - {number}
            assert others <= {*chain.crowd.went_on}
            assert chain.told == []  # as of a task that goes on twice
        assert ends == {True, False}


class Chain:
    """Tasks of a loop, some of which wake others."""

    def __init__(self) -> None:
        self.woken: set[int] = set()
        """Those woken by a call that was not interrupted."""
        self.kept: list[BaseException] = []
        """Interrupts: who keeps one keeps all that it came through."""
        self.told: list[dict[str, Any]] = []
        """Errors of callbacks."""
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, what: self.told.append(what))
        acts: list[Callable[[], object] | None] = [None] * 10
        acts[0] = lambda: self.wake(3)
        acts[3] = lambda: self.wake(4, 5)
        self.crowd = Crowd(self.loop, *acts)
        self.loop.run_until_complete(asyncio.sleep(0))

    def wake(self, *numbers: int) -> None:
        """Wake some of the tasks, from another or from a callback."""
        for number in numbers:
            wake(self.crowd.futures[number])
            self.woken.add(number)

    def run(self, *numbers: int) -> None:
        """Run the loop for some turns, and wake some of the tasks first; an interrupt ends the turns."""
        self.loop.call_soon(self.wake, *numbers)
        try:
            for _ in range(5):
                self.loop.call_soon(self.loop.stop)
                self.loop.run_forever()
        except KeyboardInterrupt as interrupt:
            self.kept.append(interrupt)

    def end(self) -> None:
        """Let go of all."""
        self.loop.close()
        for task in self.crowd.tasks:
            if task.done() and not task.cancelled():
                task.exception()
        self.crowd.abandon()


def chains_with(handler: Callable[[Chain], Callable[[], object]]) -> Iterator[Chain]:
    """Yield chains whose first tasks were woken with a signal's handler at the first place, the second, and so on."""
    number = 0
    has_acted = True
    while has_acted:
        number += 1
        chain = Chain()
        with At(number, {"asyncify.wakeups"}, handler(chain)) as at:
            chain.run(0, 1, 2)
        chain.run()
        chain.run(8)
        chain.run(9)
        assert len({*chain.crowd.went_on}) == len(chain.crowd.went_on)
        has_acted = at.has_acted()
        yield chain
        chain.end()
    assert number > 50


class TestLoops:
    def test_one_that_runs_elsewhere_has_none_here(self) -> None:
        """Nor has one that does not run; trio's is none of asyncio's."""
        loop = asyncio.new_event_loop()
        with pytest.raises(RuntimeError, match="no event loop of asyncio runs here"):
            wakeups_of(loop)
        loop.close()

    async def test_one_has_the_same_always(self) -> None:
        """So the order is one, however many limiters a loop's tasks wait for."""
        loop = asyncio.get_running_loop()

        assert wakeups_of(loop) is wakeups_of(loop)

    def test_it_keeps_no_loop(self) -> None:
        """A loop goes with its last reference, closed or not, although a task has waited in it."""
        queue = Queue()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(queue.run(3))
        loop.close()
        gone = weakref.ref(loop)
        del loop
        gc.collect()

        assert gone() is None
        with asyncio.Runner() as runner:
            runner.run(queue.run(3))
        assert queue.passed == [0, 1, 2] * 2

    def test_one_that_is_closed(self) -> None:
        """Each who is woken gives up, and nothing keeps its task."""
        loop = asyncio.new_event_loop()
        crowd = Crowd(loop, None, None)
        wakeups = Wakeups(loop)
        loop.close()
        sleepers = [Sleeper(awaited) for awaited in crowd.futures]
        rouse(wakeups, *sleepers)

        assert [(sleeper.has_given_up, sleeper.ready) for sleeper in sleepers] == [(True, None)] * 2
        crowd.abandon()

    def test_one_that_is_closed_before_they_go_on(self) -> None:
        """All who were woken give up then, at once."""
        loop = asyncio.new_event_loop()
        crowd = Crowd(loop, None, None)
        wakeups = Wakeups(loop)
        loop.run_until_complete(asyncio.sleep(0))
        sleepers = [Sleeper(awaited) for awaited in crowd.futures]
        rouse(wakeups, *sleepers)
        assert not any(sleeper.has_given_up for sleeper in sleepers)
        loop.close()

        assert [(sleeper.has_given_up, sleeper.ready) for sleeper in sleepers] == [(True, None)] * 2
        crowd.abandon()

    def test_one_that_is_closed_while_it_takes_the_callback(self) -> None:
        """Another thread may close it just then; the callback lies in it for ever."""

        class Closing(asyncio.SelectorEventLoop):
            def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
                handle = super().call_soon_threadsafe(*args, **kwargs)
                self.close()
                self._ready.append(handle)  # type: ignore[attr-defined]
                return handle

        loop = Closing()
        crowd = Crowd(loop, None)
        sleeper = Sleeper(crowd.futures[0])
        rouse(Wakeups(loop), sleeper)

        assert sleeper.has_given_up
        crowd.abandon()

    async def test_one_that_refuses_the_callback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An error that is none of a closed loop is raised; who was woken goes on with the next."""
        refused: list[object] = []

        def refuse(callback: object, *_: object) -> None:
            refused.append(callback)
            raise RecursionError

        loop = asyncio.get_running_loop()
        crowd = Crowd(loop, None, None)
        await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon", refuse)
            with pytest.raises(RecursionError):
                wake(crowd.futures[0])
        assert len(refused) == 1
        wake(crowd.futures[1])
        await crowd.end()

        assert crowd.went_on == [0, 1]

    def test_one_that_is_gone(self) -> None:
        """That is as if it were closed."""
        loop, other = asyncio.new_event_loop(), asyncio.new_event_loop()
        wakeups = Wakeups(loop)
        loop.close()
        other.close()
        del loop
        gc.collect()
        sleeper = Sleeper(asyncio.Future(loop=other))
        rouse(wakeups, sleeper)

        assert wakeups.loop() is None
        assert sleeper.has_given_up

    def test_two_in_turn_in_one_thread(self) -> None:
        """A task goes on in its own."""
        loops = [asyncio.new_event_loop() for _ in range(2)]
        queue = Queue()
        for loop in loops * 2:
            loop.run_until_complete(queue.run(3))
        for loop in loops:
            loop.close()

        assert queue.passed == [0, 1, 2] * 4

    async def test_two_in_two_threads(self) -> None:
        """Each goes on with its own tasks, whoever has woken them."""
        queue = Queue()

        async def crowd() -> None:
            await asyncio.gather(*(queue.call(number) for number in range(300)))

        permit = await queue.limiter.aenter()
        thread = threading.Thread(target=lambda: asyncio.run(crowd()))
        thread.start()
        ours = asyncio.create_task(crowd())
        await until(lambda: queue.limiter.stats().waiting == 600)
        permit.leave()
        await asyncio.wait_for(ours, SAFETY_NET)
        await asyncio.to_thread(thread.join)

        assert sorted(queue.passed) == sorted([*range(300)] * 2)

    def test_uvloop(self) -> None:
        """Its futures and tasks are asyncio's own."""
        queue = Queue()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(queue.run(200))

        assert queue.passed == list(range(200))


NESTED = """
    import asyncio

    {first}
    from asyncify import Limiter

    import nest_asyncio

    limiter = Limiter(limit=1)

    async def inner(number):
        async with limiter:
            return number

    async def outer():
        async with limiter:
            pass
        nest_asyncio.apply()
        rest = asyncio.gather(*tasks[1:])
        return asyncio.get_event_loop().run_until_complete(asyncio.wait_for(rest, 20))  # within this task's step

    async def main():
        async with limiter:
            tasks.extend(asyncio.ensure_future(waiting) for waiting in (outer(), inner(1), inner(2)))
            await asyncio.sleep(0)
        return await tasks[0]

    tasks = []

    print(asyncio.run(main()))
"""


@pytest.mark.parametrize("first", ["import nest_asyncio; nest_asyncio.apply()", ""], ids=["before", "within"])
def test_a_loop_that_runs_within_a_step(first: str) -> None:
    """With nest_asyncio, as notebooks use it, a task may wait in its step for those that it has woken."""
    assert run_program(dedent(NESTED).format(first=first), warnings="ignore") == "[1, 2]\n"
