"""Waking tasks of an event loop, many by one callback.

For each task that awaits it, a future that is done schedules a callback of the loop; that is most of what a wake
takes. And where every task that goes on wakes the next, as in a queue for one slot, each has to wait for another turn
of the loop, with its system call. So tasks that are woken by those of a round go on in the same round.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import AbstractEventLoop, _get_running_loop
from itertools import islice

__all__ = ["wake_here"]

_LONGEST = 64
"""Tasks that go on in one round; then all else that the loop has to do gets its turn."""


def wake_here(loop: AbstractEventLoop, future: asyncio.Future[None]) -> bool:
    """Have a future of `loop` done soon, if this thread runs that loop; tell whether it does."""
    current = _thread.round
    if current is not None and current.loop is loop:  # asked first, as it is quicker than the other question
        current.futures.append(future)
        return True
    if loop is not _get_running_loop():
        return False
    if type(future).__module__ == "_asyncio":
        loop.call_soon(_Round(loop, [future]).run)
    elif not future.done():  # written in Python, as by nest_asyncio, by which a task may run the loop within its step
        future.set_result(None)
    return True


class _Round:
    """One callback of a loop, in which the tasks that await some futures go on."""

    __slots__ = ("futures", "loop")

    def __init__(self, loop: AbstractEventLoop, futures: list[asyncio.Future[None]]) -> None:
        self.loop = loop
        self.futures = futures  # which grows while their tasks go on

    def run(self) -> None:
        """Make the futures done, and go on with their tasks at once."""
        _thread.round = self
        rest = iter(self.futures)
        try:
            for future in islice(rest, _LONGEST):
                callbacks = future._callbacks
                if callbacks and len(callbacks) == 1:
                    ((go_on, context),) = callbacks
                    future.remove_done_callback(go_on)
                    future.set_result(None)
                    context.run(go_on, future)
                elif not future.done():  # it has been cancelled, or nobody awaits it yet
                    future.set_result(None)
        finally:  # a task lets through what is to end the program
            _thread.round = None
            if futures := list(rest):
                self.loop.call_soon(_Round(self.loop, futures).run)


class _Thread(threading.local):
    round: _Round | None = None
    """The round that this thread is in."""


_thread = _Thread()
