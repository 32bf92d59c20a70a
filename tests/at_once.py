"""Calls at once in threads, under a limiter that they may wait for themselves at."""

import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from asyncify import Dual, Limiter, concurrency, each
from asyncify.deadlock.detection import come_to_wait
from tests.waiting import SAFETY_NET, wait_until


def identity(value: Any) -> Any:
    """Return the input."""
    return value


def limited(limiter: Limiter, call: Callable[[Any], Any] = identity) -> Any:
    """Return a pair of a sync function, under a limiter."""
    return concurrency(limiter=limiter)(Dual(call, name="limited"))


def end_of(work: Callable[[], Any]) -> Any:
    """Return what work in a thread has come to: its result, or its error."""
    ends: list[Any] = []

    def run() -> None:
        try:
            ends.append(work())
        except Exception as error:  # noqa: BLE001  (it is looked at)
            ends.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SAFETY_NET)
    assert ends
    return ends[0]


def is_free(limiter: Limiter) -> bool:
    """Tell whether nobody is inside or waits."""
    return limiter.stats().in_flight == limiter.stats().waiting == 0


def are_looked_at(limiter: Limiter, waits: int) -> bool:
    """Tell whether so many wait within calls, and have looked for a deadlock, so that they saw none who comes next."""
    queue = [permit for permit in list(limiter._queue) if permit.queue is not None]  # without the places left empty
    return len(queue) == waits and all(permit.blocks and not _is_looking(permit.thread) for permit in queue)


def _is_looking(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not come_to_wait.__code__:
        frame = frame.f_back
    return frame is not None


@contextmanager
def one_besides(limiter: Limiter, others: int) -> Iterator[list[Any]]:
    """Have a thread take a slot, and wait for another when so many others wait; yield a list of what comes of it."""
    is_inside = threading.Event()
    ends: list[Any] = []

    def nest() -> str:
        with limiter:
            is_inside.set()
            wait_until(lambda: are_looked_at(limiter, others))
            with limiter:
                return "in"

    thread = threading.Thread(target=lambda: ends.append(end_of(nest)))
    thread.start()
    is_inside.wait(SAFETY_NET)
    try:
        yield ends
    finally:
        thread.join(SAFETY_NET)


def _batch(pair: Any, values: list[Any], **how: Any) -> int:
    return sum(end for end in pair.batch(values, **how) if isinstance(end, int))


def _batch_as_completed(pair: Any, values: list[Any]) -> int:
    return sum(end for _, end in pair.batch_as_completed(values))


def _each(pair: Any, values: list[Any], **how: Any) -> int:
    return sum(end if how.get("ordered", True) else end[1] for end in each(pair, values, **how))


def _branches(pair: Any, values: list[Any]) -> int:
    branches = {f"{at}": Dual(operator.itemgetter(at)) | pair for at in range(len(values))}
    return sum((Dual(list) | branches).invoke(values).values())


MANY: dict[str, Callable[[Any, list[Any]], int]] = {
    "batch": _batch,
    "batch with errors": partial(_batch, return_exceptions=True),
    "batch of two at once": partial(_batch, config={"max_concurrency": 2}),
    "batch of a binding": lambda pair, values: _batch(pair.with_config(tags=["bound"]), values),
    "batch that is observed": partial(_batch, config={"callbacks": [BaseCallbackHandler()]}),
    "batch_as_completed": _batch_as_completed,
    "each": _each,
    "each, as completed": partial(_each, ordered=False),
    "each with a window": partial(_each, window=2),
    "a dict of pairs": _branches,
}
"""Ways to call a pair several times at once."""
