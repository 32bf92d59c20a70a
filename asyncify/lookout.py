"""Tasks that wait at a limiter, looked at together: whether what they are part of waits for nothing but them.

A task that comes to wait looks who awaits it, and so who can't go on before. That is not all there is: it may be
awaited only later, or be one of several of which the others come to wait later. asyncio tells nobody of that. So it is
looked at again: in the next turn of the event loop, and then whenever as much time has passed again.
"""

from __future__ import annotations

import weakref
from asyncio import AbstractEventLoop, Timeout, get_running_loop
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Any

from asyncify.holds import callbacks_of, waiting_for
from asyncify.joins import join_of
from asyncify.permits import Permit

__all__ = ["HeldUp", "Lookout"]

_PAUSE = 0.05
"""Seconds between two looks at least, if nobody has come between them."""

_SHARE = 20
"""A look is followed by as many times its length in which there is none."""


Look = Callable[[AbstractEventLoop, list[Permit]], bool]
"""Looks at those that wait, in the order in which they came; returns whether it has told one."""


class Lookout:
    """Those who wait in the tasks of one event loop, and when they are looked at; used in its thread."""

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[Permit]] = []
        self._last_came = 0.0
        self._next_at = inf
        self._not_before = 0.0

    def note(self, permit: Permit, loop: AbstractEventLoop, look: Look) -> None:
        """Have one looked at that has come to wait."""
        self._waiting.append(weakref.ref(permit))
        self._last_came = loop.time()
        self._look_at(max(self._last_came, self._not_before), loop, look)

    def waiting(self) -> list[Permit]:
        """Return those that wait still."""
        return [permit for known in self._waiting if (permit := known()) is not None and permit.queue is not None]

    def _look_at(self, at: float, loop: AbstractEventLoop, look: Look) -> None:
        if at >= self._next_at:
            return
        self._next_at = at  # and one that was to come later finds that it is not that; a handle would keep the loop
        if at <= loop.time():
            loop.call_soon(self._turn, at, look)
        else:
            loop.call_at(at, self._turn, at, look)

    def _turn(self, at: float, look: Look) -> None:
        if at != self._next_at:
            return
        self._next_at = inf
        loop = get_running_loop()
        start = loop.time()
        waiting = self.waiting()
        self._waiting = [weakref.ref(permit) for permit in waiting]
        if not waiting:
            return
        has_told = look(loop, waiting)
        end = loop.time()
        self._not_before = end + _SHARE * (end - start)
        pause = 0 if has_told else max(_PAUSE, end - self._last_came)
        self._look_at(max(end + pause, self._not_before), loop, look)


class HeldUp:
    """What can't go on as long as some futures, which tasks of one event loop await, are not set.

    Attributes:
        permits: those that can't end before, each with one of these futures.
    """

    def __init__(self, futures: Iterable[Any]) -> None:
        self.permits: dict[Permit, Any] = {}
        self._known: dict[int, Any] = {}
        self._cancel: defaultdict[int, list[Any]] = defaultdict(list)  # what takes a task or a future along
        left: dict[int, int] = {}  # parts of a join
        chain = [(future, future) for future in futures]
        for awaited, first in chain:
            for callback, context in callbacks_of(awaited):
                waiter, held = waiting_for(awaited, callback, context)
                self.permits.update(dict.fromkeys(held, first))
                join = None if waiter is not None or held else join_of(callback)
                if join is not None:
                    key = id(join.whole)
                    left[key] = left.get(key, join.parts) - 1
                    waiter = None if left[key] else join.whole
                if waiter is not None:
                    if join is None or join.cancels_parts:
                        self._cancel[id(awaited)].append(waiter)
                    if id(waiter) not in self._known:
                        self._known[id(waiter)] = waiter
                        chain.append((waiter, first))

    def may_go_on(self, loop: AbstractEventLoop, future: Any) -> bool:
        """Tell whether a timer of the loop may end one of these waits, but not that for this future with it."""
        scheduled: Iterable[Any] | None = getattr(loop, "_scheduled", None)
        if scheduled is None:
            return True  # another kind of loop, which shows none
        others = self._known.keys() - self._taken_along(future)
        ready: Iterable[Any] = getattr(loop, "_ready", ())
        return any(
            id(known) in others
            for handle in (*scheduled, *ready)
            if not handle.cancelled()
            for known in _woken_by(handle)
        )

    def _taken_along(self, future: Any) -> set[int]:
        """Return those with which the wait for this future is cancelled."""
        chain, found = [future], set[int]()
        for taken in chain:
            for waiter in self._cancel[id(taken)]:
                if id(waiter) not in found:
                    found.add(id(waiter))
                    chain.append(waiter)
        return found


def _woken_by(handle: Any) -> Iterator[Any]:
    """Yield what a handle of a loop may be about to wake or cancel, as a timeout of asyncio or anyio does."""
    owner = getattr(handle._callback, "__self__", None)
    yield owner
    yield from handle._args or ()
    if isinstance(owner, Timeout):
        yield owner._task  # type: ignore[attr-defined]
    elif type(owner).__module__ == "anyio._backends._asyncio":
        yield from getattr(owner, "_tasks", ())  # of a cancel scope
