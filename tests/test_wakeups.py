"""Tasks of a loop that are woken, many by one callback: none twice, none lost, and all else gets its turn."""

import asyncio
import contextvars
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import pairwise
from textwrap import dedent
from typing import Any

import pytest
import uvloop

from asyncify import Limiter
from asyncify.wakeups import wake_here
from tests.crowd import SAFETY_NET, until

Future = asyncio.Future[None]
MakeTask = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


def future() -> Future:
    """Make one of the running loop."""
    return asyncio.get_running_loop().create_future()


def wake(awaited: Future) -> None:
    """Wake who awaits it, in the running loop."""
    assert wake_here(asyncio.get_running_loop(), awaited)


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


@pytest.fixture(autouse=True)
async def nothing_goes_wrong() -> AsyncIterator[None]:
    """No callback of the loop fails, unless a test takes the errors itself."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
    yield
    assert told == []


class TestRound:
    async def test_a_task_goes_on_once_and_in_its_context(self) -> None:
        """It is the running task then, and sees its own variables."""
        variable = contextvars.ContextVar("variable", default="outside")
        seen: list[object] = []

        async def wait(name: str, awaited: Future) -> None:
            variable.set(name)
            await awaited
            seen.append((name, variable.get(), asyncio.current_task() is tasks[name]))

        futures = {name: future() for name in "abc"}
        tasks = {name: asyncio.create_task(wait(name, awaited)) for name, awaited in futures.items()}
        await asyncio.sleep(0)
        for awaited in futures.values():
            wake(awaited)
        await asyncio.gather(*tasks.values())

        assert seen == [(name, name, True) for name in "abc"]
        assert variable.get() == "outside"

    async def test_a_task_that_is_woken_does_not_go_on_within_the_call(self) -> None:
        """Who wakes it goes on first."""
        seen: list[str] = []
        awaited = future()

        async def wait() -> None:
            await awaited
            seen.append("woken")

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        wake(awaited)
        seen.append("waker")
        await task

        assert seen == ["waker", "woken"]

    async def test_tasks_that_wake_each_other_go_on_in_one_turn_and_in_order(self) -> None:
        """A queue for one slot takes no turn of the loop for each."""
        queue = Queue()
        tasks = await queue.start(50)
        await asyncio.sleep(0)

        assert queue.passed == list(range(50))
        await asyncio.gather(*tasks)

    async def test_the_rest_of_the_loop_gets_its_turn(self) -> None:
        """However many wake each other, a callback waits for no more than a round of them."""
        queue = Queue()
        tasks = await queue.start(1000)
        seen = [0]
        while seen[-1] < 1000:
            await asyncio.sleep(0)
            seen.append(len(queue.passed))
        await asyncio.gather(*tasks)

        assert [after - before for before, after in pairwise(seen)] == [64] * 15 + [40]
        assert queue.passed == list(range(1000))

    async def test_woken_when_a_round_is_over(self) -> None:
        """It is in another one."""
        for _ in range(3):
            awaited = future()
            task = asyncio.ensure_future(asyncio.wait_for(awaited, SAFETY_NET))
            await asyncio.sleep(0)
            wake(awaited)
            await task

    async def test_cancelled_between_being_woken_and_going_on(self) -> None:
        """It is cancelled, and those behind it go on."""
        futures = [future() for _ in range(3)]

        async def wait(awaited: Future) -> str:
            await awaited
            return "went on"

        tasks = [asyncio.create_task(wait(awaited)) for awaited in futures]
        await asyncio.sleep(0)
        for awaited in futures:
            wake(awaited)
        tasks[1].cancel()

        assert [type(end).__name__ for end in await asyncio.gather(*tasks, return_exceptions=True)] == [
            "str",
            "CancelledError",
            "str",
        ]

    async def test_cancelled_by_a_task_of_the_same_round(self) -> None:
        """It is in the list already, and does not go on twice."""
        futures = [future() for _ in range(3)]

        async def wait(number: int) -> str:
            await futures[number]
            if number == 0:
                tasks[1].cancel()
            return "went on"

        tasks = [asyncio.create_task(wait(number)) for number in range(3)]
        await asyncio.sleep(0)
        for awaited in futures:
            wake(awaited)

        assert [type(end).__name__ for end in await asyncio.gather(*tasks, return_exceptions=True)] == [
            "str",
            "CancelledError",
            "str",
        ]

    async def test_nobody_awaits_it_yet(self) -> None:
        """Then it is done when somebody does."""
        awaited = future()
        wake(awaited)
        await asyncio.sleep(0)

        assert awaited.done()
        await awaited

    async def test_woken_twice(self) -> None:
        """The second time changes nothing."""
        awaited = future()
        wake(awaited)
        wake(awaited)

        await awaited

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

    async def test_a_callback_that_fails_stops_nobody(self) -> None:
        """The loop is told of its error, as of any callback's."""
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told_of: told.append(told_of["exception"]))
        error = ValueError("by the callback")
        failing, awaited = future(), future()

        def fail(_: Future) -> None:
            raise error

        failing.add_done_callback(fail)
        task = asyncio.ensure_future(awaited)
        await asyncio.sleep(0)

        async def wake_both() -> None:
            wake(first)
            await first
            wake(failing)
            wake(awaited)

        first = future()
        await asyncio.create_task(wake_both())
        await asyncio.wait_for(task, SAFETY_NET)

        assert told == [error]

    def test_a_task_that_ends_the_program_stops_nobody(self) -> None:
        """Its error comes out of the loop; when that is run again, the others go on."""
        loop = asyncio.new_event_loop()
        seen: list[int] = []

        async def wait(number: int, awaited: Future) -> None:
            await awaited
            if number == 1:
                raise KeyboardInterrupt
            seen.append(number)

        async def wake_all() -> None:
            await futures[3]
            for awaited in futures[:3]:
                wake(awaited)

        async def go_on() -> None:
            wake(futures[3])
            await asyncio.wait(tasks)

        futures = [loop.create_future() for _ in range(4)]
        tasks = [loop.create_task(wait(number, awaited)) for number, awaited in enumerate(futures[:3])]
        tasks.append(loop.create_task(wake_all()))
        loop.run_until_complete(asyncio.sleep(0))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(go_on())
        loop.run_until_complete(asyncio.wait(tasks))
        with pytest.raises(KeyboardInterrupt):
            tasks[1].result()
        loop.close()

        assert seen == [0, 2]

    async def test_tasks_written_in_python(self) -> None:
        """As a task factory may make them."""
        python_task: Callable[..., asyncio.Task[None]] = asyncio.tasks._PyTask  # type: ignore[attr-defined]
        queue = Queue()
        await queue.run(5, lambda coroutine: python_task(coroutine, loop=asyncio.get_running_loop()))

        assert queue.passed == [0, 1, 2, 3, 4]


class TestWhere:
    def test_a_thread_that_does_not_run_the_loop_is_told(self) -> None:
        """It has to ask the loop to."""
        loop = asyncio.new_event_loop()
        awaited: Future = loop.create_future()
        try:
            assert not wake_here(loop, awaited)
            assert not awaited.done()
        finally:
            loop.close()

    async def test_a_round_is_of_its_thread_and_its_loop(self) -> None:
        """While a thread is in a round, others have to ask that loop, as this thread has to ask other loops."""
        loop, awaited, ours = asyncio.get_running_loop(), future(), future()
        other_loop = asyncio.new_event_loop()
        theirs: Future = other_loop.create_future()
        told: list[bool] = []

        async def wait() -> None:
            await awaited
            told.append(wake_here(other_loop, theirs))
            thread = threading.Thread(target=lambda: told.append(wake_here(loop, ours)))
            thread.start()
            thread.join()

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        wake(awaited)
        await task
        other_loop.close()

        assert told == [False, False]
        assert not ours.done()
        assert not theirs.done()

    def test_uvloop(self) -> None:
        """Its futures are asyncio's own."""
        queue = Queue()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(queue.run(200))

        assert queue.passed == list(range(200))

    def test_two_loops_in_turn_in_one_thread(self) -> None:
        """A round of one is none of the other's."""
        loops = [asyncio.new_event_loop() for _ in range(2)]
        queue = Queue()
        for loop in loops * 2:
            loop.run_until_complete(queue.run(3))
        for loop in loops:
            loop.close()

        assert queue.passed == [0, 1, 2] * 4

    async def test_two_loops_in_two_threads(self) -> None:
        """Each wakes its own tasks, and asks the other to wake that one's."""
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


NESTED = """
    import asyncio

    {first}
    from asyncify import Limiter

    import nest_asyncio
    nest_asyncio.apply()

    limiter = Limiter(limit=1)

    async def inner():
        async with limiter:
            return "inner"

    async def outer():
        async with limiter:
            pass
        return asyncio.run(asyncio.wait_for(tasks[1], 20))  # the same loop, within this task's step

    async def main():
        async with limiter:
            tasks.extend(asyncio.ensure_future(waiting) for waiting in (outer(), inner()))
            await asyncio.sleep(0)
        return await tasks[0]

    tasks = []

    print(asyncio.run(main()))
"""


@pytest.mark.parametrize("first", ["import nest_asyncio; nest_asyncio.apply()", ""], ids=["before", "after"])
def test_a_loop_that_runs_within_a_step(first: str) -> None:
    """With nest_asyncio, as notebooks use it, a task may wait in its step for one that it has woken."""
    code = dedent(NESTED).format(first=first)
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    assert (run.stdout, run.stderr) == ("inner\n", "")
