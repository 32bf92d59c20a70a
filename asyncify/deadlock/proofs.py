"""The proof of a deadlock: that nothing inside some limiters can end, as all of it waits for those who wait there."""

from __future__ import annotations

import weakref
from asyncio import AbstractEventLoop
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from asyncify.deadlock.crews import Crew, Hand, crews_of
from asyncify.deadlock.holds import Standstill, loose
from asyncify.permits import Issuer, Permit
from asyncify.scopes import CancelScope

__all__ = ["Held", "Proof", "is_anybody_free", "lasts"]


@dataclass(frozen=True, slots=True)
class Held:
    """What can't go on before a wait at a limiter ends.

    Attributes:
        permits: calls inside this limiter or others.
        standstills: what stops others as long as it lasts, but for hands.
        hands: of crews, whose threads may all have to wait before anybody is stopped.
    """

    permits: frozenset[Permit]
    standstills: tuple[Standstill, ...] = ()
    hands: tuple[Hand, ...] = ()

    @classmethod
    def of(cls, held: Collection[Permit]) -> Self:
        """Tell these apart, without permits that take no slot."""
        permits = frozenset([permit for permit in held if permit.slots])
        if len(permits) == len(held):
            return cls(permits)
        standstills = {other for other in held if isinstance(other, Standstill) and other not in loose}
        hands = tuple(other for other in standstills if isinstance(other, Hand))
        return cls(permits, tuple(standstills.difference(hands)), hands)

    @classmethod
    def by(cls, permit: Permit) -> Self:
        """Return what can't go on before the wait of a call ends, as far as it was noted when that began."""
        crews = [other for other in permit.blocks if isinstance(other, Crew)]
        hands = tuple(hand for crew in crews for hand in crew.hands() if hand.waits_for() is permit)
        return cls(frozenset(other for other in permit.blocks if isinstance(other, Permit)), hands=hands)

    def __bool__(self) -> bool:
        return bool(self.permits or self.standstills or self.hands)

    def keeps(self, inside: Collection[Permit]) -> tuple[Permit, ...]:
        """Return all of it that keeps some of these calls from ending, or may do so with other threads."""
        standstills = (standstill for standstill in self.standstills if standstill.among(inside))
        hands = (hand for hand in self.hands if any(crew.stops(inside) for crew in crews_of([hand])))
        return (*self.permits.intersection(inside), *standstills, *hands)

    def blocks(self) -> tuple[Permit | Crew, ...]:
        """Return what is kept from ending for as long as the wait lasts; what a standstill stops may end before."""
        return (*self.permits, *{hand.crew for hand in self.hands})

    def stops(self, inside: Collection[Permit]) -> frozenset[Permit]:
        """Return those of the calls inside that can't end before, whatever other threads do."""
        return self.permits.intersection(inside).union(*(other.among(inside) for other in self.standstills))

    def stops_at_most(self, inside: Collection[Permit]) -> frozenset[Permit]:
        """Return those that can't end before if none of the crews' threads can go on."""
        return self.stops(inside).union(*(crew.stops(inside) for crew in crews_of(self.hands)))

    def holds_up_others(self) -> bool:
        """Tell whether calls are stopped that do not wait themselves, nor anybody within them."""
        return bool(self.standstills) or any(crew.holds_up_others() for crew in crews_of(self.hands))

    def holds_up_loop(self) -> bool:
        """Tell whether tasks are stopped because their event loop is held up."""
        return any(other.holds_up_loop() for other in (*self.standstills, *self.hands))


def is_anybody_free(inside: Collection[Permit], own: Held) -> bool:
    """Tell whether nobody has ever waited within one of the calls inside, nor holds it up; what follows is slow."""
    free = (call for call in inside if not call.has_been_kept())
    some = next(free, None)
    if some is None or not own.holds_up_others():
        return some is not None
    return not own.stops_at_most(inside).issuperset((some, *free))


_free_calls: weakref.WeakKeyDictionary[Issuer, weakref.ref[Permit]] = weakref.WeakKeyDictionary()
"""The call inside each limiter that was last found to go on. It most likely still does, so it is looked at first: else
each of many that come to wait would go through all that wait inside already, until it meets that call."""


def _last_free_first(limiter: Issuer, inside: frozenset[Permit]) -> Iterable[Permit]:
    known = _free_calls.get(limiter)
    call = None if known is None else known()
    return inside if call is None or call not in inside else (call, *inside.difference((call,)))


def lasts(permit: Permit, scope: CancelScope | None, stuck: Collection[CancelScope] = ()) -> bool:
    """Tell whether a wait is called off only with those in this scope, if ever; scopes of stuck crews call off none."""
    return permit.scope is None or permit.scope.is_within(scope, stuck)


class Proof:
    """Which limiters nobody can leave and so nobody enter, as all inside wait for this wait or for others.

    That is a largest fixed point: a graph of waits, reduced until nothing more can go on (R. C. Holt, Some Deadlock
    Properties of Computer Systems, ACM Computing Surveys 4(3), 1972). It supposes that whatever it comes across is
    stuck: a limiter, a wait, a crew. What is found to go on sets free what waits for nothing else, and so on. What is
    left is stuck indeed.

    - A limiter is stuck if each call inside is kept by something that is, and no place is free.
    - A wait is, if its limiter is, and nothing calls it off.
    - A crew is, if what each of its threads waits for is.

    No lock is held, so the calls inside are those of a moment, and another moment for each limiter. But nobody waits
    twice with one permit: whoever waits before and after all of these moments has waited throughout, and what waits
    for that has stayed inside.

    The same holds of a crew, whose caller is asked again what it holds.

    Args:
        own: what can't go on before this wait ends, which is supposed to last.
        at: the limiters that are asked about.
        scope: what the wait is called off with. Who may be called off alone is no proof.
        loop: the event loop in whose thread this is asked, if one runs there. What the timers of others may end is not
            known, so their tasks are no proof; each loop looks at its own.
        by: if this is about several waits at once, some of those that keep each of the calls that they hold; it goes
            on if one of these does.
        without: a wait that does not count.

    Attributes:
        stuck: those of these limiters that are stuck, and those that lead to it, with the calls inside each; none, if
            none of the given ones is.
        scopes: those of the crews that are stuck.
    """

    def __init__(
        self,
        own: Held,
        at: Iterable[Issuer],
        *,
        scope: CancelScope | None,
        loop: AbstractEventLoop | None,
        by: Mapping[Permit, Collection[Permit]] | None = None,
        without: Permit | None = None,
    ) -> None:
        self._own = own
        self._scope = scope
        self._loop = loop
        self._by = by or {}
        self._without = without
        self._crews = crews_of(own.hands) if own.hands else set[Crew]()
        self._free: set[Any] = set()
        self._inside: dict[Issuer, frozenset[Permit]] = {}
        self._waits: list[Permit] = []
        self._left: Counter[Permit] = Counter()  # by how many a call inside is kept
        self._keeps: defaultdict[Any, list[Permit]] = defaultdict(list)  # which calls a wait or a crew keeps
        self._waits_for: defaultdict[Any, list[Any]] = defaultdict(list)  # what goes on as soon as this does

        self._walk(roots := set(at))
        self._look_again()
        inside = {} if roots <= self._free else self._inside
        self.stuck: dict[Issuer, frozenset[Permit]] = {
            limiter: calls for limiter, calls in inside.items() if limiter not in self._free
        }
        self.scopes: set[CancelScope] = {crew.scope for crew in self._crews.difference(self._free)}

    def _walk(self, roots: set[Issuer]) -> None:
        """Go wherever these limiters may be stuck, until all of them are found to be free."""
        known = set[Any]()
        steps: list[Iterator[Any]] = [iter([*roots, *self._crews])]
        while steps and not roots <= self._free:
            each = next(steps[-1], None)
            if each is None:
                steps.pop()
            elif each not in known:
                known.add(each)
                steps.append(self._led_to(each))

    def _led_to(self, each: Any) -> Iterator[Any]:
        """Yield what this can be stuck by, as far as it is not found to go on."""
        if isinstance(each, Permit):
            return self._from_wait(each)
        return self._from_crew(each) if isinstance(each, Crew) else self._from_limiter(each)

    def _from_limiter(self, limiter: Issuer) -> Iterator[Any]:
        self._inside[limiter] = inside = limiter._inside()
        stopped = self._own.stops(inside)
        # An adaptive limit may have shrunk below the number of calls inside, and grow by their success.
        if len(inside) < limiter._places():
            self._set_free(limiter)
        for call in _last_free_first(limiter, inside):
            if limiter in self._free:
                return
            if call.ended or call in loose:
                self._set_free(limiter)
            elif call in self._by:
                for wait in self._by[call]:
                    yield from self._needs(limiter, wait)
            elif call not in stopped:
                yield from self._from_call(call)

    def _from_call(self, call: Permit) -> Iterator[Any]:
        may_keep = {*call.keepers(), *(crew for crew in self._crews if crew.holds_up_others())} - self._free
        keepers = [keeper for keeper in may_keep if keeper is not self._without and keeper.keeps(call)]
        self._left[call] = len(keepers)
        for keeper in keepers:
            self._keeps[keeper].append(call)
        if not keepers:
            self._set_free(self._limiter_free_by(call))
        for keeper in keepers:
            if call.issuer not in self._free:
                yield keeper

    def _from_wait(self, wait: Permit) -> Iterator[Any]:
        self._waits.append(wait)
        if wait.gives_up() or (wait.in_task and not wait.is_of(self._loop)):
            self._set_free(wait)
        else:
            yield from self._needs(wait, wait.issuer)
            yield from (crew for crew in wait.blocks if isinstance(crew, Crew))  # by its scope it is called off

    def _from_crew(self, crew: Crew) -> Iterator[Any]:
        self._crews.add(crew)
        yield from (hand.crew for hand in crew.outer_hands())
        hands = crew.hands()
        if not hands or not loose.isdisjoint(hands):
            self._set_free(crew)
        for hand in hands:
            if hand not in self._own.hands and crew not in self._free:
                yield from self._needs(crew, hand.waits_for())

    def _needs(self, each: Any, other: Any) -> Iterator[Any]:
        """Note that this goes on as soon as that other does; which is yielded, to be looked at."""
        if other is None or other is self._without or other in self._free:
            self._set_free(each)
        else:
            self._waits_for[other].append(each)
            yield other

    def _limiter_free_by(self, call: Permit) -> Issuer:
        """Return the limiter of a call that goes on; if the call is the first to set it free, keep that in mind."""
        limiter = call.issuer
        if limiter not in self._free:
            _free_calls[limiter] = weakref.ref(call)
        return limiter

    def _set_free(self, each: Any) -> None:
        """Note that something goes on, and so what is stuck by nothing else."""
        chain = [each]
        for other in chain:
            if other in self._free:
                continue
            self._free.add(other)
            chain += self._waits_for.pop(other, ())
            for call in self._keeps.pop(other, ()):
                self._left[call] -= 1
                if not self._left[call]:
                    chain.append(self._limiter_free_by(call))

    def _look_again(self) -> None:
        """Set free what does not last: crews whose callers have gone on, waits that are over or may be called off."""
        for crew in self._crews.difference(self._free):
            if not all(crew.keeps(call) for call in self._keeps.get(crew, ())):
                self._set_free(crew)
        gone: list[Permit] | None = None
        while gone is None or gone:
            scopes = {crew.scope for crew in self._crews.difference(self._free)}
            left = (wait for wait in self._waits if wait not in self._free)
            gone = [wait for wait in left if wait.gives_up() or not lasts(wait, self._scope, scopes)]
            for wait in gone:
                self._set_free(wait)
