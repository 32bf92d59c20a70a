"""The background event loop, which runs the async functions that sync code calls."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, Generic, TypeVar, cast

from asyncify.collector import in_collection
from asyncify.forks import at_fork, check_not_ending, left_behind
from asyncify.scopes import CancelScope
from asyncify.sources import END, Source

__all__ = ["BackgroundLoop", "background"]

T = TypeVar("T")
U = TypeVar("U")

_CLOSE_SECONDS = 5.0
"""How long the program's exit waits for the loop to close, if a task blocks it."""


class _Visit(Generic[T]):
    """The run of a coroutine on a background loop, and the wait of a thread for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[T]], context: Context) -> None:
        self._loop = loop
        self._call = call
        self._context = context
        self._begun = False
        self._is_interrupted = False
        self._task: asyncio.Task[T] | None = None
        self.ended: Future[Any] = Future()

    def _start(self) -> None:
        self._task = self._loop.create_task(_awaited(self._call), context=self._context)
        self._task.add_done_callback(self._end)
        _running.add(self._task)

    def _end(self, task: asyncio.Task[T]) -> None:
        _running.discard(task)
        if task.cancelled():
            self._set_cancelled()
        elif (error := task.exception()) is not None:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(task.result())

    def _set_cancelled(self) -> None:
        if self._is_interrupted:
            self.ended.set_result(None)  # an error would replace the interrupt
        else:
            self.ended.set_exception(asyncio.CancelledError())

    def _interrupt(self) -> None:
        self._is_interrupted = True
        if self._task is not None:
            self._task.cancel()
        elif not self.ended.done():  # the task has not been started
            self._set_cancelled()

    def forsake(self) -> None:
        """Drop the task without a warning: its loop runs only in the process that this one was forked from."""
        if self._task is not None:
            task: Any = self._task
            task._log_destroy_pending = False  # as `asyncio.gather` does

    def wait(self, answer: Future[U]) -> U:
        """Wait for an answer from the coroutine; on an interrupt, cancel the coroutine and wait for its end.

        The first wait also starts the coroutine, inside the `try`: an interrupt may come as soon as it runs.
        """
        try:
            if not self._begun:
                self._begun = True
                self._loop.call_soon_threadsafe(self._start, context=self._context)
            return answer.result()
        except BaseException:
            if not answer.done():
                self._loop.call_soon_threadsafe(self._interrupt)
                self.ended.exception()
            raise
        finally:
            del self, answer  # the error's traceback holds this frame


_running: set[asyncio.Task[Any]] = set()
"""Tasks that threads wait for, kept alive: a loop keeps no task alive, so one could be collected with its stream."""


def _ask(loop: asyncio.AbstractEventLoop, source: Source, visit: _Visit[None]) -> Any:
    answer: Future[Any] = Future()
    loop.call_soon_threadsafe(source.ask, answer)
    try:
        return visit.wait(answer)
    finally:
        del answer  # the error's traceback holds this frame


async def _awaited(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


@contextmanager
def _even_at_exit() -> Generator[None]:
    """Let a loop close at exit, when no thread can start any more: in Python 3.12 the close starts one.

    That thread would wait for the threads of `to_thread`, which Python itself has joined before.
    """
    try:
        yield
    except RuntimeError as error:
        if "interpreter shutdown" not in str(error):
            raise


class BackgroundLoop:
    """An event loop on a thread of its own, started by the first call and closed at exit.

    All bridged calls share the loop, so a client that is bound to its loop can be used from call to call.
    """

    def __init__(self) -> None:
        self._forked_from: list[asyncio.AbstractEventLoop] = []
        self._reset()
        at_fork(after_in_child=self._after_fork)
        atexit.register(self.close)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._deeper: BackgroundLoop | None = None

    def _after_fork(self) -> None:
        if self._loop is not None:
            # Kept alive, as closing the loop would unregister the parent's own wake-up pipe.
            self._forked_from.append(self._loop)
        self._reset()

    def run(self, call: Callable[[], Awaitable[T]], context: Context) -> T:
        """Await the awaitable that `call` makes, in a task of the loop in `context`, while this thread waits for it.

        An interrupt of the waiting thread cancels the task and waits for its end, as `asyncio.run` does.
        """
        visit = _Visit(self._free(), call, context)
        try:
            return cast("T", visit.wait(visit.ended))
        finally:
            del visit  # the error's traceback holds this frame

    def stream(self, chunks: AsyncGenerator[T, Any], context: Context) -> Generator[T]:
        """Yield the chunks of an async generator that lives in one task of the loop from its first chunk to its end."""
        loop, process = self._free(), os.getpid()
        source = Source(chunks)
        visit = _Visit(loop, source.serve, context)
        try:
            while (chunk := _ask(loop, source, visit)) is not END:
                yield chunk
                if os.getpid() != process:
                    raise left_behind("this stream")
        finally:
            if os.getpid() != process:
                visit.forsake()
            elif not sys.is_finalizing():  # else the loop is closed, and the generator too
                loop.call_soon_threadsafe(source.ask, None)
                if asyncio._get_running_loop() is not loop and not in_collection():  # else the stream was dropped
                    visit.wait(visit.ended)

    @contextmanager
    def waited_for(self) -> Generator[None]:
        """Let all that is started in this block, in threads or on another loop, know that this thread waits for it.

        Its calls then take no loop that waits along with this thread.
        """
        held = self._held()
        if held is None:
            yield
            return
        token = _held_by_waiter.set(held)
        try:
            yield
        finally:
            _held_by_waiter.reset(token)

    def context_of_waiter(self, scope: CancelScope | None = None) -> Context:
        """Return a copy of this thread's context for work that this thread will wait for; put it into the scope."""
        with self.waited_for():
            context = copy_context()
        if scope is not None:
            context.run(scope.enter)
        return context

    def _free(self) -> asyncio.AbstractEventLoop:
        """Return a loop that this thread can wait for.

        A coroutine on this loop that calls the sync side of a pair blocks the loop until that call has ended, so the
        call needs another loop.
        """
        held = self._held()
        return self.loop() if held is None else held._next_deeper().loop()

    def _held(self) -> BackgroundLoop | None:
        """Return the deepest loop that is blocked while this thread, or the thread that waits for it, waits."""
        thread, by_waiter = threading.current_thread(), _held_by_waiter.get()
        held: BackgroundLoop | None = None
        level: BackgroundLoop | None = self
        while level is not None:
            if level._thread is thread or level is by_waiter:
                held = level
            level = level._deeper
        return held

    def _next_deeper(self) -> BackgroundLoop:
        with self._lock:
            if self._deeper is None:
                self._deeper = BackgroundLoop()
            return self._deeper

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the running loop; start it if need be."""
        return self._loop or self._started()

    def _started(self) -> asyncio.AbstractEventLoop:
        check_not_ending()
        with self._lock:
            if self._loop is None:
                started: Future[asyncio.AbstractEventLoop] = Future()
                thread = threading.Thread(target=self._main, args=(started,), name="asyncify-loop", daemon=True)
                thread.start()
                loop = started.result()
                self._thread = thread  # first: code on the loop's thread may find the loop before this thread goes on
                self._loop = loop
            return self._loop

    def _main(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        with _even_at_exit(), asyncio.Runner() as runner:
            try:
                loop = runner.get_loop()
            except BaseException as error:  # noqa: BLE001  (it is raised where the loop is waited for)
                started.set_exception(error)
                return
            closed = loop.create_task(self._until_closed(started))
            while not closed.done():
                # A task that raises one of these stops the loop. The error goes to its caller; other tasks must go on.
                with suppress(KeyboardInterrupt, SystemExit):
                    loop.run_until_complete(closed)

    async def _until_closed(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        self._closing = asyncio.Event()
        started.set_result(asyncio.get_running_loop())
        await self._closing.wait()

    def close(self) -> None:
        """Cancel the tasks, close the async generators, and end the thread; the next call starts a new loop."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._closing.set)
            thread.join(_CLOSE_SECONDS)


_held_by_waiter: ContextVar[BackgroundLoop | None] = ContextVar("asyncify_held_by_waiter", default=None)
"""The deepest loop that is blocked while another thread waits for the work in this context; None if none is."""

background: BackgroundLoop = BackgroundLoop()
"""The loop of all async sides that sync code calls."""
