"""The proof of a deadlock: that nothing inside a limiter can end, as all of it waits for those who wait there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from asyncify.crews import Crew, Hand, crews_of
from asyncify.holds import Standstill, loose
from asyncify.permits import Permit
from asyncify.scopes import CancelScope

__all__ = ["Held", "lasts", "stopped_by"]


@dataclass(frozen=True, slots=True)
class Held:
    """What can't go on before a wait ends.

    Attributes:
        permits: calls inside the limiter.
        standstills: what stops others as long as it lasts, but for hands.
        hands: of crews, whose threads may all have to wait before anybody is stopped.
    """

    permits: set[Permit]
    standstills: list[Standstill]
    hands: list[Hand]

    @classmethod
    def of(cls, held: Collection[Permit], inside: Collection[Permit]) -> Self:
        """Tell these apart, and leave out what is inside of something else."""
        hands = [other for other in held if isinstance(other, Hand)]
        standstills = [other for other in held if isinstance(other, Standstill) and not isinstance(other, Hand)]
        return cls({permit for permit in held if permit in inside}, standstills, hands)

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

    def holds_up_loop(self) -> bool:
        """Tell whether tasks are stopped because their event loop is held up."""
        return any(other.holds_up_loop() for other in (*self.standstills, *self.hands))

    def blocks(self) -> tuple[Permit | Crew, ...]:
        """Return what is kept from ending for as long as the wait lasts; what a standstill stops may end before."""
        return (*self.permits, *{hand.crew for hand in self.hands})


def stopped_by(
    own: Held,
    blocked: Iterable[Any],
    who_wait: Callable[[], Iterable[Permit]],
    *,
    inside: Collection[Permit],
    slots: float,
    scope: CancelScope | None,
) -> set[Permit] | None:
    """Return what a wait stops, if with that and what others wait for nothing inside can end; else None.

    That is a largest fixed point: it is supposed that all crews are stuck and all waits last, and those for which that
    does not follow from the others are taken out, again and again.

    Args:
        own: what can't go on before this wait ends.
        blocked: what others block at most, who wait for the same limiter.
        who_wait: returns these others, of whom some may wait no longer; it is called only if that may be a proof.
        inside: the calls inside.
        slots: how many of them can't end, if nobody is ever let in.
        scope: what the wait is called off with. Who may be called off alone is no proof.
    """
    crews = {other for other in blocked if isinstance(other, Crew)}
    crews |= crews_of([*own.hands, *(hand for crew in crews for hand in crew.outer_hands())])
    stopped = own.permits.union(*(standstill.among(inside) for standstill in own.standstills))
    if not _are(slots, stopped.union(blocked, *(crew.stops(inside) for crew in crews))):
        return None
    crews, waiting = _largest(crews, set(who_wait()), own.hands, scope)
    stopped.update(*(crew.stops(inside) for crew in crews & crews_of(own.hands)))
    blocks = (permit.blocks for permit in waiting)
    return stopped if _are(slots, stopped.union(*blocks, *(crew.stops(inside) for crew in crews))) else None


def lasts(permit: Permit, scope: CancelScope | None, stuck: Collection[CancelScope] = ()) -> bool:
    """Tell whether a wait is called off only with those in this scope, if ever; what is stuck calls nobody off."""
    return permit.scope is None or permit.scope.is_within(scope, stuck)


def _largest(
    crews: set[Crew], waiting: set[Permit], stuck: Collection[Hand], scope: CancelScope | None
) -> tuple[set[Crew], set[Permit]]:
    """Return the crews that are stuck, if these hands of theirs are, and those whose waits last."""
    hands = {crew: crew.hands() for crew in crews}
    while True:
        scopes = {crew.scope for crew in crews}
        lasting = {permit for permit in waiting if lasts(permit, scope, scopes)}
        held_up = partial(_is_held_up, stuck=stuck, by={*lasting, *crews})
        still = {crew for crew in crews if hands[crew] and all(map(held_up, hands[crew]))}
        if len(still) == len(crews) and len(lasting) == len(waiting):
            return crews, waiting
        crews, waiting = still, lasting


def _is_held_up(hand: Hand, stuck: Collection[Hand], by: Collection[object]) -> bool:
    return hand not in loose and (hand in stuck or hand.waits_for() in by)


def _are(slots: float, blocked: Iterable[Any]) -> bool:
    """Tell whether so many calls inside are among what is blocked."""
    calls = (other for other in blocked if isinstance(other, Permit) and not other.ended and other not in loose)
    return sum(1 for _ in calls) >= slots
