"""The registry: every decorated pair by name, and fakes in their places."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature
from typing import Any

from asyncify.entries import Entries, Kind, make_entries
from asyncify.errors import NameTakenError, PairNotFoundError
from asyncify.gate import ForeignLimiter, KeyedLimiter
from asyncify.limiter import Limiter
from asyncify.runnable import Dual
from asyncify.signatures import describe, is_async, signature_of

__all__ = ["Record", "Registry", "registry"]

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Record:
    """What the registry knows of one pair: a side is native, bridged, or missing where a bridge is forbidden."""

    name: str
    sync: Kind
    async_: Kind
    signature: Signature | None
    limiter: Limiter | KeyedLimiter | ForeignLimiter | None
    module: str
    line: int | None
    pair: Dual[Any, Any]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a pair was written: tells the same function, loaded again, from another of its name.

    A module gets a new spec each time it is run, so a name that comes back under another spec has been reloaded.
    """

    qualname: str
    file: str | None
    line: int | None
    spec: object

    def is_reload_of(self, other: _Origin) -> bool:
        if self.qualname != other.qualname:
            return False
        return self.spec is not other.spec or self.file != other.file or self.line == other.line


class Registry:
    """All decorated pairs, by `module.qualname`.

    A mapping from names to records, in the order of the names: `registry["quotes.fetch"]`, `"fetch" in registry`,
    `for record in registry`, `len(registry)`. A short name, the end of a full one, finds a pair if it is unique.
    A pair that nobody else holds any more is forgotten.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pairs: weakref.WeakValueDictionary[str, Dual[Any, Any]] = weakref.WeakValueDictionary()
        self._origins: dict[str, _Origin] = {}

    def __getitem__(self, name: str) -> Record:
        """Return the record of a pair.

        Raises:
            PairNotFoundError: no pair has this name, or several do; the message lists those that are near.
        """
        full_name = self._full_name(name)
        return _record(full_name, self._pairs[full_name])

    def __contains__(self, name: object) -> bool:
        """Tell whether `registry[name]` finds a pair."""
        try:
            return isinstance(name, str) and bool(self._full_name(name))
        except PairNotFoundError:
            return False

    def __iter__(self) -> Iterator[Record]:
        """Yield the record of every pair, in the order of their names."""
        for name, pair in sorted(self._pairs.items(), key=lambda item: item[0]):
            yield _record(name, pair)

    def __len__(self) -> int:
        """Return how many pairs there are."""
        return len(self._pairs)

    def __repr__(self) -> str:
        """Show how many pairs there are: `<Registry of 3 pairs>`."""
        return f"<Registry of {len(self)} pairs>"

    def add(self, pair: Dual[Any, Any], fn: Function, name: str | None = None) -> None:
        """Register a pair under `name`, or else under that of the function that stands for it.

        Raises:
            NameTakenError: a different function has the name. The same one, loaded again, takes its own place.
        """
        origin = _origin(fn)
        with self._lock:
            full_name = f"{_module(fn)}.{name or origin.qualname}"
            if name is None and not _is_named(fn):
                full_name = self._numbered(full_name)
            taken = self._pairs.get(full_name)
            if taken is not None and taken is not pair and not origin.is_reload_of(self._origins[full_name]):
                raise NameTakenError(
                    f"the name {full_name} is taken by {describe(taken)}, so {describe(fn)} can't have it; give it "
                    'another, as in dual(..., name="other")'
                )
            self._pairs[full_name] = pair
            self._origins[full_name] = origin

    def rename(self, pair: Dual[Any, Any], fn: Function) -> None:
        """Register a pair under the name of `fn` instead of the one that it has."""
        with self._lock:
            old = [name for name, known in self._pairs.items() if known is pair]
            self.add(pair, fn)
            for name in old:
                del self._pairs[name]

    def _numbered(self, name: str) -> str:
        """Return a free name for a function that has none of its own."""
        candidates = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
        return next(candidate for candidate in candidates if candidate not in self._pairs)

    def _full_name(self, name: str) -> str:
        with self._lock:
            if name in self._pairs:
                return name
            found = sorted(full for full in self._pairs if full.endswith(f".{name}"))
            if len(found) == 1:
                return found[0]
            if found:
                raise PairNotFoundError(
                    f"{name!r} is the short name of several pairs: {', '.join(found)}; write one in full"
                )
            short = {full.rpartition(".")[2]: full for full in self._pairs}
            near = difflib.get_close_matches(name, [*self._pairs, *short], n=3)
            names = ", ".join(dict.fromkeys(short.get(match, match) for match in near))
            hint = f"did you mean {names}?" if names else "there is none like it; is its module imported?"
            raise PairNotFoundError(f"no pair is called {name!r}; {hint}")

    @contextmanager
    def override(
        self,
        pair: Dual[Any, Any] | str,
        fake: Function | None = None,
        *,
        sync: Function | None = None,
        async_: Function | None = None,
    ) -> Iterator[Dual[Any, Any]]:
        """Put a fake in the place of a pair for a `with` block, on both paths, in every thread and pipe.

        The fake stands in for the pair with its limit: it runs at once. One function serves both paths; a sync one
        is called on the event loop itself. Nested overrides are undone in any order.

        Args:
            pair: the pair, or its name.
            fake: a function, of either colour, or another pair.
            sync, async_: a fake for each path, instead of `fake`.

        Raises:
            PairNotFoundError: no pair has this name.
            TypeError: there is nothing that could be called.
        """
        target = self[pair].pair if isinstance(pair, str) else pair
        entries = _fake_entries(target, fake, sync, async_)
        with self._lock:
            target.set_fakes((*target.fakes, entries))
        try:
            yield target
        finally:
            with self._lock:
                target.set_fakes(tuple(other for other in target.fakes if other is not entries))


def _fake_entries(
    pair: Dual[Any, Any], fake: Function | None, sync: Function | None, async_: Function | None
) -> Entries:
    if not isinstance(pair, Dual):
        raise TypeError(f"override takes a pair or its name, not {pair!r}")
    if (fake is None) == (sync is None and async_ is None):
        raise TypeError(
            f"override of {pair.get_name()}: give one fake for both paths, as in override(pair, fake), or one for "
            "each, as in override(pair, sync=..., async_=...)"
        )
    for candidate in (fake, sync, async_):
        if candidate is not None and not callable(candidate):
            raise TypeError(f"override of {pair.get_name()}: a fake is a function, not {candidate!r}")
    if isinstance(fake, Dual):
        return fake.entries
    if fake is not None and is_async(fake):
        async_ = fake
    elif fake is not None:
        sync = fake
    if sync is not None and async_ is None:
        return make_entries(sync, _on_the_loop(sync), gate=None, bridge="thread", name=pair.get_name())
    return make_entries(sync, async_, gate=None, bridge="thread", name=pair.get_name())


def _on_the_loop(fake: Function) -> Function:
    """Return the async twin of a sync fake; it takes no thread, as a fake answers at once."""

    @functools.wraps(fake)
    async def run(*args: Any, **kwargs: Any) -> Any:
        result = fake(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return run


def _record(name: str, pair: Dual[Any, Any]) -> Record:
    code = getattr(inspect.unwrap(pair), "__code__", None)
    return Record(
        name=name,
        sync=pair.entries.sync.kind,
        async_=pair.entries.async_.kind,
        signature=signature_of(pair),
        limiter=pair.limiter,
        module=pair.__module__,
        line=code.co_firstlineno if code is not None else None,
        pair=pair,
    )


def _origin(fn: Function) -> _Origin:
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return _Origin(
        qualname=getattr(fn, "__qualname__", type(fn).__qualname__),
        file=code.co_filename if code is not None else None,
        line=code.co_firstlineno if code is not None else None,
        spec=getattr(sys.modules.get(_module(fn)), "__spec__", None),
    )


def _module(fn: Function) -> str:
    return getattr(fn, "__module__", None) or type(fn).__module__


def _is_named(fn: Function) -> bool:
    return getattr(fn, "__name__", "<lambda>") != "<lambda>"


registry = Registry()
"""The registry that `dual` and `concurrency` register with."""
