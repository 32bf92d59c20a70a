"""Context managers that decorate functions of either colour.

`contextlib.ContextDecorator` leaves its block as soon as an async function has made its coroutine.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar, cast

__all__ = ["Block"]

P = ParamSpec("P")
T = TypeVar("T")


class Block(ABC):
    """What decorates a function with a block around each of its calls."""

    @abstractmethod
    def _around_a_call(self) -> AbstractContextManager[object]:
        """Return the block for one call."""

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """Enter the block for each call of `fn`, until an async one has ended.

        Raises:
            TypeError: `fn` is a generator, which runs after its call; a class; or nothing that can be called.
        """
        given: Any = fn
        if type(given) in (staticmethod, classmethod):
            return cast("Callable[P, T]", type(given)(self(given.__func__)))
        if not callable(given) or inspect.isclass(given):
            raise TypeError(
                f"{given!r} is no function, around each call of which a block could be entered; of a class decorate "
                "the methods"
            )
        is_written = inspect.isfunction(given) or inspect.ismethod(given)
        within = given if is_written else getattr(given, "__wrapped__", given)  # as `lru_cache` has it
        if any(inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn) for fn in (given, within)):
            raise TypeError(
                f"{getattr(given, '__qualname__', given)} is a generator, which runs after its call; instead of "
                "decorating it, write the `with` in it"
            )

        async def finish(begun: Coroutine[Any, Any, Any]) -> Any:
            # Of an object whose call is async, say, or a wrapper: nothing of it has run yet.
            with self._around_a_call():
                return await begun

        @functools.wraps(fn)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            with self._around_a_call():
                result = fn(*args, **kwargs)
            return finish(result) if inspect.iscoroutine(result) else result

        @functools.wraps(fn)
        async def arun(*args: P.args, **kwargs: P.kwargs) -> Any:
            with self._around_a_call():
                return await cast("Coroutine[Any, Any, Any]", fn(*args, **kwargs))

        return cast("Callable[P, T]", arun if inspect.iscoroutinefunction(fn) else run)
