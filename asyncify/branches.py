"""Several streams over one input, read at once: the branches of a dict.

Each branch is at most one chunk ahead of the reader, and all branches are closed when the reader stops.
"""

from __future__ import annotations

import asyncio
import threading
from _thread import get_ident
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, suppress
from math import inf
from typing import Any

from langchain_core.utils.iter import safetee

from asyncify.background import background
from asyncify.collector import in_collection
from asyncify.deadlock.joins import Join, Joining
from asyncify.fanout import until_ended
from asyncify.pools import ThreadPool
from asyncify.scopes import CancelScope
from asyncify.sources import END, Source
from asyncify.streams import closable

__all__ = ["amerge", "merge"]


def merge(
    inputs: Iterator[Any], branches: Mapping[str, Callable[[Iterator[Any]], Any]], pool: ThreadPool
) -> Generator[tuple[str, Any]]:
    """Yield the chunks of all branches as they come, each with its branch's key; threads of the pool make them."""
    streams: dict[str, _Stream] = {}
    futures: dict[Future[Any], str] = {}
    scope = CancelScope()

    def ask(key: str) -> None:
        futures[pool.submit(background.context_of_waiter(scope).run, streams[key].make)] = key

    def take(future: Future[Any]) -> tuple[str, Any]:
        try:
            return futures.pop(future), future.result()
        finally:
            del future  # an error's traceback holds this frame

    def end() -> None:
        _end([future for future, key in futures.items() if not streams[key].is_made_here()], scope)

    copies = safetee(inputs, len(branches), lock=threading.Lock())
    with ExitStack() as stack:
        for (key, branch), copy in zip(branches.items(), copies, strict=True):
            streams[key] = _Stream(branch(copy))
            stack.callback(streams[key].close)
        stack.callback(end)
        for key in streams:
            ask(key)
        while futures:
            for key, chunk in map(take, wait(futures, return_when=FIRST_COMPLETED).done):
                if chunk is not END:
                    yield key, chunk
                    ask(key)


class _Stream:
    """A branch's chunks. The garbage collector, which runs in any thread, may close them while a thread makes one."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks
        self._thread: int | None = None  # the thread that is making a chunk
        self._is_left = False

    def make(self) -> Any:
        """Return the next chunk, or `END`."""
        self._thread = get_ident()
        try:
            return next(self._chunks, END)
        finally:
            self._thread = None
            if self._is_left:
                self._chunks.close()

    def is_made_here(self) -> bool:
        """Tell whether this thread is making a chunk."""
        return self._thread == get_ident()

    def close(self) -> None:
        """Close the branch: at once, or if a thread is making a chunk, after that chunk."""
        self._is_left = True
        if self._thread is not None:
            return
        if not in_collection():
            self._chunks.close()
            return
        with suppress(ValueError):  # a thread has just begun to make a chunk, and will close the branch
            self._chunks.close()


def _end(futures: Iterable[Future[Any]], scope: CancelScope) -> None:
    """Drop the calls that have not begun, call off those that wait for a limiter, and wait for the rest."""
    running = [future for future in futures if not future.cancel() and not future.done()]
    if running:
        scope.cancel()
        if in_collection():  # the collector must not wait; the threads end by themselves
            _end_with(running, scope)
            return
        wait(running)
    scope.end()


def _end_with(futures: Iterable[Future[Any]], scope: CancelScope) -> None:
    """End a scope with the last of some futures."""
    left = set(futures)

    def note(future: Future[Any]) -> None:
        left.discard(future)
        if not left:
            scope.end()

    for future in tuple(left):
        future.add_done_callback(note)


async def amerge(
    inputs: AsyncIterator[Any], branches: Mapping[str, Callable[[AsyncIterator[Any]], AsyncIterator[Any]]]
) -> AsyncGenerator[tuple[str, Any]]:
    """Yield the chunks of all branches as they come, each with its branch's key; each branch runs in its own task.

    The input is read in the task that reads this generator.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[str | None] = asyncio.Queue()  # a branch whose answer is ready; None asks for input
    shared = _Shared(inputs, lambda: told.put_nowait(None))
    sources = {key: Source(closable(branch(shared.copy()))) for key, branch in branches.items()}
    tasks = {key: loop.create_task(source.serve()) for key, source in sources.items()}
    answers: dict[str, asyncio.Future[Any]] = {}
    merged = _Merged()
    for task in tasks.values():
        task.add_done_callback(merged.note)

    def ask(key: str) -> None:
        answers[key] = answer = loop.create_future()
        answer.add_done_callback(lambda _: told.put_nowait(key))
        sources[key].ask(answer)

    try:
        for key in sources:
            ask(key)
        while answers:
            ready = await told.get()
            if ready is None:
                await shared.read()
            elif (chunk := answers.pop(ready).result()) is not END:
                yield ready, chunk
                ask(ready)
    finally:
        for source in sources.values():
            source.ask(None)
        await _close({tasks[key]: answer for key, answer in answers.items()}, tasks.values())


async def _close(
    asked: Mapping[asyncio.Task[None], asyncio.Future[Any]], tasks: Collection[asyncio.Task[None]]
) -> None:
    """Wait for the branches to end, and raise an error that one of them raised as it was closed."""
    for task, answer in asked.items():
        if not answer.done():  # the branch is in the middle of a chunk
            task.cancel()
    interrupted = await until_ended(tasks)
    for answer in asked.values():
        if answer.done():
            answer.exception()  # mark it as retrieved: nobody reads this answer any more
    errors = [task.exception() for task in tasks if not task.cancelled()]
    if interrupted is not None:
        raise interrupted
    for error in errors:
        if isinstance(error, Exception):
            raise error


class _Merged(Joining):
    """The join of the branches' tasks, which all end when one of them fails, or when their reader stops."""

    def note(self, task: asyncio.Task[None]) -> None:
        """Do nothing: as a task's done callback, this method only tells deadlock detection which join it belongs to."""

    def join(self) -> Join:
        """Return the join of the branches' tasks; its end is unknown, as the reader may be busy."""
        return Join(self, inf, fails_at_once=True)


class _Place:
    """A place in a stream, a node of a linked list: it references the places after it, and none before it."""

    __slots__ = ("chunk", "next")

    def __init__(self, chunk: Any = None) -> None:
        self.chunk = chunk
        self.next: _Place | None = None


class _Shared:
    """One stream for several readers, each in a task of its own; one other task calls `read()` when `ask` tells it to.

    So a timeout or a task group inside the stream's generator stays in the task that it was entered in.

    Args:
        chunks: the stream.
        ask: called by a reader to have the next chunk read.
    """

    def __init__(self, chunks: AsyncIterator[Any], ask: Callable[[], None]) -> None:
        self._chunks = chunks
        self._ask = ask
        self._is_asked = False
        self._last = _Place()
        self._error: Exception | None = None
        self._has_more = asyncio.Event()

    async def read(self) -> None:
        """Read the next chunk, for all readers."""
        try:
            place = _Place(await anext(self._chunks, END))
        except Exception as error:  # noqa: BLE001  (each reader gets it)
            self._error = error
        else:
            self._last.next = self._last = place
        self._is_asked = False
        self._has_more.set()

    def copy(self) -> AsyncGenerator[Any]:
        """Return a generator for one reader, which yields all chunks that have not been read yet."""
        return self._after(self._last)

    async def _after(self, place: _Place) -> AsyncGenerator[Any]:
        while (place := await self._next(place)).chunk is not END:
            yield place.chunk

    async def _next(self, place: _Place) -> _Place:
        while place.next is None:
            if self._error is not None:
                raise self._error
            if not self._is_asked:
                self._is_asked = True
                self._has_more.clear()
                self._ask()
            await self._has_more.wait()
        return place.next
