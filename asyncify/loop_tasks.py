"""Many inputs as tasks of the background loop, for a caller who has no event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextvars import copy_context
from math import inf
from typing import Any, Self

from asyncify.background import background
from asyncify.collector import in_collection
from asyncify.deadlock.holds import Waiter
from asyncify.deadlock.joins import Join, Joining
from asyncify.fanout import Alive, BlockingFan, Ended, Width, ended_task, is_raised

__all__ = ["LoopTasks"]


class LoopTasks(BlockingFan, Joining):
    """Items that run as tasks of the background loop, used by another thread as `Threads` is.

    Args:
        start: makes the task of an item from its index and its input; called on that loop.
        width: tasks alive.
        return_exceptions: go on after an error; otherwise no item starts after one, and those in flight are cancelled.
        ordered: after an error, items that came before are still wanted, and go on.
    """

    def __init__(
        self,
        start: Callable[[int, Any], asyncio.Task[Any]],
        width: Width,
        *,
        return_exceptions: bool,
        ordered: bool = False,
    ) -> None:
        super().__init__(return_exceptions=return_exceptions)
        self._start = start
        self._width = width
        self._alive = Alive(ordered=ordered)
        self._caller = Waiter()
        self._drain_is_due = False

    def __enter__(self) -> Self:
        """Find the loop."""
        self._loop = background.run(_running_loop, copy_context())
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is still in flight and wait for its end."""
        if self._is_deserted():
            return
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        if asyncio._get_running_loop() is not self._loop and not in_collection():
            closing.result()

    async def _close(self) -> None:
        self._inbox.clear()
        self._alive.cancel()
        while self._alive.items:
            await asyncio.wait(self._alive.items)

    def _wait(self) -> None:
        try:
            self._caller.hold_up_this_thread()
            super()._wait()
        finally:
            self._caller.let_go()

    def join(self) -> Join:
        """Return the wait for the items: that of another thread, which may be busy, or about to be."""
        starts_more = self._drain_is_due or (self._inbox and len(self._alive.items) < self._width())
        if not self._awaited or self._ended or starts_more:
            return Join(self._caller, inf, fails_at_once=True)
        return Join(self._caller, len(self._alive.items), fails_at_once=True)

    def run(self, items: Iterable[tuple[int, Any]]) -> None:
        """Start items, each an index and an input, as tasks end."""
        self._inbox.extend(items)
        if not self._drain_is_due:  # else the loop is on its way, and finds these too
            self._drain_is_due = True
            self._loop.call_soon_threadsafe(self._drain)

    def _is_idle(self) -> bool:
        return not self._drain_is_due and not self._inbox and not self._alive.items

    # The caller may look at any moment: an item leaves one place when it is in the next.

    def _drain(self) -> None:
        while self._inbox and not self.is_over and len(self._alive.items) < self._width():
            index, value = self._inbox[0]
            try:
                task = self._start(index, value)
            except BaseException as error:  # noqa: BLE001  (it is handed to whoever takes the item)
                self._end((index, None, error))
            else:
                self._alive.items[task] = index
                task.add_done_callback(self._on_end)
            self._inbox.popleft()
        if self.is_over:
            self._inbox.clear()
        self._drain_is_due = False
        if self._inbox and len(self._alive.items) < self._width():  # came while the flag was still up
            self._drain()
        self._tell()

    def _on_end(self, task: asyncio.Task[Any]) -> None:
        self._end(ended_task(self._alive.items[task], task))
        del self._alive.items[task]
        self._drain()

    def _end(self, ended: Ended) -> None:
        if is_raised(ended, return_exceptions=self.return_exceptions):
            self.is_over = True
            self._alive.fail(ended[0])
        self._ended.append(ended)


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()
