"""Permits: which calls can't end while this thread or this task waits."""

import asyncio
import contextlib
import contextvars
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from asyncify.deadlock.holds import Link, Standstill, Steps, held_by_this_task, held_by_this_thread, held_by_waiters_for
from asyncify.permits import Permit, innermost, permits


class Issuer:
    """Takes permits back and remembers how."""

    def __init__(self) -> None:
        self.taken: list[tuple[Permit, BaseException | None]] = []
        self.given_up: list[Permit] = []
        self.others: list[BaseException | None] = []
        self.called_off: list[Permit] = []

    def _give_back(self, permit: Permit, error: BaseException | None) -> None:
        self.taken.append((permit, error))

    def _give_up(self, permit: Permit) -> None:
        self.given_up.append(permit)

    def _give_back_other(self, error: BaseException | None) -> None:
        self.others.append(error)

    def _call_off(self, permit: Permit) -> None:
        self.called_off.append(permit)

    def _count_rejected(self) -> None:
        raise NotImplementedError

    def _title(self) -> str:
        raise NotImplementedError

    def _inside(self) -> frozenset[Permit]:
        raise NotImplementedError

    def _places(self) -> float:
        raise NotImplementedError

    def _waiting_on(self, loop: asyncio.AbstractEventLoop) -> list[asyncio.Future[None]]:
        raise NotImplementedError


@pytest.fixture
def issuer() -> Issuer:
    """Whom permits are given back to."""
    return Issuer()


@pytest.fixture(autouse=True)
def leave_nothing() -> Any:
    """Each test begins and ends under no permit."""
    token = innermost.set(None)
    yield
    innermost.reset(token)


def begun(issuer: Issuer) -> Permit:
    """Return a permit under which this context runs."""
    permit = Permit().ask(issuer, 1, 1)
    permit.begin()
    return permit


def test_permits_are_told_from_the_inside_out(issuer: Issuer) -> None:
    """Those that have ended are passed over."""
    first, second, third = begun(issuer), begun(issuer), begun(issuer)
    second.end()

    assert list(permits()) == [third, first]


def test_leaving_goes_back_to_the_permit_around(issuer: Issuer) -> None:
    """Each leaves its own context as it was."""
    first, second = begun(issuer), begun(issuer)
    second.finish()
    assert innermost.get() is first
    first.finish()

    assert innermost.get() is None


def test_only_the_first_end_counts(issuer: Issuer) -> None:
    """However a call ends, and however often, its place is given back once, with the first error."""
    permit = begun(issuer)
    permit.queue_up(deque(), 0.0, 0)
    error = ValueError()
    permit.finish(error)
    permit.end()
    permit.give_up()

    assert (issuer.taken, issuer.given_up) == ([(permit, error)], [])


def test_ending_in_another_context_leaves_that_one_alone(issuer: Issuer) -> None:
    """A call that began elsewhere gives its place back, and what this context runs under stays."""
    elsewhere = contextvars.Context().run(lambda: begun(issuer))
    mine = begun(issuer)
    elsewhere.finish()

    assert issuer.taken == [(elsewhere, None)]
    assert innermost.get() is mine


def test_stepping_out_goes_on_elsewhere(issuer: Issuer) -> None:
    """The context is left, the place is not given back."""
    outer, permit = begun(issuer), begun(issuer)
    permit.step_out()

    assert innermost.get() is outer
    assert issuer.taken == []


def test_an_error_is_told_from_elsewhere_too(issuer: Issuer) -> None:
    """The limiter learns from a call that ends in another thread, as from one that leaves."""
    permit, error = begun(issuer), ValueError()
    permit.step_out()
    permit.end(error)

    assert issuer.taken == [(permit, error)]


def test_an_error_is_told_of_a_call_that_is_left_elsewhere(issuer: Issuer) -> None:
    """The limiter learns from it whatever this context runs under."""
    elsewhere = contextvars.Context().run(lambda: begun(issuer))
    error = ValueError()
    elsewhere.finish(error)

    assert issuer.taken == [(elsewhere, error)]


def test_to_leave_after_the_end_takes_no_place_of_another(issuer: Issuer) -> None:
    """Neither in the context that entered nor in another."""
    permit = begun(issuer)
    permit.end()
    contextvars.Context().run(permit.finish)
    permit.finish()

    assert (issuer.taken, issuer.others) == ([(permit, None)], [])


@pytest.mark.parametrize(
    "end",
    [Permit.finish, Permit.end, lambda permit, error: contextvars.Context().run(permit.finish, error)],
    ids=["in its context", "anywhere", "in another context"],
)
def test_a_call_whose_place_was_taken_tells_its_error(issuer: Issuer, end: Any) -> None:
    """The place that it gives back is another's, once; the error is its own."""
    permit, error = begun(issuer), ValueError()
    permit.taken = permit.ended = True
    end(permit, error)
    assert (issuer.taken, issuer.others) == ([], [error])
    permit.finish(error)
    permit.end(error)

    assert (issuer.taken, issuer.others) == ([], [error])


def test_giving_up_is_told(issuer: Issuer) -> None:
    """The limiter learns that the call never started, once."""
    permit = begun(issuer)
    permit.queue_up(deque(), 0.0, 0)
    permit.give_up()
    permit.give_up()
    permit.end()

    assert (issuer.taken, issuer.given_up) == ([], [permit])


def test_a_new_permit_keeps_none_that_has_ended(issuer: Issuer) -> None:
    """What is around it is the next that still runs."""
    first, second = begun(issuer), begun(issuer)
    second.end()

    assert Permit().ask(issuer, 1, 1).outer is first


def test_an_ended_permit_lets_go_of_those_that_ended_before(issuer: Issuer) -> None:
    """A chain of calls does not keep all of its links."""
    first, second = begun(issuer), begun(issuer)
    first.end()
    assert second.outer is first
    second.end()

    assert second.outer is None


def test_an_ended_permit_keeps_those_around_it_that_run(issuer: Issuer) -> None:
    """Only what has ended is let go of."""
    first, second, third = begun(issuer), begun(issuer), begun(issuer)
    second.end()
    third.end()

    assert third.outer is first
    assert list(permits()) == [first]


class TestThread:
    def test_a_thread_holds_what_it_has_entered(self, issuer: Issuer) -> None:
        """All of it, the innermost first."""
        first, second = begun(issuer), begun(issuer)

        assert held_by_this_thread() == [second, first]

    def test_a_thread_holds_nothing_that_it_inherited(self, issuer: Issuer) -> None:
        """A copy of the context in another thread is no proof."""
        begun(issuer)
        held: list[list[Permit]] = []
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: held.append(held_by_this_thread()),))
        thread.start()
        thread.join()

        assert held == [[]]

    def test_a_thread_holds_what_has_moved_to_it(self, issuer: Issuer) -> None:
        """A call that was handed to a thread is held by that, and no more by the one that it came from."""
        permit = begun(issuer)
        held: list[list[Permit]] = []

        def run() -> None:
            permit.move_to_this_thread()
            held.append(held_by_this_thread())

        thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
        thread.start()
        thread.join()

        assert held == [[permit]]
        assert held_by_this_thread() == []


class TestTask:
    async def test_a_task_holds_what_it_has_entered(self, issuer: Issuer) -> None:
        """All of it, the innermost first, and asking changes nothing."""
        first, second = begun(issuer), begun(issuer)

        for _ in range(2):
            assert held_by_this_task() == [second, first]
        second.finish()
        assert held_by_this_task() == [first]
        first.finish()
        assert held_by_this_task() == []
        assert innermost.get() is None

    async def test_a_task_holds_nothing_that_it_inherited(self, issuer: Issuer) -> None:
        """A background task may outlive the call that started it."""
        permit = begun(issuer)

        async def inside() -> tuple[list[Permit], list[Permit]]:
            inherited = held_by_this_task()
            mine = begun(issuer)
            assert held_by_this_task() == [mine]
            return inherited, list(permits())

        task = asyncio.create_task(inside())
        await asyncio.wait([task])  # by way of which another task might end the wait
        held, around = task.result()

        assert held == []
        assert around[1:] == [permit]

    async def test_a_task_holds_what_those_hold_who_await_it(self, issuer: Issuer) -> None:
        """They await it and nothing else, through however many tasks; asking changes nothing for them."""
        outer = begun(issuer)

        async def innermost_task() -> list[list[Permit]]:
            return [held_by_this_task() for _ in range(2)]

        async def between() -> tuple[list[list[Permit]], Permit]:
            mine = begun(issuer)
            held = await asyncio.create_task(innermost_task())
            assert held_by_this_task() == [mine, outer]
            return held, mine

        held, mine = await asyncio.create_task(between())

        assert held == [[mine, outer]] * 2
        assert held_by_this_task() == [outer]

    async def test_a_task_holds_what_is_held_in_a_context_that_it_shares(self, issuer: Issuer) -> None:
        """Two tasks may run in one context."""
        permit = begun(issuer)
        context = contextvars.copy_context()

        async def ask() -> list[Permit]:
            return held_by_this_task()

        async def share() -> tuple[list[Permit], Permit]:
            mine = begun(issuer)
            held: list[Permit] = await asyncio.get_running_loop().create_task(ask(), context=context)
            return held, mine

        held, mine = await asyncio.get_running_loop().create_task(share(), context=context)

        assert held == [mine, permit]

    async def test_a_task_does_not_hold_what_those_hold_whom_it_only_tells_of_its_end(self, issuer: Issuer) -> None:
        """A method of a task may be called back as well, by which it does not wait."""
        begun(issuer)
        here: Any = asyncio.current_task()

        async def inside() -> list[Permit]:
            return held_by_this_task()

        task = asyncio.create_task(inside())
        task.add_done_callback(here.remove_done_callback)
        await asyncio.wait([task])

        assert task.result() == []

    async def test_a_task_holds_what_is_held_in_the_context_of_a_step(self, issuer: Issuer) -> None:
        """Who awaits it takes a step of a stream; asking changes nothing."""
        context = contextvars.copy_context()
        steps = Steps(context)
        permit = context.run(begun, issuer)

        async def inside() -> list[list[Permit]]:
            return [held_by_this_task() for _ in range(2)]

        task = asyncio.get_running_loop().create_task(inside(), context=context.copy())
        steps.begin()
        held = await task
        steps.end()

        assert held == [[permit]] * 2
        assert held_by_this_task() == []

    async def test_a_task_does_not_hold_what_those_hold_who_have_left_it(self, issuer: Issuer) -> None:
        """Whoever was cancelled as it awaited a task behind a shield goes on without it."""
        go_on = asyncio.Event()

        async def inside() -> list[Permit]:
            await go_on.wait()
            return held_by_this_task()

        async def leave() -> asyncio.Task[list[Permit]]:
            begun(issuer)
            task = asyncio.create_task(inside())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await asyncio.shield(task)
            return task

        task = await asyncio.create_task(leave())
        go_on.set()

        assert await task == []

    def test_many_tasks_in_a_row(self, issuer: Issuer) -> None:
        """However many await each other."""

        async def descend(depth: int) -> list[Permit]:
            if depth:
                return await asyncio.create_task(descend(depth - 1))
            return held_by_this_task()

        async def main() -> None:
            permit = begun(issuer)
            assert await descend(5000) == [permit]

        asyncio.run(main())

    async def test_a_task_holds_what_was_handed_over_to_it(self, issuer: Issuer) -> None:
        """Whoever holds them waits for this context and for nothing else."""
        permit = begun(issuer)
        context = contextvars.Context()
        Link(held_by_this_task()).lead_to(context)

        async def inside() -> list[list[Permit]]:
            mine = begun(issuer)
            first = held_by_this_task()
            permit.end()
            return [first, held_by_this_task(), [mine]]

        first, then, mine = await asyncio.get_running_loop().create_task(inside(), context=context)

        assert first == [*mine, permit]
        assert then == mine

    async def test_what_was_handed_over_is_not_inherited(self, issuer: Issuer) -> None:
        """A task that this context starts is not what the holder waits for."""
        permit = begun(issuer)
        context = contextvars.Context()
        Link([permit]).lead_to(context)

        async def deeper() -> list[Permit]:
            return held_by_this_task() + held_by_this_thread()

        async def inside() -> list[Permit]:
            task = asyncio.create_task(deeper())
            await asyncio.wait([task])
            return task.result()

        assert await asyncio.get_running_loop().create_task(inside(), context=context) == []

    async def test_a_thread_holds_up_the_tasks_of_its_event_loop(self, issuer: Issuer) -> None:
        """One permit stands for theirs, as long as it waits."""
        awaited, blocking, elsewhere = (Permit().ask(issuer, 1, 1) for _ in range(3))
        awaited.in_task = elsewhere.in_task = True
        elsewhere.thread = 0
        link = Link()
        link.hold_up_this_thread()
        (standstill,) = link.held

        assert isinstance(standstill, Standstill)
        assert standstill.among([awaited, blocking, elsewhere]) == {awaited, blocking}
        link.leave()
        assert standstill.among([awaited, blocking, elsewhere]) == set()

    def test_a_thread_that_runs_an_event_loop_holds_until_that_ends(self, issuer: Issuer) -> None:
        """One permit stands for what it holds, until the loop's first task has ended or the loop is stopped."""
        permit, other = begun(issuer), Permit().ask(issuer, 1, 1)
        standstills: list[Permit] = []

        async def stay() -> None:
            asyncio.get_running_loop().call_soon(stop)
            await asyncio.Event().wait()

        def stop() -> None:
            standstills.extend(held_by_waiters_for(task))
            assert isinstance(standstills[0], Standstill)
            assert standstills[0].among([permit, other]) == {permit}
            loop.stop()

        loop = asyncio.new_event_loop()
        with contextlib.closing(loop):
            task = loop.create_task(stay())
            with pytest.raises(RuntimeError, match="stopped before Future completed"):
                loop.run_until_complete(task)
            (standstill,) = standstills
            assert isinstance(standstill, Standstill)
            assert standstill.among([permit, other]) == set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                loop.run_until_complete(task)

    def test_a_thread_holds_what_was_handed_over_to_it(self, issuer: Issuer) -> None:
        """Whatever context it is in, for as long as it is waited for."""
        permit = begun(issuer)
        context = contextvars.Context()
        link = Link([permit]).lead_to(context)
        assert link is not None
        with link:
            assert contextvars.Context().run(held_by_this_thread) == [permit]
            with ThreadPoolExecutor(1) as threads:
                assert threads.submit(context.run, held_by_this_thread).result() == []
            permit.end()
            assert contextvars.Context().run(held_by_this_thread) == []

    def test_nothing_to_hand_over(self) -> None:
        """No holder, no link."""
        context = contextvars.Context()
        assert Link().lead_to(context) is None

        assert not list(context)
