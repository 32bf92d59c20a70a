"""`dual_patch`: a function of somebody else's module becomes a pair where it stands, until it is undone."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Self, cast

from asyncify.decorators import dual
from asyncify.entries import Bridge
from asyncify.errors import PairError
from asyncify.pairs import registry
from asyncify.runnable import AnyDual, is_pair

__all__ = ["Patch", "dual_patch"]

Function = Callable[..., Any]


class Patch:
    """A pair in the place of a function of another module; as a context manager it is undone at the end.

    Attributes:
        target: what is patched, as "package.module:Class.method".
        pair: the pair, or None before its module is imported and after the patch is undone.
    """

    def __init__(self, target: str, make: Callable[[Function], AnyDual]) -> None:
        self.target = target
        self.pair: Any = None  # to a checker: it does not know that it is there
        self._make = make
        self._undone = False
        self._module, _, self._path = str(target).partition(":")
        if not (self._module and self._path):
            raise PairError(f"dual_patch: {target!r} is no path; write it as in 'package.module:Class.method'")

    def _start(self) -> None:
        if self._module in sys.modules:
            self._apply(importlib.import_module(self._module))  # which waits for a thread that is importing it
        elif any(self.target == other.target for other in _waiting.get(self._module, ())):
            raise PairError(f"dual_patch: {self.target} is to be patched already, when {self._module} is imported")
        else:
            self._wait()

    def _wait(self) -> None:
        import wrapt  # noqa: PLC0415  (only a patch needs it)

        if self._module not in _waiting:
            _waiting[self._module] = []
            wrapt.register_post_import_hook(_apply_waiting, self._module)
        _waiting[self._module].append(self)

    def _apply(self, module: ModuleType) -> None:
        import wrapt  # noqa: PLC0415  (only a patch needs it)

        try:
            self._parent, self._name, original = wrapt.resolve_path(module, self._path)
        except AttributeError as error:
            raise PairError(f"dual_patch: there is no {self.target}: {error}") from error
        if is_pair(original):
            raise PairError(f"dual_patch: {self.target} is a pair already ({original!r}); undo what made it one first")
        if inspect.isclass(original):
            raise PairError(f"dual_patch: {self.target} is a class; name one of its methods, as in {self.target}.get")
        if not hasattr(self._parent, "__dict__"):
            raise PairError(f"dual_patch: {self.target} can't be replaced where it stands: {self._parent!r} has slots")
        self._own: Any = vars(self._parent).get(self._name)  # None for what is inherited
        pair = self._make(original)
        try:
            setattr(self._parent, self._name, pair)
        except (AttributeError, TypeError) as error:
            registry._discard(pair)
            raise PairError(f"dual_patch: {self.target} can't be replaced where it stands: {error}") from error
        if inspect.isclass(self._parent):
            pair._become_method()
        self.pair = pair
        self._spec = getattr(self._parent, "__spec__", None)

    def undo(self) -> None:
        """Put the function back; before its module is imported, leave it alone when it is.

        Raises:
            PairError: it is undone already, or something else has been put in the pair's place since.
        """
        if self._undone:
            raise PairError(f"dual_patch: {self.target} is undone already")
        if self.pair is not None:
            self._put_back()
        else:
            _waiting[self._module].remove(self)
        self._undone = True

    def _put_back(self) -> None:
        pair, found = cast("AnyDual", self.pair), vars(self._parent).get(self._name)
        was_reloaded = getattr(self._parent, "__spec__", None) is not self._spec  # and what is there now is its own
        if found is pair:
            self._restore()
        elif not was_reloaded:
            raise PairError(
                f"dual_patch: {self.target} is {found!r} by now, and no longer the pair; undo that first, the last "
                "patch before the first"
            )
        registry._discard(pair)
        self.pair = None

    def _restore(self) -> None:
        if self._own is None:
            delattr(self._parent, self._name)
        else:
            setattr(self._parent, self._name, self._own)

    def __enter__(self) -> Self:
        """Return the patch itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Undo the patch, if that has not been done."""
        if not self._undone:
            self.undo()

    def __repr__(self) -> str:
        """Show what is patched, and whether it is by now: `<Patch httpx:Client.get applied>`."""
        state = "undone" if self._undone else "applied" if self.pair is not None else "waits for the import"
        return f"<Patch {self.target} {state}>"


_waiting: dict[str, list[Patch]] = {}
"""The patches of modules that are not imported yet."""


def _apply_waiting(module: ModuleType) -> None:
    """Patch a module that has just been imported; if one patch fails, so does the import, and the others wait on."""
    patches = _waiting.pop(module.__name__)
    for number, patch in enumerate(patches):
        try:
            patch._apply(module)
        except BaseException:
            sys.modules.pop(module.__name__, None)  # as the import is about to, so that the next one is waited for
            patch._undone = True
            for other in reversed(patches[:number]):
                other._put_back()
            for other in patches[:number] + patches[number + 1 :]:
                other._wait()
            raise


def dual_patch(
    target: str,
    *,
    sync: Function | None = None,
    async_: Function | None = None,
    name: str | None = None,
    bridge: Bridge = "thread",
    warn: bool = True,
) -> Patch:
    """Make a pair of a function or a method that is not yours, in its place.

    Everybody who looks it up from then on finds the pair; whoever imported it by name before keeps the function.

    Args:
        target: the function, as "package.module:function" or "package.module:Class.method". If the module is not
            imported yet, it is patched when it is.
        sync: the sync side, for an async function.
        async_: the async side, for a sync function.
        name, bridge, warn: as for `dual`.

    Returns:
        The patch, whose `undo()` puts the function back; also a context manager.

    Raises:
        PairError: there is no such function, it is a pair already, or the sides do not make one. For a module that
            is not imported yet, it is raised by the import, which fails; other patches of it wait for the next one.
    """
    if sync is not None and async_ is not None:
        raise PairError(f"dual_patch: {target} is one side already; give the other one only, as sync= or async_=")
    any_dual: Any = dual  # which of its overloads is meant is known only now
    patch = Patch(target, any_dual(sync=sync, async_=async_, name=name, bridge=bridge, warn=warn))
    patch._start()
    return patch
