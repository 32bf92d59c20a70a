"""Where a pair keeps the functions of its two sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

__all__ = ["ASYNC_SIDE", "SYNC_SIDE", "Side"]

Function = Callable[..., Any]

SYNC_SIDE = "_asyncify_func"
ASYNC_SIDE = "_asyncify_afunc"


class Side:
    """A side of a pair, kept on it under a name that nobody else uses.

    A class that decorates functions keeps its own in `func`, say, as LangGraph's `task` does, and then copies all that
    the function keeps by `functools.update_wrapper`: it would run the side, without its limit.
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
