"""The proof of a deadlock: no call inside some limiters can end, as each waits for calls that wait at them."""

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
        permits: the permits of calls inside this limiter or others.
        standstills: the standstills other than hands; each stops others' calls while it lasts.
        hands: the hands of crews; a crew's caller is stopped only if all of its workers are.
    """

    permits: frozenset[Permit]
    standstills: tuple[Standstill, ...] = ()
    hands: tuple[Hand, ...] = ()

    @classmethod
    def of(cls, held: Collection[Permit]) -> Self:
        """Sort held permits by kind; leave out permits that take no slot, and loose standstills."""
        permits = frozenset([permit for permit in held if permit.slots])
        if len(permits) == len(held):
            return cls(permits)
        standstills = {other for other in held if isinstance(other, Standstill) and other not in loose}
        hands = tuple(other for other in standstills if isinstance(other, Hand))
        return cls(permits, tuple(standstills.difference(hands)), hands)

    @classmethod
    def by(cls, permit: Permit) -> Self:
        """Return what can't go on before this permit's wait ends, as it was recorded when the wait began."""
        crews = [other for other in permit.blocks if isinstance(other, Crew)]
        hands = tuple(hand for crew in crews for hand in crew.hands() if hand.waits_for() is permit)
        return cls(frozenset(other for other in permit.blocks if isinstance(other, Permit)), hands=hands)

    def __bool__(self) -> bool:
        return bool(self.permits or self.standstills or self.hands)

    def keeps(self, inside: Collection[Permit]) -> tuple[Permit, ...]:
        """Return the elements that keep some of these calls from ending, or may do so together with other workers."""
        standstills = (standstill for standstill in self.standstills if standstill.among(inside))
        hands = (hand for hand in self.hands if any(crew.stops(inside) for crew in crews_of([hand])))
        return (*self.permits.intersection(inside), *standstills, *hands)

    def blocks(self) -> tuple[Permit | Crew, ...]:
        """Return the permits and crews that are kept for the whole wait; a standstill may be over before the wait."""
        return (*self.permits, *{hand.crew for hand in self.hands})

    def stops(self, inside: Collection[Permit]) -> frozenset[Permit]:
        """Return the calls inside that can't end before the wait does, whatever other workers do."""
        return self.permits.intersection(inside).union(*(other.among(inside) for other in self.standstills))

    def stops_at_most(self, inside: Collection[Permit]) -> frozenset[Permit]:
        """Return the calls inside that can't end before the wait does if no other worker of the crews goes on."""
        return self.stops(inside).union(*(crew.stops(inside) for crew in crews_of(self.hands)))

    def holds_up_others(self) -> bool:
        """Tell whether a standstill, here or in a crew, may stop calls that have no wait within them."""
        return bool(self.standstills) or any(crew.holds_up_others() for crew in crews_of(self.hands))

    def holds_up_loop(self) -> bool:
        """Tell whether the wait holds up an event loop, and so its tasks."""
        return any(other.holds_up_loop() for other in (*self.standstills, *self.hands))


def is_anybody_free(inside: Collection[Permit], own: Held) -> bool:
    """Tell whether some call inside never had a wait within it and is not held up: a fast check before the proof."""
    free = (call for call in inside if not call.has_been_kept())
    some = next(free, None)
    if some is None or not own.holds_up_others():
        return some is not None
    return not own.stops_at_most(inside).issuperset((some, *free))


_free_calls: weakref.WeakKeyDictionary[Issuer, weakref.ref[Permit]] = weakref.WeakKeyDictionary()
"""For each limiter, the call inside that was last found to go on. It most likely still does, so it is looked at first:
else each of many calls that begin to wait would check all waiting calls inside before it came to that one."""


def _last_free_first(limiter: Issuer, inside: frozenset[Permit]) -> Iterable[Permit]:
    known = _free_calls.get(limiter)
    call = None if known is None else known()
    return inside if call is None or call not in inside else (call, *inside.difference((call,)))


def lasts(permit: Permit, scope: CancelScope | None, stuck: Collection[CancelScope] = ()) -> bool:
    """Tell whether nothing calls a wait off but what also cancels this scope; scopes of stuck crews don't count."""
    return permit.scope is None or permit.scope.is_within(scope, stuck)


class Proof:
    """The limiters that no call can leave, and so none enter, as all calls inside wait for this wait or for others.

    They are a largest fixed point: a wait-for graph, reduced until nothing more can go on (R. C. Holt, Some Deadlock
    Properties of Computer Systems, ACM Computing Surveys 4(3), 1972). Each node, a limiter, a wait or a crew, is first
    taken to be stuck. A node that is found to go on frees the nodes that wait for nothing else, and so on. What is left
    is stuck.

    - A limiter is stuck if each call inside is kept by a stuck node, and no place is free.
    - A wait is stuck if its limiter is, and nothing calls the wait off.
    - A crew is stuck if what each of its workers waits for is stuck.

    No lock is held, so each limiter's calls inside are read at a different moment. But a permit waits only once: one
    that waits before and after all of these moments has waited throughout, and the calls that it keeps have stayed
    inside.

    The same holds for a crew: at the end its caller is asked again what it holds.

    Args:
        own: what can't go on before this wait ends; the wait is taken to last.
        at: the limiters in question.
        scope: the cancellation scope of the wait. Another wait that may be called off alone proves nothing.
        loop: the event loop that runs in this thread, if any. What the timers of other loops may end is not known, so
            waits in their tasks prove nothing; each loop looks at its own.
        by: for a proof about several waits at once: for each held call, some of the waits that keep it; the call goes
            on if one of these does.
        without: a wait to leave out.

    Attributes:
        stuck: those of the given limiters that are stuck, and the stuck ones reached from them, each with the calls
            inside; empty if none of the given ones is stuck.
        scopes: the scopes of the stuck crews.
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
        self._left: Counter[Permit] = Counter()  # how many keepers each call inside still has
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
        """Search the graph depth first from these limiters, until all of them are found to be free."""
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
        """Yield the nodes that this one waits for, as long as it is not found to go on."""
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
            yield from (crew for crew in wait.blocks if isinstance(crew, Crew))  # its scope calls the wait off

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
        """Record that `each` goes on as soon as `other` does, and yield `other` to be searched."""
        if other is None or other is self._without or other in self._free:
            self._set_free(each)
        else:
            self._waits_for[other].append(each)
            yield other

    def _limiter_free_by(self, call: Permit) -> Issuer:
        """Return the limiter of a call that goes on; remember the call if it is the first to set the limiter free."""
        limiter = call.issuer
        if limiter not in self._free:
            _free_calls[limiter] = weakref.ref(call)
        return limiter

    def _set_free(self, each: Any) -> None:
        """Record that this node goes on, and with it all nodes that are stuck by nothing else."""
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
        """Set free the crews whose callers have gone on, and the waits that are over or may be called off."""
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
