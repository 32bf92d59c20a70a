"""Several streams over one input, read at once: the branches of a dict.

Each branch is one chunk ahead of the reader at most, and when the reader goes, all of them are closed.
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
    """Yield the chunks of all branches as they come, each with its key; each is made in a thread of the pool."""
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
    """A branch's chunks, which may be left while a thread makes one: a garbage collector runs anywhere."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks
        self._thread: int | None = None  # that which makes a chunk
        self._is_left = False

    def make(self) -> Any:
        """Return the next chunk, or END."""
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
        """Close it: at once, or if a thread is making a chunk, after that."""
        self._is_left = True
        if self._thread is not None:
            return
        if not in_collection():
            self._chunks.close()
            return
        with suppress(ValueError):  # a thread has just begun to make one, and closes it
            self._chunks.close()


def _end(futures: Iterable[Future[Any]], scope: CancelScope) -> None:
    """Drop what has not begun, call off what waits for a limiter, and wait for the rest."""
    running = [future for future in futures if not future.cancel() and not future.done()]
    if running:
        scope.cancel()
        if in_collection():  # its threads are on their way out
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
    """Yield the chunks of all branches as they come, each with its key; each is made in a task of its branch.

    The input is read by the task that reads this.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[str | None] = asyncio.Queue()  # whose answer is there, and None to ask for input
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
    """Wait for the end of the branches, and raise the error of a generator that can't be closed."""
    for task, answer in asked.items():
        if not answer.done():  # it is in the middle of a chunk
            task.cancel()
    interrupted = await until_ended(tasks)
    for answer in asked.values():
        if answer.done():
            answer.exception()  # it comes too late to be of use
    errors = [task.exception() for task in tasks if not task.cancelled()]
    if interrupted is not None:
        raise interrupted
    for error in errors:
        if isinstance(error, Exception):
            raise error


class _Merged(Joining):
    """The branches' tasks: all of them are ended when one fails, or when their reader goes."""

    def note(self, task: asyncio.Task[None]) -> None:
        """Do nothing; that it is called back says whose part a task is."""

    def join(self) -> Join:
        """Return the wait for them: that of a reader who may be busy."""
        return Join(self, inf, fails_at_once=True)


class _Place:
    """A place in a stream: it holds those that come after it, and none that came before."""

    __slots__ = ("chunk", "next")

    def __init__(self, chunk: Any = None) -> None:
        self.chunk = chunk
        self.next: _Place | None = None


class _Shared:
    """One stream for several readers in tasks of their own; whoever is asked by them reads it, in its own task.

    So a timeout or a task group in a generator stays in the task that it was entered in.

    Args:
        chunks: the stream.
        ask: called to have the next chunk read.
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
        """Return what yields all chunks that are not read yet, to one of the readers."""
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
