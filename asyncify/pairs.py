"""The registry: every decorated pair by name."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from inspect import Signature
from types import CodeType
from typing import Any

from asyncify.entries import Kind
from asyncify.errors import NameTakenError, PairNotFoundError
from asyncify.fakes import Override, fake_entries
from asyncify.forks import at_fork
from asyncify.runnable import AnyDual, in_its_class
from asyncify.signatures import code_of, describe, signature_of, without_partials

__all__ = ["Record", "Registry", "registry"]

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Record:
    """What the registry knows of one pair: a side is native, bridged, or missing where a bridge is forbidden."""

    name: str
    sync: Kind
    async_: Kind
    signature: Signature | None
    limiter: Any  # as that of a pair
    module: str
    line: int | None
    pair: AnyDual


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a pair was written: tells the same function, loaded again, from another of its name.

    A name that comes back in another run of its module has been reloaded. Each run has a code object of its own, of
    which a script that is run again knows, and gives the module a new spec, of which a function that is called later
    knows. In a notebook each version of a cell is a file of its own.
    """

    module: str
    qualname: str
    file: str | None
    line: int | None
    spec: object
    run: weakref.ref[CodeType] | None
    """The code of the module, if it is being run."""

    def is_reload_of(self, other: _Origin) -> bool:
        if self.qualname != other.qualname:
            return False
        return self._is_of_another_run(other) or self.file != other.file or self.line == other.line

    def _is_of_another_run(self, other: _Origin) -> bool:
        if self.spec is not other.spec:
            return True
        return self.run is not None and (other.run is None or other.run() is not self.run())


class Registry:
    """All decorated pairs, by `module.qualname`.

    `registry["quotes.fetch"]` is the record of one, `"fetch" in registry` tells whether there is one, `for record in
    registry` goes through all, in the order of their names, `len(registry)` counts them. A short name, the end of a
    full one, finds a pair if it is unique. A pair that nobody else holds any more is forgotten.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pairs: weakref.WeakValueDictionary[str, AnyDual] = weakref.WeakValueDictionary()
        self._origins: dict[str, _Origin] = {}

    def __getitem__(self, name: str) -> Record:
        """Return the record of a pair.

        Raises:
            PairNotFoundError: no pair has this name, or several do; the message lists those that are near.
        """
        with self._lock:
            return _record(*self._find(name))

    def __contains__(self, name: object) -> bool:
        """Tell whether `registry[name]` finds a pair."""
        try:
            with self._lock:
                return isinstance(name, str) and bool(self._find(name))
        except PairNotFoundError:
            return False

    def __iter__(self) -> Iterator[Record]:
        """Yield the record of every pair, in the order of their names."""
        with self._lock:
            known = [(name, pair, self._origins[name]) for name, pair in self._pairs.items()]
        for name, pair, origin in sorted(known, key=lambda item: item[0]):
            yield _record(name, pair, origin)

    def __len__(self) -> int:
        """Return how many pairs there are."""
        return len(self._pairs)

    def __repr__(self) -> str:
        """Show how many pairs there are: `<Registry of 3 pairs>`."""
        return f"<Registry of {len(self)} pairs>"

    def _add(self, pair: AnyDual, fn: Function, name: str | None = None, *, instead_of: AnyDual | None = None) -> None:
        """Register a pair under `name`, or else under that of the function that stands for it.

        A function without a name of its own, or with the name that a decorator has given to another one too, and one
        that another pair stands for already, get a number.

        Args:
            pair: the pair.
            fn: the function that stands for it.
            name: what to call it, after its module.
            instead_of: a pair that this one replaces, so that it is forgotten; or the pair itself, to rename it.

        Raises:
            NameTakenError: a different function has the name. The same one, loaded again, takes its own place.
        """
        origin = _origin(fn)
        with self._lock:
            replaced = [known for known, other in self._pairs.items() if other is instead_of]
            full_name = f"{origin.module}.{name or origin.qualname}"
            if name is None and full_name not in replaced and self._needs_number(full_name, fn):
                full_name = self._numbered(full_name)
            taken = None if full_name in replaced else self._pairs.get(full_name)
            if taken is not None and not origin.is_reload_of(self._origins[full_name]):
                raise NameTakenError(
                    f"the name {full_name} is taken by {describe(taken)}, so {describe(fn)} can't have it; give it "
                    'another, as in dual(..., name="other")'
                )
            for old in replaced:
                del self._pairs[old]
            self._pairs[full_name] = pair
            self._origins[full_name] = origin
            self._drop_origins()

    def _discard(self, pair: AnyDual) -> None:
        """Forget a pair, if it is known."""
        with self._lock:
            for name in [known for known, other in self._pairs.items() if other is pair]:
                del self._pairs[name]

    def _needs_number(self, full_name: str, fn: Function) -> bool:
        taken = self._pairs.get(full_name)
        if not _is_named(fn) or taken is None:
            return not _is_named(fn)
        own, other = inspect.unwrap(fn), inspect.unwrap(taken)
        return own is other or _are_wrapped_alike(own, other)

    def _numbered(self, name: str) -> str:
        """Return a free name for a function that has none of its own."""
        candidates = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
        return next(candidate for candidate in candidates if candidate not in self._pairs)

    def _drop_origins(self) -> None:
        """Forget where those pairs came from that nobody holds any more."""
        if len(self._origins) > len(self._pairs):
            self._origins = {name: self._origins[name] for name in list(self._pairs)}

    def _find(self, name: str) -> tuple[str, AnyDual, _Origin]:
        """Return full name, pair and origin; called with the lock held."""
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a pair is found by its name, a string, and not by {name!r}")
        known = dict(self._pairs.items())
        found = [name] if name in known else sorted(full for full in known if full.endswith(f".{name}"))
        if not found:
            raise PairNotFoundError(f"no pair is called {name!r}; {_near(name, known)}")
        if len(found) > 1:
            raise PairNotFoundError(
                f"{name!r} is the short name of several pairs: {', '.join(found)}; write one in full"
            )
        return found[0], known[found[0]], self._origins[found[0]]

    def override(
        self,
        pair: AnyDual | str,
        fake: Function | None = None,
        *,
        sync: Function | None = None,
        async_: Function | None = None,
    ) -> Override:
        """Put a fake in the place of a pair for a `with` block, on both paths, in every thread and pipe.

        What it returns decorates functions too: the fake is there while they run.

        The fake is called as the function was, at once: the pair's limit does not hold for it. One function, `def` or
        `async def`, serves both paths; on the async path a `def` runs on the event loop itself. A generator's fake is a
        generator, or returns its chunks. Nested overrides may be undone in any order; the newest that is left counts.
        One that was entered by hand lasts until it is exited.

        Args:
            pair: the pair, or its name.
            fake: a function, `def` or `async def`, or another pair.
            sync, async_: a fake for each path, instead of `fake`; one alone serves both. A sync function may be
            given as `async_` too.

        Raises:
            PairNotFoundError: no pair has this name.
            TypeError: there is nothing that could be called.
        """
        return Override(functools.partial(self._put_fake, pair, fake, sync, async_))

    def _put_fake(
        self, pair: AnyDual | str, fake: Function | None, sync: Function | None, async_: Function | None
    ) -> tuple[AnyDual, Callable[[], None]]:
        """Put a fake in the place of a pair; return the pair and what undoes that."""
        target = in_its_class(self[pair].pair if isinstance(pair, str) else pair)
        entries = fake_entries(target, fake, sync, async_)

        def put_back() -> None:
            with self._lock:
                target._set_fakes(tuple(other for other in target._fakes if other is not entries))

        with self._lock:
            target._set_fakes((*target._fakes, entries))
        return target, put_back


def _near(name: str, known: Iterable[str]) -> str:
    """Say which names are near to one that is not there."""
    by_short: dict[str, list[str]] = {}
    for full in sorted(known):
        by_short.setdefault(full.rpartition(".")[2], []).append(full)
        by_short.setdefault(full, []).append(full)
    matches = difflib.get_close_matches(name, by_short)
    names = dict.fromkeys(full for match in matches for full in by_short[match])
    return f"did you mean {', '.join(names)}?" if names else "there is none like it; is its module imported?"


def _record(name: str, pair: AnyDual, origin: _Origin) -> Record:
    return Record(
        name=name,
        sync=pair._entries.sync.kind,
        async_=pair._entries.async_.kind,
        signature=signature_of(pair),
        limiter=pair.limiter,
        module=origin.module,
        line=origin.line,
        pair=pair,
    )


def _origin(fn: Function) -> _Origin:
    fn = without_partials(fn)
    code = code_of(fn)
    module = getattr(fn, "__module__", None) or type(fn).__module__
    return _Origin(
        module=module,
        qualname=getattr(fn, "__qualname__", type(fn).__qualname__),
        file=code.co_filename if code is not None else None,
        line=code.co_firstlineno if code is not None else None,
        spec=getattr(sys.modules.get(module), "__spec__", None),
        run=_run_of(module),
    )


def _run_of(module: str) -> weakref.ref[CodeType] | None:
    """Return the code of a module that is being run, which this call comes from."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == module:
            return weakref.ref(frame.f_code)
        frame = frame.f_back
    return None


def _are_wrapped_alike(one: Function, other: Function) -> bool:
    """Tell whether two functions are what one decorator, which hides it, has put around functions of other names."""
    if getattr(one, "__code__", one) is not getattr(other, "__code__", other):
        return False
    ones, others = _held_by(one), _held_by(other)
    return any(ones[name] != others[name] for name in ones.keys() & others.keys())


def _held_by(fn: Function) -> dict[str, tuple[object, object]]:
    """Return module and name of the functions that a closure holds, by the names of its variables."""
    held: dict[str, tuple[object, object]] = {}
    for name, cell in zip(fn.__code__.co_freevars, getattr(fn, "__closure__", None) or (), strict=False):
        with suppress(ValueError):  # nothing is in it yet
            if inspect.isroutine(value := cell.cell_contents):
                held[name] = getattr(value, "__module__", None), value.__qualname__
    return held


def _is_named(fn: Function) -> bool:
    return getattr(fn, "__name__", "<lambda>") != "<lambda>"


registry: Registry = Registry()
"""The registry that `dual` and `concurrency` register with."""

# Whatever thread it is that changes it: a child has no thread that could let go of the lock.
at_fork(before=registry._lock.acquire, after_in_parent=registry._lock.release, after_in_child=registry._lock.release)
