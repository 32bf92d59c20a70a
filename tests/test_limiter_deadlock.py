"""When a limiter can tell that a wait would never end, for threads and for tasks."""

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from asyncify import Adaptive, Dual, concurrency, dual, turnstile
from asyncify.deadlock import detection
from asyncify.deadlock.holds import held_by_this_task
from asyncify.deadlock.lookout import closes_generators
from asyncify.errors import DeadlockError, LimitTimeout
from asyncify.limiter import Limiter
from asyncify.permits import Permit, get_innermost
from asyncify.testing import FakeClock
from tests.at_once import are_looked_at, is_free
from tests.waiting import SAFETY_NET, run_program, until, wait_until


def _end_while_looking(call: Permit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a call end as soon as it is looked whether one who waits is stuck."""

    def is_anybody_free(*_: object) -> bool:
        call.end()
        return True

    monkeypatch.setattr(detection, "is_anybody_free", is_anybody_free)


class TestDeadlock:
    def test_nested_in_a_thread(self) -> None:
        """A call that waits for the slot that it holds is told so, and the limiter is as it was."""
        limiter = Limiter(limit=1, per_second=1, name="quotes", clock=FakeClock())
        with limiter:
            assert not limiter.acquire(blocking=False)
            with pytest.raises(DeadlockError) as caught:
                limiter._enter()

        assert str(caught.value) == (
            "limiter quotes: all slots (1) are held by calls that wait for a slot of this very limiter, so none can "
            "ever come free. Give the inner function a limiter of its own, or call its unlimited .func or .afunc."
        )
        assert limiter.stats().in_flight == 0
        assert limiter.stats().waiting == 0
        assert limiter.stats().rejected == 2

    async def test_nested_in_a_task(self) -> None:
        """A call that waits for the slot that it holds is told so, and the limiter is as it was."""
        limiter = Limiter(limit=1)
        async with limiter:
            with pytest.raises(DeadlockError, match=r"^limiter: all slots \(1\) are held by calls that wait"):
                await limiter._aenter()

        assert limiter.stats().in_flight == 0
        assert limiter.stats().waiting == 0

    async def test_a_sync_wait_inside_an_async_call(self) -> None:
        """A task that holds the slot and then waits with its whole loop is certain to wait for ever."""
        limiter = Limiter(limit=1)
        async with limiter:
            with pytest.raises(DeadlockError):
                limiter._enter()

        assert limiter.stats().in_flight == 0

    async def test_a_sync_wait_on_the_loop_of_an_async_call(self) -> None:
        """Code that is inside of nothing itself may hold up the loop that the call inside runs on."""
        limiter = Limiter(limit=1)
        async with limiter:
            with pytest.raises(DeadlockError) as caught:
                contextvars.Context().run(limiter.enter)

        assert str(caught.value) == (
            "limiter: all slots (1) are held by calls that run on the event loop which this one holds up while it "
            "waits, so none can ever come free. On an event loop, await the async side: ainvoke or acall."
        )
        assert limiter.stats().in_flight == 0

    async def test_two_slots_nested_twice(self) -> None:
        """Two tasks that each hold one of two slots and wait for another: the second to wait is told."""
        limiter = Limiter(limit=2)
        both_in = asyncio.Barrier(2)

        async def nest() -> str:
            async with limiter:
                await both_in.wait()
                async with limiter:
                    return "in"

        results = await asyncio.gather(nest(), nest(), return_exceptions=True)

        assert [type(result) for result in results if result != "in"] == [DeadlockError]
        assert "in" in results

    def test_one_thread_nested_three_deep(self) -> None:
        """Two slots that one thread holds are held by one who waits."""
        limiter = Limiter(limit=2)

        with limiter, limiter, pytest.raises(DeadlockError):
            limiter._enter()

        assert limiter.stats().in_flight == 0

    async def test_a_limit_below_the_calls_inside_is_no_proof(self) -> None:
        """An adaptive limit that has shrunk grows again by the success of those who do not wait."""
        limiter = Limiter(limit=2)
        async with limiter:
            other = await asyncio.create_task(limiter._aenter(), context=contextvars.Context())
            limiter.resize(limit=1)
            asyncio.get_running_loop().call_later(0.01, lambda: limiter.resize(limit=3))
            async with limiter:
                other.end()

    async def test_nesting_with_a_slot_to_spare_is_no_deadlock(self) -> None:
        """While another call holds a slot and may end, a nested one waits for it."""
        limiter = Limiter(limit=2)
        other = contextvars.Context().run(limiter.enter)

        async def nest() -> str:
            async with limiter, limiter:
                return "in"

        task = asyncio.create_task(nest())
        await until(lambda: limiter.stats().waiting == 1)
        other.end()

        assert await task == "in"

    async def test_a_slot_of_another_limiter_is_no_proof(self) -> None:
        """A call inside one limiter may wait for another whose slots will come free."""
        outer, inner = Limiter(limit=1), Limiter(limit=1)
        other = contextvars.Context().run(inner.enter)

        async def nest() -> str:
            async with outer, inner:
                return "in"

        task = asyncio.create_task(nest())
        await until(lambda: inner.stats().waiting == 1)
        other.end()

        assert await task == "in"

    async def test_a_wait_that_is_over_is_no_proof(self) -> None:
        """A call that had nested, and is now about to end, is no longer counted among those that wait."""
        limiter = Limiter(limit=2)
        nested, go_on = asyncio.Event(), asyncio.Event()
        other = contextvars.Context().run(limiter.enter)

        async def first() -> None:
            async with limiter:
                async with limiter:
                    pass
                nested.set()
                await go_on.wait()

        async def second() -> str:
            async with limiter, limiter:
                return "in"

        tasks = [asyncio.create_task(first())]
        await until(lambda: limiter.stats().waiting == 1)
        other.end()
        await nested.wait()
        tasks.append(asyncio.create_task(second()))  # type: ignore[arg-type]  # another kind of result
        await until(lambda: limiter.stats().waiting == 1 or tasks[1].done())
        go_on.set()

        assert (await asyncio.gather(*tasks))[1] == "in"

    async def test_a_background_task_is_no_proof(self) -> None:
        """A task that has inherited the context of a call may outlive it: it waits, and gets the slot."""
        limiter = Limiter(limit=1)

        async def inside() -> str:
            async with limiter:
                return "in"

        async with limiter:
            task = asyncio.create_task(inside())
            await until(lambda: limiter.stats().waiting == 1)

        assert await task == "in"

    def test_a_background_thread_is_no_proof(self) -> None:
        """A thread that has inherited the context of a call may outlive it: it waits, and gets the slot."""
        limiter = Limiter(limit=1)
        outcome: list[str] = []

        def inside() -> None:
            with limiter:
                outcome.append("in")

        with limiter:
            thread = threading.Thread(target=contextvars.copy_context().run, args=(inside,))
            thread.start()
            while not limiter.stats().waiting:
                thread.join(0.001)
        thread.join(SAFETY_NET)

        assert outcome == ["in"]

    async def test_a_waiter_that_will_time_out_is_no_proof(self) -> None:
        """Its call will end, so another that nests waits for that and is not told of a deadlock."""
        clock = FakeClock()
        limiter = Limiter(limit=2, clock=clock)

        async def nest(timeout: float | None) -> str:
            async with limiter:
                await both_in.wait()
                permit = await limiter._aenter(timeout=timeout)
                permit.finish()
                return "in"

        both_in = asyncio.Barrier(2)
        patient = asyncio.create_task(nest(None))
        impatient = asyncio.create_task(nest(1))  # the last to come to the barrier is the first to go on
        await until(lambda: limiter.stats().waiting == 2)
        clock.advance(1)

        with pytest.raises(LimitTimeout):
            await impatient
        assert await patient == "in"

    async def test_a_call_that_waits_for_the_rate_alone_is_no_proof(self) -> None:
        """It will get the rate and end, so another that nests is not told of a deadlock."""
        clock = FakeClock()
        limiter = Limiter(limit=2, per_second=10, clock=clock)

        async def hold(then: Callable[[], Any]) -> str:
            async with limiter:
                await both_in.wait()
                permit = await then()
                permit.finish()
                return "in"

        both_in = asyncio.Barrier(2)
        nested = asyncio.create_task(hold(limiter.aenter))
        rate = asyncio.create_task(hold(lambda: limiter._aenter(slots=0)))
        await asyncio.sleep(0)
        clock.advance(0.1)
        await until(lambda: limiter.stats().waiting == 2)
        clock.advance(0.1)
        assert await rate == "in"
        clock.advance(0.1)

        assert await nested == "in"

    async def test_a_call_that_somebody_else_has_ended_is_no_proof(self) -> None:
        """It waits still, in a slot that is another's by now."""
        limiter = Limiter(limit=2)
        permits: list[Permit] = []
        may_nest = [asyncio.Event(), asyncio.Event()]

        async def nest(number: int) -> str:
            permits.append(await limiter._aenter())
            await may_nest[number].wait()
            async with limiter:
                return "in"

        tasks = [asyncio.create_task(nest(number)) for number in range(2)]
        await until(lambda: len(permits) == 2)
        stranger = asyncio.get_running_loop().create_task(limiter._aenter(), context=contextvars.Context())
        await until(lambda: limiter.stats().waiting == 1)
        may_nest[0].set()
        await until(lambda: limiter.stats().waiting == 2)
        permits[0].end()
        await until(stranger.done)
        may_nest[1].set()
        await until(lambda: limiter.stats().waiting == 2 or tasks[1].done())
        stranger.result().end()

        assert await asyncio.gather(*tasks) == ["in", "in"]
        permits[1].end()
        assert limiter.stats().in_flight == 0

    async def test_a_wait_that_ends_as_it_is_looked_at_is_no_proof(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever has been admitted meanwhile blocks nobody."""
        limiter = Limiter(limit=2)
        other = contextvars.Context().run(limiter.enter)

        def held() -> list[Permit]:
            other.end()
            return held_by_this_task()

        async def nest() -> str:
            async with limiter, limiter:
                return "in"

        async with limiter:
            with monkeypatch.context() as patch:
                patch.setattr(turnstile, "held_by_this_task", held)
                (await limiter._aenter()).finish()
            task = asyncio.get_running_loop().create_task(nest(), context=contextvars.Context())
            await until(lambda: limiter.stats().waiting == 1 or task.done())

        assert await task == "in"

    def test_a_slot_that_comes_free_as_a_thread_is_looked_at_is_passed_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever leaves lets it in, which finds that as it is about to wait."""
        limiter = Limiter(limit=2)
        other = contextvars.Context().run(limiter.enter)
        _end_while_looking(other, monkeypatch)
        with limiter:
            limiter._enter(timeout=SAFETY_NET).finish()

        assert other.ended
        assert limiter.stats().in_flight == 0

    async def test_a_slot_that_comes_free_as_a_task_is_looked_at_is_passed_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever leaves lets it in, which finds that as it is about to wait."""
        limiter = Limiter(limit=2)
        other = contextvars.Context().run(limiter.enter)
        _end_while_looking(other, monkeypatch)
        async with limiter:
            (await limiter._aenter(timeout=SAFETY_NET)).finish()

        assert other.ended
        assert limiter.stats().in_flight == 0

    def test_a_rate_alone_is_waited_for_inside_a_call_in_a_thread(self) -> None:
        """It comes with time, whoever is inside."""
        clock = FakeClock()
        limiter = Limiter(per_second=10, clock=clock)

        def let_in() -> None:
            wait_until(lambda: limiter.stats().waiting == 1)
            clock.advance(0.1)

        with limiter:
            thread = threading.Thread(target=let_in)
            thread.start()
            with limiter:
                thread.join()

        assert limiter.stats().in_flight == 0

    async def test_a_rate_alone_is_waited_for_inside_a_call_in_a_task(self) -> None:
        """It comes with time, whoever is inside."""
        clock = FakeClock()
        limiter = Limiter(per_second=10, clock=clock)
        async with limiter:
            asyncio.get_running_loop().call_later(0.01, clock.advance, 0.1)
            async with limiter:
                pass

        assert limiter.stats().in_flight == 0

    async def test_one_call_counted_twice_is_no_proof(self) -> None:
        """Two waits that keep the same call from ending leave the other slot out of the count."""
        limiter = Limiter(limit=2)
        other = contextvars.Context().run(limiter.enter)
        told: list[type] = []

        async def stop_the_loop() -> None:
            await until(lambda: limiter.stats().waiting == 1)
            try:
                limiter._enter(timeout=0.01)
            except (DeadlockError, LimitTimeout) as error:
                told.append(type(error))
            other.end()

        async with limiter:
            blocker = asyncio.create_task(stop_the_loop())
            nested = await limiter._aenter()
            nested.finish()
            await blocker

        assert told == [LimitTimeout]

    async def test_the_rate_inside_a_call_while_others_wait_for_slots(self, clock: FakeClock) -> None:
        """A call that holds the only slot gets the rate, past those who wait for that slot."""
        limiter = Limiter(limit=1, per_second=10, clock=clock)
        async with limiter:
            waiting = asyncio.get_running_loop().create_task(limiter._aenter(), context=contextvars.Context())
            await until(lambda: limiter.stats().waiting == 1)
            clock.advance(0.1)
            assert await limiter.aacquire()
        clock.advance(0.1)

        (await waiting).finish()


async def test_an_interrupt_before_a_call_is_known_by_its_context_costs_no_other_limiter() -> None:
    """A call without a token is no proof of anything, and leaves its context as any does."""
    limiter, other = Limiter(limit=1), Limiter(limit=1)
    permit = limiter._enter()
    del permit.token  # as if the interrupt had come just before it was kept

    async def wait() -> None:
        async with other:
            await asyncio.sleep(0)

    async with asyncio.timeout(SAFETY_NET):
        await asyncio.gather(wait(), wait(), wait())
    permit.finish()

    assert get_innermost() is not permit
    assert limiter.stats().in_flight == other.stats().in_flight == 0


class RefusedError(Exception):
    """That of a server which has too much to do."""

    status_code = 429


def _refuse(other: Permit) -> None:
    other.leave(RefusedError())


def _resize(other: Permit) -> None:
    assert isinstance(other.issuer, Limiter)
    other.issuer.resize(limit=2)
    other.leave()


def _nested_in_threads(limiter: Limiter, count: int) -> tuple[list[threading.Thread], list[object]]:
    """Return so many threads that are inside and wait for more, and where each tells its end."""
    all_in = threading.Barrier(count)
    ends: list[object] = []

    def nest() -> None:
        try:
            with limiter:
                all_in.wait(SAFETY_NET)
                with limiter:
                    ends.append("in")
        except DeadlockError as error:
            ends.append(type(error))

    threads = [threading.Thread(target=nest, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    wait_until(lambda: are_looked_at(limiter, count))
    return threads, ends


@pytest.mark.parametrize("shrink", [_refuse, _resize])
class TestShrunkLimit:
    """Three of four calls wait for more, the fourth ends, and then there are two slots and nobody who comes to wait."""

    @pytest.fixture
    def limiter(self) -> Limiter:
        """Return one that may shrink in either way."""
        return Limiter(limit=Adaptive(min=1, max=4, start=4))

    def test_in_threads(self, limiter: Limiter, shrink: Callable[[Permit], None]) -> None:
        """Two of the three are told, by whose errors the third goes on."""
        other = contextvars.Context().run(limiter.enter)
        threads, ends = _nested_in_threads(limiter, 3)
        shrink(other)
        for thread in threads:
            thread.join(SAFETY_NET)

        assert ends == [DeadlockError, DeadlockError, "in"]
        assert limiter.stats().rejected == 2
        assert is_free(limiter)

    async def test_in_tasks(self, limiter: Limiter, shrink: Callable[[Permit], None]) -> None:
        """Two of the three are told, by whose errors the third goes on."""
        other = contextvars.Context().run(limiter.enter)
        all_in = asyncio.Barrier(3)
        ends: list[object] = []

        async def nest() -> None:
            try:
                async with limiter:
                    await all_in.wait()
                    async with limiter:
                        ends.append("in")
            except DeadlockError as error:
                ends.append(type(error))

        tasks = [asyncio.create_task(nest()) for _ in range(3)]
        await until(lambda: are_looked_at(limiter, 3))
        shrink(other)
        await asyncio.wait(tasks, timeout=SAFETY_NET)

        assert ends == [DeadlockError, DeadlockError, "in"]
        assert limiter.stats().rejected == 2
        assert is_free(limiter)

    def test_in_threads_beside_others_that_go_on(self, limiter: Limiter, shrink: Callable[[Permit], None]) -> None:
        """Who is inside and does not wait leaves its slot to another."""
        other, *busy = (contextvars.Context().run(limiter.enter) for _ in range(3))
        ends: list[str] = []

        def nest() -> None:
            with limiter, limiter:
                ends.append("in")

        thread = threading.Thread(target=nest, daemon=True)
        thread.start()
        wait_until(lambda: are_looked_at(limiter, 1))
        shrink(other)
        for call in busy:
            call.leave()
        thread.join(SAFETY_NET)

        assert ends == ["in"]
        assert limiter.stats().rejected == 0
        assert is_free(limiter)


def test_threads_that_wait_for_the_rate_inside_as_the_slot_that_is_left_is_taken_away() -> None:
    """They wait for their own slots then."""
    clock = FakeClock()
    limiter = Limiter(limit=3, per_second=2, burst=2, clock=clock)
    threads, ends = _nested_in_threads(limiter, 2)
    limiter.resize(limit=2)
    wait_until(lambda: limiter.stats().in_flight == 1)
    clock.advance(1)
    for thread in threads:
        thread.join(SAFETY_NET)

    assert ends == [DeadlockError, "in"]
    assert is_free(limiter)


def test_a_program_that_is_ending_is_not_looked_at_after_a_limit_shrank() -> None:
    """Python 3.12 starts no thread any more when the main thread has ended; the call's own error arrives."""
    program = """
import threading, time
from asyncify import Adaptive, Limiter

class RefusedError(Exception):
    status_code = 429

limiter, inner = Limiter(limit=Adaptive(min=1, max=3, start=3)), Limiter(limit=1)

def call(number):
    try:
        with limiter:
            with inner:
                time.sleep(0.02)
            threading.main_thread().join()
            time.sleep(0.05 * number)
            if not number:
                raise RefusedError
    except BaseException as error:
        print(type(error).__name__)

for number in range(4):
    threading.Thread(target=call, args=(number,)).start()
"""
    assert run_program(program) == "RefusedError\n"


async def test_who_leaves_a_limit_that_shrank_has_the_others_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look is due at most once, and asks nobody who waits in a task or holds nothing."""
    looked: list[int] = []
    is_asked = threading.Event()

    def look_at_threads(waiting: Collection[Permit]) -> None:
        looked.append(len(waiting))
        is_asked.wait(SAFETY_NET)

    monkeypatch.setattr(turnstile, "look_at_threads", look_at_threads)
    limiter = Limiter(limit=50)
    calls = [contextvars.Context().run(limiter.enter) for _ in range(50)]
    waiting = asyncio.create_task(limiter._aenter())
    await until(lambda: limiter.stats().waiting == 1)
    limiter.resize(limit=1)
    for call in calls[:40]:
        call.leave()
    await until(lambda: bool(looked))
    is_asked.set()
    for call in calls[40:]:
        call.leave()
    (await waiting).finish()

    assert len(looked) <= 12
    assert set(looked) == {0}


async def test_a_look_that_no_thread_could_be_started_for_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next call that leaves; there may be too many threads for a moment only."""
    looks: list[float] = []

    def call_at(when: float, _: Callable[[], None]) -> None:
        looks.append(when)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(turnstile, "monotonic_clock", SimpleNamespace(call_at=call_at))
    limiter = Limiter(limit=3)
    calls = [contextvars.Context().run(limiter.enter) for _ in range(3)]
    waiting = asyncio.create_task(limiter._aenter())
    await until(lambda: limiter.stats().waiting == 1)
    limiter.resize(limit=1)
    for call in calls:
        call.leave()
    (await waiting).finish()

    assert len(looks) > 1


class TestHandedOn:
    """A slot that is taken here and given back elsewhere, as many do with a semaphore."""

    def test_a_permit_that_another_thread_leaves_is_no_proof(self) -> None:
        """An executor takes so many jobs and no more: each gives the slot back that its submitter has entered."""
        limiter = Limiter(limit=2)
        may_end = threading.Event()

        def leave_later(permit: Permit) -> None:
            may_end.wait(SAFETY_NET)
            permit.leave()

        def submit_all(pool: ThreadPoolExecutor) -> None:
            for _ in range(6):
                pool.submit(leave_later, limiter.enter())

        with ThreadPoolExecutor(3) as pool:
            submitter = pool.submit(submit_all, pool)
            wait_until(lambda: limiter.stats().waiting == 1)
            may_end.set()
            submitter.result(SAFETY_NET)

        assert (limiter.stats().in_flight, limiter.stats().admitted) == (0, 6)

    async def test_a_permit_that_another_task_leaves_is_no_proof(self) -> None:
        """A producer takes a slot for each job before it starts a task that does it."""
        limiter = Limiter(limit=2)
        may_end = asyncio.Event()

        async def leave_later(permit: Permit) -> None:
            await may_end.wait()
            permit.leave()

        async def submit_all() -> None:
            async with asyncio.TaskGroup() as jobs:
                for _ in range(6):
                    jobs.create_task(leave_later(await limiter.aenter()))

        submitter = asyncio.create_task(submit_all())
        await until(lambda: limiter.stats().waiting == 1)
        for _ in range(10):
            await asyncio.sleep(0)  # who waits is looked at in the next turn
        may_end.set()
        await submitter

        assert (limiter.stats().in_flight, limiter.stats().admitted) == (0, 6)

    def test_a_with_does_not_end_what_was_entered_in_it(self) -> None:
        """The block gives its own slot back; the other is given back with its permit, and is no proof till then."""
        limiter = Limiter(limit=2)
        with limiter:
            handed = limiter.enter()
        assert (handed.ended, limiter.stats().in_flight) == (False, 1)
        with limiter:
            threading.Timer(0.01, handed.leave).start()
            with limiter:
                pass

        assert limiter.stats().in_flight == 0

    async def test_an_async_with_does_not_end_what_was_entered_in_it(self) -> None:
        """The block gives its own slot back; the other is given back with its permit, and is no proof till then."""
        limiter = Limiter(limit=2)
        async with limiter:
            handed = await limiter.aenter()
        assert (handed.ended, limiter.stats().in_flight) == (False, 1)
        async with limiter:
            asyncio.get_running_loop().call_later(0.01, handed.leave)
            async with limiter:
                pass

        assert limiter.stats().in_flight == 0

    async def test_a_sync_wait_on_the_loop_that_another_thread_ends_is_no_proof(self) -> None:
        """A permit that is left by another thread comes back however long the loop stands still."""
        limiter = Limiter(limit=1)
        threading.Timer(0.01, limiter.enter().leave).start()
        with limiter:
            pass

        assert limiter.stats().in_flight == 0


class TestDroppedGenerators:
    """An async generator that its reader has left is closed by asyncio, some turns of the loop later."""

    @pytest.mark.parametrize("turns", [0, 5])
    async def test_a_generator_that_a_break_has_left_is_no_proof(self, turns: int) -> None:
        """Its slot is about to come back, though it takes a few turns to end, and looks as if its reader had it."""
        limiter = Limiter(limit=1)

        async def pages() -> AsyncIterator[int]:
            async with limiter:
                try:
                    for number in range(3):
                        yield number
                finally:
                    for _ in range(turns):
                        await asyncio.sleep(0)

        async def first_page() -> int:
            async for page in pages():
                return page
            raise AssertionError("no pages")

        assert [await first_page(), await first_page()] == [0, 0]
        assert [*await asyncio.gather(first_page(), first_page())] == [0, 0]
        await until(lambda: limiter.stats().in_flight == 0)

    @pytest.mark.parametrize("enters", ["async with", "with"])
    async def test_nor_is_it_for_a_thread_that_its_reader_waits_for(self, enters: str) -> None:
        """The thread looks on its own, while the loop goes on to close the generator."""
        limiter = Limiter(limit=1)

        async def pages() -> AsyncIterator[int]:
            if enters == "with":
                with limiter:
                    yield 1
            else:
                async with limiter:
                    yield 1

        def look_up(_: int) -> str:
            with limiter:
                return "in"

        report = Dual(look_up)
        for _ in range(30):
            async for page in pages():
                assert page == 1
                break
            assert await report.ainvoke(1) == "in"

    def test_handles_that_other_threads_add_are_of_no_matter(self) -> None:
        """What the loop is about to call is copied before it is looked at."""
        ready: deque[Any] = deque()

        class Busy:
            @property
            def _args(self) -> tuple[object, ...]:
                ready.append(self)
                return ()

        ready.extend([Busy(), Busy()])

        assert not closes_generators(cast("Any", SimpleNamespace(_ready=ready)))

    async def test_who_waits_beside_one_that_is_closed_is_told_when_it_has_ended(self) -> None:
        """It is looked at again."""
        limiter, other = Limiter(limit=1), Limiter(limit=1)

        async def pages() -> AsyncIterator[int]:
            async with other:
                yield 1

        async for _ in pages():
            break
        with pytest.raises(DeadlockError):
            async with limiter, limiter:
                pass

    async def test_a_generator_that_is_kept_is_told_as_before(self) -> None:
        """Nobody closes it as long as its reader waits."""
        limiter = Limiter(limit=1)

        async def pages() -> AsyncGenerator[int, None]:
            async with limiter:
                yield 1

        async with aclosing(pages()) as kept:
            assert await anext(kept) == 1
            with pytest.raises(DeadlockError):
                await limiter._aenter()


class TestHeldUpLoop:
    """A sync `with` in coroutines, where an `async with` was meant."""

    @pytest.mark.parametrize("way", ["with", "by a bridge"])
    async def test_a_sync_with_in_another_task_holds_its_slot_as_long_as_the_loop_stands_still(self, way: str) -> None:
        """Whoever holds up the loop is told, as where that task entered by `async with`."""
        limiter = Limiter(limit=1, timeout=SAFETY_NET)
        may_leave = asyncio.Event()

        async def call(query: str) -> str:
            async with limiter:
                return query

        async def hold() -> None:
            with limiter:
                await may_leave.wait()

        ways: dict[str, Callable[[], Any]] = {
            "with": limiter.__enter__,
            "by a bridge": partial(Dual(call).invoke, "EUR"),
        }
        holder = asyncio.create_task(hold())
        await until(lambda: limiter.stats().in_flight == 1)
        with pytest.raises(DeadlockError, match="run on the event loop which this one holds up"):
            ways[way]()
        may_leave.set()
        await holder

        assert limiter.stats().in_flight == 0


class TestSharedContext:
    """Tasks that `create_task` was given one context for: what one has entered looks as if the others had, too."""

    @pytest.mark.parametrize("enters", ["async with", "a pair"])
    async def test_tasks_that_share_a_context_take_turns(self, enters: str) -> None:
        """As at an `asyncio.Semaphore`."""
        limiter = Limiter(limit=1)

        async def look_up(number: int) -> int:
            await asyncio.sleep(0.01)
            return number

        async def enter(number: int) -> int:
            async with limiter:
                return await look_up(number)

        pair = concurrency(limiter=limiter)(dual(look_up))
        ways: dict[str, Callable[[int], Any]] = {"async with": enter, "a pair": pair.acall}
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(ways[enters](number), context=context) for number in range(5)]

        assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]

    async def test_a_task_in_the_context_of_its_caller_is_no_proof(self) -> None:
        """It is found by who runs just now, too, whose context Python 3.11 shows nowhere else."""
        limiter = Limiter(limit=1)
        limited = asyncio.Event()
        may_leave = asyncio.Event()

        async def hold() -> None:
            async with limiter:
                limited.set()
                await may_leave.wait()

        async def come() -> None:
            holder = asyncio.get_running_loop().create_task(hold(), context=context)
            await limited.wait()
            asyncio.get_running_loop().call_later(0.01, may_leave.set)
            async with limiter:
                pass
            await holder

        context = contextvars.copy_context()
        await asyncio.get_running_loop().create_task(come(), context=context)

        assert limiter.stats().admitted == 2

    @pytest.mark.parametrize("where", ["about to run", "at the end of a future"])
    async def test_callbacks_of_what_has_no_hash_are_of_no_matter(self, where: str) -> None:
        """Such as a list's `append`, which stands among those of the loop or of what a task awaits."""
        limiter, results = Limiter(limit=1), list[object]()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        other = asyncio.create_task(asyncio.wait_for(future, None))
        await asyncio.sleep(0)
        if where == "about to run":
            loop.call_soon(results.append, 1)
        else:
            future.add_done_callback(results.append)

        with pytest.raises(DeadlockError):
            async with limiter, limiter:
                pass
        future.set_result(None)
        await other
        assert len(results) == 1

    async def test_a_deadlock_is_told_when_no_context_is_shared_any_more(self) -> None:
        """It is looked at again."""
        limiter, context = Limiter(limit=1), contextvars.copy_context()
        may_end = asyncio.Event()
        loop = asyncio.get_running_loop()
        others = [loop.create_task(may_end.wait(), context=context) for _ in range(2)]
        loop.call_later(0.05, may_end.set)

        with pytest.raises(DeadlockError):
            async with limiter, limiter:
                pass
        await asyncio.gather(*others)
