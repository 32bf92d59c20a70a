"""Waiting for what other threads, tasks and programs bring about."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

SAFETY_NET = 30  # seconds after which a wait that should have ended is a failure


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that other threads or tasks bring about."""
    async with asyncio.timeout(SAFETY_NET):
        while not holds():  # noqa: ASYNC110  (other threads bring it about, which can't set an asyncio.Event)
            await asyncio.sleep(0.0005)


@asynccontextmanager
async def timeout_once(has_begun: Callable[[], bool], seconds: float) -> AsyncIterator[None]:
    """Time out so long after something has begun: a thread, say, which never does for who has given up before."""

    async def watch() -> None:
        await until(has_begun)
        limit.reschedule(asyncio.get_running_loop().time() + seconds)

    async with asyncio.timeout(None) as limit:
        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()


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
