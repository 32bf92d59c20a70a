"""Waking tasks: all that an event loop has woken go on in one callback of it, first woken, first on.

A future that is done has its loop call back each task that awaits it. In a queue for one slot, where every task that
goes on wakes the next, each of these callbacks takes a turn of the loop of its own, with a system call; and each one
that another thread asks for takes a system call there.
"""

from __future__ import annotations

import asyncio
import weakref
from asyncio import AbstractEventLoop, _get_running_loop
from collections import deque
from collections.abc import Callable
from time import monotonic

__all__ = ["Wakeups", "wakeups_of"]

_STRETCH = 0.001
"""Seconds in which tasks go on that were woken meanwhile; then all else that the loop has to do gets its turn."""


def _nothing() -> None:
    """Stand for a reference to a round that does not come."""


class Wakeups:
    """What tasks of one event loop await that have been woken and have not gone on yet.

    A round goes on with them. While there are any, one is pending, also while one is run: a task may let an interrupt
    through, or run its loop itself, as it can with nest_asyncio.

    Attributes:
        woken: their futures, in the order of waking.
        pending: gives the round that the loop will run, or None. The reference is weak, as the loop may never do so:
            because it has been closed, or because an interrupt came as it began to. Then the round goes.
    """

    __slots__ = ("__weakref__", "loop", "pending", "woken")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop: Callable[[], AbstractEventLoop | None] = weakref.ref(loop)
        self.woken: deque[asyncio.Future[None]] = deque()
        self.pending: Callable[[], _Round | None] = _nothing

    def wake(self, future: asyncio.Future[None]) -> bool:
        """Have the task that awaits a future go on soon; tell whether the loop still runs any. From any thread."""
        self.woken.append(future)
        pending = self.pending  # `look()`, without a call
        return pending() is not None or self.schedule()

    def look(self) -> bool:
        """See to it that a round is pending; tell whether the loop still runs any."""
        pending = self.pending
        return pending() is not None or self.schedule()

    def schedule(self) -> bool:
        """Have the loop run a round; tell whether it does."""
        coming = _Round(self)
        try:
            self.pending = weakref.ref(coming, self._replace)  # first, as another thread's loop may run it at once
            if (loop := self.loop()) is not None:
                call_soon = loop.call_soon if loop is _get_running_loop() else loop.call_soon_threadsafe
                call_soon(coming.run)
                return True
        except RuntimeError:
            pass  # the loop is closed
        except BaseException:  # an interrupt, whose traceback keeps the round
            self.pending = _nothing
            raise
        self.pending = _nothing
        self.woken.clear()  # they would keep their tasks
        return False

    def _replace(self, _: object) -> None:
        """Schedule a round in place of one that has gone without having been run."""
        self.pending = _nothing
        if self.woken:
            self.schedule()


class _Round:
    """A callback of a loop, in which its tasks go on that have been woken, and those that they wake."""

    __slots__ = ("__weakref__", "_wakeups")

    def __init__(self, wakeups: Wakeups) -> None:
        self._wakeups = wakeups

    def run(self) -> None:
        """Have the futures done, and go on with their tasks at once."""
        wakeups = self._wakeups
        woken = wakeups.woken
        try:
            wakeups.pending = _nothing
            left = len(woken)  # for these the loop itself would call back in this turn, however long it takes
            end = monotonic() + _STRETCH
            while woken and (left > 0 or monotonic() < end):
                left -= 1
                future = woken.popleft()
                if woken:
                    wakeups.look()
                callbacks = future._callbacks
                if callbacks and len(callbacks) == 1:
                    ((go_on, context),) = callbacks
                    future.remove_done_callback(go_on)
                    future.set_result(None)
                    context.run(go_on, future)
                elif not future.done():  # else its task was cancelled, or it was woken before
                    future.set_result(None)
        finally:
            if woken:
                wakeups.look()


def wakeups_of(loop: AbstractEventLoop) -> Wakeups:
    """Return those of the event loop that runs here.

    Raises:
        RuntimeError: the loop does not run here.
    """
    if loop is not _get_running_loop():
        raise RuntimeError("no event loop of asyncio runs here, and a limiter can't wait on any other, such as trio's")
    return _all.setdefault(loop, Wakeups(loop))


_all: weakref.WeakKeyDictionary[AbstractEventLoop, Wakeups] = weakref.WeakKeyDictionary()
