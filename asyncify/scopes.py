"""Cancellation scopes: waits for admission that are called off together when the work that they are part of has ended.

A waiting task can be cancelled. A waiting thread can't, so its wait is called off instead. Once a call runs on the sync
path, it is left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Protocol

from asyncify.forks import in_worker

__all__ = ["CancelScope", "get_scope"]


class Wait(Protocol):
    """The wait of a call."""

    def call_off(self) -> None:
        """Make the waiting call give up; do nothing when the wait is over. Never block."""
        ...


class CancelScope:
    """The waits of a fan-out's items, in any thread or loop, including those of inner scopes.

    No lock is taken, as a finalizer may interrupt at any point and the process may be forked: each change is a single
    step of the interpreter.
    """

    def __init__(self) -> None:
        self._outer = current_scope.get()
        self._waits: set[weakref.ref[Wait]] = set()
        self.is_cancelled: bool = False
        self._has_ended = False
        for _ in self._alive():
            pass  # drops ended outer scopes, or a chain of tasks would keep all of its scopes alive

    def enter(self) -> None:
        """Put this context, and contexts that are copied from it later, into the scope."""
        current_scope.set(self)

    def watch(self, wait: Wait) -> bool:
        """Add a wait that has begun to this scope and those around it; tell whether none of them is cancelled."""
        may_go_on = True
        for scope in self._alive():
            scope._waits.add(weakref.ref(wait, scope._waits.discard))
            may_go_on &= not scope.is_cancelled  # read last, as `cancel` sets it first
        return may_go_on

    def cancel(self) -> None:
        """Call off the waits in the scope, and those that will begin in it until its end."""
        self.is_cancelled = True
        for known in list(self._waits):
            if (wait := known()) is not None:
                wait.call_off()

    def end(self) -> None:
        """End the scope: tasks that an item has left running in its context may wait there again."""
        self._has_ended = True

    def is_within(self, other: CancelScope | None, lasting: Iterable[CancelScope] = ()) -> bool:
        """Tell whether every scope that can call off this scope's waits is the other one or around it.

        The scopes in `lasting` don't count, as nobody can cancel them.
        """
        return set(self._alive()).difference(lasting).issubset(() if other is None else other._alive())

    def _alive(self) -> Iterator[CancelScope]:
        """Yield this scope and the scopes around it, from the inside out, without those that have ended."""
        scope: CancelScope | None = self
        while scope is not None:
            if not scope._has_ended:
                yield scope
            outer = scope._outer  # read once, as other threads may change it
            while outer is not None and outer._has_ended:
                outer = outer._outer
            scope._outer = outer
            scope = outer


current_scope: ContextVar[CancelScope | None] = ContextVar("asyncify_scope", default=None)
"""The innermost scope that this context runs in."""

get_scope: Callable[[], CancelScope | None] = current_scope.get


def _forget_scopes() -> None:
    current_scope.set(None)


in_worker(_forget_scopes)
