"""The proof of a deadlock: that nothing inside a limiter can end, as all of it waits for those who wait there."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Self

from asyncify.crews import Crew, Hand, crews_of
from asyncify.holds import Standstill, loose
from asyncify.permits import Permit
from asyncify.scopes import CancelScope

__all__ = ["Held", "is_proof", "lasts"]


@dataclass(frozen=True, slots=True)
class Held:
    """What can't go on before a wait at a limiter ends.

    Attributes:
        permits: calls inside this limiter.
        standstills: what stops others as long as it lasts, but for hands.
        hands: of crews, whose threads may all have to wait before anybody is stopped.
    """

    permits: set[Permit]
    standstills: list[Standstill]
    hands: list[Hand]

    @classmethod
    def of(cls, held: Collection[Permit], inside: Collection[Permit]) -> Self:
        """Tell these apart, without permits of other limiters."""
        standstills = [other for other in held if isinstance(other, Standstill) and other not in loose]
        hands = [other for other in standstills if isinstance(other, Hand)]
        return cls({permit for permit in held if permit in inside}, [*{*standstills}.difference(hands)], hands)

    @classmethod
    def by(cls, permit: Permit) -> Self:
        """Return what can't go on before the wait of a call ends, as far as it was noted when that began."""
        crews = [other for other in permit.blocks if isinstance(other, Crew)]
        hands = [hand for crew in crews for hand in crew.hands() if hand.waits_for() is permit]
        return cls({other for other in permit.blocks if isinstance(other, Permit)}, [], hands)

    def __bool__(self) -> bool:
        return bool(self.permits or self.standstills or self.hands)

    def all(self) -> tuple[Permit, ...]:
        """Return all of it."""
        return (*self.permits, *self.standstills, *self.hands)

    def blocks(self) -> tuple[Permit | Crew, ...]:
        """Return what is kept from ending for as long as the wait lasts; what a standstill stops may end before."""
        return (*self.permits, *{hand.crew for hand in self.hands})

    def stops(self, inside: Collection[Permit]) -> set[Permit]:
        """Return the calls that can't end before, whatever other threads do."""
        return self.permits.union(*(standstill.among(inside) for standstill in self.standstills))

    def stops_at_most(self, inside: Collection[Permit]) -> set[Permit]:
        """Return the calls that can't end before if none of the crews' threads can go on."""
        return self.stops(inside).union(*(crew.stops(inside) for crew in crews_of(self.hands)))

    def holds_up_others(self) -> bool:
        """Tell whether calls are stopped that do not wait themselves, nor anybody within them."""
        return bool(self.standstills) or any(crew.holds_up_others() for crew in crews_of(self.hands))

    def holds_up_loop(self) -> bool:
        """Tell whether tasks are stopped because their event loop is held up."""
        return any(other.holds_up_loop() for other in (*self.standstills, *self.hands))


def is_proof(
    own: Held,
    waiting: Iterable[Permit],
    *,
    inside: Collection[Permit],
    slots: float,
    scope: CancelScope | None,
    loop: AbstractEventLoop | None,
) -> bool:
    """Tell whether nothing inside can end, as all of it waits for this wait or for others at the same limiter.

    That is a largest fixed point: it is supposed that all crews are stuck and all waits last, and those for which that
    does not follow from the others are taken out, again and again.

    Args:
        own: what can't go on before this wait ends.
        waiting: the others who wait and block anything, without those who are about to give up.
        inside: the calls inside.
        slots: how many of them can't end, if nobody is ever let in.
        scope: what the wait is called off with. Who may be called off alone is no proof.
        loop: the event loop in whose thread this is asked, if one runs there. What the timers of others may end is not
            known, so their tasks are no proof; each loop looks at its own.
    """
    waits = {permit for permit in waiting if not permit.in_task or permit.is_of(loop)}
    crews = {other for permit in waits for other in permit.blocks if isinstance(other, Crew)}
    crews |= crews_of([*own.hands, *(hand for crew in crews for hand in crew.outer_hands())])
    crews, waits = _largest(crews, waits, own.hands, scope)
    stopped: set[Any] = own.stops(inside).union(
        *(crew.stops(inside) for crew in crews), *(permit.blocks for permit in waits)
    )
    calls = [other for other in stopped if isinstance(other, Permit) and not other.ended and other not in loose]
    return len(calls) >= slots


def lasts(permit: Permit, scope: CancelScope | None, stuck: Collection[CancelScope] = ()) -> bool:
    """Tell whether a wait is called off only with those in this scope, if ever; scopes of stuck crews call off none."""
    return permit.scope is None or permit.scope.is_within(scope, stuck)


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
