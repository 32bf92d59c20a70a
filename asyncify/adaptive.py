"""A limit that finds itself: it shrinks when the server is overloaded, and grows while calls succeed.

The algorithm is CUBIC (RFC 9438), with calls in flight in place of the window of segments. Before the first congestion
it is slow start (RFC 5681, section 3.1): one more for every success, which doubles the limit each round. After a
congestion with `w` other calls in flight, the limit is halved. `t` seconds later it is `w * (1 + 0.04 * (t - k)**3)`,
with `k` such that the curve starts at the half: fast back to `w`, flat there, then ever faster.

It differs from the RFC in two ways. The curve is steeper, and scaled with `w`, so that a limit of any size is found
again in the same time; the RFC multiplies by 0.7 and is made for round trips of milliseconds. And if the server has not
changed, a try above `w` costs a call. So the curve stands still at `w` until some time has passed and some calls have
succeeded. If a refusal carries a `Retry-After`, a try also costs that pause of all calls, so it is put off for longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from asyncify.arguments import check_count
from asyncify.congestion import congestion_of
from asyncify.signatures import is_async, takes_one_argument

__all__ = ["Adaptive", "AdaptiveLimit"]

_SHRINK = 0.5
_STEEPNESS = 0.04  # per cubic second: back at the old limit after 2.3 s, at its double 2.9 s after leaving it
_HOLD_SECONDS = 4.0  # since the congestion: with 2.9 s to double, and some rounds, it recovers within 10 s
_HOLD_PER_PAUSE = 2.0  # added for each second that the congestion paused all calls
_HOLD_SUCCESSES = 100  # since the congestion: so a failed try costs 1% of the calls, however few there are
_FORGET_SECONDS = 60.0  # since the limit last changed: then a key that nobody uses is forgotten


def _is_congestion(error: BaseException) -> bool:
    return congestion_of(error) is not None


@dataclass(frozen=True, slots=True)
class Adaptive:
    """A limit on the calls in flight that adapts to what the server can take.

    Args:
        min: the lowest limit.
        max: the highest limit.
        start: the limit to begin with; by default `min`.
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
        for name in ("min", "max", "start") if self.start is not None else ("min", "max"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), example))
        start = self.min if self.start is None else self.start
        if not self.min <= start <= self.max:
            given = f"Adaptive(min={self.min}, max={self.max}, start={start})"
            raise ValueError(f"{given}: the numbers must be in order, min <= start <= max, as in {example}")
        on: object = self.on
        # An async function or a class returns something that is always true.
        if not callable(on) or isinstance(on, type) or is_async(on) or not takes_one_argument(on):
            example = "on=lambda error: isinstance(error, TimeoutError)"
            raise TypeError(f"on={on!r}: must be a def of the error, as in {example}")


class AdaptiveLimit:
    """The state of one adaptive limit. Time, in seconds, is an argument."""

    __slots__ = ("_ceiling", "_changed_at", "_epoch", "_hold", "_shrunk_at", "_streak", "_successes", "config", "limit")

    def __init__(self, config: Adaptive) -> None:
        self.config: Adaptive = config
        self.limit: int = config.min if config.start is None else config.start
        self._ceiling: int | None = None  # how many calls the server could take at the last congestion
        self._shrunk_at = -math.inf
        self._changed_at = -math.inf
        self._hold = _HOLD_SECONDS  # from the shrinking to the next try above the ceiling
        self._epoch = -math.inf  # where the curve begins: at the shrinking, moved on while held at the ceiling
        self._streak = 0  # successes in a row, since the limit last changed
        self._successes = 0  # since the limit last shrank

    def succeeded(self, now: float, in_flight: int) -> bool:
        """Note a success, with `in_flight` calls in flight, itself included; tell whether the limit has changed.

        The limit grows by one after a run of successes. The farther it is below its target, the shorter the run (RFC
        9438, section 4.4). Successes count only while the limit is in use, as an idle limit proves nothing about a
        higher one (section 5.8).
        """
        if 2 * in_flight < self.limit:
            return False
        self._streak += 1
        self._successes += 1
        gap = self._target(now) - self.limit
        if gap <= 0 or self._streak * gap < self.limit:
            return False
        return self._set(self.limit + 1, now)

    def failed(self, now: float, admitted_at: float, in_flight: int, pause: float = 0.0) -> bool:
        """Note a congestion, with `in_flight` calls in flight, itself included; tell whether the limit has changed.

        `pause` is the number of seconds for which the congestion pauses all calls. Calls that were admitted before the
        last shrinking belong to the same burst, and do not shrink the limit further.
        """
        self._streak = 0
        if admitted_at <= self._shrunk_at:
            return False
        self._shrunk_at = self._epoch = now
        self._successes = 0
        self._hold = _HOLD_SECONDS + _HOLD_PER_PAUSE * pause
        too_many = min(in_flight, self.limit)
        self._ceiling = max(too_many - 1, 1)
        return self._set(int(too_many * _SHRINK), now)

    def is_as_new(self, now: float) -> bool:
        """Tell whether a new one would do as well, as what this one has learned is old."""
        return now - max(self._shrunk_at, self._changed_at) >= _FORGET_SECONDS

    def _target(self, now: float) -> float:
        """Return the curve's value; it is held at the ceiling until a try above it is due."""
        if self._ceiling is None:
            return math.inf
        climb = math.cbrt((1 - _SHRINK) / _STEEPNESS)
        is_due = now - self._shrunk_at >= self._hold and self._successes >= _HOLD_SUCCESSES
        if not is_due and now - self._epoch > climb:
            self._epoch = now - climb
        return self._ceiling * (1 + _STEEPNESS * (now - self._epoch - climb) ** 3)

    def _set(self, limit: int, now: float) -> bool:
        self._streak = 0
        before, self.limit = self.limit, min(max(limit, self.config.min), self.config.max)
        if self.limit == before:
            return False
        self._changed_at = now
        return True
