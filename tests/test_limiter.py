"""The promises of a limiter for threads and for tasks: slots, rates, order, giving up, leaving elsewhere."""

import asyncio
import contextlib
import contextvars
import copy
import pickle
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

import pytest

from asyncify import concurrency, turnstile
from asyncify.adaptive import Adaptive
from asyncify.errors import DeadlockError, LimitTimeout
from asyncify.limiter import Limiter
from asyncify.meter import Meter
from asyncify.permits import Permit
from asyncify.testing import FakeClock
from tests.crowd import Crowd, ServerError, TaskCall, ThreadCall, start_times
from tests.waiting import SAFETY_NET, until


class TestSlots:
    async def test_never_more_than_the_limit(self, crowd: Crowd) -> None:
        """Calls beyond the limit wait, and each that ends lets one in."""
        limiter = crowd.limiter_of(limit=3)
        calls = await crowd.come_all("abcde")
        assert limiter.stats().in_flight == 3
        await crowd.finish(calls[1])

        assert crowd.order == ["a", "b", "c", "d"]
        assert limiter.stats().in_flight == 3
        assert limiter.stats().waiting == 1

    async def test_threads_and_two_loops_share_the_slots(self) -> None:
        """A slot held by a thread is missing to both loops, and goes to whoever came first."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1)
        holder = ThreadCall(crowd, "thread")
        await until(lambda: holder.admitted)

        async def other_loop() -> None:
            async with limiter:
                crowd.order.append("other loop")

        other = threading.Thread(target=lambda: asyncio.run(other_loop()))
        other.start()
        await until(lambda: limiter.stats().waiting == 1)
        here = await crowd.come("this loop")
        holder.finish()
        await until(lambda: here.admitted)
        await asyncio.to_thread(other.join)
        await crowd.disperse()

        assert crowd.order == ["thread", "other loop", "this loop"]

    @pytest.mark.parametrize("limit", [1, 2, 5])
    async def test_tasks_start_in_the_order_of_their_coming(self, limit: int) -> None:
        """They are let in so, and each goes on before those behind it, though several slots come free at once."""
        limiter = Limiter(limit=limit)
        started: list[int] = []

        async def call(number: int) -> None:
            async with limiter:
                started.append(number)

        holders = [limiter.enter() for _ in range(limit)]
        tasks = [asyncio.create_task(call(number)) for number in range(200)]
        await until(lambda: limiter.stats().waiting == 200)
        for permit in reversed(holders):
            permit.leave()
        await asyncio.gather(*tasks)

        assert started == list(range(200))

    async def test_an_error_gives_the_slot_back(self, crowd: Crowd) -> None:
        """A call that fails leaves as well as one that succeeds."""
        limiter = crowd.limiter_of(limit=1)
        call = await crowd.come()
        await crowd.finish(call, ValueError("bad"))

        assert limiter.stats().in_flight == 0

    def test_with_holds_a_slot(self) -> None:
        """Inside the block a slot is held, after it, be it by an error, it is free."""
        limiter = Limiter(limit=2)
        with pytest.raises(KeyError), limiter:  # noqa: PT012  (what is inside the block is what is tested)
            assert limiter.stats().in_flight == 1
            raise KeyError

        assert limiter.stats().in_flight == 0

    async def test_async_with_holds_a_slot(self) -> None:
        """Inside the block a slot is held, after it, be it by an error, it is free."""
        limiter = Limiter(limit=2)
        with pytest.raises(KeyError):  # noqa: PT012  (what is inside the block is what is tested)
            async with limiter:
                assert limiter.stats().in_flight == 1
                raise KeyError

        assert limiter.stats().in_flight == 0

    def test_with_waits_and_is_woken(self) -> None:
        """A thread that waits at the `with` goes on when the slot is free."""
        limiter = Limiter(limit=1)
        done = threading.Event()

        def wait() -> None:
            with limiter:
                done.set()

        with limiter:
            thread = threading.Thread(target=wait)
            thread.start()
            while not limiter.stats().waiting:
                done.wait(0.001)
            assert not done.is_set()
        thread.join(SAFETY_NET)

        assert done.is_set()

    async def test_async_with_waits_and_is_woken(self) -> None:
        """A task that waits at the `async with` goes on when the slot is free."""
        limiter = Limiter(limit=1)

        async def wait() -> str:
            async with limiter:
                return "in"

        async with limiter:
            task = asyncio.get_running_loop().create_task(wait(), context=contextvars.Context())
            await until(lambda: limiter.stats().waiting == 1)

        assert await task == "in"

    def test_each_exit_leaves_its_own_limiter(self) -> None:
        """Also where the outer one is left first."""
        outer, inner = Limiter(limit=1), Limiter(limit=1)
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        assert (outer.stats().in_flight, inner.stats().in_flight) == (0, 1)
        inner.__exit__(None, None, None)

        assert inner.stats().in_flight == 0

    async def test_each_aexit_leaves_its_own_limiter(self) -> None:
        """Also where the outer one is left first."""
        outer, inner = Limiter(limit=1), Limiter(limit=1)
        await outer.__aenter__()
        await inner.__aenter__()
        await outer.__aexit__(None, None, None)
        assert (outer.stats().in_flight, inner.stats().in_flight) == (0, 1)
        await inner.__aexit__(None, None, None)

        assert inner.stats().in_flight == 0

    def test_limiters_may_be_left_in_the_order_they_were_entered(self) -> None:
        """Each is left by itself: the second goes on, knows its call, and still tells a deadlock."""
        first, second = Limiter(limit=1), Limiter(limit=1, per_second=100)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.record(3)
        with pytest.raises(DeadlockError):
            second.enter()
        second.__exit__(None, None, None)

        assert (first.stats().in_flight, second.stats().in_flight) == (0, 0)
        with second, pytest.raises(DeadlockError):
            second.enter()

    def test_leaving_what_was_not_entered_is_an_error(self) -> None:
        """A limiter that this context has not entered can't be left."""
        limiter = Limiter(limit=2, name="quotes")

        with pytest.raises(RuntimeError, match=r"^limiter quotes: this context is not inside a call"):
            limiter.__exit__(None, None, None)


class TestRates:
    async def test_no_window_is_over_and_calls_start_evenly(self, crowd: Crowd) -> None:
        """At 4 per second, ten calls that come together start 0.25 s apart."""
        crowd.limiter_of(per_second=4)

        times = await start_times(crowd, 10, step=0.125)

        assert times == [n / 4 for n in range(10)]

    async def test_a_burst_starts_back_to_back(self, crowd: Crowd) -> None:
        """With burst=3, three start at once, and the second still holds four."""
        crowd.limiter_of(per_second=4, burst=3)

        times = await start_times(crowd, 8, step=0.125)

        assert times == [0, 0, 0, 0.25, 1.0, 1.0, 1.0, 1.25]

    async def test_slot_and_token_come_in_one_moment(self, crowd: Crowd) -> None:
        """Calls that waited long for slots do not start together when the slots come free."""
        crowd.limiter_of(limit=3, per_second=10)
        calls = await crowd.come_all("abc")
        await crowd.advance(0.1)
        await crowd.advance(0.1)
        await crowd.come_all("defg")
        await crowd.advance(30)
        for call in calls:
            await crowd.finish(call)
        assert crowd.order == list("abcd")
        await crowd.advance(0.1)

        assert crowd.order == list("abcde")

    async def test_a_rate_under_one_is_a_call_in_several_seconds(self, crowd: Crowd) -> None:
        """per_second=0.5 admits one call every two seconds."""
        crowd.limiter_of(per_second=0.5)

        assert await start_times(crowd, 3, step=0.5) == pytest.approx([0, 2, 4])

    async def test_cost_takes_its_share_of_the_rate(self, crowd: Crowd) -> None:
        """A call of cost 5 at 10 per second delays the next by half a second."""
        crowd.limiter_of(per_second=10)
        await crowd.come("heavy", cost=5)
        await crowd.come("light")
        await crowd.advance(0.49)
        assert crowd.order == ["heavy"]
        await crowd.advance(0.01)

        assert crowd.order == ["heavy", "light"]

    async def test_a_cost_that_can_never_be_admitted_is_told(self, crowd: Crowd) -> None:
        """The error names both figures, and nobody is queued."""
        limiter = crowd.limiter_of(per_second=100, per_minute=20, name="tokens")
        call = await crowd.come(cost=21)

        assert isinstance(call.error, ValueError)
        assert str(call.error) == "limiter tokens: a cost of 21 can never be admitted, as the limit is 20 per minute"
        assert limiter.stats().waiting == 0

    @pytest.mark.parametrize(("per_minute", "cost"), [(20, 21), (1, 2)])
    async def test_it_is_told_behind_a_queue_too(self, crowd: Crowd, per_minute: float, cost: float) -> None:
        """It does not wait for its turn, which would hold up everybody behind it."""
        limiter = crowd.limiter_of(per_minute=per_minute)
        await crowd.come_all("ab")
        call = await crowd.come(cost=cost)

        assert isinstance(call.error, ValueError)
        assert limiter.stats().waiting == 1


class TestOrder:
    async def test_first_come_first_served(self, crowd: Crowd) -> None:
        """Waiters are admitted in the order of their coming."""
        crowd.limiter_of(limit=1)
        calls = await crowd.come_all("abcdef")
        for call in calls:
            await crowd.finish(call)

        assert crowd.order == list("abcdef")

    async def test_a_light_call_does_not_overtake_a_heavy_one(self, crowd: Crowd) -> None:
        """While a heavy call waits for its budget, light ones behind it wait as well."""
        crowd.limiter_of(per_minute=60, burst=60)
        await crowd.come("a", cost=50)
        await crowd.come("heavy", cost=60)
        await crowd.come("light", cost=1)
        await crowd.advance(59)
        assert crowd.order == ["a"]
        await crowd.advance(1)
        assert crowd.order == ["a", "heavy"]
        await crowd.advance(60)

        assert crowd.order == ["a", "heavy", "light"]

    async def test_a_newcomer_does_not_overtake(self, crowd: Crowd) -> None:
        """A call that comes when there is room for it, but not for the one ahead, waits its turn."""
        limiter = crowd.limiter_of(per_minute=10, burst=10)
        await crowd.come("a", cost=8)
        await crowd.come("b", cost=5)
        await crowd.come("c", cost=1)

        assert limiter.stats().waiting == 2

    async def test_a_frozen_loop_at_the_front_delays_only_itself(self) -> None:
        """A loop that does not run is admitted all the same, and whoever is behind it gets the next slot."""
        crowd = Crowd(ThreadCall)
        limiter = crowd.limiter_of(limit=2)
        first, second = await crowd.come_all("ab")
        frozen = threading.Event()
        thaw = threading.Event()

        async def freeze() -> None:
            task = asyncio.create_task(limiter.aenter())
            await until(lambda: limiter.stats().waiting == 1)
            frozen.set()
            thaw.wait(SAFETY_NET)
            (await task).leave()

        loop = threading.Thread(target=lambda: asyncio.run(freeze()))
        loop.start()
        await until(frozen.is_set)
        behind = await crowd.come("c")
        first.finish()
        await until(lambda: first.over)
        second.finish()
        await until(lambda: behind.admitted)
        thaw.set()
        await asyncio.to_thread(loop.join)

        await crowd.disperse()

    async def test_the_rate_alone_passes_those_who_wait_for_a_slot(self, crowd: Crowd) -> None:
        """Who needs no slot is not held up by full slots, and still waits for the rate in its turn."""
        crowd.limiter_of(limit=1, per_second=10)
        await crowd.come("slot")
        await crowd.come("waits")
        await crowd.come("rate 1", slots=0)
        await crowd.come("rate 2", slots=0)
        await crowd.advance(0.1)
        assert crowd.order == ["slot", "rate 1"]
        await crowd.advance(0.1)

        assert crowd.order == ["slot", "rate 1", "rate 2"]

    async def test_the_rate_alone_passes_at_once(self, crowd: Crowd) -> None:
        """With slots full and the rate free, a call for the rate alone does not wait."""
        limiter = crowd.limiter_of(limit=1, per_second=10)
        await crowd.come("slot")
        await crowd.come("waits")
        await crowd.advance(5)
        await crowd.come("rate", slots=0)

        assert crowd.order == ["slot", "rate"]
        assert limiter.stats().waiting == 1

    async def test_the_rate_alone_is_there_at_once_for_who_would_not_wait(self, crowd: Crowd) -> None:
        """Those who wait for a slot are not asked; nor does it take anybody to look at the queue."""
        limiter = crowd.limiter_of(limit=1, per_second=10)
        await crowd.come("slot")
        await crowd.come("waits")
        await crowd.advance(5)

        assert [limiter.acquire(blocking=False) for _ in range(2)] == [True, False]

    async def test_the_rate_alone_does_not_pass_those_who_wait_for_the_rate(self, crowd: Crowd) -> None:
        """With a free slot, the queue is one: nobody overtakes."""
        crowd.limiter_of(limit=5, per_second=10)
        await crowd.come("a")
        await crowd.come("b")
        await crowd.come("rate", slots=0)
        await crowd.advance(0.1)

        assert crowd.order == ["a", "b"]

    async def test_the_rate_alone_does_not_pass_a_heavier_call(self, crowd: Crowd) -> None:
        """With a free slot, even a call for which there would be room waits its turn."""
        crowd.limiter_of(limit=5, per_minute=10, burst=10)
        await crowd.come("a", cost=8)
        await crowd.come("heavy", cost=5)
        await crowd.come("rate", slots=0)

        assert crowd.order == ["a"]


def queued(limiter: Limiter, calls: int) -> list[Permit]:
    """Put calls into the queue of a full limiter, without anybody who waits for them."""
    permits = [Permit().ask(limiter, 1, 1) for _ in range(calls)]
    for permit in permits:
        assert not limiter._admit(permit)
    return permits


class TestGivingUp:
    async def test_a_timeout_says_how_long_and_behind_how_many(self, crowd: Crowd) -> None:
        """LimitTimeout is a TimeoutError that names the limiter, the wait and the calls ahead."""
        limiter = crowd.limiter_of(limit=1, name="quotes")
        await crowd.advance(100)
        await crowd.come()
        await crowd.come()
        late = await crowd.come(timeout=2.5)
        crowd.clock.advance(2.4)
        assert limiter.stats().waiting == 2
        crowd.clock.advance(0.1)
        await until(lambda: late.over)

        assert isinstance(late.error, LimitTimeout)
        assert str(late.error) == (
            "limiter quotes: not admitted within 2.5 s; 1 calls were ahead of it when it came. Raise timeout= or the "
            "limit, or send less."
        )
        assert limiter.stats().waiting == 1
        assert limiter.stats().rejected == 1

    async def test_a_timeout_during_a_pause_says_so(self, crowd: Crowd) -> None:
        """To raise the limit would not help; `repr` shows the pause too."""
        limiter = crowd.limiter_of(limit=5, name="quotes")
        await crowd.finish(await crowd.come(), ServerError(429, {"Retry-After": "3600"}))
        assert repr(limiter) == "<Limiter quotes 0/5 in flight, 0 waiting, paused for 3600 s>"
        late = await crowd.come(timeout=2)
        await crowd.advance(2)
        await until(lambda: late.over)

        assert str(late.error) == (
            "limiter quotes: not admitted within 2 s; 0 calls were ahead of it when it came. By a Retry-After all "
            "calls are paused for another 3598 s."
        )
        late = await crowd.come(timeout=3597.5)
        await crowd.advance(3597.5)
        await until(lambda: late.over)
        assert str(late.error).endswith("all calls are paused for another 0.5 s.")
        assert repr(limiter) == "<Limiter quotes 0/5 in flight, 0 waiting, paused for 0.5 s>"
        await crowd.advance(0.5)
        assert repr(limiter) == "<Limiter quotes 0/5 in flight, 0 waiting>"

    async def test_a_timeout_as_a_pause_ends_is_not_put_down_to_it(self, crowd: Crowd) -> None:
        """From then on something else kept the call out."""
        limiter = crowd.limiter_of(limit=2)
        _, failing = await crowd.come_all("ab")
        await crowd.finish(failing, ServerError(429, {"Retry-After": "2"}))
        limiter.resize(limit=1)
        late = await crowd.come(timeout=2)
        await crowd.advance(2)
        await until(lambda: late.over)

        assert str(late.error).endswith("Raise timeout= or the limit, or send less.")

    async def test_those_who_have_left_are_not_ahead(self, crowd: Crowd) -> None:
        """A waiter that gave up is not counted, though its place in the queue may be empty still."""
        crowd.limiter_of(limit=1)
        await crowd.come_all("ab")
        gone = await crowd.come("c", timeout=1)
        await crowd.come("d")
        crowd.clock.advance(1)
        await until(lambda: gone.over)
        late = await crowd.come("e", timeout=1)
        crowd.clock.advance(1)
        await until(lambda: late.over)

        assert "; 2 calls were ahead of it" in str(late.error)

    async def test_the_limiters_own_timeout_is_the_default(self, crowd: Crowd) -> None:
        """A call that names no timeout has the limiter's; one that names its own has that."""
        crowd.limiter_of(limit=1, timeout=1)
        await crowd.come()
        usual, patient = await crowd.come(), await crowd.come(timeout=5)
        crowd.clock.advance(1)
        await until(lambda: usual.over)
        crowd.clock.advance(3.9)
        assert not patient.over
        crowd.clock.advance(0.1)
        await until(lambda: patient.over)

        assert isinstance(usual.error, LimitTimeout)
        assert isinstance(patient.error, LimitTimeout)
        assert crowd.limiter.stats().rejected == 2

    async def test_those_behind_a_timeout_move_up(self, crowd: Crowd) -> None:
        """A heavy call that gives up lets the light one behind it in at once."""
        crowd.limiter_of(per_minute=10, burst=10)
        await crowd.come("a", cost=5)
        heavy = await crowd.come("heavy", cost=10, timeout=1)
        await crowd.come("light", cost=5)
        crowd.clock.advance(1)
        await until(lambda: heavy.over)
        await crowd.all_woken()

        assert crowd.order == ["a", "light"]

    async def test_a_call_that_is_admitted_has_no_timeout(self, crowd: Crowd) -> None:
        """The timeout is for waiting: it does not end a call, and its timer is gone."""
        crowd.limiter_of(limit=1)
        first, second = await crowd.come(), await crowd.come(timeout=5)
        await crowd.finish(first)
        assert repr(crowd.clock) == "<FakeClock 0 s, 0 timers>"
        await crowd.advance(10)

        assert second.admitted
        assert not second.over

    def test_all_are_taken_back_that_leave_while_the_queue_is_locked(self) -> None:
        """One that gave up, one that was called off, and one that failed."""
        limiter = Limiter(limit=1)
        holder = limiter.enter()
        waits = queued(limiter, 4)
        with limiter._lock:
            waits[0].give_up()
            waits[1].call_off()
            assert waits[1].gives_up()  # before it is out of the queue
            holder.leave(ValueError("it failed"))
        limiter._settle()

        assert [permit.at is None for permit in waits] == [True, True, False, True]
        assert (limiter.stats().in_flight, limiter.stats().waiting) == (1, 1)

    def test_all_are_taken_back_that_leave_after_one_that_was_called_off_as_it_was_let_in(self) -> None:
        """Whoever holds the lock may have seen the slot, but not yet who is called off."""
        limiter = Limiter(limit=2)
        holders = [limiter.enter() for _ in range(2)]
        waits = queued(limiter, 2)
        with limiter._lock:
            waits[0].call_off()
            holders[0].leave()
            limiter._pump(0)
            holders[1].leave(ValueError("it failed"))
        limiter._settle()

        assert [permit.at is None for permit in waits] == [False, False]
        assert (limiter.stats().in_flight, limiter.stats().waiting) == (2, 0)

    @pytest.mark.parametrize("ends", ["unused", "failed"])
    def test_who_leaves_in_two_threads_at_once_is_taken_back_once(self, ends: str, clock: FakeClock) -> None:
        """Both may see that it has not yet left."""
        limiter = Limiter(limit=9, per_minute=3, burst=3, clock=clock)
        limiter.enter()
        permit = limiter.enter()
        for _ in range(2):
            if ends == "unused":
                limiter._give_up(permit)
            else:
                limiter._give_back(permit, ValueError("it failed"))

        assert limiter.stats().in_flight == 1
        left = 2 if ends == "unused" else 1
        assert [limiter.acquire(blocking=False) for _ in range(left + 1)] == [True] * left + [False]

    async def test_a_task_that_somebody_else_wakes_gives_its_place_up(self) -> None:
        limiter = Limiter(limit=1)
        holder = limiter.enter()

        async def wait() -> None:
            async with limiter:
                pass

        task: Any = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task._fut_waiter.set_result(None)

        with pytest.raises(asyncio.CancelledError):
            await task
        holder.leave()
        assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)

    def test_a_call_admitted_while_it_times_out_keeps_its_slot(self, clock: FakeClock) -> None:
        """Whichever comes first counts: no call runs with a slot that was given back."""
        limiter = Limiter(limit=1, clock=clock)
        holder = limiter.enter()
        outcome: list[object] = []

        def wait() -> None:
            try:
                outcome.append(limiter.enter(timeout=1))
            except LimitTimeout as error:
                outcome.append(error)

        thread = threading.Thread(target=contextvars.Context().run, args=(wait,))
        thread.start()
        while not limiter.stats().waiting:
            thread.join(0.001)
        while not clock._timers:
            thread.join(0.001)
        lock = limiter._lock

        class Meddler:
            """A lock that lets another call end at the very moment when the expiry lets go of it."""

            def __enter__(self) -> None:
                lock.acquire()

            def __exit__(self, *_: object) -> None:
                limiter._lock = lock
                lock.release()
                holder.leave()

        limiter._lock = Meddler()  # type: ignore[assignment]  # the with statement is all that the expiry uses
        clock.advance(1)
        thread.join(SAFETY_NET)

        assert isinstance(outcome[0], LimitTimeout)
        assert limiter.stats().in_flight == 0

    async def test_a_waiter_that_times_out_and_is_cancelled_leaves_once(self, clock: FakeClock) -> None:
        """Both at the same moment count as one who has left, and those behind it are still there."""
        limiter = Limiter(limit=1, clock=clock)
        permit = await limiter.aenter()
        late, patient = [
            asyncio.create_task(limiter.aenter(timeout=timeout), context=contextvars.Context()) for timeout in (1, None)
        ]
        await until(lambda: limiter.stats().waiting == 2)
        clock.advance(1)
        late.cancel()
        await asyncio.wait([late])
        assert (limiter.stats().waiting, limiter.stats().rejected) == (1, 1)
        permit.leave()

        assert (await patient).at == 1

    def test_all_who_leave_meanwhile_are_taken_back(self) -> None:
        """Those who leave while another has the lock, be it that they wait or that they are inside."""
        limiter = Limiter(limit=Adaptive(min=1, max=9, start=2))
        inside = [contextvars.Context().run(limiter.enter) for _ in range(2)]
        waiting = Permit().ask(limiter, 1, 1)
        limiter._admit(waiting)
        with limiter._lock:
            waiting.give_up()
            for permit in inside:
                permit.end()

        stats = limiter.stats()
        assert (stats.waiting, stats.in_flight) == (0, 0)

    @pytest.mark.parametrize("limit", [1, Adaptive(min=1, max=1)], ids=["fixed", "adaptive"])
    def test_who_leaves_before_the_next_has_queued_lets_it_in(
        self, monkeypatch: pytest.MonkeyPatch, limit: int | Adaptive
    ) -> None:
        """Who leaves just after the slot was asked for sees no queue, so the one who queues looks again."""
        limiter = Limiter(limit=limit)
        permit = limiter.enter()
        admit = Meter.admit

        def racing(*args: Any) -> float:
            at = admit(*args)
            permit.end()
            return at

        monkeypatch.setattr(Meter, "admit", racing)
        waiting = Permit().ask(limiter, 1, 1)
        limiter._admit(waiting)

        assert waiting.at is not None

    def test_who_leaves_while_another_queues_lets_the_next_in(self) -> None:
        """The other has the lock, and looks once more after letting go of it."""
        inside: list[Permit] = []

        class Meddling(FakeClock):
            """A clock on which a call ends when somebody looks at it."""

            def now(self) -> float:
                while inside:
                    inside.pop().end()
                return super().now()

        limiter = Limiter(limit=1, clock=Meddling())
        permit = limiter.enter()
        first, second = Permit().ask(limiter, 1, 1), Permit().ask(limiter, 1, 1)
        limiter._admit(first)
        inside.append(permit)
        limiter._admit(second)

        assert first.at is not None

    async def test_a_cancelled_waiter_gives_its_place_back(self) -> None:
        """Those behind it move up, and neither its place nor its timer is left."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1)
        first = await crowd.come("a")
        cancelled = await crowd.come("b", timeout=60)
        await crowd.come("c")
        assert isinstance(cancelled, TaskCall)
        cancelled.task.cancel()
        await until(lambda: cancelled.over)
        assert limiter.stats().waiting == 1
        assert repr(crowd.clock) == "<FakeClock 0 s, 0 timers>"
        await crowd.finish(first)

        assert crowd.order == ["a", "c"]
        await crowd.disperse()

    async def test_a_waiter_cancelled_when_already_admitted_gives_all_back(self) -> None:
        """A task that is cancelled between its admission and its running costs neither slot nor token."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1, per_minute=2, burst=2)
        first = await crowd.come("a")
        cancelled = await crowd.come("b")
        assert isinstance(cancelled, TaskCall)
        limiter._settle()
        first.finish()
        while limiter.stats().admitted < 2:
            await asyncio.sleep(0)
            if limiter.stats().waiting == 0:
                cancelled.task.cancel()
        await until(lambda: cancelled.over)
        assert isinstance(cancelled.error, asyncio.CancelledError)
        third = await crowd.come("c")

        assert third.admitted
        await crowd.disperse()

    async def test_a_thread_that_is_interrupted_gives_its_place_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An error that strikes a waiting thread, as Ctrl-C does, takes it out of the queue."""
        limiter = Limiter(limit=1)
        permit = limiter.enter()

        def interrupt(*_: object) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(limiter, "_guard_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            contextvars.Context().run(limiter.enter)
        permit.leave()

        assert limiter.stats().waiting == 0
        assert limiter.stats().in_flight == 0

    async def test_a_wait_where_no_event_loop_runs_gives_its_place_back(self) -> None:
        """The error is asyncio's own."""
        limiter = Limiter(limit=1)
        permit = limiter.enter()

        def attempt() -> None:
            with pytest.raises(RuntimeError, match="no current event loop"):
                limiter.aenter().send(None)

        await asyncio.to_thread(contextvars.Context().run, attempt)
        assert limiter.stats().waiting == 0
        permit.leave()

        assert limiter.stats().in_flight == 0


class TestLeftElsewhere:
    """A limiter that is entered in one task and left in another, as a generator does that somebody else closes."""

    async def test_the_slot_comes_back(self) -> None:
        """The place is free, whoever has left it."""
        limiter = Limiter(limit=1)
        await asyncio.create_task(limiter.__aenter__())
        await asyncio.create_task(limiter.__aexit__(None, None, None))

        assert limiter.stats().in_flight == 0

    def test_the_slot_comes_back_in_a_thread(self) -> None:
        """The same, of `with`."""
        limiter = Limiter(limit=1)
        contextvars.Context().run(limiter.__enter__)
        contextvars.Context().run(limiter.__exit__, None, None, None)

        assert limiter.stats().in_flight == 0

    async def test_no_deadlock_is_certain_any_more(self) -> None:
        """Where it was entered the call still looks as if it were inside, so nobody is told."""
        limiter = Limiter(limit=1, timeout=0.01)
        await limiter.aenter()
        await asyncio.create_task(limiter.__aexit__(None, None, None), context=contextvars.Context())

        async with limiter:
            with pytest.raises(LimitTimeout):
                await limiter.aenter()

    async def test_its_error_pauses_all(self, clock: FakeClock) -> None:
        """The limiter learns from the error, whoever has left, and wherever."""
        limiter, refused = Limiter(limit=2, clock=clock), ServerError(429, {"Retry-After": "7"})
        await asyncio.create_task(limiter.__aenter__())
        await asyncio.create_task(limiter.__aexit__(ServerError, refused, None), context=contextvars.Context())

        assert repr(limiter) == "<Limiter 0/2 in flight, 0 waiting, paused for 7 s>"

    def test_its_error_pauses_all_in_a_thread(self, clock: FakeClock) -> None:
        """The same, of `with`."""
        limiter, refused = Limiter(limit=2, clock=clock), ServerError(429, {"Retry-After": "7"})
        contextvars.Context().run(limiter.__enter__)
        contextvars.Context().run(limiter.__exit__, ServerError, refused, None)

        assert repr(limiter) == "<Limiter 0/2 in flight, 0 waiting, paused for 7 s>"

    async def test_an_error_of_the_outer_of_two_pauses_all(self, clock: FakeClock) -> None:
        """A limiter that is left before the one inside it learns from its error too."""
        for path in ("sync", "async"):
            outer, inner = Limiter(limit=1, clock=clock), Limiter(limit=1, clock=clock)
            refused = ServerError(429, {"Retry-After": "7"})
            if path == "sync":
                outer.__enter__()
                inner.__enter__()
                outer.__exit__(ServerError, refused, None)
                inner.__exit__(None, None, None)
            else:
                await outer.__aenter__()
                await inner.__aenter__()
                await outer.__aexit__(ServerError, refused, None)
                await inner.__aexit__(None, None, None)

            assert repr(outer) == "<Limiter 0/1 in flight, 0 waiting, paused for 7 s>"
            assert repr(inner) == "<Limiter 0/1 in flight, 0 waiting>"

    async def test_a_task_whose_permit_was_taken_gives_another_slot_back(self) -> None:
        """An async generator is closed inside a call: its `async with` takes the permit of that."""
        limiter = Limiter(limit=3)

        async def stream() -> AsyncGenerator[None]:
            async with limiter:
                yield

        chunks = stream()
        await asyncio.create_task(anext(chunks))
        permit = await limiter.aenter()
        await chunks.aclose()
        assert limiter.stats().in_flight == 1
        permit.leave()
        permit.end()

        assert limiter.stats().in_flight == 0

    def test_a_call_whose_permit_was_taken_gives_another_slot_back(self) -> None:
        """A generator is closed inside a call: its `with` can't tell whose permit it finds, and takes the call's."""
        limiter = Limiter(limit=3)

        def stream() -> Generator[None]:
            with limiter:
                yield

        chunks, elsewhere = stream(), contextvars.copy_context()
        elsewhere.run(next, chunks)
        permit = limiter.enter()
        chunks.close()
        assert limiter.stats().in_flight == 1
        permit.leave()
        permit.end()

        assert limiter.stats().in_flight == 0

    async def test_a_bridged_call_whose_permit_was_taken_gives_another_slot_back(self) -> None:
        """It ends in another thread and context than it began in."""
        limiter = Limiter(limit=3)

        def stream() -> Generator[None]:
            with limiter:
                yield

        @concurrency(limiter=limiter)
        def close(chunks: Generator[None]) -> None:
            chunks.close()

        chunks = stream()
        contextvars.copy_context().run(next, chunks)
        await close.ainvoke(chunks)

        assert limiter.stats().in_flight == 0

    @pytest.mark.parametrize("within", [contextlib.nullcontext(), Limiter(limit=1)], ids=["itself", "another"])
    async def test_a_call_in_a_task_whose_permit_was_taken_gives_another_slot_back(
        self, within: contextlib.AbstractAsyncContextManager[Any]
    ) -> None:
        """An async generator is closed inside a call that runs to its end there, or within another limiter there."""
        limiter = Limiter(limit=3)

        async def stream() -> AsyncGenerator[None]:
            async with limiter:
                yield

        @concurrency(limiter=limiter)
        async def close(chunks: AsyncGenerator[None]) -> None:
            async with within:
                await chunks.aclose()

        chunks = stream()
        await asyncio.create_task(anext(chunks))
        await close.ainvoke(chunks)

        assert limiter.stats().in_flight == 0

    async def test_a_permit_that_is_not_the_innermost_is_taken_too_in_a_task(self) -> None:
        """The `async with` ends within a call of another limiter; whose slot it has is told when the others leave."""
        limiter, other = Limiter(limit=3), Limiter(limit=3)
        running = await asyncio.create_task(limiter.aenter())
        async with limiter:
            kept, inner = await limiter.aenter(), await other.aenter()
        kept.leave()
        inner.leave()
        kept.leave()

        assert (limiter.stats().in_flight, other.stats().in_flight) == (1, 0)
        running.leave()
        assert limiter.stats().in_flight == 0

    def test_a_permit_that_is_not_the_innermost_is_taken_too_in_a_thread(self) -> None:
        """The `with` ends within a call of another limiter; whose slot it has is told when the others leave."""
        limiter, other = Limiter(limit=3), Limiter(limit=3)
        running = contextvars.Context().run(limiter.enter)
        with limiter:
            kept, inner = limiter.enter(), other.enter()
        kept.leave()
        inner.leave()
        kept.leave()

        assert (limiter.stats().in_flight, other.stats().in_flight) == (1, 0)
        running.leave()
        assert limiter.stats().in_flight == 0

    @pytest.mark.parametrize("when", ["within", "after"])
    def test_a_permit_left_by_hand_gives_one_slot_back_in_a_thread(self, when: str) -> None:
        """It ends the call before its `with` block does, or has no effect."""
        limiter = Limiter(limit=3)
        others = [limiter.enter(), limiter.enter()]
        with limiter as call:
            if when == "within":
                call.leave()
                call.leave()
                assert limiter.stats().in_flight == 2
        call.leave()

        assert limiter.stats().in_flight == 2
        for other in reversed(others):
            other.leave()
        assert limiter.stats().in_flight == 0

    @pytest.mark.parametrize("when", ["within", "after"])
    async def test_a_permit_left_by_hand_gives_one_slot_back_in_a_task(self, when: str) -> None:
        """It ends the call before its `async with` block does, or has no effect."""
        limiter = Limiter(limit=3)
        others = [await limiter.aenter(), await limiter.aenter()]
        async with limiter as call:
            if when == "within":
                call.leave()
                call.leave()
                assert limiter.stats().in_flight == 2
        call.leave()

        assert limiter.stats().in_flight == 2
        for other in reversed(others):
            other.leave()
        assert limiter.stats().in_flight == 0

    def test_a_permit_left_elsewhere_ends_no_other_block(self) -> None:
        """Blocks within it, and around it, end their own calls."""
        limiter = Limiter(limit=3)
        with limiter:
            with limiter as call:
                with limiter:
                    thread = threading.Thread(target=call.leave)
                    thread.start()
                    thread.join()
                    assert limiter.stats().in_flight == 2
                assert limiter.stats().in_flight == 1
            assert limiter.stats().in_flight == 1
        assert limiter.stats().in_flight == 0

    @pytest.mark.parametrize("first", ["leave", "enter"])
    @pytest.mark.parametrize("where", ["there", "elsewhere"])
    def test_a_block_left_by_hand_ends_no_call_that_was_entered_in_it(self, first: str, where: str) -> None:
        """Such a call may go on after the block, there or at another limiter."""
        limiter = Limiter(limit=3)
        entered = limiter if where == "there" else Limiter(limit=3)
        other = contextvars.Context().run(limiter.enter)
        with limiter as call:
            if first == "leave":
                call.leave()
            inner = entered.enter()
            call.leave()
        assert limiter.stats().in_flight == 1 + (entered is limiter)
        inner.leave()
        other.leave()

        assert limiter.stats().in_flight == entered.stats().in_flight == 0

    def test_only_the_end_of_its_own_block_gives_no_slot_back(self) -> None:
        """Where a permit was left by hand, and other blocks of the limiter end in its context."""
        limiter = Limiter(limit=3)

        def stream() -> Generator[None]:
            with limiter:
                yield

        streams = [stream(), stream()]
        for each in streams:
            contextvars.Context().run(next, each)
        with limiter as call:
            call.leave()
            within = contextvars.copy_context()
            within.run(streams[0].close)
        within.run(streams[1].close)

        assert limiter.stats().in_flight == 0

    @pytest.mark.parametrize("ends", ["the block", "the permit"])
    def test_a_permit_left_as_its_block_ends_gives_one_slot_back(
        self, ends: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another thread does so, at the worst moment."""
        limiter = Limiter(limit=3)
        other = contextvars.Context().run(limiter.enter)
        finish, end = Permit.finish_innermost, Permit.end
        block = contextlib.ExitStack()
        call = block.enter_context(limiter)

        def leave_first(permit: Permit, error: BaseException | None) -> None:
            monkeypatch.undo()
            permit.leave()
            finish(permit, error)

        def end_block_first(permit: Permit, error: BaseException | None) -> None:
            monkeypatch.undo()
            block.close()
            end(permit, error)

        if ends == "the block":
            monkeypatch.setattr(Permit, "finish_innermost", leave_first)
            block.close()
        else:
            monkeypatch.setattr(Permit, "end", end_block_first)
            call.leave()
        assert limiter.stats().in_flight == 1
        other.leave()

    def test_an_error_that_is_left_with_by_hand_is_learned_from(self) -> None:
        """Also where the block then ends without an error."""
        limiter = Limiter(limit=Adaptive(min=1, max=8, start=8))
        with limiter as call:
            call.leave(TimeoutError())

        assert limiter.stats().limit == 1

    async def test_each_exit_gives_one_slot_back(self) -> None:
        """The exit does not tell whose slot it is. The numbers are right all the same, whoever leaves next."""
        limiter = Limiter(limit=5)
        inside = [await asyncio.create_task(limiter.aenter()) for _ in range(5)]
        free: list[int] = []
        for leave in (0, None, 1, 2, None):
            if leave is None:
                await asyncio.create_task(limiter.__aexit__(None, None, None), context=contextvars.Context())
            else:
                inside[leave].leave()
            free.append(5 - limiter.stats().in_flight)

        assert free == [1, 2, 3, 4, 5]

    async def test_who_left_is_not_counted_twice(self) -> None:
        """A call that ends when its slot has been given back for it frees another's, and only once."""
        limiter = Limiter(limit=3)
        inside = [await asyncio.create_task(limiter.aenter()) for _ in range(3)]
        await asyncio.create_task(limiter.__aexit__(None, None, None), context=contextvars.Context())
        for permit in (inside[0], inside[0], inside[1], inside[1]):
            permit.leave()

        assert limiter.stats().in_flight == 0

    def test_who_leaves_as_its_slot_is_looked_for_is_not_the_one(self) -> None:
        """Another's slot is given back for the unknown one."""
        limiter = Limiter(limit=2)
        left, inside = limiter.enter(), limiter.enter()
        left.leave()

        class Late(set[Permit]):
            def __iter__(self) -> Iterator[Permit]:
                return iter((left, inside))

        limiter._meter.inside = Late((inside,))
        limiter._give_back_other(None)

        assert limiter.stats().in_flight == 0
        assert [permit in turnstile._robbed for permit in (left, inside)] == [False, True]


class TestArguments:
    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
    def test_a_bad_timeout_is_told(self, timeout: float) -> None:
        """A wait of no time, or of no sensible time, can't be meant."""
        with pytest.raises(ValueError, match=f"^timeout={timeout!r}: must be above 0 and finite, as in timeout=30$"):
            Limiter(limit=1, timeout=timeout)

    @pytest.mark.parametrize("cost", [float("nan"), -5, float("inf"), "3", None])
    async def test_a_bad_cost_is_told(self, cost: Any) -> None:
        """On both paths, and nothing is taken."""
        limiter = Limiter(limit=1, per_second=5)
        with pytest.raises((TypeError, ValueError), match=r"^cost=.*, as in cost=20$"):
            limiter.enter(cost)
        with pytest.raises((TypeError, ValueError), match=r"^cost=.*, as in cost=20$"):
            await limiter.aenter(cost)
        assert limiter.stats().admitted == 0

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "3", True])
    async def test_a_bad_timeout_of_a_call_is_told(self, timeout: Any) -> None:
        """On both paths, also when the call need not wait, and nothing is taken."""
        limiter = Limiter(limit=1)
        with pytest.raises((TypeError, ValueError), match=r"^timeout=.*, as in timeout=30$"):
            limiter.enter(timeout=timeout)
        with pytest.raises((TypeError, ValueError), match=r"^timeout=.*, as in timeout=30$"):
            await limiter.aenter(timeout=timeout)
        assert limiter.stats().admitted == 0

    @pytest.mark.parametrize("slots", [2, -1, 0.5, None])
    async def test_a_bad_number_of_slots_is_told(self, slots: Any) -> None:
        """A call takes one, or none."""
        limiter = Limiter(limit=1)
        with pytest.raises(ValueError, match=rf"^slots={slots}: a call takes one slot, or with slots=0 the rate alone"):
            limiter.enter(slots=slots)
        with pytest.raises(ValueError, match=r"^slots="):
            await limiter.aenter(slots=slots)
        assert limiter.stats().admitted == 0

    def test_a_number_too_large_for_a_float_is_told(self) -> None:
        """As any that is not finite."""
        with pytest.raises(ValueError, match=r"^per_second=inf: must be above 0 and finite"):
            Limiter(per_second=10**400)

    def test_large_numbers_can_be_read(self) -> None:
        """All their digits count."""
        limiter = Limiter(per_minute=1_234_567)

        assert repr(limiter) == "<Limiter 1234567 per minute, 0 waiting>"
        with pytest.raises(ValueError, match="a cost of 1234568 can never be admitted, as the limit is 1234567 per"):
            limiter.enter(cost=1_234_568)

    def test_a_burst_of_one_goes_with_any_rate(self) -> None:
        """It is what every rate has by default."""
        assert Limiter(per_second=0.5, burst=1)._limits.burst == 1

    def test_a_copy_is_the_limiter_itself(self) -> None:
        """A limit is one wherever it stands; and it holds in one process."""
        limiter = Limiter(limit=1, name="quotes")

        assert copy.copy(limiter) is limiter
        assert copy.deepcopy({"limiter": limiter})["limiter"] is limiter
        with pytest.raises(pickle.PicklingError, match="limiter quotes: holds in one process"):
            pickle.dumps(limiter)

    def test_it_knows_whether_it_bounds_calls(self) -> None:
        """A limit does, a rate does not."""
        assert Limiter(limit=1)._bounds_calls
        assert not Limiter(per_second=1)._bounds_calls


def test_it_has_few_public_names() -> None:
    """A subclass may call its own as it likes: all else that a limiter has inside is private."""
    names = {name for name in dir(Limiter(limit=1)) if not name.startswith("_")}

    assert names == {"aacquire", "acquire", "aenter", "enter", "name", "record", "resize", "stats", "timeout"}
