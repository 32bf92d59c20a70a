"""Waits for admission that end together, when what they are part of has ended.

A task that waits is cancelled; a thread can't be, and so its wait is called off instead. The call itself, once it
runs, is left alone on the sync path.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

__all__ = ["CancelScope", "current_scope"]


class Wait(Protocol):
    """Something that a call waits for."""

    def call_off(self) -> None:
        """Wake whoever waits, to give up; of no effect when the wait is over. Never blocks."""
        ...


class CancelScope:
    """The waits of a fan-out's items, whatever thread or loop they are in, those of scopes inside it included."""

    def __init__(self) -> None:
        self._outer = current_scope.get()
        self._lock = threading.RLock()  # as a finalizer may come in between
        self._waits: weakref.WeakSet[Wait] = weakref.WeakSet()
        self._is_cancelled = False

    def enter(self) -> None:
        """Put this context into the scope, and what will be copied from it."""
        current_scope.set(self)

    def watch(self, wait: Wait) -> bool:
        """Note a wait that has begun, and tell whether it may go on."""
        with self._lock:
            self._waits.add(wait)
        may_go_on = not self._is_cancelled  # looked at last: who cancels looks for waits last
        return (self._outer is None or self._outer.watch(wait)) and may_go_on

    def cancel(self) -> None:
        """Call off what waits in it, and what will until the end of `cancelled()`."""
        self._is_cancelled = True
        with self._lock:
            waits = list(self._waits)
        for wait in waits:
            wait.call_off()

    @contextmanager
    def cancelled(self) -> Generator[None]:
        """Call off what waits in it, and what will while this block waits for the end of all.

        What an item has left running may go on in its context, and wait later, when nobody waits for it.
        """
        try:
            self.cancel()
            yield
        finally:
            self._is_cancelled = False


current_scope: ContextVar[CancelScope | None] = ContextVar("asyncify_scope", default=None)
"""The innermost scope that this context runs in."""
