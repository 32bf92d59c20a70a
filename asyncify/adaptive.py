"""A limit that finds itself: it shrinks when the server has had too much and grows while all is well.

The algorithm is CUBIC (RFC 9438), made for slots instead of a window of segments: after a congestion at `w` calls
in flight the limit is halved and then follows `w * (1 + 0.02 * (t - k)**3)`, `t` seconds later, with `k` such that
the curve starts at the half. It is back near `w` fast, stays there, and only then tries more. Before the first
congestion, and as the most that any round may add, stands the doubling of slow start (RFC 5681).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from asyncify.congestion import congestion_of
from asyncify.meter import check_count

__all__ = ["Adaptive", "AdaptiveLimit"]

_SHRINK = 0.5
_STEEPNESS = 0.02  # per cubic second: back at the old limit after 2.9 s, at twice the old limit after 6.6 s


def _is_congestion(error: BaseException) -> bool:
    return congestion_of(error) is not None


@dataclass(frozen=True, slots=True)
class Adaptive:
    """A limit on the calls in flight that adapts to what the server can take.

    Args:
        min: the least that the limit shrinks to.
        max: the most that it grows to.
        start: where it begins; by default at `min`.
        on: tells whether an error is a sign of congestion; by default HTTP 429 and 503, and timeouts, are.

    Raises:
        TypeError, ValueError: a number is not a whole one of at least 1, or they are not in order.
    """

    min: int = 1
    max: int = 100
    start: int | None = None
    on: Callable[[BaseException], bool] = _is_congestion

    def __post_init__(self) -> None:
        """Check the numbers."""
        example = "Adaptive(min=1, max=100)"
        start = self.min if self.start is None else self.start
        for name, count in (("min", self.min), ("max", self.max), ("start", start)):
            check_count(name, count, example)
        if not self.min <= start <= self.max:
            raise ValueError(f"{self}: the numbers must be in order, min <= start <= max, as in {example}")
        if not callable(self.on):
            raise TypeError(f"on={self.on!r}: must be a function of the error, as in on=lambda error: ...")


class AdaptiveLimit:
    """The state of one adaptive limit. Time, in seconds, is an argument."""

    __slots__ = ("_ceiling", "_exact", "_shrunk_at", "_successes", "config", "limit")

    def __init__(self, config: Adaptive) -> None:
        self.config = config
        self.limit = config.min if config.start is None else config.start
        self._exact = float(self.limit)
        self._ceiling: float | None = None  # what was in flight when it last hurt
        self._shrunk_at = float("-inf")
        self._successes = 0  # since the limit last changed

    def succeeded(self, now: float, in_flight: int) -> bool:
        """Note a success; tell whether the limit has changed.

        It grows after as many successes in a row as it has slots, and only if they were in use: an idle limit
        proves nothing about a higher one (RFC 9438, section 5.8).
        """
        self._successes += 1
        if self._successes < self.limit or 2 * in_flight < self.limit:
            return False
        self._successes = 0
        return self._set(max(self._exact, min(2 * self._exact, self._curve(now))))

    def failed(self, now: float, admitted_at: float, in_flight: int) -> bool:
        """Note a congestion; tell whether the limit has changed.

        Calls that were admitted before the last shrinking belong to the same burst, and shrink it no further.
        """
        self._successes = 0
        if admitted_at < self._shrunk_at:
            return False
        self._shrunk_at = now
        self._ceiling = float(min(in_flight, self.limit))
        return self._set(self._ceiling * _SHRINK)

    def _curve(self, now: float) -> float:
        if self._ceiling is None:
            return float("inf")
        k = math.cbrt((1 - _SHRINK) / _STEEPNESS)
        return self._ceiling * (1 + _STEEPNESS * (now - self._shrunk_at - k) ** 3)

    def _set(self, exact: float) -> bool:
        self._exact = min(max(exact, self.config.min), self.config.max)
        before, self.limit = self.limit, int(self._exact)
        return self.limit != before
