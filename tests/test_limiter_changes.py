"""What changes a limit while calls wait: a pause, `resize`, an adaptive limit, a corrected cost."""

import asyncio
import contextvars
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from asyncify.adaptive import Adaptive
from asyncify.clock import Timer
from asyncify.limiter import Limiter
from asyncify.permits import Permit
from asyncify.testing import FakeClock
from tests.crowd import Crowd, ServerError
from tests.waiting import SAFETY_NET, until


class TestPause:
    async def test_retry_after_in_seconds_pauses_everyone(self, crowd: Crowd) -> None:
        """Those who wait and those who come are held until then; then calls start at the pace."""
        crowd.limiter_of(limit=3, per_second=10)
        call = await crowd.come("a")
        await crowd.advance(1)
        await crowd.finish(call, ServerError(429, {"Retry-After": "3"}))
        await crowd.come_all("bcd")
        await crowd.advance(2.9)
        assert crowd.order == ["a"]
        await crowd.advance(0.1)
        assert crowd.order == ["a", "b"]
        await crowd.advance(0.1)

        assert crowd.order == ["a", "b", "c"]

    async def test_retry_after_as_a_date_pauses_everyone(self, crowd: Crowd) -> None:
        """A date is as good as a number of seconds."""
        crowd.limiter_of(limit=3)
        call = await crowd.come("a")
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
        await crowd.finish(call, ServerError(503, {"retry-after": date}))
        await crowd.come("b")
        await crowd.advance(3500)
        assert crowd.order == ["a"]
        await crowd.advance(100)

        assert crowd.order == ["a", "b"]

    async def test_a_slot_that_comes_free_in_a_pause_is_given_to_nobody(self, crowd: Crowd) -> None:
        """The call that ends well says nothing against the pause that another one has learned of."""
        crowd.limiter_of(limit=1)
        first = await crowd.come("a")
        refused = await crowd.come("b", slots=0)
        await crowd.come("c")
        await crowd.finish(refused, ServerError(429, {"Retry-After": "3"}))
        await crowd.finish(first)
        assert crowd.order == ["a", "b"]
        await crowd.advance(3)

        assert crowd.order == ["a", "b", "c"]

    async def test_a_slot_that_comes_free_is_not_given_to_who_needs_none(self) -> None:
        """Though the pause is over for which such a call waits, and the clock has only not called back yet."""

        class LateClock(FakeClock):
            def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
                return super().call_at(when + 10, callback)

        clock = LateClock()
        limiter = Limiter(limit=1, clock=clock)
        inside = limiter.enter()
        limiter.enter(slots=0).leave(ServerError(429, {"Retry-After": "3"}))
        waiting = asyncio.create_task(limiter.aacquire())
        await until(lambda: limiter.stats().waiting == 1)
        clock.advance(4)
        inside.leave()
        await asyncio.wait_for(waiting, SAFETY_NET)

        assert limiter.stats().in_flight == 0

    def test_a_pause_that_nobody_waits_for_counts_from_the_refusal(self, clock: FakeClock) -> None:
        """That is noted when the call fails, and not when the next one comes."""
        limiter = Limiter(limit=3, clock=clock)
        limiter.enter().leave(ServerError(429, {"Retry-After": "5"}))
        clock.advance(3)
        waiting = Permit().ask(limiter, 1, 1)
        assert not limiter._admit(waiting)
        clock.advance(2)

        assert waiting.at == 5

    async def test_a_pause_counts_from_the_refusal(self, crowd: Crowd) -> None:
        """When nobody was there to hear of it, it is over all the same when its time has passed."""
        crowd.limiter_of(limit=3)
        call = await crowd.come("a")
        await crowd.finish(call, ServerError(429, {"Retry-After": "3"}))
        await crowd.advance(2)
        await crowd.come("b")
        await crowd.advance(0.9)
        assert crowd.order == ["a"]
        await crowd.advance(0.1)

        assert crowd.order == ["a", "b"]

    async def test_another_error_pauses_nobody(self, crowd: Crowd) -> None:
        """Only a 429 or a 503 tells to wait, whatever its headers."""
        crowd.limiter_of(limit=3)
        call = await crowd.come("a")
        await crowd.finish(call, ServerError(500, {"Retry-After": "3"}))
        await crowd.come("b")

        assert crowd.order == ["a", "b"]

    def test_with_passes_the_error_on(self, clock: FakeClock) -> None:
        """An error inside the block pauses the limiter."""
        limiter = Limiter(limit=3, clock=clock)
        with pytest.raises(ServerError), limiter:
            raise ServerError(429, {"Retry-After": "3"})

        assert not limiter.acquire(blocking=False)
        clock.advance(3)
        assert limiter.acquire(blocking=False)

    async def test_async_with_passes_the_error_on(self, clock: FakeClock) -> None:
        """An error inside the block pauses the limiter."""
        limiter = Limiter(limit=3, clock=clock)
        with pytest.raises(ServerError):
            async with limiter:
                raise ServerError(429, {"Retry-After": "3"})

        assert not await limiter.aacquire(blocking=False)
        clock.advance(3)
        assert await limiter.aacquire(blocking=False)


class TestJudging:
    def test_an_error_that_can_not_be_looked_at_goes_on(self) -> None:
        """The call's own error arrives, and the slot is free."""

        class Unread(Exception):  # noqa: N818  (as it says)
            @property
            def response(self) -> object:
                raise RuntimeError("not read yet")

        limiter = Limiter(limit=1, name="quotes")
        with pytest.raises(Unread) as caught, limiter:
            raise Unread

        assert caught.value.__notes__ == [
            "limiter quotes: whether this is a congestion can't be told: RuntimeError('not read yet')"
        ]
        assert limiter.stats().in_flight == 0

    async def test_a_judgement_that_fails_hides_no_error(self) -> None:
        """What `on=` does not know is no congestion."""
        limiter = Limiter(limit=Adaptive(min=1, max=9, start=4, on=lambda error: error.status == 429))  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="mine") as caught:
            async with limiter:
                raise ValueError("mine")

        assert "has no attribute 'status'" in caught.value.__notes__[0]
        assert (limiter.stats().in_flight, limiter.stats().limit) == (0, 4)

    def test_a_judgement_that_is_neither_yes_nor_no_costs_no_slot(self) -> None:
        """Asked for its truth, it raises; that is noted on the error, which goes on."""

        class Unclear:
            def __bool__(self) -> bool:
                raise ValueError("the truth value is ambiguous")

        judge: Any = lambda error: Unclear()  # noqa: E731
        limiter = Limiter(limit=Adaptive(start=2, on=judge))
        with pytest.raises(KeyError) as caught, limiter:
            raise KeyError

        assert limiter.stats().in_flight == 0
        assert "the truth value is ambiguous" in caught.value.__notes__[0]

    def test_a_judgement_that_fails_hides_no_retry_after(self) -> None:
        """Whether the limit has to shrink is another question than how long all calls have to pause."""
        limiter = Limiter(limit=Adaptive(on=lambda error: error.status == 429), clock=FakeClock())  # type: ignore[attr-defined]
        with pytest.raises(ServerError), limiter:
            raise ServerError(429, {"Retry-After": "5"})

        assert repr(limiter) == "<Limiter 0/1 in flight, 0 waiting, paused for 5 s>"


class TestResize:
    async def test_more_slots_let_those_who_wait_in(self, crowd: Crowd) -> None:
        """A raised limit is filled from the queue at once."""
        limiter = crowd.limiter_of(limit=1)
        await crowd.come_all("abcd")
        limiter.resize(limit=3)
        await crowd.all_woken()

        assert sorted(crowd.order) == list("abc")

    async def test_fewer_slots_wait_until_enough_have_ended(self, crowd: Crowd) -> None:
        """A lowered limit ends no call, and admits none before there is room under it."""
        limiter = crowd.limiter_of(limit=3)
        calls = await crowd.come_all("abcd")
        limiter.resize(limit=1)
        await crowd.finish(calls[0])
        await crowd.finish(calls[1])
        assert crowd.order == list("abc")
        await crowd.finish(calls[2])

        assert crowd.order == list("abcd")

    async def test_a_faster_rate_holds_for_those_who_wait(self, crowd: Crowd) -> None:
        """Nobody waits for a turn that the old rate had given."""
        limiter = crowd.limiter_of(per_hour=1)
        await crowd.come_all("abc")
        await crowd.advance(1)
        limiter.resize(per_hour=3600)
        await crowd.all_woken()
        assert crowd.order == ["a", "b"]
        await crowd.advance(1)

        assert crowd.order == ["a", "b", "c"]

    async def test_who_is_turned_away_hears_why_though_the_limit_is_back(self) -> None:
        """A second change comes before the task that waits runs again."""
        limiter = Limiter(per_second=5, clock=FakeClock())
        await limiter.aenter(cost=5)
        waiting = asyncio.create_task(limiter.aenter(cost=3))
        await until(lambda: limiter.stats().waiting == 1)
        limiter.resize(per_second=2)
        limiter.resize(per_second=5)

        with pytest.raises(ValueError, match=r"a cost of 3 can never be admitted, as the limit is 2 per second$"):
            await waiting

    async def test_a_cost_above_the_new_limit_is_turned_away(self, crowd: Crowd) -> None:
        """A waiter that could never be admitted any more is told, and those behind it move up."""
        limiter = crowd.limiter_of(per_minute=100, burst=100)
        await crowd.come("a", cost=10)
        heavy = await crowd.come("heavy", cost=95)
        await crowd.come("light", cost=10)
        just = await crowd.come("just", cost=50)
        limiter.resize(per_minute=50, burst=50)
        await until(lambda: heavy.over)
        await crowd.all_woken()

        assert isinstance(heavy.error, ValueError)
        assert str(heavy.error) == "limiter: a cost of 95 can never be admitted, as the limit is 50 per minute"
        assert crowd.order == ["a", "light"]
        assert not just.over
        assert limiter.stats().rejected == 1

    def test_what_is_not_named_stays(self) -> None:
        """Each limit is changed alone; None takes it away."""
        limiter = Limiter(limit=3, per_second=10, per_hour=99, burst=2)
        limiter.resize(per_second=20)
        assert repr(limiter) == "<Limiter 0/3 in flight, 20 per second, 99 per hour, 0 waiting>"
        assert limiter._limits.burst == 2
        limiter.resize(limit=None, per_minute=50, per_hour=None, burst=None)

        assert repr(limiter) == "<Limiter 20 per second, 50 per minute, 0 waiting>"
        assert limiter._limits.burst == 1

    def test_who_leaves_gives_its_own_slot_back(self) -> None:
        """Those who are still inside are the others, also where each end is learnt from."""
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=20))
        permits = [contextvars.Context().run(limiter.enter) for _ in range(20)]
        for permit in permits[:10]:
            permit.end()
        limiter.stats()

        assert limiter._meter.inside == set(permits[10:])

    async def test_one_who_does_not_wait_yet_keeps_nobody_from_being_woken(self) -> None:
        """Of two who are let in at once the first has queued and not begun to wait: it sees that by itself."""
        limiter = Limiter(limit=2)
        inside = [contextvars.Context().run(limiter.enter) for _ in range(2)]
        early = Permit().ask(limiter, 1, 1)
        limiter._admit(early)
        waiting = asyncio.create_task(limiter.aenter(), context=contextvars.Context())
        await until(lambda: limiter.stats().waiting == 2)
        with limiter._lock:
            for permit in inside:
                permit.end()
        limiter.stats()

        assert early.at is not None
        (await asyncio.wait_for(waiting, SAFETY_NET)).leave()

    async def test_a_refused_change_keeps_nobody_waiting(self) -> None:
        """Who leaves just when a change of the limits is refused lets the next one in."""
        limiter = Limiter(limit=1)
        permit = await limiter.aenter()
        waiting = asyncio.create_task(limiter.aenter(), context=contextvars.Context())
        await until(lambda: limiter.stats().waiting == 1)

        class Meddling(float):
            """A number that ends a call when somebody looks what it is."""

            def __float__(self) -> float:
                permit.leave()
                return 0.0

        with pytest.raises(ValueError, match="per_second"):
            limiter.resize(per_second=Meddling(1))

        (await asyncio.wait_for(waiting, SAFETY_NET)).leave()

    @pytest.mark.parametrize("path", ["sync", "async"])
    def test_a_call_that_is_about_to_wait_is_told_that_it_never_can(self, path: str) -> None:
        """The limits change when it has queued, and before it can be woken."""

        class Changing(Limiter):
            def _admit(self, permit: Permit, *, queue: bool = True) -> bool:
                admitted = super()._admit(permit, queue=queue)
                if not admitted:
                    self.resize(per_second=5)
                return admitted

        limiter = Changing(per_second=10)
        limiter.enter(cost=10).leave()
        ways: dict[str, Callable[[], Any]] = {
            "sync": lambda: limiter.enter(cost=10),
            "async": lambda: asyncio.run(asyncio.wait_for(limiter.aenter(cost=10), SAFETY_NET)),
        }
        with pytest.raises(ValueError, match="a cost of 10 can never be admitted"):
            ways[path]()
        assert limiter.stats().waiting == 0

    def test_nothing_left_to_limit_is_an_error(self) -> None:
        """A refused change leaves the limiter as it was."""
        limiter = Limiter(limit=3)
        with pytest.raises(TypeError, match=r"^nothing to limit"):
            limiter.resize(limit=None)

        assert repr(limiter) == "<Limiter 0/3 in flight, 0 waiting>"
        assert limiter.acquire(blocking=False)

    def test_an_adaptive_limit_may_take_the_place_of_a_number(self) -> None:
        """A resize to Adaptive begins where that begins; a resize of something else keeps it."""
        limiter = Limiter(limit=3)
        limiter.resize(limit=Adaptive(min=2, max=9, start=5))
        limiter.resize(per_second=10)

        assert limiter.stats().limit == 5
        with limiter:
            pass
        with pytest.raises(ServerError), limiter:
            raise ServerError(429)
        assert limiter.stats().limit == 2


class TestAdaptive:
    def test_a_congestion_shrinks_and_other_errors_do_not(self) -> None:
        """A 429 halves what was in flight; a plain error changes nothing."""
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=10), clock=FakeClock())
        permits = [limiter.enter() for _ in range(8)]
        permits.pop().leave(ValueError())
        assert limiter.stats().limit == 10
        permits.pop().leave(ServerError(429))

        assert limiter.stats().limit == 3
        for permit in permits:
            permit.leave()

    def test_successes_grow_it(self) -> None:
        """As many successes as there are slots, while they are used, raise the limit for those who wait."""
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=2), clock=FakeClock())
        permits = [limiter.enter(), limiter.enter()]
        for permit in permits:
            permit.leave()

        assert limiter.acquire()
        assert limiter.stats().limit in (3, 4)

    def test_taking_the_rate_alone_is_no_success(self) -> None:
        """An `acquire` says nothing of how the call ended."""
        limiter = Limiter(limit=Adaptive(min=2, max=20), clock=FakeClock())
        with limiter:
            for _ in range(9):
                limiter.acquire()

            assert limiter.stats().limit == 2

    @pytest.mark.parametrize(("pause", "seconds"), [(0, 6), (2, 8)])
    def test_a_refusal_that_pauses_puts_the_next_try_off(self, pause: int, seconds: int) -> None:
        """So many seconds after a congestion the limit is above what hurt, unless each try costs a pause."""
        clock = FakeClock()
        limiter = Limiter(limit=Adaptive(min=1, max=99, start=8), clock=clock)
        permits = [contextvars.Context().run(limiter.enter) for _ in range(8)]
        permits[0].end(ServerError(429, {"Retry-After": str(pause)}))
        for permit in permits[1:]:
            permit.end()
        for _ in range(10 * seconds):
            clock.advance(0.1)
            if clock.now() > pause:
                permits = [contextvars.Context().run(limiter.enter) for _ in range(limiter._limits.limit or 0)]
                for permit in permits:
                    permit.end()

        assert ((limiter.stats().limit or 0) > 8) is (pause == 0)

    def test_it_recovers_after_a_congestion(self) -> None:
        """Time and successes, while the slots are in use, raise a limit that was shrunk."""
        clock = FakeClock()
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=10), clock=clock)
        permits = [limiter.enter() for _ in range(8)]
        permits.pop().leave(ServerError(429))
        shrunk = limiter.stats().limit or 0
        while limiter.stats().in_flight >= shrunk:
            permits.pop().leave()
        for _ in range(30):
            clock.advance(1)
            limiter.enter().leave()

        assert 0 < shrunk < (limiter.stats().limit or 0)
        for permit in permits:
            permit.leave()


class TestRecord:
    def test_a_cost_known_afterwards_is_corrected(self, clock: FakeClock) -> None:
        """What was estimated too low counts in full, from inside the call."""
        limiter = Limiter(per_minute=100, burst=100, clock=clock)
        with limiter:
            limiter.record(100)
        assert not limiter.acquire(blocking=False)
        clock.advance(60)

        assert limiter.acquire(blocking=False)

    async def test_arecord_in_a_task(self, clock: FakeClock) -> None:
        """What was estimated too high comes back at once, for those who wait too."""
        limiter = Limiter(per_minute=100, burst=100, clock=clock)
        permit = await limiter.aenter(cost=100)
        waiting = asyncio.get_running_loop().create_task(limiter.aenter(cost=60), context=contextvars.Context())
        await until(lambda: limiter.stats().waiting == 1)
        limiter.record(40)
        (await waiting).leave()
        permit.leave()

        assert limiter.stats().admitted == 2

    def test_the_last_record_counts(self, clock: FakeClock) -> None:
        """A second correction replaces the first."""
        limiter = Limiter(per_minute=100, burst=100, clock=clock)
        with limiter:
            limiter.record(90)
            limiter.record(50)
        with limiter:
            limiter.record(50)

        assert not limiter.acquire(blocking=False)

    def test_the_outer_of_two_limiters_is_corrected(self) -> None:
        """A correction inside a call of another limiter, too, goes to the call of this one."""
        tokens = Limiter(per_minute=10, burst=10, clock=FakeClock())
        with tokens:
            dear = Limiter(per_minute=9, burst=9).enter(cost=9)
            tokens.record(10)
            dear.leave()

        assert not tokens.acquire(blocking=False)

    def test_outside_a_call_is_an_error(self) -> None:
        """There is nothing to correct."""
        with pytest.raises(RuntimeError, match=r"^limiter: this context is not inside a call that it has admitted$"):
            Limiter(per_second=1).record(5)

    @pytest.mark.parametrize(
        ("cost", "error", "message"),
        [
            (-1, ValueError, "actual=-1: must be finite and not negative, as in record(120)"),
            (float("inf"), ValueError, "actual=inf: must be finite and not negative, as in record(120)"),
            (True, TypeError, "actual=True: must be a number, as in record(120)"),
            ("5", TypeError, "actual='5': must be a number, as in record(120)"),
        ],
    )
    def test_a_bad_cost_is_told(self, cost: Any, error: type[Exception], message: str) -> None:
        """What was charged stays charged."""
        limiter = Limiter(per_second=1, clock=FakeClock())
        with limiter, pytest.raises(error) as caught:
            limiter.record(cost)

        assert str(caught.value) == message
        assert not limiter.acquire(blocking=False)

    def test_a_call_may_turn_out_to_cost_nothing(self) -> None:
        """Zero is a cost."""
        limiter = Limiter(per_second=1, clock=FakeClock())
        with limiter:
            limiter.record(0)

        assert limiter.acquire(blocking=False)
