"""A limiter for each key of the calls, such as a tenant."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from asyncify.forks import at_fork
from asyncify.limiter import Limiter
from asyncify.meter import Limits
from asyncify.permits import Permit, permits

__all__ = ["KeyedLimiter"]


class KeyedLimiter:
    """A limiter for each key: made on first use, forgotten when it is idle.

    `keyed["tenant"]` is the limiter of one key. The keys that are remembered can be counted and gone through.
    """

    def __init__(self, key: Callable[[Any], Hashable], name: str | None = None, **limits: Any) -> None:
        self._limits: Limits = Limiter(**limits, name=name)._limits  # bad arguments raise now, not at the first call
        self.key = key
        self.name = name
        self._arguments = limits
        self._mark = object()  # by which it knows its own limiters, without a reference cycle
        self._after_fork()
        _keyed.add(self)
        # A call that is inside or waits keeps its limiter alive; `_recent` keeps those whose admissions still count.
        self._alive: weakref.WeakValueDictionary[Hashable, Limiter] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Hashable, Limiter] = OrderedDict()

    _bounds_calls = False
    """There is a limit on the calls of a key, but none on their sum over all keys."""

    def _after_fork(self) -> None:
        """Make a lock that no thread of the parent holds."""
        self._lock = threading.RLock()  # re-entrant, as a finalizer may come here while the lock is held

    def enter(self, key: Hashable, cost: float, timeout: float | None) -> Permit:
        """Wait in this thread at the limiter of a key."""
        limiter = self[key]
        permit = limiter._enter(cost, 1, timeout)
        self._remember(key, limiter)
        return permit

    async def aenter(self, key: Hashable, cost: float, timeout: float | None) -> Permit:
        """Wait in this task at the limiter of a key."""
        limiter = self[key]
        permit = await limiter._aenter(cost, 1, timeout)
        self._remember(key, limiter)
        return permit

    def _remember(self, key: Hashable, limiter: Limiter) -> None:
        """Keep a limiter that was forgotten as idle after it was looked up and before it admitted a call."""
        with self._lock:
            self._recent.setdefault(key, limiter)

    def __getitem__(self, key: Hashable) -> Limiter:
        """Return the limiter of a key; make it if there is none."""
        with self._lock:
            limiter = self._alive.get(key)
            if limiter is None:
                limiter = self._alive[key] = Limiter(name=f"{self.name or 'key'}[{key!r}]", **self._arguments)
                limiter._made_by = self._mark
                limiter._on_resize = partial(_remember, weakref.ref(self), key)
            self._recent[key] = limiter
            self._recent.move_to_end(key)
            self._forget_idle()
        return limiter

    def _forget_idle(self) -> None:
        """Check the two least recently used: so a call pays little, and idle limiters do not pile up."""
        for _ in range(2):
            key, limiter = next(iter(self._recent.items()))
            is_idle = len(self._recent) > 1 and limiter._is_idle()
            with suppress(KeyError):  # a finalizer may have removed it meanwhile
                if is_idle:
                    del self._recent[key]
                else:
                    self._recent.move_to_end(key)  # or a busy one would keep all others from being checked

    def __contains__(self, key: object) -> bool:
        """Tell whether a key is remembered."""
        return key in self._alive

    def __iter__(self) -> Iterator[Hashable]:
        """Yield the keys that are remembered now."""
        with self._lock:
            return iter(list(self._alive))

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._alive)

    def __bool__(self) -> bool:
        """Be true, as any limiter is, though no key may be remembered."""
        return True

    def record(self, actual: float) -> None:
        """Correct the estimated cost of a call, from inside it."""
        for permit in permits():
            limiter = permit.issuer
            if isinstance(limiter, Limiter) and limiter._made_by is self._mark:
                limiter.record(actual)
                return
        raise RuntimeError(f"{self.name or 'keyed limiter'}: this context is not inside a call that it has admitted")

    def _state(self) -> str:
        """Say how many keys are remembered."""
        return f"{len(self)} keys"

    def __repr__(self) -> str:
        """Show how many keys are remembered: `<KeyedLimiter quotes 12 keys>`."""
        name = f"{self.name} " if self.name else ""
        return f"<KeyedLimiter {name}{self._state()}>"


def _remember(keyed: weakref.ref[KeyedLimiter], key: Hashable, limiter: Limiter) -> None:
    """Keep a limiter that has been resized, even if it was forgotten after it was looked up."""
    if (owner := keyed()) is not None:
        owner._remember(key, limiter)


_keyed: weakref.WeakSet[KeyedLimiter] = weakref.WeakSet()


def _after_fork() -> None:
    for limiter in list(_keyed):
        limiter._after_fork()


at_fork(after_in_child=_after_fork)
