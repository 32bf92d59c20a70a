"""A side made from the other: threads for a sync function, one background event loop for an async one.

The threads are this module's own. Those of `concurrent.futures` are never let go and are waited for at exit; those
of anyio belong to one event loop, and are waited for as well. Here an abandoned call can't keep a program from
ending, and a thousand pairs that were called once leave no thousand threads.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

__all__ = ["DEFAULT_THREADS", "BackgroundLoop", "ThreadPool", "background", "call_guarded"]

T = TypeVar("T")

DEFAULT_THREADS = 64
"""Threads for the calls of a pair that has no limit on its calls in flight."""

_IDLE_SECONDS = 5.0


class _Worker:
    """A thread that does one job after the other, and ends when it has been idle for a while."""

    __slots__ = ("job", "ready")

    def __init__(self, job: Callable[[], None]) -> None:
        self.job = job
        self.ready = allocate_lock()
        self.ready.acquire()

    def run(self, stock: _Stock) -> None:
        while True:
            self.job()
            del self.job  # an idle thread keeps nothing of its last call alive
            if not stock.wait_for_job(self):
                return


class _Stock:
    """The idle threads of the process, the last used on top."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def start(self, job: Callable[[], None]) -> None:
        """Run `job`, which must not raise, on an idle thread, or on a new one."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None:
            worker.job = job
            worker.ready.release()
        else:
            worker = _Worker(job)
            threading.Thread(target=worker.run, args=(self,), name="asyncify", daemon=True).start()

    def wait_for_job(self, worker: _Worker) -> bool:
        """Wait until there is a job for this worker; False when it has been idle for long enough."""
        with self._lock:
            self._idle.append(worker)
        if worker.ready.acquire(timeout=_IDLE_SECONDS):
            return True
        with self._lock:
            if worker in self._idle:
                self._idle.remove(worker)
                return False
        return worker.ready.acquire()


_stock = _Stock()
_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


class ThreadPool(Executor):
    """At most `size` calls at once on threads that carry its name; more wait, first come, first served.

    A thread belongs to the pool for as long as it has work, and goes back to a stock that all pools draw from;
    the stock has no bound, so no pool waits for another.

    Args:
        size: threads at most; None for as many as there are calls, where something else bounds those.
        name: what the threads are called while they work.
    """

    def __init__(self, size: int | None, name: str) -> None:
        self.size = size
        self.name = name
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._busy = 0
        self._backlog: deque[Callable[[], None]] = deque()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` on a thread; its context is a new one, unless `fn` is the `run` of another."""
        future: Future[T] = Future()
        job = partial(_fulfil, future, fn, args, kwargs)
        with self._lock:
            if self.size is not None and self._busy >= self.size:
                self._backlog.append(job)
                return future
            self._busy += 1
        try:
            _stock.start(partial(self._work, job))
        except RuntimeError:  # the system has no thread left
            with self._lock:
                self._busy -= 1
            raise
        return future

    def _work(self, job: Callable[[], None]) -> None:
        threading.current_thread().name = self.name
        while True:
            job()
            with self._lock:
                if not self._backlog:
                    self._busy -= 1
                    break
                job = self._backlog.popleft()
        threading.current_thread().name = "asyncify"


def _fulfil(future: Future[T], fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001  (it is handed to whoever waits for the future)
        future.set_exception(error)
    else:
        future.set_result(result)


def call_guarded(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `fn`, for a caller that awaits it: a `StopIteration` can't pass a future, so it is wrapped."""
    try:
        return fn(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("the function raised StopIteration") from error


class BackgroundLoop:
    """An event loop on a thread of its own, started by the first call and closed at exit.

    All bridged calls share it, so that a client which is bound to its loop lives on from call to call.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.close)

    def _reset(self) -> None:
        # After a fork the old loop is kept: closing it would unregister the parent's own wake-up pipe.
        self._forked_from = getattr(self, "_loop", None)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._deeper: BackgroundLoop | None = None

    def run(self, call: Callable[[], Coroutine[Any, Any, T]], context: Context) -> T:
        """Run the coroutine that `call` makes, in this context, and wait for it in this thread.

        An interrupt of the waiting thread cancels the coroutine and waits for its end, as `asyncio.run` does.
        """
        if threading.current_thread() is self._thread:
            # The coroutine that runs here waits for this very call: it needs a loop that is free.
            return self._next_deeper().run(call, context)
        loop = self.loop()
        done: Future[T] = Future()
        task: list[asyncio.Task[T]] = []

        def start() -> None:
            task.append(loop.create_task(call(), context=context))
            task[0].add_done_callback(partial(_copy_outcome, done))

        loop.call_soon_threadsafe(start, context=context)
        try:
            return done.result()
        except BaseException:
            if not done.done():
                loop.call_soon_threadsafe(lambda: task[0].cancel())  # noqa: PLW0108  (there is no task yet)
                done.exception()
            raise

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop, running."""
        with self._lock:
            if self._loop is None:
                started: Future[asyncio.AbstractEventLoop] = Future()
                self._thread = threading.Thread(target=self._main, args=(started,), name="asyncify-loop", daemon=True)
                self._thread.start()
                self._loop = started.result()
            return self._loop

    def _main(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._until_closed(started))

    async def _until_closed(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        self._closing = asyncio.Event()
        started.set_result(asyncio.get_running_loop())
        await self._closing.wait()

    def _next_deeper(self) -> BackgroundLoop:
        with self._lock:
            if self._deeper is None:
                self._deeper = BackgroundLoop()
            return self._deeper

    def close(self) -> None:
        """Cancel what still runs, close the async generators, and end the thread."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._closing.set)
            thread.join()


def _copy_outcome(done: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        done.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())


background = BackgroundLoop()
"""The loop of all async sides that are called by sync code."""


def _reset_pools() -> None:
    for pool in list(_pools):
        pool._reset()


os.register_at_fork(after_in_child=_reset_pools)
