"""Deadlocks: who is told that it waits for itself, and when that is looked at.

When a call comes to wait in a thread or a task; when a thread comes to wait for others; and when a call has waited in a
task for a while, as asyncio tells nobody of what makes it certain then (`lookout`).
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from _thread import get_ident
from asyncio import AbstractEventLoop, _get_running_loop
from collections.abc import Collection, Iterable, Mapping

from asyncify.crews import Crew
from asyncify.errors import DeadlockError
from asyncify.forks import at_fork
from asyncify.lookout import HeldUp, Lookout
from asyncify.permits import Issuer, Permit, wait_within
from asyncify.proofs import Held, is_anybody_free, lasts, stuck_limiters
from asyncify.scopes import CancelScope

__all__ = ["come_to_wait", "look_at"]

Stuck = Mapping[Issuer, frozenset[Permit]]
"""Limiters that nobody can leave, with the calls inside."""

# One looks at a time, and who is told blocks nothing any more: so only one of those is told who wait for one another.
_looking = threading.RLock()

_MANY = 10_000
"""More than these are not looked at: it would hold the event loop for over a tenth of a second."""

_lookouts: weakref.WeakKeyDictionary[AbstractEventLoop, Lookout] = weakref.WeakKeyDictionary()


def come_to_wait(permit: Permit, held: Collection[Permit], scope: CancelScope | None, *, gives_up: bool) -> None:
    """Note what a call blocks that has come to wait: what can't end before its wait does.

    A waiter that will give up some day lets what it blocks end, so it is no proof for others. Nor is what a standstill
    stops, as that may be over before the wait is.

    Args:
        permit: that of the call.
        held: what its thread or task holds.
        scope: what its wait may be called off with.
        gives_up: whether it waits for some time only.

    Raises:
        DeadlockError: the wait can never end, as all calls inside are blocked by this waiter or by others.
    """
    loop = permit.ready.get_loop() if permit.in_task else None
    own = Held.of(held if permit.in_task else [*held, *_frozen_by(permit)])
    if gives_up:
        own.hands.clear()  # who waits for it among others is set free
    wait_within(own.permits.union(permit.around()), permit.issuer)
    if own:
        permit.scope = scope
        for hand in own.hands:
            hand.wait_for(permit)
        permit.blocks = () if gives_up else own.blocks()
        if permit.queue is None:
            permit.blocks = ()  # it was let in meanwhile
        elif stuck := _stuck_by(permit, own, loop):
            permit.issuer.count_rejected()
            raise _deadlock_error(permit, own, stuck)
    if loop is not None and permit.outer is not None and not gives_up:
        permit.scope = scope
        _lookouts.setdefault(loop, Lookout()).note(permit, loop, _look)


def look_at(crew: Crew) -> None:
    """Look whether a call waits for itself, as no thread of a crew can go on; if so, have the last that came told.

    Who waits in a task is looked at by its event loop.
    """
    if not (waits := crew.waits()):
        return
    last = max(waits, key=lambda permit: permit.since)
    own = Held.by(last)
    if own and not last.in_task and (stuck := _stuck_by(last, own, None)):
        last.told = _deadlock_error(last, own, stuck)
        last.issuer.count_rejected()
        last.call_off()


def _stuck_by(permit: Permit, own: Held, loop: AbstractEventLoop | None) -> Stuck | None:
    """Return the limiters that are stuck with this wait, if it can never end; it blocks nothing any more then."""
    limiter = permit.issuer
    if is_anybody_free(limiter.inside(), own):
        return None
    with _looking:
        stuck = stuck_limiters(own, [limiter], scope=permit.scope, loop=loop)
        if limiter not in stuck or permit.gives_up() or (permit.in_task and _may_go_on(limiter, own, stuck)):
            return None
        permit.blocks = ()
        return stuck


def _may_go_on(limiter: Issuer, own: Held, stuck: Stuck) -> bool:
    """Tell whether something may end a call inside, which this task does not keep from ending."""
    if stuck[limiter] <= own.stops(stuck[limiter]):
        return False
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    held_up = HeldUp([task, *_waiting_on(loop, stuck)])
    return _holds_others(own, held_up, stuck) or held_up.doomed(loop, [task]) is None


def _look(loop: AbstractEventLoop, waiting: list[Permit]) -> bool:
    """Look at those that wait in tasks of this loop, and tell one if they wait for themselves."""
    busy = {limiter for limiter in {permit.issuer for permit in waiting} if is_anybody_free(limiter.inside())}
    waiting = [permit for permit in waiting if permit.issuer not in busy]
    if not 0 < len(waiting) <= _MANY:
        return False
    scope = waiting[-1].scope
    permits_of = {each.ready: each for each in waiting if not each.gives_up() and lasts(each, scope)}
    with _looking:
        while True:
            held_up = HeldUp(permits_of)
            own = Held.of(held_up.permits)
            at = {permit.issuer for permit in permits_of.values()}
            stuck = stuck_limiters(own, at, scope=scope, loop=loop) if own else {}
            if stuck.keys() >= at:
                break
            permits_of = {ready: permit for ready, permit in permits_of.items() if permit.issuer in stuck}
        if not stuck or _holds_others(own, held_up, stuck):
            return False
        inside = frozenset[Permit]().union(*stuck.values())
        needed = {ready for other in own.keeps(inside) for ready in held_up.permits[other]}
        everybody = HeldUp(
            _waiting_on(loop, stuck)
        )  # those within no call, too: they may be siblings of those that are
        ready = everybody.doomed(loop, (ready for ready in reversed(permits_of) if ready in needed))
        if ready is None:
            return False
        permit = permits_of[ready]
        ready.set_exception(_deadlock_error(permit, own, stuck))
    ready.exception()  # its task may be cancelled at this moment, and not hear of it
    permit.issuer.count_rejected()
    return True


def _waiting_on(loop: AbstractEventLoop, limiters: Iterable[Issuer]) -> list[asyncio.Future[None]]:
    return [future for limiter in limiters for future in limiter.waiting_on(loop)]


def _holds_others(own: Held, held_up: HeldUp, stuck: Stuck) -> bool:
    """Tell whether a task of this thread is inside of which it is not known what may cancel it."""
    thread = get_ident()
    return any(
        permit.in_task and permit.thread == thread and permit not in held_up.permits
        for inside in stuck.values()
        for permit in inside.difference(own.stops(inside))
    )


def _frozen_by(permit: Permit) -> set[Permit]:
    """Return the calls inside that are tasks of an event loop whose thread `permit` waits in."""
    if permit.in_task or _get_running_loop() is None:
        return set()
    return {other for other in permit.issuer.inside() if other.thread == permit.thread and other.in_task}


def _deadlock_error(permit: Permit, own: Held, stuck: Stuck) -> DeadlockError:
    """Return what a call is told that waits for itself."""
    limiter = permit.issuer
    slots = f"{limiter.title()}: all slots ({limiter.places()}) are held by calls that"
    holds_loop = not permit.in_task and _get_running_loop() is not None
    if (holds_loop or own.holds_up_loop()) and not own.stops_at_most(stuck[limiter]).issubset(permit.around()):
        return DeadlockError(
            f"{slots} run on the event loop which this one holds up while it waits, so none can ever come free. "
            "On an event loop, await the async side: ainvoke or acall."
        )
    if others := [other.title() for other in stuck if other is not limiter]:
        return DeadlockError(
            f"{slots} wait, by way of {' and '.join(others)}, for a slot of this very limiter, so none can ever come "
            "free. Have all calls take slots of these limiters in the same order."
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
