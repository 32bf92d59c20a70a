"""Other people's rate limiters: LangChain's and aiolimiter's."""

from __future__ import annotations

import asyncio
import time
import weakref
from concurrent.futures import Future
from typing import Any

from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.background import BackgroundLoop
from asyncify.permits import FREE_PASS, Pass

__all__ = ["ForeignLimiter"]

_waiting_loop = BackgroundLoop()
"""Where the waiting for an `AsyncLimiter` is done. No call runs on it, so none can wait there for itself."""


def _take(limiter: AsyncLimiter) -> float:
    """Take one call from the bucket of an `AsyncLimiter`, or return after how many seconds there may be room for it.

    Its own `acquire` belongs to the first event loop that it is awaited on, and that may be one whose code uses it
    directly. The bucket leaks by `time.monotonic()`, the clock of asyncio's loops.
    """
    bucket: Any = limiter
    now = time.monotonic()
    level = max(bucket._level - (now - bucket._last_check) * bucket._rate_per_sec, 0.0)
    excess = level + 1 - limiter.max_rate
    if excess <= 0:
        bucket._level, bucket._last_check = level + 1, now
        return 0.0
    return float(excess / bucket._rate_per_sec)


class ForeignLimiter:
    """Somebody else's rate limiter, made to serve both paths and every event loop.

    A LangChain `BaseRateLimiter` has both paths itself. For an `aiolimiter.AsyncLimiter` the calls of a pair wait on a
    loop in the background, first come, first served. Other pairs that have the same one wait beside them, and code may
    go on to use it directly, on a loop of its own.
    """

    _bounds_calls = False

    def __init__(self, limiter: AsyncLimiter | BaseRateLimiter) -> None:
        if not isinstance(limiter, (AsyncLimiter, BaseRateLimiter)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"limiter={limiter!r} is no limiter; write limiter=Limiter(limit=10), or give an "
                "aiolimiter.AsyncLimiter or a LangChain BaseRateLimiter"
            )
        if isinstance(limiter, AsyncLimiter) and limiter.max_rate < 1:
            raise ValueError(
                f"limiter=: AsyncLimiter({limiter.max_rate!r}, {limiter.time_period!r}) can never admit a call, as its "
                "max_rate is below 1; write it for a longer time_period"
            )
        self._limiter = limiter
        # One for each waiting loop: a forked process has another.
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()

    def enter(self) -> Pass:
        """Wait in this thread for the rate."""
        if isinstance(self._limiter, AsyncLimiter):
            acquired = self._acquired(self._limiter)
            try:
                acquired.result()
            except BaseException:
                acquired.cancel()
                raise
        else:
            self._limiter.acquire()
        return FREE_PASS

    async def aenter(self) -> Pass:
        """Wait in this task for the rate."""
        if isinstance(self._limiter, AsyncLimiter):
            await asyncio.wrap_future(self._acquired(self._limiter))
        else:
            await self._limiter.aacquire()
        return FREE_PASS

    def _acquired(self, limiter: AsyncLimiter) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._acquire(limiter), _waiting_loop.loop())

    async def _acquire(self, limiter: AsyncLimiter) -> None:
        """Wait for one call's turn and its room in the bucket, on the waiting loop."""
        async with self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            while (seconds := _take(limiter)) > 0:  # noqa: ASYNC110  (nobody tells of room in a bucket)
                await asyncio.sleep(seconds)

    def __eq__(self, other: object) -> bool:
        """Compare by whose it is: both sides of a pair may bring the same one along."""
        return isinstance(other, ForeignLimiter) and other._limiter is self._limiter

    def __hash__(self) -> int:
        """Hash by whose it is."""
        return id(self._limiter)

    def _state(self) -> str:
        """Say whose it is."""
        return f"limited by {type(self._limiter).__name__}"

    def __repr__(self) -> str:
        """Show whose it is: `<ForeignLimiter limited by AsyncLimiter>`."""
        return f"<ForeignLimiter {self._state()}>"
