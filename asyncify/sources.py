"""An async generator that lives in one task, for a reader in another task or thread.

A timeout or a task group inside a generator belongs to the task that it was entered in. So the reader takes none of
its steps: the reader asks, and the generator's own task answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

from asyncify.relay import Relay

__all__ = ["END", "Source"]

END: Any = object()
"""The answer of a source that has no more chunks."""

Answer = Future[Any] | asyncio.Future[Any]


class Source:
    """An async generator in a task of its own, which makes a chunk when it is asked for one."""

    def __init__(self, chunks: AsyncGenerator[Any, Any]) -> None:
        self._chunks = chunks
        self._relay = Relay(chunks)
        self._questions: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._made: tuple[Any, BaseException | None] | None = None
        self._is_at_end = False
        self._over = False

    def ask(self, answer: Answer | None) -> None:
        """Ask for a chunk, or `END`; or with None ask for the end. Called on the loop."""
        if answer is not None and self._over:
            answer.set_exception(asyncio.CancelledError())
        else:
            self._questions.put_nowait(answer)

    async def serve(self) -> None:
        """Answer until no more is asked."""
        try:
            async with aclosing(self._chunks):
                while (answer := await self._next_question()) is not None:
                    made, self._made = self._made or await _attempt(anext(self._relay)), None
                    self._is_at_end = made[0] is END or made[1] is not None
                    _answer(answer, *made)
                    over = isinstance(made[1], asyncio.CancelledError)
                    del made  # the error's traceback may hold this frame
                    if over:
                        return
        finally:
            self._over = True
            while not self._questions.empty():
                if (answer := self._questions.get_nowait()) is not None:
                    self.ask(answer)

    async def _next_question(self) -> Answer | None:
        while True:
            try:
                return await self._questions.get()
            except asyncio.CancelledError as error:
                if self._is_at_end:
                    raise
                # A timeout or a task group in the generator has cancelled the task: it hears of it at its yield.
                self._made = await _attempt(self._chunks.athrow(error))
                if isinstance(self._made[1], asyncio.CancelledError):
                    raise


async def _attempt(chunk: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    # A frame of its own: the error's traceback holds it, so it must not hold who holds the error.
    try:
        return await chunk, None
    except StopAsyncIteration:
        return END, None
    except BaseException as error:  # noqa: BLE001  (it is handed to whoever asked)
        return None, error


def _answer(answer: Answer, chunk: Any, error: BaseException | None) -> None:
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(chunk)
