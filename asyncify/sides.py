"""Attributes of a pair that its wrappers must not get: `functools.update_wrapper` copies the whole `__dict__`.

So these are descriptors, and what they return is kept under other names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

__all__ = ["ASYNC_SIDE", "SYNC_SIDE", "BoundSide", "Mark", "Side"]

Function = Callable[..., Any]

SYNC_SIDE = "_asyncify_func"
ASYNC_SIDE = "_asyncify_afunc"


class Side:
    """A side of a pair, kept on it under a name that nobody else uses.

    A class that decorates functions may keep its own function in `func`, as LangGraph's `task` does. If the `func` of a
    pair were copied over it, it would run the side, without the limit.
    """

    def __init__(self, kept: str, colour: str) -> None:
        self._kept = kept
        self._missing = f"this pair has no {colour} function of its own"  # made once, as `hasattr` asks often

    def __get__(self, pair: object, owner: type) -> Function:
        try:
            return cast("Function", vars(pair)[self._kept])
        except (KeyError, TypeError):
            raise AttributeError(self._missing) from None

    def __set__(self, pair: object, side: Function) -> None:
        vars(pair)[self._kept] = side

    def __delete__(self, pair: object) -> None:
        self.__get__(pair, type(pair))
        del vars(pair)[self._kept]


class BoundSide(Side):
    """A side of a bound pair. Each access makes a new bound pair, so a side can be replaced only in the class."""

    def __set__(self, pair: Any, side: Function) -> None:
        raise pair._not_here()

    def __delete__(self, pair: Any) -> None:
        raise pair._not_here()


class Mark:
    """An attribute by which frameworks see what kind of function a pair is; its value is in the pair's `_marks`.

    What wraps the pair of an `async def` may be a `def`: with a copy of the mark it would be taken for an `async def`.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, pair: Any, owner: type) -> object:
        try:
            return pair._marks[self._name]
        except (AttributeError, KeyError):
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self._name!r}") from None
