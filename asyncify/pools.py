"""Thread pools for calls that a task or thread waits for: each bounds its calls, and all draw on one stock of threads.

The threads are this module's own. Those of `concurrent.futures` never end and are joined at exit; those of anyio
belong to one event loop, and are joined as well. Here an abandoned call can't keep a program from ending, and a
thousand pairs that were each called once leave no thousand threads behind.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from _thread import allocate_lock
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context, ContextVar
from functools import partial
from inspect import iscoroutine
from queue import SimpleQueue
from typing import Any, TypeVar

from asyncify.forks import at_fork, check_not_ending, in_worker

__all__ = ["DEFAULT_THREADS", "OnEnd", "ThreadPool", "call_guarded"]

T = TypeVar("T")

OnEnd = Callable[[BaseException | None], None]
"""A callback for the end of a call, with its error if it failed; a second call of the callback does nothing."""

DEFAULT_THREADS = 64
"""How many threads a pair without a limit on its calls in flight may use."""

_IDLE_SECONDS = 5.0


class _Worker:
    """A thread that runs one job after the other, and ends when it has been idle for a while."""

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
    """The idle threads of the process: a stack, the last used on top."""

    def __init__(self) -> None:
        self._reset()
        at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def start(self, job: Callable[[], None]) -> None:
        """Run `job`, which must not raise, on an idle thread, or on a new one if none is idle."""
        check_not_ending()
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None:
            worker.job = job
            worker.ready.release()
        else:
            worker = _Worker(job)
            threading.Thread(target=worker.run, args=(self,), name="asyncify", daemon=True).start()

    def wait_for_job(self, worker: _Worker) -> bool:
        """Wait for a job for this worker; return False when it has been idle for long enough to end."""
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


def call_guarded(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `fn`, for a caller that awaits it: a `StopIteration` can't pass a future, so it is wrapped."""
    try:
        return fn(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("the function raised StopIteration") from error


def _attempt(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    # A frame of its own: the error's traceback holds this frame, so the frame must not hold the error's holder.
    try:
        return work(), None
    except BaseException as error:  # noqa: BLE001  (it is handed to the waiting task)
        return None, error


class _Call:
    """Work on a thread, and the task that waits for it.

    `on_end` is called once no part of the work runs any more, or ever will. After the task was cancelled this may be
    much later, as a thread can't be stopped.
    """

    __slots__ = ("_loop", "_on_end", "_outcome", "_work")

    def __init__(self, work: Callable[[], Any], on_end: OnEnd) -> None:
        self._work = [work]  # taken by the thread, or by the task as it gives up, whichever is first
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Any] = self._loop.create_future()

    def run(self) -> None:
        """Do the work in this thread, unless the task has given up."""
        work = self._take()
        if work is None:
            return
        try:
            self._report(*_attempt(partial(call_guarded, work)))
        finally:
            del self, work  # an error's traceback holds this frame too, as a caller

    def _report(self, result: Any, error: BaseException | None) -> None:
        if not iscoroutine(result):
            self._on_end(error)
        try:
            self._loop.call_soon_threadsafe(self._settle, result, error)
        except RuntimeError:  # the loop is closed: no task waits any more
            if iscoroutine(result):
                result.close()
            self._on_end(error)

    def _take(self) -> Callable[[], Any] | None:
        try:
            return self._work.pop()
        except IndexError:
            return None

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self._outcome.cancelled():
            if iscoroutine(result):
                result.close()  # no task awaits it any more
            self._on_end(error)
        elif error is not None:
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(result)

    async def wait(self) -> Any:
        """Wait for the result; if it is a coroutine, await it too, as part of the work."""
        try:
            result = await self._outcome
            if iscoroutine(result):
                result = await result
        except BaseException as error:
            with suppress(RuntimeError):  # raised by a closed loop; the outcome is cancelled all the same
                self._outcome.cancel()  # whatever ended the wait: this coroutine may have been closed, too
            if self._take() is not None or not self._outcome.cancelled():
                self._on_end(error)
            raise
        else:
            self._on_end(None)
            return result
        finally:
            del self  # the error's traceback holds this frame


_inside: ContextVar[tuple[ThreadPool, ...]] = ContextVar("asyncify_pools", default=())
"""The pools of the calls that this context runs in."""

_END: Any = object()


class ThreadPool:
    """At most `size` calls at once, on threads with the pool's name; further calls wait, first come, first served.

    A thread belongs to the pool while it has work, and then goes back to the stock that all pools draw on; the stock
    has no bound, so no pool waits for another. A nested call, made by a call of the same pool that waits for it, never
    waits for a thread.

    Args:
        size: the most threads, or a function that returns it, asked at each call; None for no bound, where something
            else bounds the calls.
        name: the threads' name while they work.
    """

    def __init__(self, size: int | Callable[[], int | None] | None, name: str) -> None:
        self._size = size
        self.name = name
        self.forget()
        _pools.add(self)

    def forget(self) -> None:
        """Begin anew without calls: in a forked child, those of its parent don't run."""
        self._lock = threading.Lock()
        self._busy = 0
        self._backlog: deque[Callable[[], object]] = deque()

    @property
    def size(self) -> int | None:
        """How many threads the pool may use now; None for no bound."""
        return self._size() if callable(self._size) else self._size

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` on a thread, in that thread's own context, unless `fn` is a context's `run`."""
        future: Future[T] = Future()
        self.start(partial(_fulfil, future, partial(fn, *args, **kwargs)))
        return future

    async def call(self, work: Callable[[], Any], on_end: OnEnd, context: Context) -> Any:
        """Run `work` on a thread, in the given context, and wait for it in this task.

        `on_end` is called as soon as the work has ended, in every case, whatever happens to this task.
        """
        call = _Call(lambda: context.run(self._within, work), on_end)
        try:
            self.start(call.run)
        except BaseException as error:
            on_end(error)
            raise
        try:
            return await call.wait()
        finally:
            del call  # the error's traceback holds this frame

    async def stream(self, chunks: Generator[T, Any, Any], on_end: OnEnd, context: Context) -> AsyncGenerator[T]:
        """Yield the chunks of a generator that lives in one thread from its first chunk to its end.

        If this stream is closed early, it waits until the thread has closed the generator; if the reading task is
        cancelled, it leaves that to the thread.
        """
        requests: SimpleQueue[_Call | None] = SimpleQueue()
        in_thread = _ThreadChunks(chunks, on_end)
        try:
            self.start(partial(_serve, requests, in_thread))
        except BaseException as error:
            on_end(error)
            raise

        def ask(work: Callable[[], Any]) -> _Call:
            call = _Call(lambda: context.run(self._within, work), _nothing)
            requests.put(call)
            return call

        try:
            while (chunk := await ask(in_thread.next).wait()) is not _END:
                yield chunk
        except asyncio.CancelledError:
            ask(in_thread.close)
            raise
        except BaseException:
            try:
                await ask(in_thread.close).wait()
            except asyncio.CancelledError:  # given up, maybe before the thread has taken it
                ask(in_thread.close)
                raise
            raise
        finally:
            requests.put(None)

    def _within(self, work: Callable[[], Any]) -> Any:
        inside = _inside.get()
        if self not in inside:
            _inside.set((*inside, self))
        return work()

    def start(self, job: Callable[[], object]) -> None:
        """Run `job`, which must not raise, on a thread, or queue it until one is free."""
        with self._lock:
            size = self.size
            if size is not None and self._busy >= size and self not in _inside.get():
                self._backlog.append(job)
                return
            self._busy += 1
        try:
            _stock.start(partial(self._work, job))
        except RuntimeError:  # the system has no thread left
            with self._lock:
                self._busy -= 1
            raise

    def _work(self, job: Callable[[], object]) -> None:
        threading.current_thread().name = self.name
        while True:
            job()
            del job  # an error's traceback holds this frame too
            with self._lock:
                size = self.size
                if not self._backlog or (size is not None and self._busy > size):
                    self._busy -= 1
                    break
                job = self._backlog.popleft()
        threading.current_thread().name = "asyncify"


_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _forget_calls() -> None:
    for pool in list(_pools):
        pool.forget()


at_fork(after_in_child=_forget_calls)


def _forget_pools() -> None:
    _inside.set(())


in_worker(_forget_pools)


def _nothing(error: BaseException | None) -> None:
    pass


class _ThreadChunks:
    """The chunks of a generator, made in its thread; reports its end once, before the reader can know of it."""

    __slots__ = ("_chunks", "_on_end")

    def __init__(self, chunks: Generator[Any, Any, Any], on_end: OnEnd) -> None:
        self._chunks = chunks
        self._on_end = on_end

    def next(self) -> Any:
        try:
            chunk = next(self._chunks, _END)
        except BaseException as error:
            self.tell(error)
            raise
        if chunk is _END:
            self.tell(None)
        return chunk

    def close(self) -> None:
        try:
            self._chunks.close()
        finally:
            self.tell(None)

    def tell(self, error: BaseException | None) -> None:
        on_end, self._on_end = self._on_end, _nothing
        on_end(error)


def _serve(requests: SimpleQueue[_Call | None], chunks: _ThreadChunks) -> None:
    while (request := requests.get()) is not None:
        request.run()
        del request
    chunks.tell(None)


def _fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    result, error = _attempt(work)
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
    del future, result, error  # an error's traceback holds this frame too
