"""The proof of a deadlock against a slow, obviously right one, over any limiters, calls, waits and threads."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncify.deadlock.crews import Crew, Hand
from asyncify.deadlock.proofs import Held, Proof
from asyncify.permits import Issuer, Permit, innermost, keep
from asyncify.scopes import CancelScope


class Limit:
    """A limiter, as a proof sees it."""

    def __init__(self, places: int) -> None:
        self.calls: list[Permit] = []
        self._limit = places

    def _inside(self) -> frozenset[Permit]:
        return frozenset(self.calls)

    def _places(self) -> float:
        return self._limit


class Threads(Crew):
    """Threads of which each waits for a limiter, for other threads, or for nothing; and what their caller holds."""

    def __init__(self, held: Sequence[Permit]) -> None:
        super().__init__(CancelScope())
        self.held = self._caller.held = list(held)
        self.threads: list[Hand] = []
        keep(held, self)

    def add_thread(self, waits_for: "Permit | Crew") -> None:
        hand = Hand(self)
        hand.wait_for(waits_for)
        self.threads.append(hand)

    def hands(self) -> Collection[Hand]:
        return self.threads


@dataclass
class World:
    """Limiters, the waits at them, and crews."""

    limits: list[Limit] = field(default_factory=list)
    waits: list[Permit] = field(default_factory=list)
    crews: list[Threads] = field(default_factory=list)
    own: list[Permit] = field(default_factory=list)
    by: dict[Permit, list[Permit]] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """No permit is made within another."""
    token = innermost.set(None)
    yield
    innermost.reset(token)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Draw calls inside limiters; what waits within them; and which of these waits are those of threads of one crew."""
    world = World([Limit(draw(st.integers(1, 3))) for _ in range(draw(st.integers(1, 4)))])
    for limit in world.limits:
        limit.calls += [Permit().ask(cast("Issuer", limit), 1, 1) for _ in range(draw(st.integers(1, 3)))]
    some_calls = st.lists(st.sampled_from([call for limit in world.limits for call in limit.calls]), max_size=2)
    world.own = draw(some_calls)
    world.crews = [Threads(draw(some_calls)) for _ in range(draw(st.integers(0, 2)))]
    some_crew = st.sampled_from([None, *world.crews])
    for _ in range(draw(st.integers(0, 6))):
        issuer: Any = draw(st.sampled_from(world.limits))
        calls = draw(some_calls), draw(some_calls)
        world.waits.append(a_wait(issuer, *calls, draw(some_crew), is_over=draw(st.integers(0, 5)) == 0))
    for crew in world.crews:
        if (other := draw(some_crew)) is not None:
            crew.add_thread(other)
        elif draw(st.booleans()):
            crew.threads.append(Hand(crew))  # it does something else
    for call in draw(some_calls):
        call.ended = True  # and its place is not taken back yet
    if world.waits:
        some_waits = st.lists(st.sampled_from(world.waits), min_size=1, max_size=2)
        world.by = {call: draw(some_waits) for call in world.own if draw(st.booleans())}
    return world


def a_wait(issuer: Issuer, kept: list[Permit], around: list[Permit], crew: Threads | None, *, is_over: bool) -> Permit:
    """Return a wait within calls of which it keeps some, in a thread of the crew if there is one."""
    wait = Permit().ask(issuer, 1, 1)
    wait.queue_up(deque(), 0, 0)
    wait.scope = None if crew is None else crew.scope
    wait.wait_within([*kept, *around])
    wait.blocks = tuple(kept) if crew is None else (*kept, crew)
    wait.is_called_off = is_over
    if crew is not None:
        crew.add_thread(wait)
    return wait


def slow_proof(world: World, without: Permit | None = None) -> set[Any]:
    """Suppose that all is stuck, and take out what does not follow, until nothing more has to be."""
    limits: set[Any] = {*world.limits}
    waits, crews = {*world.waits} - {without}, {*world.crews}
    while True:
        scopes = {crew.scope for crew in crews}
        still_waits = {
            wait
            for wait in waits
            if not wait.is_called_off
            and any(wait.issuer is limit for limit in limits)
            and (wait.scope is None or wait.scope in scopes)
        }
        still_crews = {
            crew
            for crew in crews
            if crew.threads and all(hand.waits_for() in {*waits, *crews} for hand in crew.threads)
        }
        kept = {call for call in world.own if waits.issuperset(world.by.get(call, ()))}
        others = {other for wait in waits for other in wait.blocks if isinstance(other, Permit)}
        others |= {call for crew in crews for call in crew.held}
        kept |= others.difference(world.own)
        still_limits = {
            limit
            for limit in limits
            if len(limit.calls) >= limit._places() and all(call in kept and not call.ended for call in limit.calls)
        }
        if (still_limits, still_waits, still_crews) == (limits, waits, crews):
            return limits
        limits, waits, crews = still_limits, still_waits, still_crews


@settings(max_examples=1000, deadline=None)
@given(world=worlds())
def test_a_proof_finds_what_is_stuck(world: World) -> None:
    """All that leads to the limiter that is asked about, and nothing else; without one of the waits, too."""
    for without in [None, *world.waits[:2]]:
        slow = slow_proof(world, without)
        for limit in cast("list[Any]", world.limits):
            own = Held(frozenset(world.own))
            found = Proof(own, [limit], scope=None, loop=None, by=world.by, without=without).stuck

            assert (limit in found) == (limit in slow)
            assert slow.issuperset(found)
