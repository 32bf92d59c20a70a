"""The warnings of traps, each at the caller's own line and with the line to write.

That of blocking I/O in an async side is given by `watch`, in `watches`.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import langchain_core

from asyncify.errors import AsyncifyWarning, BlockingWarning, BridgedWarning, UnboundedWarning
from asyncify.signatures import describe

__all__ = ["MANY_BRIDGED", "MANY_UNBOUNDED", "tell_bridged", "tell_unbounded", "telling_if_held"]

Function = Callable[..., Any]

MANY_BRIDGED = 10
"""Calls in a batch or a stream from which on it matters that the async side is made of threads."""

MANY_UNBOUNDED = 100
"""Calls in a batch up to which no limit is needed."""

_HELD_SECONDS = 0.05

_NOT_THE_CALLER = tuple(
    f"{Path(module.__file__ or '').parent}{os.sep}" for module in (sys.modules[__name__], langchain_core, asyncio)
)


def tell_bridged(name: str, fn: Function, calls: int) -> None:
    """Tell that many async calls run on threads."""
    _tell(
        BridgedWarning(
            f"{calls:,} async calls of {name} run in threads, for it has no async side of its own; write one, and "
            f"@dual(async_={_plain_name(name)}_async) over {describe(fn)}; or warn=False in @dual or @concurrency, if "
            "threads will do"
        )
    )


def tell_unbounded(name: str, fn: Function, calls: int) -> None:
    """Tell that a batch runs all its calls at once."""
    _tell(
        UnboundedWarning(
            f"{calls:,} calls of {name} run at once, for nothing limits them; write @concurrency(limit=50) over "
            f'{describe(fn)}, or give the batch config={{"max_concurrency": 50}}; or @dual(warn=False), if all at once '
            "will do"
        )
    )


def _tell_held(name: str, seconds: float) -> None:
    if _is_module_code(sys._getframe(1)):
        return
    _tell(
        BlockingWarning(
            f"a sync call of {name} held the event loop for over {_rounded(seconds * 1000)} ms; where there is a loop, "
            f"write await {_plain_name(name)}.ainvoke(...), or await {_plain_name(name)}.acall(...)"
        )
    )


def _is_module_code(frame: FrameType | None) -> bool:
    """Tell whether a module's own code, run by an event loop, has come to this: a cell of a notebook, say.

    It is the program, and so there is nothing else that it could hold up.
    """
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith("asyncio."):
        if frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back
    return False


def _rounded(milliseconds: float) -> str:
    """Round down to 1, 2 or 5 times a power of ten: Python's filter would let each different text through."""
    ten = 10 ** math.floor(math.log10(milliseconds))
    return f"{max(number * ten for number in (1, 2, 5) if number * ten <= milliseconds):,.0f}"


def telling_if_held(run: Function, name: str, *, is_generator: bool) -> Function:
    """Return a sync function that does what `run` does, and tells if it held an event loop it was called on."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        if asyncio._get_running_loop() is None:
            return run(*args, **kwargs)
        began = perf_counter()
        try:
            result = run(*args, **kwargs)
        except BaseException:
            with suppress(BlockingWarning):  # made an error, it would hide the call's own
                tell_since(began)
            raise
        tell_since(began)
        return result

    def tell_since(began: float) -> None:
        if (seconds := perf_counter() - began) > _HELD_SECONDS:
            _tell_held(name, seconds)

    def timed_chunks(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with closing(_Timed(run(*args, **kwargs), name)) as chunks:  # a warning that is an error ends them halfway
            return (yield from chunks)

    return timed_chunks if is_generator else timed


class _Timed(Generator[Any, Any, Any]):
    """A generator whose steps tell if they held an event loop."""

    def __init__(self, chunks: Generator[Any, Any, Any], name: str) -> None:
        self._chunks = chunks
        self._send = telling_if_held(chunks.send, name, is_generator=False)

    def send(self, value: Any, /) -> Any:
        return self._send(value)

    def throw(self, *error: Any) -> Any:
        return self._chunks.throw(*error)

    def close(self) -> None:
        self._chunks.close()


def _plain_name(name: str) -> str:
    return name if name.isidentifier() else "pair"


def _tell(warning: AsyncifyWarning) -> None:
    """Warn at the line of whoever called the package, be it by way of LangChain."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        frame = frame.f_back
    if frame is None:  # a task that was made of the call itself: nobody's line is on the stack
        warnings.warn(warning, stacklevel=2)
        return
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    # Without the module's globals: from Python 3.12 on they are refused where they name no loader, as a notebook's do.
    warnings.warn_explicit(warning, None, frame.f_code.co_filename, frame.f_lineno, names.get("__name__"), registry)
