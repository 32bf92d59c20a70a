"""Waking tasks: an event loop resumes all tasks that were woken in one callback, in the order of waking.

Normally, a done future makes its loop schedule a callback for each task that awaits it. In a queue for one slot, where
each resumed task wakes the next, every callback would need a turn of the loop, with a system call; and a wakeup from
another thread costs that thread a system call, too.
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
"""How many seconds a round also resumes tasks woken meanwhile; then the loop's other callbacks get their turn."""


class Sleeper(Protocol):
    """The object that a task waits with."""

    ready: Any
    """The future of its loop that the task awaits; None once the task is resumed."""

    def give_up(self) -> None:
        """Give the wait up: the task will never go on, as its loop is closed. Never block."""
        ...


def _nothing() -> None:
    """Stand in for a dead weak reference while no round is pending."""


class Wakeups:
    """The sleepers whose tasks one event loop has to resume.

    A round resumes them. It is a generator that has been started already, so it notices whatever becomes of it: that
    the loop runs it, that an interrupt comes at that moment, or that a loop that was closed drops it.

    Attributes:
        woken: the sleepers whose tasks no round has resumed yet, in the order of waking. Whoever adds one must call
            `ask_for_round()`.
        pending: returns the round that the loop is to run; None once the round has begun or is gone.
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
        """Schedule a round if none is pending, after an addition to `woken`; from any thread."""
        pending = self.pending
        if pending() is None:
            self.schedule()

    def schedule(self) -> None:
        """Schedule a round on the loop; if the loop is closed, make all woken sleepers give up."""
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
            if not loop.is_closed():  # checked even after success, as the loop may have been closed meanwhile
                return
        self.pending = _nothing
        while self.woken:
            sleeper = self.woken.popleft()
            sleeper.ready = None  # it references the task
            sleeper.give_up()

    def _round(self) -> Iterator[None]:
        """Resume the tasks: all those woken before the round, and for a stretch those woken meanwhile.

        Whenever others are left behind, a further round is made pending before a task is resumed: the task may let an
        interrupt through, or run the loop itself, as nest_asyncio allows.
        """
        woken = self.woken
        try:
            yield
        except BaseException:  # the loop has dropped the round, or an interrupt has come as the round was to begin
            if self.pending is not _nothing:  # else the loop has not taken the round
                self.pending = _nothing
                if woken:
                    self.ask_for_round()
            raise
        try:
            self.pending = _nothing
            left = len(woken)  # asyncio's own callbacks for these would run in this turn, too, however long they take
            end = monotonic() + _STRETCH
            while woken and (left > 0 or monotonic() < end):
                left -= 1
                sleeper = woken.popleft()
                pending = self.pending
                if woken and pending() is None:  # `ask_for_round()`, without a call
                    self.schedule()
                future, sleeper.ready = sleeper.ready, None
                callbacks = future._callbacks
                if callbacks and len(callbacks) == 1:
                    ((go_on, context),) = callbacks
                    if not future.remove_done_callback(go_on):
                        continue  # a signal handler cancelled the task just now
                    try:  # noqa: SIM105  (a `with` here would slow down every task that has waited)
                        future.set_result(None)
                    except asyncio.InvalidStateError:
                        pass  # cancelled just now, too: the task gets its cancellation
                    context.run(go_on, future)
                else:
                    with suppress(asyncio.InvalidStateError):  # no task awaits it yet, or the task was cancelled
                        future.set_result(None)
        finally:
            if woken:
                self.ask_for_round()


def wakeups_of(loop: AbstractEventLoop) -> Wakeups:
    """Return the wakeups of the event loop that runs in this thread.

    Raises:
        RuntimeError: the loop does not run in this thread.
    """
    if loop is not _get_running_loop():
        raise RuntimeError("no event loop of asyncio runs here, and a limiter can't wait on any other, such as trio's")
    return _all.setdefault(loop, Wakeups(loop))


_all: weakref.WeakKeyDictionary[AbstractEventLoop, Wakeups] = weakref.WeakKeyDictionary()
