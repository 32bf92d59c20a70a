"""`Limiter`: one limit for threads and event loops; its arguments, its interfaces and its statistics."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple, Never, Self

from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.adaptive import Adaptive, AdaptiveLimit
from asyncify.arguments import check_not_negative, check_positive, unnamed
from asyncify.clock import Clock, monotonic_clock
from asyncify.meter import Limits, Meter
from asyncify.permits import Permit, get_innermost
from asyncify.turnstile import RECENT, Turnstile

__all__ = ["Limiter", "LimiterStats", "Memory", "OfOneProcess"]


@dataclass(frozen=True, slots=True)
class LimiterStats:
    """What a limiter has seen; waits are in seconds, over the last 1,000 admissions.

    `rejected` counts the calls that timed out, would have deadlocked, were not admitted at once by
    `acquire(blocking=False)`, or cost more than a `resize` allows; not those that were cancelled.
    """

    in_flight: int
    waiting: int
    admitted: int
    rejected: int
    limit: int | None
    wait_p50: float
    wait_p95: float
    wait_p99: float


class Memory(NamedTuple):
    """What a limiter has learned: a new one goes on with it where the old one is gone."""

    meter: Meter
    adaptive: AdaptiveLimit | None
    was_resized: bool

    def is_void(self, now: float) -> bool:
        """Tell whether a new limiter would do as well without it: no call is inside or counts, and nothing is known."""
        is_as_new = not self.was_resized and (self.adaptive is None or self.adaptive.is_as_new(now))
        return is_as_new and self.meter.is_idle(now)


class OfOneProcess:
    """What limits calls wherever it stands, in one process."""

    def _title(self) -> str:
        """Return what errors call it."""
        raise NotImplementedError

    def __copy__(self) -> Self:
        """Return itself: a copy shares the limit."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled: a limit holds within one process."""
        raise pickle.PicklingError(
            f"{self._title()}: holds in one process, so it can't be pickled; make one where the calls are made"
        )


class Limiter(Turnstile, OfOneProcess, BaseRateLimiter):
    """Hold calls to `limit` at once and to rates over time, for all threads and event loops together.

    As a context manager (`with`, `async with`) it grants a slot and a rate token in one moment. As a LangChain
    `BaseRateLimiter` (`acquire`, `aacquire`) it grants the rate alone. First come, first served. An error that
    passes through it with a `Retry-After` (HTTP 429, 503) pauses it for that long.

    Args:
        limit: calls that may run at once; or an `Adaptive`, which finds the number.
        per_second, per_minute, per_hour: cost that may start in any such window, wherever it begins; a call costs
            1 unless told otherwise. The shortest window also sets the pace: calls start evenly spaced, in the order
            in which they came; the longer ones only cap.
        burst: calls that may start back to back; the windows still hold.
        timeout: seconds that a call may wait before it gets a `LimitTimeout`; for ever by default.
        name: what errors and `repr` call it.
        clock: where it gets the time; for tests.

    Raises:
        TypeError, ValueError: the arguments limit nothing or can't be meant.
    """

    def __init__(
        self,
        *given: Never,
        limit: int | Adaptive | None = None,
        per_second: float | None = None,
        per_minute: float | None = None,
        per_hour: float | None = None,
        burst: int | None = None,
        timeout: float | None = None,
        name: str | None = None,
        clock: Clock = monotonic_clock,
    ) -> None:
        if given:
            raise unnamed("Limiter", given[0])
        adaptive, slots = _adaptive_limit(limit)
        limits = Limits.of(limit=slots, burst=burst, per_second=per_second, per_minute=per_minute, per_hour=per_hour)
        if timeout is not None:
            timeout = check_positive("timeout", timeout, "timeout=30")
        _check_name(name)
        super().__init__(limits, adaptive, timeout=timeout, name=name, clock=clock)
        self._was_resized = False
        self._made_by: object = None  # the mark of the keyed limiter that has made it, if one has
        self._on_resize: Callable[[Limiter], None] | None = None  # tells its maker

    # --- the interfaces ---

    __enter__: ClassVar[Callable[[Turnstile], Permit]] = Turnstile._enter

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Give the slot back."""
        permit = get_innermost()  # inlined, as the cost of one more function call shows in each limited call
        if permit is None or permit.issuer is not self or permit.ended or not permit.thread:
            self._leave_one(error)
        else:
            permit.taken = True
            permit.finish_innermost(error)

    __aenter__: ClassVar[Callable[[Turnstile], Coroutine[Any, Any, Permit]]] = Turnstile._aenter

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Give the slot back."""
        permit = get_innermost()
        if permit is None or permit.issuer is not self or permit.ended or not permit.thread:
            self._leave_one(error)
        else:
            permit.taken = True
            permit.finish_innermost(error)

    def enter(self, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this thread for a slot and the rate, and return the permit; call its `leave()` at the end.

        Another thread or task may leave it, so unlike a `with` block it is no proof of a deadlock.

        Args:
            cost: what the call costs in the rates.
            slots: 1, or 0 to wait for the rate alone.
            timeout: seconds that the call may wait, instead of the limiter's own.
        """
        permit = self._enter(cost, slots, timeout)
        permit.thread = 0
        return permit

    async def aenter(self, cost: float = 1, slots: int = 1, timeout: float | None = None) -> Permit:
        """Wait in this task for a slot and the rate, and return the permit, as `enter` does."""
        permit = await self._aenter(cost, slots, timeout)
        permit.thread = 0
        return permit

    def acquire(self, *, blocking: bool = True) -> bool:
        """Wait in this thread for the rate alone; without `blocking`, say whether it was there at once."""
        if blocking:
            self._enter(slots=0).finish()
            return True
        return self._try()

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """Wait in this task for the rate alone; without `blocking`, say whether it was there at once."""
        if blocking:
            (await self._aenter(slots=0)).finish()
            return True
        return self._try()

    def _try(self) -> bool:
        admitted = self._admit(Permit().ask(self, 1, 0), queue=False)
        if not admitted:
            self._count_rejected()
        return admitted

    def _not_inside(self) -> str:
        return f"{self._title()}: this context is not inside a call that it has admitted"

    def _leave_one(self, error: BaseException | None) -> None:
        """End a call whose permit is not the innermost of this context, or is not in it at all.

        A generator that entered in one task may be closed in another.
        """
        permit = get_innermost()
        while permit is not None and not (permit.issuer is self and permit.may_have_block()):
            permit = permit.outer
        if permit is not None:
            permit.finish_block(error)
        elif self._meter.inside:  # looked at without the lock: a finalizer may be in the thread that holds it
            self._give_back_other(error)
        else:
            raise RuntimeError(self._not_inside())

    def record(self, actual: float) -> None:
        """Correct the estimated cost of a call, from inside it.

        Raises:
            RuntimeError: this context is not inside a call that the limiter has admitted.
            ValueError: the cost is negative or not finite.
        """
        permit = self._entered()
        if permit is None:
            raise RuntimeError(self._not_inside())
        actual = check_not_negative("actual", actual, "record(120)")
        with self._lock:
            if permit.at is not None:
                self._meter.correct(permit.at, actual - permit.cost)
            permit.cost = actual
        self._settle()

    def resize(
        self,
        *,
        limit: int | Adaptive | EllipsisType | None = ...,
        per_second: float | EllipsisType | None = ...,
        per_minute: float | EllipsisType | None = ...,
        per_hour: float | EllipsisType | None = ...,
        burst: int | EllipsisType | None = ...,
    ) -> None:
        """Change the limits, also for calls that already wait; what is not named stays, None removes a limit.

        Raises:
            TypeError, ValueError: nothing would be left to limit, or an argument can't be meant.
        """
        changes = {"per_second": per_second, "per_minute": per_minute, "per_hour": per_hour}
        try:
            with self._lock:
                old = self._meter.limits
                named = {name: amount for name, amount in changes.items() if not isinstance(amount, EllipsisType)}
                adaptive, slots = (
                    (self._adaptive, old.limit) if isinstance(limit, EllipsisType) else _adaptive_limit(limit)
                )
                new_burst = (old.burst if old.burst > 1 else None) if isinstance(burst, EllipsisType) else burst
                limits = Limits.of(limit=slots, burst=new_burst, **(old.amounts | named))
                self._adaptive = adaptive
                self._was_resized = True
                self._configure(limits)
                for permit in [each for each in self._queue if each.queue and each.cost > limits.largest_cost]:
                    permit.told = limits.too_dear(permit.cost, self._title())
                    self._turn_away(permit)
            if self._on_resize is not None:
                self._on_resize(self)
        finally:  # also if refused: a call may have left meanwhile, and relies on the lock's holder to check the queue
            self._settle()

    # --- statistics ---

    @property
    def _bounds_calls(self) -> bool:
        """Whether there is a limit on the calls in flight, and not on their rate alone."""
        return self._meter.limits.limit is not None

    @property
    def _limits(self) -> Limits:
        """The limits as they are now."""
        return self._meter.limits

    def _memory(self) -> Memory:
        """Return what it has learned."""
        return Memory(self._meter, self._adaptive, self._was_resized)

    def _resume(self, memory: Memory) -> None:
        """Go on, when new, in place of a limiter that is gone."""
        self._meter, self._adaptive, self._was_resized = memory

    def stats(self) -> LimiterStats:
        """Return what the limiter has seen so far."""
        self._drop_closed_loops()
        self._settle()
        with self._lock:
            self._take_back(self._now())  # the places of calls that left while another thread held the lock
            waits = [wait for number, wait in self._waits if number > self._admitted - RECENT]
            at_once = min(self._admitted, RECENT) - len(waits)
            counts = (len(self._meter.inside), self._waiting, self._admitted, self._rejected)
        self._settle()
        ordered = [0.0] * at_once + sorted(waits)
        p50, p95, p99 = (_percentile(ordered, share) for share in (0.50, 0.95, 0.99))
        return LimiterStats(*counts, self._meter.limits.limit, wait_p50=p50, wait_p95=p95, wait_p99=p99)

    def _state(self) -> str:
        """Describe the current state: `3/10 in flight, 50 per second, 7 waiting`."""
        self._drop_closed_loops()
        self._settle()
        limits = self._meter.limits
        flight = [] if limits.limit is None else [f"{len(self._meter.inside)}/{limits.limit} in flight"]
        paused = self._paused_for()
        pause = [f"paused for {paused:.4g} s"] if paused > 0 else []
        return ", ".join([*flight, *map(str, limits.rates), f"{self._waiting} waiting", *pause])

    def __repr__(self) -> str:
        """Show the state: `<Limiter quotes 3/10 in flight, 50 per second, 7 waiting>`."""
        name = f"{self.name} " if self.name else ""
        return f"<Limiter {name}{self._state()}>"


def _adaptive_limit(limit: int | Adaptive | None) -> tuple[AdaptiveLimit | None, int | None]:
    """Return the state of an adaptive limit, if it is one, and the number of slots to begin with."""
    if not isinstance(limit, Adaptive):
        return None, limit
    adaptive = AdaptiveLimit(limit)
    return adaptive, adaptive.limit


def _check_name(name: object) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise TypeError(f'name={name!r} is not a name; write name="quotes"')


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[int(len(ordered) * share)] if ordered else 0.0
