"""Async generators in a row: what is thrown into one at its yield goes on into the one that it reads.

Python has `yield from` for generators, and nothing like it for async ones. It matters where a generator holds a
timeout or a task group over a yield: that cancels the task, which is at the yield of the last generator in the row,
and it is the first one that has to hear of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Generic, Self, TypeVar

__all__ = ["Relay"]

T = TypeVar("T")


class Relay(Generic[T]):
    """Reads an async generator for another one, which yields in a block of it.

    As in `async for chunk in relay:`, `with relay:`, `yield chunk`.
    """

    __slots__ = ("_chunks", "_thrown")

    def __init__(self, chunks: AsyncGenerator[T, Any]) -> None:
        self._chunks = chunks
        self._thrown: BaseException | None = None

    def __aiter__(self) -> Self:
        """Return the relay itself."""
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        """Return what makes the next chunk."""
        thrown, self._thrown = self._thrown, None
        return self._chunks.__anext__() if thrown is None else self._chunks.athrow(thrown)

    def __enter__(self) -> None:
        """Begin to yield."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """Keep what was thrown in at the yield for the generator; a `GeneratorExit` ends this one first."""
        if error is None or isinstance(error, GeneratorExit):
            return False
        self._thrown = error
        return True
