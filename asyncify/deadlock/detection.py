"""Deadlocks: when limiters look for one, and which of the waiting calls gets the `DeadlockError`.

They look when a call begins to wait in a thread or a task; when a thread begins to wait for a crew; and when a call has
waited in a task for a while, as asyncio gives no sign when a deadlock becomes certain later (`lookout`).
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from _thread import get_ident
from asyncio import AbstractEventLoop, _get_running_loop
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache

from asyncify.deadlock.crews import Crew
from asyncify.deadlock.holds import loop_of
from asyncify.deadlock.lookout import HeldUp, Lookout, closes_generators, shares_context
from asyncify.deadlock.proofs import Held, Proof, is_anybody_free, lasts
from asyncify.errors import DeadlockError
from asyncify.forks import at_fork
from asyncify.permits import Issuer, Permit
from asyncify.scopes import CancelScope

__all__ = ["come_to_wait", "look_at", "look_at_threads"]

Stuck = Mapping[Issuer, frozenset[Permit]]
"""Limiters that nobody can leave, with the calls inside."""

Doubts = Callable[[AbstractEventLoop], bool]
"""Tells whether a call on an event loop may end otherwise than it looks."""

By = Mapping[Permit, Collection[Permit]]
"""For each call or standstill that is held, some of the waits that keep it."""

# Only one thread looks at a time, and a wait that gets the error counts as called off from then on: so of the calls
# that wait for one another only one gets it.
_looking = threading.RLock()

_ROUNDS = 10
"""How many times a proof is tried, each time without the waits that were found to go on."""

_NAMED = 5
"""How many limiters an error names beside its own."""

_MANY = 10_000
"""With more waiting tasks than this none is looked at: that would hold the event loop for tenths of a second."""

_lookouts: weakref.WeakKeyDictionary[AbstractEventLoop, Lookout] = weakref.WeakKeyDictionary()


def come_to_wait(permit: Permit, held: Collection[Permit], scope: CancelScope | None, *, gives_up: bool) -> None:
    """Record what a call keeps from ending while it waits, and only then look for a deadlock.

    Every call that begins to wait does both in this order, so the last of those in a deadlock sees all of it.

    A waiter with a timeout will let what it keeps end, so it proves nothing for other waits. Nor does what a standstill
    stops, as the standstill may be over before the wait is.

    Args:
        permit: the waiting call's permit.
        held: the permits that its thread or task holds.
        scope: the cancellation scope of the wait.
        gives_up: whether the wait has a timeout.

    Raises:
        DeadlockError: the wait can never end, as this wait or others keep all calls inside from ending.
    """
    own = Held.of(held if permit.in_task else [*held, *_frozen_by(permit)])
    if gives_up and own.hands:
        own = Held(own.permits, own.standstills)  # at the timeout its crew's caller goes on
    permit.scope = scope
    permit.wait_within(own.permits.union(permit.around()))
    permit.blocks = () if gives_up else own.blocks()
    for hand in own.hands:
        hand.wait_for(permit)
    if permit.queue is None:
        permit.end_wait()  # the call was admitted meanwhile
        return
    loop = permit.ready.get_loop() if permit.in_task else None
    if own and (stuck := _stuck_by(permit, own, loop)):
        permit.issuer._count_rejected()
        raise _deadlock_error(permit, own, stuck)
    if loop is not None and permit.within and not gives_up:
        _lookouts.setdefault(loop, Lookout()).note(permit, loop, _look)


def look_at(crew: Crew) -> None:
    """Look for a deadlock in which no worker of a crew can go on; the last worker that began to wait gets the error.

    A wait in a task is left to the lookout of its event loop.
    """
    if waits := crew.waits():
        _tell_if_stuck(max(waits, key=lambda permit: permit.since))


def look_at_threads(waiting: Collection[Permit]) -> None:
    """Look for deadlocks after a limit has shrunk; the last of the waiting threads in one gets the error."""
    for permit in sorted(waiting, key=lambda permit: permit.since, reverse=True):
        _tell_if_stuck(permit)


def _tell_if_stuck(permit: Permit) -> None:
    """Call off the wait of a call in a thread, with a `DeadlockError`, if the call waits for itself."""
    own = Held.by(permit)
    if own and not permit.in_task and (stuck := _stuck_by(permit, own, None)):
        permit.told = _deadlock_error(permit, own, stuck)
        permit.issuer._count_rejected()
        permit.call_off()


def _stuck_by(permit: Permit, own: Held, loop: AbstractEventLoop | None) -> Stuck | None:
    """Return the limiters that are stuck by this wait if it can never end; the wait counts as called off then."""
    limiter = permit.issuer
    if is_anybody_free(limiter._inside(), own) or not Proof(own, [limiter], scope=permit.scope, loop=loop).stuck:
        return None
    with _looking:
        proof = Proof(own, [limiter], scope=permit.scope, loop=loop)
        is_certain = proof.stuck and not permit.gives_up() and not _may_go_on(permit, own, proof)
        if not is_certain or not _is_needed(permit, loop) or _may_be_left(proof.stuck):
            return None
        permit.is_called_off = True
        return proof.stuck


def _is_needed(permit: Permit, loop: AbstractEventLoop | None) -> bool:
    """Tell whether the permit's limiter would be free if this wait were over, with all that ends after it.

    If not, the deadlock is among other calls, which this one only waits for: its error would set none of them free.
    """
    return not Proof(Held.of(()), [permit.issuer], scope=None, loop=loop, without=permit).stuck


def _is_in_doubt(loop: AbstractEventLoop) -> bool:
    """Tell whether a call on a loop may be that of another task, or of a generator that is about to be closed."""
    return closes_generators(loop) or shares_context(loop)


def _may_be_left(stuck: Stuck, doubts: Doubts = _is_in_doubt) -> bool:
    """Tell whether it is in doubt in which task, and when, one of these calls will end."""
    threads = {call.thread for call in _all_inside(stuck)}
    loops = [loop for thread in threads if (loop := loop_of.get(thread)) is not None]
    return any(map(doubts, loops))


def _may_go_on(permit: Permit, own: Held, proof: Proof) -> bool:
    """Tell whether something may end one of those calls inside that this waiting task does not keep from ending."""
    inside = proof.stuck[permit.issuer]
    if not permit.in_task or inside <= own.stops(inside):
        return False
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    held_up = HeldUp([task, *_waiting_on(loop, proof.stuck)])
    if _holds_others(own, held_up.permits, proof.stuck):
        return True
    kept = Held.of(held_up.permits).keeps(_all_inside(proof.stuck))
    return held_up.doomed(loop, [task], kept) is None


def _look(loop: AbstractEventLoop, waiting: list[Permit]) -> bool:
    """Look for deadlocks among these waits in tasks of this loop; one wait of the first one found gets the error."""
    busy = {limiter for limiter in {permit.issuer for permit in waiting} if _is_busy(limiter)}
    waiting = [permit for permit in waiting if permit.issuer not in busy and not permit.gives_up()]
    if not 0 < len(waiting) <= _MANY:
        return False
    with _looking:
        doubts = cache(_is_in_doubt)  # asked once for all parts: nothing else runs on the loop meanwhile
        return any(_tell_one(loop, part, doubts) for part in _parts(waiting))


def _is_busy(limiter: Issuer) -> bool:
    """Tell whether the limiter has a call inside that certainly no wait keeps from ending."""
    return any(not call.keepers() for call in limiter._inside())


def _parts(waiting: list[Permit]) -> Iterable[list[Permit]]:
    """Divide the waits into parts that can't wait for one another; within a part they keep their order."""
    limiters = {permit.issuer for permit in waiting}
    if len(limiters) == 1:
        return [waiting]
    groups = _Groups()
    for call, waits in _held_by(waiting)[1].items():
        if call.slots:
            groups.join(call.issuer, (permit.issuer for permit in waits))
    for limiter in limiters:
        for call in limiter._inside():
            groups.join(limiter, (keeper.issuer for keeper in call.keepers() if isinstance(keeper, Permit)))
    parts: defaultdict[Issuer, list[Permit]] = defaultdict(list)
    for permit in waiting:
        parts[groups.of(permit.issuer)].append(permit)
    return parts.values()


def _tell_one(loop: AbstractEventLoop, waits: list[Permit], doubts: Doubts) -> bool:
    """Give one of these waits the error if together they are a deadlock."""
    scope = waits[-1].scope
    for _ in range(_ROUNDS):
        own, by = _held_by(waits)
        proof = Proof(own, {permit.issuer for permit in waits}, scope=scope, loop=loop, by=by)
        left = [permit for permit in waits if permit.issuer in proof.stuck and lasts(permit, scope, proof.scopes)]
        if len(left) == len(waits):
            break
        waits = left
    else:
        return False
    stuck = _smallest(own, by, scope, loop, proof.stuck)
    if not stuck or _holds_others(own, by, stuck) or doubts(loop) or _may_be_left(stuck, doubts):
        return False
    around = Proof(own, {*proof.stuck, *(call.issuer for call in own.permits)}, scope=scope, loop=loop, by=by).stuck
    everybody = HeldUp(_waiting_on(loop, around))  # waits within no call, too: their tasks may be siblings of these
    if (permit := _whom_to_tell(loop, own, by, stuck, everybody)) is None:
        return False
    permit.ready.set_exception(_deadlock_error(permit, own, stuck))
    permit.ready.exception()  # count it as retrieved: its task may be cancelled at this moment
    permit.issuer._count_rejected()
    return True


def _smallest(own: Held, by: By, scope: CancelScope | None, loop: AbstractEventLoop, stuck: Stuck) -> Stuck:
    """Return as small a subset of these limiters as is stuck by itself; the others wait for those."""
    for limiter in list(stuck):
        if limiter in stuck:
            fewer = Proof(own, [limiter], scope=scope, loop=loop, by=by).stuck
            if 0 < len(fewer) < len(stuck):
                stuck = fewer
    return stuck


def _held_by(waits: Iterable[Permit]) -> tuple[Held, By]:
    """Return what can't go on before these waits in tasks end, and for each part of it some waits that keep it."""
    permits_of = {permit.ready: permit for permit in waits}
    kept = HeldUp(permits_of).permits
    return Held.of(kept), {other: [permits_of[future] for future in futures] for other, futures in kept.items()}


def _whom_to_tell(loop: AbstractEventLoop, own: Held, by: By, stuck: Stuck, everybody: HeldUp) -> Permit | None:
    """Return the wait to give the error: the last of those that keep these limiters stuck.

    Return none if something else may end one of these waits, a timeout or a failing sibling, say.
    """
    inside = _all_inside(stuck)
    if not everybody.permits.keys() >= own.permits & inside:
        return None  # one of these waits was admitted just now
    permits_of = {permit.ready: permit for call in own.keeps(inside) for permit in by[call] if permit.issuer in stuck}
    last_first = sorted(permits_of, key=lambda ready: permits_of[ready].since, reverse=True)
    ready = everybody.doomed(loop, last_first, Held.of(everybody.permits).keeps(inside))
    return None if ready is None else permits_of[ready]


def _all_inside(stuck: Stuck) -> frozenset[Permit]:
    return frozenset[Permit]().union(*stuck.values())


class _Groups:
    """Disjoint sets of limiters that belong together: union-find with path halving."""

    def __init__(self) -> None:
        self._of: dict[Issuer, Issuer] = {}

    def of(self, limiter: Issuer) -> Issuer:
        """Return the limiter that represents this one's group."""
        while (other := self._of.get(limiter, limiter)) is not limiter:
            self._of[limiter] = limiter = self._of.get(other, other)
        return limiter

    def join(self, one: Issuer, others: Iterable[Issuer]) -> None:
        """Merge the groups of these limiters."""
        for other in others:
            self._of[self.of(other)] = self.of(one)


def _waiting_on(loop: AbstractEventLoop, limiters: Iterable[Issuer]) -> list[asyncio.Future[None]]:
    return [future for limiter in limiters for future in limiter._waiting_on(loop)]


def _holds_others(own: Held, known: Collection[Permit], stuck: Stuck) -> bool:
    """Tell whether a call inside runs in this thread in a task of which it is unknown what may cancel it."""
    thread = get_ident()
    return any(
        permit.thread == thread and permit not in known
        for inside in stuck.values()
        for permit in inside.difference(own.stops(inside))
    )


def _frozen_by(permit: Permit) -> set[Permit]:
    """Return the calls inside that run in the thread that `permit` blocks, if an event loop runs there."""
    if permit.in_task or _get_running_loop() is None:
        return set()
    return {other for other in permit.issuer._inside() if other.thread == permit.thread}


def _deadlock_error(permit: Permit, own: Held, stuck: Stuck) -> DeadlockError:
    """Return the error for a call that waits for itself."""
    limiter = permit.issuer
    slots = f"{limiter._title()}: all slots ({limiter._places()}) are held by calls that"
    holds_loop = not permit.in_task and _get_running_loop() is not None
    if (holds_loop or own.holds_up_loop()) and not own.stops_at_most(stuck[limiter]).issubset(permit.around()):
        return DeadlockError(
            f"{slots} run on the event loop which this one holds up while it waits, so none can ever come free. "
            "On an event loop, await the async side: ainvoke or acall."
        )
    if others := sorted({other._title() for other in stuck if other is not limiter}):
        way = " and ".join(others if len(others) <= _NAMED else [*others[:_NAMED], f"{len(others) - _NAMED} others"])
        return DeadlockError(
            f"{slots} wait, by way of {way}, for a slot of this very limiter, so none can ever come free. Have all "
            "calls take slots of these limiters in the same order."
        )
    return DeadlockError(
        f"{slots} wait for a slot of this very limiter, so none can ever come free. Give the inner function a "
        "limiter of its own, or call its unlimited .func or .afunc."
    )


def _begin_anew() -> None:
    global _looking  # noqa: PLW0603  (a lock that another thread held)
    _looking = threading.RLock()
    _lookouts.clear()


at_fork(after_in_child=_begin_anew)
