"""Whether a garbage collection runs in this thread.

It may begin in the middle of anything, at a lock that others wait for say, and it runs what finalizers there are. So
these must not wait for other threads.

What the collector calls back is written in C: a signal that comes while it is at work is looked for as the next Python
function begins, and an error of what it calls back, a KeyboardInterrupt say, is dropped.
"""

from __future__ import annotations

import gc
import threading
from functools import partial
from typing import Any

__all__ = ["in_collection"]

_phases: dict[str, Any] = {}
"""The last `info` that the collector has called back with, by phase; the later phase, "start" or "stop", comes last."""

_here = threading.local()
"""The same for this thread, with the phases as attributes."""

# Called in this order, each with the phase and the `info`, a new dict each time: the first takes the phase out of
# `_phases`, the second puts it back at the end.
gc.callbacks += [_phases.pop, _phases.setdefault, partial(setattr, _here)]


def in_collection() -> bool:
    """Tell whether this thread is in the middle of a garbage collection, and so in a finalizer."""
    phases = _phases.copy()  # in one step, as another thread may begin a collection meanwhile
    return next(reversed(phases), None) == "start" and phases["start"] is getattr(_here, "start", None)
