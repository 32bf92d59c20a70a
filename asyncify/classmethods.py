"""Pairs under `classmethod`: since Python 3.13 it binds what it wraps as a plain callable, without asking it."""

from __future__ import annotations

import inspect
import sys
from types import FrameType

from asyncify.runnable import is_pair

__all__ = ["watch_class_body"]

_CLASSMETHOD_ASKS: bool = sys.version_info[:2] < (3, 13)
_NAME = "__asyncify_class_methods__"


class _ClassMethods:
    """Stands in a class body until the class is made, then takes the pairs out of their `classmethod`."""

    def __init__(self, body: dict[str, object]) -> None:
        self._body = body

    def __set_name__(self, owner: type, name: str) -> None:
        type.__delattr__(owner, name)
        body, self._body = self._body, {}  # which has this object in it
        for attribute, value in body.items():
            pair: object = getattr(value, "__func__", None)
            if isinstance(value, classmethod) and is_pair(pair):
                pair._binding = "class"
                if vars(owner).get(attribute) is value:
                    type.__setattr__(owner, attribute, pair)
                else:  # a NamedTuple is made first, and given what its body has one by one
                    body[attribute] = pair


def watch_class_body() -> None:
    """Find, when the class is made in whose body a pair is being made, the pairs that `classmethod` has wrapped.

    `classmethod` offers no hook of its own: up to Python 3.12 it asks what it wraps to bind itself, which serves.
    """
    frame = None if _CLASSMETHOD_ASKS else _class_body()
    if frame is not None:
        frame.f_locals.setdefault(_NAME, _ClassMethods(frame.f_locals))


def _class_body() -> FrameType | None:
    """Return the frame of the class body that is being run, perhaps through functions that it calls as decorators."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "<module>":
        if "__qualname__" in frame.f_locals and not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return frame
        frame = frame.f_back
    return None
