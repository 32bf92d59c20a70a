"""The beginning of a forked process and the end of any: what has to be made anew, and what can't be made any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing import util

__all__ = ["PROGRAM", "at_fork", "check_not_ending", "in_worker", "left_behind"]

PROGRAM = ("__main__", "__mp_main__")
"""Names of the program's own module, which in another process may be another program's."""


def at_fork(**callbacks: Callable[[], object]) -> None:
    """Do what `os.register_at_fork` does, where there is one (not on Windows).

    The callbacks are `before`, `after_in_parent` and `after_in_child`.
    """
    register: Callable[..., None] | None = getattr(os, "register_at_fork", None)
    if register is not None:
        register(**callbacks)


def in_worker(callback: Callable[[], object]) -> None:
    """Do this in each process that `multiprocessing` forks, a pool's workers among others, after what `at_fork` does.

    Unlike a child of `os.fork` it never comes back to what the forking thread is in the middle of.
    """
    util.register_after_fork(callback, _call)  # which keeps it only as long as somebody else does


def _call(callback: Callable[[], object]) -> None:
    callback()


def check_not_ending() -> None:
    """Check that a thread can do something still, in a finalizer say.

    Raises:
        RuntimeError: the interpreter ends, and its threads are frozen. Python says the same from 3.12 on.
    """
    if sys.is_finalizing():
        raise RuntimeError("can't create new thread at interpreter shutdown")


def left_behind(what: str) -> RuntimeError:
    """Return the error for a forked child that goes on with what only threads of its parent could finish."""
    return RuntimeError(f"{what} was begun in the process that this one was forked from, and goes on there; begin anew")
