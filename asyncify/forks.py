"""What a forked child has to make anew; where no process forks, as on Windows, there is nothing to do."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["at_fork"]


def at_fork(**callbacks: Callable[[], object]) -> None:
    """Do what `os.register_at_fork` does, where there is one: `before`, `after_in_parent`, `after_in_child`."""
    register: Callable[..., None] | None = getattr(os, "register_at_fork", None)
    if register is not None:
        register(**callbacks)
