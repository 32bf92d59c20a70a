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
from asyncify.limiter import Limiter, Memory, OfOneProcess
from asyncify.meter import Limits
from asyncify.permits import Permit, permits

__all__ = ["KeyedLimiter"]


_WHOLE = 1000
"""How many limiters are kept, the last used; of the others, only what they have learned, until that is void."""


class KeyedLimiter(OfOneProcess):
    """A limiter for each key: made on first use, and forgotten when it is idle and others have been used since.

    `keyed["tenant"]` is the limiter of one key. The keys that are remembered can be counted and gone through.
    """

    def __init__(self, key: Callable[[Any], Hashable], name: str | None = None, **limits: Any) -> None:
        like_each = Limiter(**limits, name=name)  # bad arguments raise now, not at the first call
        self._limits: Limits = like_each._limits
        self._now = like_each._now
        self.key = key
        self.name = name
        self._arguments = limits
        self._mark = object()  # by which it knows its own limiters, without a reference cycle
        self._after_fork()
        _keyed.add(self)
        # Whoever uses a limiter keeps it alive, as does a call that is inside or waits.
        self._alive: weakref.WeakValueDictionary[Hashable, Limiter] = weakref.WeakValueDictionary()
        self._last_used: OrderedDict[Hashable, Limiter] = OrderedDict()
        self._memories: OrderedDict[Hashable, Memory] = OrderedDict()  # of all that are alive, and all that count

    _bounds_calls = False
    """There is a limit on the calls of a key, but none on their sum over all keys."""

    def _after_fork(self) -> None:
        """Make a lock that no thread of the parent holds."""
        self._lock = threading.RLock()  # re-entrant, as a finalizer may come here while the lock is held

    def enter(self, key: Hashable, cost: float, timeout: float | None) -> Permit:
        """Wait in this thread at the limiter of a key."""
        return self[key]._enter(cost, 1, timeout)

    async def aenter(self, key: Hashable, cost: float, timeout: float | None) -> Permit:
        """Wait in this task at the limiter of a key."""
        return await self[key]._aenter(cost, 1, timeout)

    def __getitem__(self, key: Hashable) -> Limiter:
        """Return the limiter of a key; make it if there is none."""
        with self._lock:
            limiter = self._alive.get(key)
            if limiter is None:
                limiter = self._alive.setdefault(key, self._make(key))  # a finalizer may have made one meanwhile
            if key not in self._memories:
                self._memories[key] = limiter._memory()
            self._last_used[key] = limiter
            self._last_used.move_to_end(key)
            if len(self._last_used) > _WHOLE:
                old = self._last_used.popitem(last=False)
                self._memories.move_to_end(old[0], last=False)  # it is checked next
                del old  # its limiter goes now, unless somebody holds it
            self._forget_void()
        return limiter

    def _make(self, key: Hashable) -> Limiter:
        limiter = Limiter(name=f"{self.name or 'key'}[{key!r}]", **self._arguments)
        limiter._made_by = self._mark
        limiter._on_resize = partial(_note, weakref.ref(self), key)
        if (memory := self._memories.get(key)) is not None:
            limiter._resume(memory)
        return limiter

    def _note(self, key: Hashable, limiter: Limiter) -> None:
        """Keep what a limiter has learned."""
        with self._lock:
            self._memories[key] = limiter._memory()

    def _forget_void(self) -> None:
        """Check three keys, in turn: so a call pays little, and keys that no longer count go faster than new ones come.

        One of the three may just have fallen behind, and count for long.
        """
        now = self._now()
        for _ in range(3):
            for key, memory in self._memories.items():  # the first; before a `next()`, a finalizer may add others
                limiter = self._alive.get(key)
                with suppress(KeyError):  # a finalizer may have removed it meanwhile
                    self._memories.move_to_end(key)
                    if limiter is not None:  # it is one of the last used, or somebody holds it, and it may be used
                        limiter._drop_closed_loops()
                        limiter._settle()  # a call that has left may be counted still, and would keep it alive
                    elif memory.is_void(now):
                        del self._memories[key]
                        if key in self._alive:  # a finalizer has made it meanwhile
                            self._memories.setdefault(key, memory)
                break

    def __contains__(self, key: object) -> bool:
        """Tell whether a key is remembered."""
        return key in self._memories

    def __iter__(self) -> Iterator[Hashable]:
        """Yield the keys that are remembered now."""
        with self._lock:
            return iter(list(self._memories))

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._memories)

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
        raise RuntimeError(f"{self._title()}: this context is not inside a call that it has admitted")

    def _title(self) -> str:
        return self.name or "keyed limiter"

    def _state(self) -> str:
        """Say how many keys are remembered."""
        return f"{len(self)} keys"

    def __repr__(self) -> str:
        """Show how many keys are remembered: `<KeyedLimiter quotes 12 keys>`."""
        name = f"{self.name} " if self.name else ""
        return f"<KeyedLimiter {name}{self._state()}>"


def _note(keyed: weakref.ref[KeyedLimiter], key: Hashable, limiter: Limiter) -> None:
    """Keep what a limiter has learned as it was resized."""
    if (owner := keyed()) is not None:
        owner._note(key, limiter)


_keyed: weakref.WeakSet[KeyedLimiter] = weakref.WeakSet()


def _after_fork() -> None:
    for limiter in list(_keyed):
        limiter._after_fork()


at_fork(after_in_child=_after_fork)
