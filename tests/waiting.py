"""Waiting for what other threads, tasks and programs bring about."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable

SAFETY_NET = 30  # seconds after which a wait that should have ended is a failure


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that other threads or tasks bring about."""
    async with asyncio.timeout(SAFETY_NET):
        while not holds():  # noqa: ASYNC110  (other threads bring it about, which can't set an asyncio.Event)
            await asyncio.sleep(0.0005)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that other threads bring about."""
    deadline = time.monotonic() + SAFETY_NET
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def run_program(source: str, *arguments: str, warnings: str = "ignore::DeprecationWarning") -> str:
    """Run a program in an interpreter of its own and return what it prints; by default it may fork beside threads."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", source, *arguments],
        capture_output=True,
        text=True,
        timeout=SAFETY_NET,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
