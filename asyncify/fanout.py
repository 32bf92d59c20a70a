"""Many inputs, a bounded number of them in flight: one engine for batches, dicts and `each`.

A fan-out has items, each with an index. It starts them as places come free and collects them as they end, in whatever
order they end. `Tasks` runs items as tasks of the running event loop, `Threads` runs them in threads. Both are used
alike: enter one in a `with` or `async with` block and `take()` groups of ended items until a group is empty. Leaving
the block, for whatever reason, ends the items still in flight and waits for their end.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from _thread import get_ident
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Collection, Generator, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from time import monotonic
from typing import Any, Self

from asyncify.collector import in_collection
from asyncify.deadlock.crews import Crew, Hand
from asyncify.deadlock.detection import look_at
from asyncify.deadlock.joins import Join, Joining
from asyncify.forks import check_not_ending, left_behind
from asyncify.pools import ThreadPool
from asyncify.scopes import CancelScope

__all__ = [
    "Alive",
    "BlockingFan",
    "Ended",
    "Tasks",
    "Threads",
    "Width",
    "aas_completed",
    "agather",
    "as_completed",
    "attempt",
    "ended_task",
    "gather",
    "is_raised",
    "outcome",
    "raise_or_note",
    "run_one",
    "until_ended",
]

Ended = tuple[int, Any, BaseException | None]
"""An item that has ended: its index, its output (None if it has failed), and its error (None if it has not)."""

Width = Callable[[], float]
"""Returns how many items may be in flight; called again and again, as a limit may be resized meanwhile."""

_STRIDE = 100
"""Tasks made before the event loop gets a turn, or as many as are alive if these are more: so unbounded items that end
at once never pile up, and items that wait have all begun before the first of them needs the loop again."""

_STRIDE_SECONDS = 0.02
"""Seconds that such a stride may hold the event loop, as the source may be slow."""


def attempt(call: Callable[[int, Any], Any], index: int, value: Any) -> Ended:
    """Run an item in this thread and return how it has ended."""
    try:
        return index, call(index, value), None
    except BaseException as error:  # noqa: BLE001  (it is handed to whoever takes the item)
        return index, None, error


def outcome(ended: Ended, *, return_exceptions: bool) -> tuple[int, Any]:
    """Return an ended item's index with its output or with the error in its place, or raise the error.

    The calling frame must keep neither the item nor its error: the error's traceback holds that frame.
    """
    index, output, error = ended
    try:
        if error is None:
            return index, output
        if is_raised(ended, return_exceptions=return_exceptions):
            raise error
        return index, error
    finally:
        del ended, error


def is_raised(ended: Ended, *, return_exceptions: bool) -> bool:
    """Tell whether an ended item has an error that is raised, not returned in the output's place."""
    return ended[2] is not None and not (return_exceptions and isinstance(ended[2], Exception))


def raise_or_note(closing: BaseException, error: BaseException | None) -> None:
    """Raise the error of closing a source, or add it as a note to the error for which the source was closed."""
    if error is None or isinstance(error, GeneratorExit):
        raise closing
    error.add_note(f"The source raised {closing!r} as it was closed.")


async def until_ended(tasks: Collection[asyncio.Future[Any]]) -> asyncio.CancelledError | None:
    """Wait until all tasks have ended, however often this wait is itself cancelled; return the last cancellation."""
    interrupted: asyncio.CancelledError | None = None
    while alive := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(alive)
        except asyncio.CancelledError as interruption:
            interrupted = interruption
    try:
        return interrupted
    finally:
        del interrupted  # its traceback holds this frame


class _Signal:
    """An event that wakes the one task that waits for it; a task that waits only later misses an earlier `set()`."""

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None


class Alive:
    """The tasks of items in flight; a task whose result is not wanted any more is cancelled, once only.

    Args:
        ordered: results are given in the order of the items, so after an error the items before it are still wanted.
    """

    def __init__(self, *, ordered: bool) -> None:
        self.items: dict[asyncio.Task[Any], int] = {}
        self._ordered = ordered
        self._last_wanted = math.inf

    def fail(self, index: int) -> None:
        """Cancel the tasks whose results are not wanted any more, as this item has failed."""
        self._want_up_to(index if self._ordered else -1)

    def cancel(self) -> None:
        """Cancel all tasks but those cancelled before: a second cancellation would break into their clean-up."""
        self._want_up_to(-1)

    def _want_up_to(self, last: int) -> None:
        for task, index in self.items.items():
            if last < index <= self._last_wanted:
                task.cancel()
        self._last_wanted = min(self._last_wanted, last)


class Tasks(Joining):
    """Items that run as tasks, one each.

    Args:
        start: makes an item's task from its index and its input; returns None for an item that needs no task, which is
            then passed to `settle()`.
        source: the inputs; a task of its own reads them, and never more than there is room for.
        width: how many tasks may be alive.
        window: how many items may have been started and not yet been let go by `free()`.
        return_exceptions: go on after an error; otherwise the source is read no further, no item starts, and the tasks
            in flight are cancelled.
        ordered: after an error, the items before it are still wanted and go on.
    """

    def __init__(
        self,
        start: Callable[[int, Any], asyncio.Task[Any] | None],
        source: Iterable[Any] | AsyncIterable[Any],
        width: Width,
        window: Width = lambda: math.inf,
        *,
        return_exceptions: bool,
        ordered: bool = False,
    ) -> None:
        self._start = start
        self._source = source
        self._width = width
        self._window = window
        self._return_exceptions = return_exceptions
        self._held = 0
        self._alive = Alive(ordered=ordered)
        self._ended: deque[Ended] = deque()
        self._is_over = False
        self._room_made = _Signal()
        self._news = _Signal()

    async def __aenter__(self) -> Self:
        """Begin to read the source and to start items."""
        feeding = (
            self._feed_async(self._source) if isinstance(self._source, AsyncIterable) else self._feed(self._source)
        )
        self._feeder = asyncio.get_running_loop().create_task(feeding)
        self._feeder.add_done_callback(lambda _: self._news.set())
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Cancel the items in flight and wait for their end, however often this wait is itself cancelled.

        Raises:
            Exception: the source raised it as it was closed, and no other error is under way.
        """
        self._is_over = True
        feeder, is_closed = self._feeder, self._feeder.done()
        feeder.cancel()
        self._alive.cancel()
        interrupted = await until_ended([feeder, *self._alive.items])
        del self._start, self._feeder  # break reference cycles: the feeder's frame holds this fan-out, `_start` may
        if not is_closed and not feeder.cancelled() and (closing := feeder.exception()) is not None:
            raise_or_note(closing, interrupted or error)
        try:
            if interrupted is not None:
                raise interrupted
        finally:
            del interrupted  # its traceback holds this frame

    async def take(self) -> deque[Ended]:
        """Wait until an item has ended and return all ended items; none when the source and all items are at an end.

        Raises:
            Exception: the source raised it, and all items before it are taken.
        """
        while not self._ended:
            if self._feeder.done() and not self._alive.items:
                self._feeder.result()
                return deque()
            await self._news.wait()
        return self.take_at_once()

    def take_at_once(self) -> deque[Ended]:
        """Return all items that have ended by now."""
        group, self._ended = self._ended, deque()
        return group

    def settle(self, ended: Ended) -> None:
        """Count an item as ended for which `start` made no task."""
        self._ended.append(ended)
        self._news.set()

    def free(self) -> None:
        """Let go of an item that was taken, to make room in the window."""
        self._held -= 1
        self._room_made.set()

    def join(self) -> Join:
        """Return the join of the items' tasks; its reader may be busy, or the feeder about to start more tasks."""
        waiter, room = self._news.waiter, self._room_made.waiter
        is_fed = self._feeder.done() or (room is not None and not room.done())
        if waiter is None:
            return Join(self, math.inf, fails_at_once=True)  # the reader is unknown, and what may cancel it
        parts = len(self._alive.items) if is_fed else math.inf
        return Join(waiter, parts, fails_at_once=not self._return_exceptions)

    def _room(self) -> float:
        return 0 if self._is_over else min(self._width() - len(self._alive.items), self._window() - self._held)

    async def _feed(self, source: Iterable[Any]) -> None:
        values = iter(source)
        index = 0
        try:
            while True:
                room = self._room()
                if room <= 0:
                    await self._room_made.wait()
                    continue
                stop = index + int(min(room, max(len(self._alive.items), _STRIDE)))
                until = monotonic() + _STRIDE_SECONDS
                for value in islice(values, stop - index):
                    self._run(index, value)
                    index += 1
                    if monotonic() > until:
                        break
                else:
                    if index < stop:
                        return
                await asyncio.sleep(0)
        finally:
            if isinstance(values, Generator):
                values.close()

    async def _feed_async(self, source: AsyncIterable[Any]) -> None:
        values = aiter(source)
        index = 0
        try:
            while True:
                while self._room() <= 0:
                    await self._room_made.wait()
                try:
                    value = await anext(values)
                except StopAsyncIteration:
                    return
                if self._is_over:  # an item failed meanwhile, or the source swallowed the cancellation
                    return
                self._run(index, value)
                index += 1
        finally:
            if isinstance(values, AsyncGenerator):
                await values.aclose()

    def _run(self, index: int, value: Any) -> None:
        self._held += 1
        task = self._start(index, value)
        if task is not None:
            self._alive.items[task] = index
            task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[Any]) -> None:
        ended = ended_task(self._alive.items.pop(task), task)
        if is_raised(ended, return_exceptions=self._return_exceptions):
            self._is_over = True
            self._alive.fail(ended[0])
        self._ended.append(ended)
        self._room_made.set()
        self._news.set()


def ended_task(index: int, task: asyncio.Task[Any]) -> Ended:
    """Return an item's end, as its task shows it."""
    if task.cancelled():
        return index, None, asyncio.CancelledError()
    error = task.exception()
    return (index, task.result(), None) if error is None else (index, None, error)


class BlockingFan(ABC):
    """Items that run elsewhere, for a calling thread that blocks until they end.

    Args:
        return_exceptions: go on after an error; otherwise no item starts after one.
    """

    def __init__(self, *, return_exceptions: bool) -> None:
        self.return_exceptions = return_exceptions
        self.is_over = False
        """Whether no more items start, as one of them has failed."""
        # Re-entrant: the garbage collector may end the fan-out in the middle of anything, in a thread that holds the
        # lock. Taken directly: an interrupt while a Condition is entered would leave the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._inbox: deque[tuple[int, Any]] = deque()
        self._ended: deque[Ended] = deque()
        self._awaited = False
        self._process = os.getpid()

    def __enter__(self) -> Self:
        """Return the fan-out itself."""
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """End the items still in flight, and wait for their end."""

    @abstractmethod
    def run(self, items: Iterable[tuple[int, Any]]) -> None:
        """Start items, each an index and an input."""

    def _is_deserted(self) -> bool:
        """Tell whether the other threads are gone: the program is ending, or this process was forked from it."""
        return sys.is_finalizing() or os.getpid() != self._process

    @abstractmethod
    def _is_idle(self) -> bool:
        """Tell whether all items have ended."""

    def take(self) -> deque[Ended]:
        """Wait until an item has ended and return all ended items; none when nothing is in flight."""
        with self._lock:
            try:
                while not self._ended and not self._is_idle():
                    self._check_not_deserted()
                    self._awaited = True  # before the last look: a worker first appends an item, then reads this
                    if not self._ended:
                        self._wait()
            finally:
                self._awaited = False
        return self.take_at_once()

    def _check_not_deserted(self) -> None:
        if self._is_deserted():
            check_not_ending()
            raise left_behind("what this yields")

    def _wait(self) -> None:
        """Wait for a notification; called with the lock held."""
        self._changed.wait()

    def take_at_once(self) -> deque[Ended]:
        """Return all items that have ended by now."""
        return deque(self._ended.popleft() for _ in range(len(self._ended)))

    def _tell(self) -> None:
        """Wake the caller, if it waits."""
        if self._awaited:
            with self._lock:
                self._awaited = False
                self._changed.notify()


class Threads(BlockingFan, Crew):
    """Items that run in threads; a thread takes item after item for as long as there are any.

    Args:
        call_in: given a cancellation scope, returns the function that runs an item from its index and its input; the
            item's waits for a limiter are in the scope, which calls them off at the end.
        width: how many threads may work at once.
        name: the threads' name while they work.
        return_exceptions: go on after an error; otherwise no item starts after one.
        ordered: after an error, the items before it are still wanted, so their waits are not called off.
    """

    def __init__(
        self,
        call_in: Callable[[CancelScope], Callable[[int, Any], Any]],
        width: Width,
        *,
        name: str,
        return_exceptions: bool,
        ordered: bool = False,
    ) -> None:
        BlockingFan.__init__(self, return_exceptions=return_exceptions)
        Crew.__init__(self, CancelScope())
        self._call = call_in(self.scope)
        self._width = width
        self._ordered = ordered
        self._pool = ThreadPool(None, name)
        self._all_awaited = False
        self._is_left = False
        self._hired = 0  # threads; an interrupt may have come between the count and the start of one
        self._at_work: set[Hand] = set()  # the hands of threads that have an item

    def __exit__(self, *error: object) -> None:
        """Drop the items that have not started, and after an error those that wait for a limiter; await the rest."""
        if self._is_deserted():
            return
        with self._lock:
            self._inbox.clear()
        if error[0] is not None:
            self.scope.cancel()
        if in_collection():
            self._is_left = True  # its threads end by themselves; the collector must not wait for them
            self._end_if_left()
            return
        try:
            with self._lock:
                # The garbage collector runs in any thread, one of these workers included.
                self._changed.wait_for(lambda: all(hand.worker == get_ident() for hand in self._at_work))
        finally:
            self.scope.end()

    def run(self, items: Iterable[tuple[int, Any]]) -> None:
        """Start items, each an index and an input, as threads come free."""
        with self._lock:
            if not self.is_over:
                self._inbox.extend(items)
        self._hire_all()

    def _is_idle(self) -> bool:
        return not self._hired and not self._inbox

    def _wait(self) -> None:
        try:
            self.hold_up_caller()
            look_at(self)  # a worker that begins to wait looks too, so the last one to wait sees all
            super()._wait()
        finally:
            self.let_caller_go()

    def take_all(self) -> deque[Ended]:
        """Wait until all items that are to run have ended, and return them in the order in which they ended."""
        with self._lock:
            try:
                self._all_awaited = True
                while not self._is_idle():
                    self._check_not_deserted()
                    self._wait()
            finally:
                self._all_awaited = False
        return self.take_at_once()

    def hands(self) -> Collection[Hand]:
        """Return the hands of all workers, if the caller waits for them and each has an item; else none."""
        busy = self._at_work.copy()  # in one step
        is_awaited = self._all_awaited or (self._awaited and not self._ended)
        return busy if is_awaited and len(busy) == self._hired and not self.scope.is_cancelled else ()

    def _hire_all(self) -> None:
        """Start as many threads as are needed."""
        while self._needs_thread() and self._hire():
            pass

    def _needs_thread(self) -> bool:
        with self._lock:
            on_their_way = self._hired - len(self._at_work)
            needed = len(self._inbox) > on_their_way and self._hired < self._width()
            self._hired += needed
        return needed

    def _hire(self) -> bool:
        try:
            self._pool.start(self._work)
        except RuntimeError:  # the system has no thread left: the running ones must do
            with self._lock:
                self._hired -= 1
                if not self._hired:
                    raise
            return False
        return True

    def _work(self) -> None:
        self._work_on()
        self._end_if_left()
        if self._all_awaited:  # the caller in `take_all` is not woken by each end
            look_at(self)

    def _end_if_left(self) -> None:
        if self._is_left and not self._at_work:
            self.scope.end()

    def _work_on(self) -> None:
        hand: Hand | None = None
        while (taken := self._next(hand)) is not None:
            hand, item = taken
            with hand:
                ended = attempt(self._call, *item)
            del taken, item
            is_error = is_raised(ended, return_exceptions=self.return_exceptions)
            if is_error:
                with self._lock:
                    self.is_over = True
                    self._inbox.clear()
            self._ended.append(ended)
            if is_error and not self._ordered:
                self.scope.cancel()  # only now, or items whose wait is called off would end before the error is there
            self._tell()
            del ended  # an error's traceback holds this frame
            if self._hired < self._width():  # the limit was raised, say
                self._hire_all()

    def _next(self, last: Hand | None) -> tuple[Hand, tuple[int, Any]] | None:
        """End this thread's work on its last item; return the next item with a hand of its own, or None."""
        with self._lock:
            if last is not None:
                self._at_work.discard(last)
            if self._inbox:
                hand = Hand(self)
                self._at_work.add(hand)
                with suppress(IndexError):  # the garbage collector may empty it meanwhile, in this very thread
                    return hand, self._inbox.popleft()
                self._at_work.discard(hand)
            self._hired -= 1
            if not self._all_awaited or self._is_idle():
                self._changed.notify()
            return None


def run_one(call: Callable[[int, Any], Any], value: Any, *, return_exceptions: bool) -> Any:
    """Run a single item in this thread and return its output."""
    return outcome(attempt(call, 0, value), return_exceptions=return_exceptions)[1]


def gather(fan: Threads, inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of all items, in order; the first error stops the rest."""
    outputs: list[Any] = [None] * len(inputs)
    # Not over `as_completed`, which is a generator: an item's StopIteration could not get through one.
    try:
        with fan:
            fan.run(enumerate(inputs))
            ended = fan.take_all()
            while ended:
                index, output = outcome(ended.popleft(), return_exceptions=fan.return_exceptions)
                outputs[index] = output
    finally:
        fan.take_at_once()  # an error left inside would hold the fan-out by its traceback
    return outputs


async def agather(
    start: Callable[[int, Any], asyncio.Task[Any]], inputs: Sequence[Any], width: Width, *, return_exceptions: bool
) -> list[Any]:
    """Return the outputs of all items, in order; the first error cancels the rest."""
    inputs = tuple(inputs)  # the caller may change a list meanwhile
    outputs: list[Any] = [None] * len(inputs)
    async with Tasks(start, inputs, width, return_exceptions=return_exceptions) as fan:
        while group := await fan.take():
            while group:
                index, output = outcome(group.popleft(), return_exceptions=return_exceptions)
                outputs[index] = output
    return outputs


def as_completed(fan: Threads, inputs: Sequence[Any]) -> Generator[tuple[int, Any]]:
    """Yield index and output of each item as it ends; the first error, or closing this generator, stops the rest."""
    try:
        with fan:
            fan.run(enumerate(inputs))
            while group := fan.take():
                while group:
                    yield outcome(group.popleft(), return_exceptions=fan.return_exceptions)
    finally:
        fan.take_at_once()  # an error left inside would hold the fan-out by its traceback


async def aas_completed(
    start: Callable[[int, Any], asyncio.Task[Any]], inputs: Sequence[Any], width: Width, *, return_exceptions: bool
) -> AsyncGenerator[tuple[int, Any]]:
    """Yield index and output of each item as it ends; the first error, or closing this generator, cancels the rest."""
    async with Tasks(start, tuple(inputs), width, return_exceptions=return_exceptions) as fan:
        while group := await fan.take():
            while group:
                yield outcome(group.popleft(), return_exceptions=return_exceptions)
