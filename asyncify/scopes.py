"""Waits for admission that end together, when what they are part of has ended.

A task that waits is cancelled; a thread can't be, and so its wait is called off instead. The call itself, once it
runs, is left alone on the sync path.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Protocol

from asyncify.forks import in_worker

__all__ = ["CancelScope", "get_scope"]


class Wait(Protocol):
    """Something that a call waits for."""

    def call_off(self) -> None:
        """Have whoever waits give up; of no effect when the wait is over. Never blocks."""
        ...


class CancelScope:
    """The waits of a fan-out's items, whatever thread or loop they are in, those of scopes inside it included.

    No lock is taken, for a finalizer may come in between and a process be forked: each change is one step of the
    interpreter.
    """

    def __init__(self) -> None:
        self._outer = current_scope.get()
        self._waits: set[weakref.ref[Wait]] = set()
        self.is_cancelled: bool = False
        self._has_ended = False
        for _ in self._alive():
            pass  # forgets those that have ended, or a chain of tasks would keep all of its scopes

    def enter(self) -> None:
        """Put this context into the scope, and what will be copied from it."""
        current_scope.set(self)

    def watch(self, wait: Wait) -> bool:
        """Note a wait that has begun, and tell whether it may go on."""
        may_go_on = True
        for scope in self._alive():
            scope._waits.add(weakref.ref(wait, scope._waits.discard))
            may_go_on &= not scope.is_cancelled  # looked at last: who cancels looks for waits last
        return may_go_on

    def cancel(self) -> None:
        """Call off what waits in it, and what will until its end."""
        self.is_cancelled = True
        for known in list(self._waits):
            if (wait := known()) is not None:
                wait.call_off()

    def end(self) -> None:
        """Let go of it: what an item has left running may go on in its context, and wait there again."""
        self._has_ended = True

    def is_within(self, other: CancelScope | None, lasting: Iterable[CancelScope] = ()) -> bool:
        """Tell whether what is called off with this one is called off with that other one, too.

        Those that last, as nobody can cancel them, do not count.
        """
        return set(self._alive()).difference(lasting).issubset(() if other is None else other._alive())

    def _alive(self) -> Iterator[CancelScope]:
        """Yield this scope and those around it, from the inside out, without those that have ended."""
        scope: CancelScope | None = self
        while scope is not None:
            if not scope._has_ended:
                yield scope
            outer = scope._outer  # looked at once, as others go the same way
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
