"""Crews: the worker threads that one thread, the caller, waits for together, as for those of a batch.

The calls that the caller holds can't end before one of its workers goes on. So when each worker waits for a limiter,
or for a crew whose workers do, the caller waits for that limiter too.
"""

from __future__ import annotations

import weakref
from _thread import get_ident
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from typing import Self

from asyncify.deadlock.holds import Standstill, Waiter, hands_of_this_thread, stopped_with
from asyncify.permits import Permit, keep, let_go
from asyncify.scopes import CancelScope

__all__ = ["Crew", "Hand", "crews_of"]


class Crew(ABC):
    """A fan-out whose items run in worker threads, and its caller: the thread that waits for one or all of them.

    Args:
        scope: the cancellation scope of the workers' waits. Only the workers and the caller cancel it, and once it is
            cancelled, the caller needs no worker to go on.
    """

    def __init__(self, scope: CancelScope) -> None:
        self.scope = scope
        self._caller = Waiter()

    @abstractmethod
    def hands(self) -> Collection[Hand]:
        """Return the hands of the workers of which one has to go on before the caller can; none if it can anyway."""

    def hold_up_caller(self) -> None:
        """Record what this thread, the caller, holds; it is about to wait."""
        self._caller.hold_up_this_thread()
        keep(self._caller.held, self)
        for hand in self.outer_hands():
            hand.wait_for(self)

    def let_caller_go(self) -> None:
        """Record that this thread, the caller, goes on."""
        for hand in self.outer_hands():
            hand.goes_on(self)
        let_go(self._caller.let_go(), self)

    def is_waiting(self) -> bool:
        """Tell whether the caller waits and holds something."""
        return bool(self._caller.held)

    def keeps(self, call: Permit) -> bool:
        """Tell whether this call can't end while no worker goes on."""
        return bool(self.stops((call,)))

    def stops(self, inside: Collection[Permit]) -> set[Permit]:
        """Return the permits, of those inside a limiter, that can't end while no worker goes on."""
        return stopped_with(self._caller.held, inside)

    def holds_up_others(self) -> bool:
        """Tell whether the caller holds a standstill other than a hand."""
        return any(isinstance(other, Standstill) and not isinstance(other, Hand) for other in self._caller.held)

    def holds_up_loop(self) -> bool:
        """Tell whether the waiting caller holds up the tasks of an event loop, its own thread's or another's."""
        return any(other.holds_up_loop() for other in self._caller.held if isinstance(other, Standstill))

    def outer_hands(self) -> list[Hand]:
        """Return the hands that the caller holds: it, or a thread that waits for it, works for their crews."""
        return [other for other in self._caller.held if isinstance(other, Hand)]

    def waits(self) -> list[Permit]:
        """Return the permits that the workers, and those of the crews they wait for, wait with.

        Return none if one of these workers does not wait. Return none, too, if the waits keep no call from ending:
        neither one that the caller holds, nor one that a worker holds itself, with no worker left to call its wait off.
        """
        found: list[Permit] = []
        crews: list[Crew] = [self]
        for crew in crews:
            hands = crew.hands()
            for waits in (hand.waits_for() for hand in hands):
                if isinstance(waits, Crew):
                    if waits not in crews:
                        crews.append(waits)
                elif waits is not None and waits.queue is not None:
                    found.append(waits)
                else:
                    return []
            if not hands:
                return []
        keeps_others = self._caller.held or any(other is not self for permit in found for other in permit.blocks)
        return found if keeps_others else []


class Hand(Standstill):
    """Stands, in a worker thread of a crew, for what the crew's caller holds."""

    __slots__ = ("_waits_for", "crew", "worker")

    def __init__(self, crew: Crew) -> None:
        super().__init__()
        self.crew: Crew = crew
        self.worker: int = get_ident()
        self._waits_for: Callable[[], Permit | Crew | None] = _for_nothing

    def __enter__(self) -> Self:
        """Add the hand to this thread."""
        hands_of_this_thread().add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hand from this thread."""
        hands_of_this_thread().discard(self)

    def waits_for(self) -> Permit | Crew | None:
        """Return the permit that its worker last began to wait with, perhaps no longer, or the crew it waits for."""
        return self._waits_for()

    def wait_for(self, other: Permit | Crew) -> None:
        """Record that its worker is about to wait with this permit or for this crew."""
        self._waits_for = weakref.ref(other)

    def goes_on(self, crew: Crew) -> None:
        """Record that its worker no longer waits for this crew."""
        if self._waits_for() is crew:
            self._waits_for = _for_nothing

    def holds_up_loop(self) -> bool:
        """Tell whether the crew's caller holds up the tasks of an event loop."""
        return self.crew.holds_up_loop()

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        """Return none, as one hand alone stops nothing: that takes all hands of the crew; see `Crew.stops`."""
        return set()


def _for_nothing() -> None:
    return None


def crews_of(hands: Iterable[Hand]) -> set[Crew]:
    """Return the crews of these hands, and those that the callers of these crews work for, and so on outwards."""
    found = list(dict.fromkeys(hand.crew for hand in hands))
    for crew in found:
        found += {hand.crew for hand in crew.outer_hands()}.difference(found)
    return set(found)
