"""Whether a garbage collection runs in this thread.

It may begin in the middle of anything, at a lock that others wait for say, and it runs what finalizers there are. So
these must not wait for other threads.
"""

from __future__ import annotations

import gc
from _thread import get_ident
from typing import Any

__all__ = ["in_collection"]

_collecting = 0  # the thread; 0 if there is none


def _note(phase: str, _: dict[str, Any]) -> None:
    global _collecting  # noqa: PLW0603  (there is one collector for all)
    _collecting = get_ident() if phase == "start" else 0


gc.callbacks.append(_note)


def in_collection() -> bool:
    """Tell whether this thread is in the middle of a garbage collection, and so in a finalizer."""
    return _collecting == get_ident()
