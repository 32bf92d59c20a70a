"""The proof of a deadlock: that nothing inside some limiters can end, as all of it waits for those who wait there."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Self

from asyncify.crews import Crew, Hand, crews_of
from asyncify.holds import Standstill, loose
from asyncify.permits import Issuer, Permit
from asyncify.scopes import CancelScope

__all__ = ["Held", "is_anybody_free", "lasts", "stuck_limiters"]


@dataclass(frozen=True, slots=True)
class Held:
    """What can't go on before a wait at a limiter ends.

    Attributes:
        permits: calls inside this limiter or others.
        standstills: what stops others as long as it lasts, but for hands.
        hands: of crews, whose threads may all have to wait before anybody is stopped.
    """

    permits: set[Permit]
    standstills: list[Standstill]
    hands: list[Hand]

    @classmethod
    def of(cls, held: Collection[Permit]) -> Self:
        """Tell these apart, without permits that take no slot."""
        permits = {permit for permit in held if permit.slots}
        if len(permits) == len(held):
            return cls(permits, [], [])
        standstills = {other for other in held if isinstance(other, Standstill) and other not in loose}
        hands = [other for other in standstills if isinstance(other, Hand)]
        return cls(permits, [*standstills.difference(hands)], hands)

    @classmethod
    def by(cls, permit: Permit) -> Self:
        """Return what can't go on before the wait of a call ends, as far as it was noted when that began."""
        crews = [other for other in permit.blocks if isinstance(other, Crew)]
        hands = [hand for crew in crews for hand in crew.hands() if hand.waits_for() is permit]
        return cls({other for other in permit.blocks if isinstance(other, Permit)}, [], hands)

    def __bool__(self) -> bool:
        return bool(self.permits or self.standstills or self.hands)

    def keeps(self, inside: Collection[Permit]) -> tuple[Permit, ...]:
        """Return all of it by which it may keep these calls from ending."""
        return (*self.permits.intersection(inside), *self.standstills, *self.hands)

    def blocks(self) -> tuple[Permit | Crew, ...]:
        """Return what is kept from ending for as long as the wait lasts; what a standstill stops may end before."""
        return (*self.permits, *{hand.crew for hand in self.hands})

    def stops(self, inside: Collection[Permit]) -> set[Permit]:
        """Return those of the calls inside that can't end before, whatever other threads do."""
        return self.permits.intersection(inside).union(*(standstill.among(inside) for standstill in self.standstills))

    def stops_at_most(self, inside: Collection[Permit]) -> set[Permit]:
        """Return those that can't end before if none of the crews' threads can go on."""
        return self.stops(inside).union(*(crew.stops(inside) for crew in crews_of(self.hands)))

    def holds_up_others(self) -> bool:
        """Tell whether calls are stopped that do not wait themselves, nor anybody within them."""
        return bool(self.standstills) or any(crew.holds_up_others() for crew in crews_of(self.hands))

    def holds_up_loop(self) -> bool:
        """Tell whether tasks are stopped because their event loop is held up."""
        return any(other.holds_up_loop() for other in (*self.standstills, *self.hands))


def is_anybody_free(inside: Collection[Permit], own: Held | None = None) -> bool:
    """Tell whether one of the calls inside is certain to be stopped by nobody; what follows is slow."""
    free = (call for call in inside if not hasattr(call, "is_caller"))
    some = next(free, None)
    if some is None or own is None or not own.holds_up_others():
        return some is not None
    return not own.stops_at_most(inside).issuperset((some, *free))


def lasts(permit: Permit, scope: CancelScope | None, stuck: Collection[CancelScope] = ()) -> bool:
    """Tell whether a wait is called off only with those in this scope, if ever; scopes of stuck crews call off none."""
    return permit.scope is None or permit.scope.is_within(scope, stuck)


def stuck_limiters(
    own: Held, at: Iterable[Issuer], *, scope: CancelScope | None, loop: AbstractEventLoop | None
) -> dict[Issuer, frozenset[Permit]]:
    """Return the limiters that nobody can leave, as all inside wait for this wait or for others, and so nobody enters.

    That is a largest fixed point: it is supposed that all limiters and crews are stuck and all waits last, and those
    for which that does not follow from the others are taken out, again and again.

    No lock is held, so the calls inside are those of a moment, and another moment for each limiter. But nobody waits
    twice with one permit: whoever waits before and after all of these moments has waited throughout, and what waits
    for that has stayed inside.

    Args:
        own: what can't go on before this wait ends, which is supposed to last.
        at: the limiters to begin with. What waits within their calls leads to others.
        scope: what the wait is called off with. Who may be called off alone is no proof.
        loop: the event loop in whose thread this is asked, if one runs there. What the timers of others may end is not
            known, so their tasks are no proof; each loop looks at its own.

    Returns:
        each of these limiters, with the calls inside it.
    """
    seen = _Seen(own, at, loop)
    crews, waits, limiters = seen.crews, seen.waits, seen.limiters
    while True:
        crews, waits = _largest(crews, waits, own.hands, scope)
        blocked: set[Any] = {other for permit in waits for other in permit.blocks}
        full: dict[Issuer, frozenset[Permit]] = {}
        for limiter, inside in limiters.items():
            calls = own.stops(inside).union(blocked.intersection(inside), *(crew.stops(inside) for crew in crews))
            # An adaptive limit may have shrunk below the number of calls inside, and grow by their success.
            if sum(not call.ended and call not in loose for call in calls) >= max(limiter.places(), len(inside)):
                full[limiter] = inside
        lasting = {permit for permit in waits if permit.issuer in full}
        if len(lasting) == len(waits):
            return {} if any(permit.gives_up() for permit in waits) else full
        waits, limiters = lasting, full


class _Seen:
    """What may be stuck, as one leads to the other: limiters, those who wait within their calls, and crews."""

    def __init__(self, own: Held, at: Iterable[Issuer], loop: AbstractEventLoop | None) -> None:
        self.limiters: dict[Issuer, frozenset[Permit]] = {}
        self.waits: set[Permit] = set()
        self.crews: set[Crew] = set()
        self._own = own
        self._loop = loop
        chain: list[Any] = [*{*at, *(hand.crew for hand in own.hands)}]
        known = set(chain)
        for each in chain:
            others = set(self._led_to(each)) - known
            known |= others
            chain += others

    def _led_to(self, each: Any) -> Iterable[Any]:
        if isinstance(each, Crew):
            self.crews.add(each)
            waits = (hand.waits_for() for hand in each.hands())
            return [*(hand.crew for hand in each.outer_hands()), *(wait for wait in waits if wait is not None)]
        if isinstance(each, Permit):
            if each.gives_up() or (each.in_task and not each.is_of(self._loop)):
                return ()
            self.waits.add(each)
            return [each.issuer, *(other for other in each.blocks if isinstance(other, Crew))]
        inside = each.inside()
        if is_anybody_free(inside, self._own):
            return ()
        self.limiters[each] = inside
        kept_by = (known() for known in list(each.kept_by))
        return [*each.waits(), *(keeper for keeper in kept_by if keeper is not None)]


def _largest(
    crews: set[Crew], waiting: set[Permit], stuck: Collection[Hand], scope: CancelScope | None
) -> tuple[set[Crew], set[Permit]]:
    """Return the crews that are stuck, if these hands of theirs are, and those whose waits last."""
    hands = {crew: crew.hands() for crew in crews}
    while True:
        scopes = {crew.scope for crew in crews}
        lasting = {permit for permit in waiting if lasts(permit, scope, scopes)}
        by = {*lasting, *crews}
        still = {crew for crew in crews if hands[crew] and all(_is_stuck(hand, stuck, by) for hand in hands[crew])}
        if len(still) == len(crews) and len(lasting) == len(waiting):
            return crews, waiting
        crews, waiting = still, lasting


def _is_stuck(hand: Hand, stuck: Collection[Hand], by: Collection[object]) -> bool:
    return hand not in loose and (hand in stuck or hand.waits_for() in by)
