"""Async generators in a row: what is thrown into one at its yield goes on into the one that it reads.

Python has `yield from` for generators, and nothing like it for async ones. It matters where a generator holds a
timeout or a task group over a yield: that cancels the task, which is at the yield of the last generator in the row,
and it is the first one that has to hear of it.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Generic, Self, TypeVar

__all__ = ["Relay"]

T = TypeVar("T")


class Relay(Generic[T]):
    """Reads an async generator for another one, which yields in a block of it and closes it.

    As in `async for chunk in relay:`, `with relay:`, `yield chunk`; or `relay.sent = yield chunk`, where somebody may
    send.
    """

    __slots__ = ("_begun", "_chunks", "_thrown", "sent")

    def __init__(self, chunks: AsyncGenerator[T, Any]) -> None:
        self._chunks = chunks
        self._begun = False
        self._thrown: BaseException | None = None
        self.sent: Any = None

    def __aiter__(self) -> Self:
        """Return the relay itself."""
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        """Return what makes the next chunk."""
        if not self._begun:
            self._begun = True
            return _begin(self._chunks)
        thrown, self._thrown = self._thrown, None
        if thrown is not None:
            return self._chunks.athrow(thrown)
        return self._chunks.__anext__() if self.sent is None else self._chunks.asend(self.sent)

    def __enter__(self) -> None:
        """Begin to yield."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """Keep what was thrown in at the yield for the generator; a `GeneratorExit` ends this one first."""
        if error is None or isinstance(error, GeneratorExit):
            return False
        self._thrown = error
        return True


def _begin(chunks: AsyncGenerator[T, Any]) -> Coroutine[Any, Any, T]:
    """Return what makes the first chunk of a generator that an event loop is not to know of.

    A loop that ends closes all that it knows, at once: this one too, just as the one that reads it does.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=None, finalizer=None)
    try:
        return chunks.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)
