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
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any, Protocol

__all__ = ["Wakeups", "wakeups_of"]

_STRETCH = 0.001
"""Seconds in which tasks go on that were woken meanwhile; then all else that the loop has to do gets its turn."""


class Sleeper(Protocol):
    """What a task waits with."""

    ready: Any
    """The future that the task awaits, of its loop; None from when the task goes on."""

    def give_up(self) -> None:
        """Hear that the task will never go on, as its loop is closed. Never blocks."""
        ...


def _nothing() -> None:
    """Stand for a weak reference, where no round is to come."""


class Wakeups:
    """Those whose tasks one event loop has to go on with.

    A round does so. It is a generator that has been started already, so that it hears of whatever becomes of it: that
    the loop goes on with it, that an interrupt comes as it does, or that it drops it, as it has been closed.

    Attributes:
        woken: those with whose tasks no round has gone on yet, in the order of waking. Who adds one has to call
            `ask_for_round()`.
        pending: gives the round that the loop has been asked for, None once that has begun or is gone.
    """

    __slots__ = ("__weakref__", "loop", "pending", "woken")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop: Callable[[], AbstractEventLoop | None] = weakref.ref(loop)
        self.woken: deque[Sleeper] = deque()
        self.pending: Callable[[], object] = _nothing

    def is_closed(self) -> bool:
        """Tell whether the loop is closed, or gone."""
        return (loop := self.loop()) is None or loop.is_closed()

    def ask_for_round(self) -> None:
        """See to it that a round comes, after an addition to `woken`; from any thread."""
        pending = self.pending
        if pending() is None:
            self.schedule()

    def schedule(self) -> None:
        """Have the loop run a round; if it is closed, all who have been woken give up."""
        if (loop := self.loop()) is not None:
            coming = self._round()
            next(coming)
            try:
                self.pending = weakref.ref(coming)  # first, as another thread's loop may run it at once
                call_soon = loop.call_soon if loop is _get_running_loop() else loop.call_soon_threadsafe
                call_soon(next, coming, None)
            except BaseException as error:
                self.pending = _nothing
                if not (isinstance(error, RuntimeError) and loop.is_closed()):
                    raise
            if not loop.is_closed():  # asked also when it has taken it, as it may have been closed meanwhile
                return
        self.pending = _nothing
        while self.woken:
            sleeper = self.woken.popleft()
            sleeper.ready = None  # it leads to the task
            sleeper.give_up()

    def _round(self) -> Iterator[None]:
        """Go on with the tasks: with all that have been woken before, and for a stretch with those woken meanwhile.

        A further round is pending before any task goes on that leaves others behind: it may let an interrupt through,
        or run the loop itself, as it can with nest_asyncio.
        """
        woken = self.woken
        try:
            yield
        except BaseException:  # the loop has dropped it, or an interrupt has come as it was to go on with it
            if self.pending is not _nothing:  # else the loop has not taken it
                self.pending = _nothing
                if woken:
                    self.ask_for_round()
            raise
        try:
            self.pending = _nothing
            left = len(woken)  # for these the loop itself would call back in this turn, however long it takes
            end = monotonic() + _STRETCH
            while woken and (left > 0 or monotonic() < end):
                left -= 1
                sleeper = woken.popleft()
                if woken:
                    self.ask_for_round()
                future, sleeper.ready = sleeper.ready, None
                callbacks = future._callbacks
                if callbacks and len(callbacks) == 1:
                    ((go_on, context),) = callbacks
                    if not future.remove_done_callback(go_on):
                        continue  # its task was cancelled just now, by a signal's handler
                    try:  # noqa: SIM105  (a `with` here is felt by every task that has waited)
                        future.set_result(None)
                    except asyncio.InvalidStateError:
                        pass  # also cancelled just now: the task hears of it
                    context.run(go_on, future)
                else:
                    with suppress(asyncio.InvalidStateError):  # nobody awaits it yet, or its task was cancelled
                        future.set_result(None)
        finally:
            if woken:
                self.ask_for_round()


def wakeups_of(loop: AbstractEventLoop) -> Wakeups:
    """Return those of the event loop that runs here.

    Raises:
        RuntimeError: the loop does not run here.
    """
    if loop is not _get_running_loop():
        raise RuntimeError("no event loop of asyncio runs here, and a limiter can't wait on any other, such as trio's")
    return _all.setdefault(loop, Wakeups(loop))


_all: weakref.WeakKeyDictionary[AbstractEventLoop, Wakeups] = weakref.WeakKeyDictionary()
