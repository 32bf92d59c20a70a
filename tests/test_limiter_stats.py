"""What a limiter tells of itself, and what it keeps in memory."""

import asyncio
import contextvars
import gc
import threading
import weakref
from typing import Any

import pytest

from asyncify.adaptive import Adaptive
from asyncify.limiter import Limiter, LimiterStats
from asyncify.permits import Permit
from asyncify.testing import FakeClock
from tests.crowd import Crowd, ServerError, TaskCall
from tests.waiting import SAFETY_NET, until


class TestStats:
    async def test_counts(self, crowd: Crowd) -> None:
        """Who is inside, who waits, who came in and who was turned away."""
        limiter = crowd.limiter_of(limit=2, per_second=100, burst=100)
        calls = await crowd.come_all("abcd")
        await crowd.finish(calls[0])
        late = await crowd.come(timeout=1)
        crowd.clock.advance(1)
        await until(lambda: late.over)

        stats = limiter.stats()
        assert (stats.in_flight, stats.waiting, stats.admitted, stats.rejected, stats.limit) == (2, 1, 3, 1, 2)

    async def test_waits(self, crowd: Crowd) -> None:
        """Percentiles are over all admissions, those that did not wait included, in seconds."""
        limiter = crowd.limiter_of(limit=1)
        calls = await crowd.come_all("abcd")
        for call in calls[:3]:
            await crowd.advance(2)
            await crowd.finish(call)

        stats = limiter.stats()
        assert (stats.wait_p50, stats.wait_p95, stats.wait_p99) == (4, 6, 6)

    def test_waits_are_of_the_last_thousand(self, clock: FakeClock) -> None:
        """A wait long ago is forgotten after a thousand admissions more."""
        limiter = Limiter(limit=1, clock=clock)
        permit = limiter.enter()
        thread = threading.Thread(target=contextvars.Context().run, args=(lambda: limiter.enter().end(),))
        thread.start()
        while not limiter.stats().waiting:
            thread.join(0.001)
        clock.advance(9)
        permit.leave()
        thread.join(SAFETY_NET)
        for _ in range(49):
            limiter.enter().leave()
        assert limiter.stats().wait_p99 == 9
        assert limiter.stats().wait_p50 == 0
        for _ in range(950):
            limiter.enter().leave()
        assert limiter.stats().wait_p99 == 0
        assert 9 in [wait for _, wait in limiter._waits]
        limiter.enter().leave()

        assert limiter.stats() == LimiterStats(0, 0, 1002, 0, 1, 0.0, 0.0, 0.0)

    def test_the_oldest_of_the_last_thousand_counts_and_the_one_before_it_does_not(self) -> None:
        """The 99th percentile of a thousand is the longest wait but nine: here the shortest of ten that count."""
        limiter = Limiter(limit=1)
        limiter._waits.extend((number, 12.0 - number) for number in range(1, 12))
        limiter._admitted = 1001

        assert limiter.stats().wait_p99 == 1

    def test_no_more_than_a_thousand_waits_are_kept(self) -> None:
        """A limiter that is always busy keeps no more of them than it will ever look at."""
        limiter = Limiter(limit=1)
        permit = limiter.enter()
        for _ in range(1005):
            waiting = Permit().ask(limiter, 1, 1)
            limiter._admit(waiting)
            permit.end()
            permit = waiting

        assert len(limiter._waits) == 1000

    async def test_percentiles_of_the_last_thousand(self) -> None:
        """The 50th, 95th and 99th of a hundred waits; and of a thousand, to the very call."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1)
        await crowd.advance(50)
        calls = await crowd.come_all("x" * 11)
        for call in calls:
            await crowd.finish(call)
            await crowd.advance(1)
        for _ in range(89):
            limiter.enter().leave()
        stats = limiter.stats()
        assert (stats.wait_p50, stats.wait_p95, stats.wait_p99) == (0, 5, 9)
        for _ in range(901):
            limiter.enter().leave()
        assert limiter.stats().wait_p99 == 0
        assert (limiter.stats().admitted, len([w for _, w in limiter._waits if w])) == (1001, 9)

    def test_nothing_has_happened(self) -> None:
        """A fresh limiter has waited for nothing; without slots there is no limit to tell."""
        assert Limiter(per_second=1).stats() == LimiterStats(0, 0, 0, 0, None, 0.0, 0.0, 0.0)

    async def test_repr_tells_the_state(self, crowd: Crowd) -> None:
        """Name, slots, rates and queue."""
        limiter = crowd.limiter_of(limit=1, per_second=50, per_minute=500, name="quotes")
        await crowd.come_all("abc")

        assert repr(limiter) == "<Limiter quotes 1/1 in flight, 50 per second, 500 per minute, 2 waiting>"

    def test_who_has_left_while_another_held_the_lock_is_not_inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An adaptive limit takes slots back with the lock, and who leaves does not wait for that."""
        limiter = Limiter(limit=Adaptive())
        monkeypatch.setattr(limiter, "_settle", lambda: None)  # as if another had the lock each time
        limiter.enter().leave()

        assert limiter.stats().in_flight == 0

    def test_what_is_learnt_of_who_has_left_so_counts_from_the_look(
        self, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
    ) -> None:
        """A pause begins when it is noted, which may be at the next look."""
        limiter = Limiter(limit=1, clock=clock)
        with monkeypatch.context() as patch:
            patch.setattr(limiter, "_settle", lambda: None)
            limiter.enter().leave(ServerError(429, {"Retry-After": "5"}))
            clock.advance(1)
            limiter.stats()

        assert repr(limiter) == "<Limiter 0/1 in flight, 0 waiting, paused for 5 s>"


class TestMemory:
    async def test_those_who_gave_up_are_forgotten(self) -> None:
        """Also from the middle of a queue whose first still waits."""
        limiter = Limiter(limit=1)
        permit = await limiter.aenter()
        waiting = [asyncio.create_task(limiter.aenter(), context=contextvars.Context()) for _ in range(2000)]
        await until(lambda: limiter.stats().waiting == 2000)
        permits = (permit for permit in gc.get_objects() if isinstance(permit, Permit))
        seen = weakref.WeakSet(
            permit for permit in permits if getattr(permit, "issuer", None) is limiter
        )  # of another thread one may be half made
        for task in waiting[1:-1]:
            task.cancel()
        await asyncio.wait(waiting[1:-1])
        del waiting[1:-1]
        gc.collect()

        assert limiter.stats().waiting == 2
        assert len(seen) < 200
        permit.leave()
        (await waiting[0]).leave()
        (await waiting[1]).leave()

    async def test_a_chain_of_tasks_keeps_no_chain_of_permits(self) -> None:
        """A task that starts the next one from inside its call does not keep all calls before it alive."""
        limiter = Limiter(limit=2)
        permits: list[Any] = []
        done = asyncio.Event()

        async def link(number: int) -> None:
            permit = await limiter.aenter()
            permits.append(permit)
            if number:
                task = asyncio.create_task(link(number - 1))
                task.add_done_callback(lambda _: None)
            else:
                done.set()
            await asyncio.sleep(0)
            permit.leave()

        await link(50)
        await done.wait()
        await until(lambda: limiter.stats().in_flight == 0)
        depth = 0
        outer = permits[-1].outer
        while outer is not None:
            depth, outer = depth + (outer.issuer is limiter), outer.outer
        gc.collect()

        assert depth <= 2
