"""Threads that one thread waits for, all together, as it does for those of a batch.

What the waiting thread holds can't end before one of them has ended what it does. So when each of them waits for a
limiter, or for threads that do, the one that waits for them waits for that limiter too.
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
    """A fan-out whose items run in threads, and the thread that waits for one of them or for all.

    Args:
        scope: that of what its threads wait for; nobody cancels it but they and the one that waits, and when it is
            cancelled none of them has to go on any more.
    """

    def __init__(self, scope: CancelScope) -> None:
        self.scope = scope
        self._caller = Waiter()

    @abstractmethod
    def hands(self) -> Collection[Hand]:
        """Return those of the threads of which one has to go on before the waiting one can; none if it can anyway."""

    def hold_up_caller(self) -> None:
        """Note what this thread holds, which is about to wait."""
        self._caller.hold_up_this_thread()
        keep(self._caller.held, self)
        for hand in self.outer_hands():
            hand.wait_for(self)

    def let_caller_go(self) -> None:
        """Note that this thread goes on."""
        for hand in self.outer_hands():
            hand.goes_on(self)
        let_go(self._caller.let_go(), self)

    def is_waiting(self) -> bool:
        """Tell whether its caller waits."""
        return bool(self._caller.held)

    def keeps(self, call: Permit) -> bool:
        """Tell whether a call can't end while none of its threads goes on."""
        return bool(self.stops((call,)))

    def stops(self, inside: Collection[Permit]) -> set[Permit]:
        """Return those of a limiter's permits that can't end while none of its threads goes on."""
        return stopped_with(self._caller.held, inside)

    def holds_up_others(self) -> bool:
        """Tell whether something stands for others in the waiting thread, but hands."""
        return any(isinstance(other, Standstill) and not isinstance(other, Hand) for other in self._caller.held)

    def holds_up_loop(self) -> bool:
        """Tell whether the waiting thread holds up tasks of an event loop, its own or another's."""
        return any(other.holds_up_loop() for other in self._caller.held if isinstance(other, Standstill))

    def outer_hands(self) -> list[Hand]:
        """Return what stands in the waiting thread, or in those that wait for it, for others that do."""
        return [other for other in self._caller.held if isinstance(other, Hand)]

    def waits(self) -> list[Permit]:
        """Return what its threads wait with, and those that they wait for, if by that somebody else may be stuck.

        That is who waits for them; or, if one of them holds something itself, whoever else waits for that, as none of
        them is left to call that off. Nothing, if one of them does not wait.
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
    """Stands, in a thread of a crew, for what the thread holds that waits for them all."""

    __slots__ = ("_waits_for", "crew", "worker")

    def __init__(self, crew: Crew) -> None:
        super().__init__()
        self.crew: Crew = crew
        self.worker: int = get_ident()
        self._waits_for: Callable[[], Permit | Crew | None] = _for_nothing

    def __enter__(self) -> Self:
        """Stand in this thread."""
        hands_of_this_thread().add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Stand there no longer."""
        hands_of_this_thread().discard(self)

    def waits_for(self) -> Permit | Crew | None:
        """Return what its thread has come to wait with, which may be over, or for which crew it waits."""
        return self._waits_for()

    def wait_for(self, other: Permit | Crew) -> None:
        """Note that its thread is about to wait."""
        self._waits_for = weakref.ref(other)

    def goes_on(self, crew: Crew) -> None:
        """Note that its thread waits no longer for a crew."""
        if self._waits_for() is crew:
            self._waits_for = _for_nothing

    def holds_up_loop(self) -> bool:
        """Tell whether the waiting thread does."""
        return self.crew.holds_up_loop()

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        """Return none, as it takes all the hands of a crew; see `Crew.stops`."""
        return set()


def _for_nothing() -> None:
    return None


def crews_of(hands: Iterable[Hand]) -> set[Crew]:
    """Return the crews of these hands, and of those of the threads that wait for them."""
    found = list(dict.fromkeys(hand.crew for hand in hands))
    for crew in found:
        found += {hand.crew for hand in crew.outer_hands()}.difference(found)
    return set(found)
