"""Other people's rate limiters: LangChain's and aiolimiter's."""

from __future__ import annotations

import asyncio

from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.background import BackgroundLoop
from asyncify.permits import FREE_PASS, Pass

__all__ = ["ForeignLimiter"]

_waiting_loop = BackgroundLoop()
"""Where the waiting for an `AsyncLimiter` is done. No call runs on it, so none can wait there for itself."""


class ForeignLimiter:
    """Somebody else's rate limiter, made to serve both paths and every event loop.

    A LangChain `BaseRateLimiter` has both paths itself. An `aiolimiter.AsyncLimiter` belongs to the first event
    loop that uses it, so all its waiting is done on one loop in the background.
    """

    _bounds_calls = False

    def __init__(self, limiter: AsyncLimiter | BaseRateLimiter) -> None:
        if not isinstance(limiter, (AsyncLimiter, BaseRateLimiter)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"limiter={limiter!r} is no limiter; write limiter=Limiter(limit=10), or give an "
                "aiolimiter.AsyncLimiter or a LangChain BaseRateLimiter"
            )
        self._limiter = limiter

    def enter(self) -> Pass:
        """Wait in this thread for the rate."""
        if isinstance(self._limiter, AsyncLimiter):
            acquired = asyncio.run_coroutine_threadsafe(self._limiter.acquire(), _waiting_loop.loop())
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
            acquired = asyncio.run_coroutine_threadsafe(self._limiter.acquire(), _waiting_loop.loop())
            await asyncio.wrap_future(acquired)
        else:
            await self._limiter.aacquire()
        return FREE_PASS

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
