"""Joins, waits for several tasks at once: `asyncio.gather` and the like, task groups, and this package's fan-outs.

A task that awaits one other task is found by that task's done callbacks. A task that awaits several is not: each of
them has a callback that counts how many are left. asyncio has no public way from there to the waiter, so it is read
from that callback, by private names that are the same from Python 3.11 to 3.13. A callback that can't be read counts as
no join, and a deadlock by way of it is missed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from types import FunctionType, MethodType
from typing import Any

__all__ = ["Join", "Joining", "join_of", "leader_of"]


@dataclass(frozen=True, slots=True)
class Join:
    """A wait for several tasks or futures, its parts; it ends with the last of them, or before if one fails.

    Attributes:
        whole: the future that is set when the wait ends, or the `Waiter` of a waiting thread; the same for all parts.
            While nothing waits yet, the object that will have such a future: a task group, say.
        parts: how many parts have not ended; infinity if nothing waits yet, or more parts may come.
        cancels_parts: whether the parts are cancelled when the waiting task is.
        fails_at_once: whether the parts are also cancelled when one of them fails.
        leader: the task that began the parts, if it does not wait for them yet; a failing part cancels it, too.
    """

    whole: Any
    parts: float
    cancels_parts: bool = True
    fails_at_once: bool = False
    leader: Any = None


class Joining(ABC):
    """An object that waits for several tasks by a done callback on each, which is one of its methods."""

    @abstractmethod
    def join(self) -> Join:
        """Return the wait for these tasks."""


def join_of(callback: Any) -> Join | None:
    """Return the join that a done callback belongs to; the task or future with this callback is one of its parts."""
    if isinstance(callback, MethodType):
        return _of_method(callback.__func__, callback.__self__)
    if isinstance(callback, partial):  # of `asyncio.wait_for`, in Python 3.11
        return Join(callback.args[0], 1) if callback.func is _RELEASE else None
    if isinstance(callback, FunctionType):
        read = _READERS.get((callback.__module__, callback.__qualname__))
        try:
            return None if read is None else read(_closure(callback))
        except (KeyError, ValueError):  # another version's names, or a cell that is still empty
            return None
    return None


def _of_method(method: Any, owner: Any) -> Join | None:
    if isinstance(owner, Joining):
        return owner.join()
    if method is _END_OF_NEXT:  # of `asyncio.as_completed`, from Python 3.13 on
        return _of_next(owner._done, owner._todo, owner._timeout_handle)
    return _of_group(owner) if method is _END_OF_PART else None


def _closure(function: FunctionType) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


_END_OF_PART: Any = getattr(asyncio.TaskGroup, "_on_task_done", None)
_END_OF_NEXT: Any = getattr(getattr(asyncio.tasks, "_AsCompletedIterator", None), "_handle_completion", None)
_RELEASE: Any = getattr(asyncio.tasks, "_release_waiter", None)


def _of_group(group: Any) -> Join:
    whole = getattr(group, "_on_completed_fut", None)  # None until the group's block has ended
    if whole is None:
        return Join(group, inf, fails_at_once=True, leader=leader_of(group))
    return Join(whole, len(group._tasks), fails_at_once=True)


def leader_of(group: Any) -> Any:
    """Return the task that entered a task group of asyncio or anyio."""
    scope = getattr(group, "cancel_scope", None)
    return getattr(group, "_parent_task", None) or getattr(scope, "_host_task", None)


def _of_gather(seen: dict[str, Any]) -> Join | None:
    outer = seen["outer"]
    return None if outer is None else Join(outer, seen["nfuts"] - seen["nfinished"])


def _of_wait(seen: dict[str, Any]) -> Join | None:
    return Join(seen["waiter"], seen["counter"], cancels_parts=False) if seen["timeout_handle"] is None else None


def _of_as_completed(seen: dict[str, Any]) -> Join | None:
    return _of_next(seen["done"], seen["todo"], seen["timeout_handle"])


def _of_next(done: Any, todo: Any, timeout_handle: Any) -> Join | None:
    """Return the wait for the next of several tasks to end."""
    readers = [reader for reader in done._getters if not reader.done()]
    if timeout_handle is not None or len(readers) != 1:  # none waits if a result is in the queue
        return None
    return Join(readers[0], len(todo), cancels_parts=False)


def _of_shield(seen: dict[str, Any]) -> Join:
    return Join(seen["outer"], 1, cancels_parts=False)


def _of_anyio_group(seen: dict[str, Any]) -> Join:
    return _of_group(seen["self"])


_READERS: dict[tuple[str, str], Callable[[dict[str, Any]], Join | None]] = {
    ("asyncio.tasks", "gather.<locals>._done_callback"): _of_gather,
    ("asyncio.tasks", "_wait.<locals>._on_completion"): _of_wait,
    ("asyncio.tasks", "as_completed.<locals>._on_completion"): _of_as_completed,
    ("asyncio.tasks", "shield.<locals>._inner_done_callback"): _of_shield,
    ("anyio._backends._asyncio", "TaskGroup._spawn.<locals>.task_done"): _of_anyio_group,
}
