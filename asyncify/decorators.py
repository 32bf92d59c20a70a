"""`dual` and `concurrency`: check, assemble, register. No machinery."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import Any, overload

from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.adaptive import Adaptive
from asyncify.entries import Bridge
from asyncify.errors import PairError
from asyncify.gate import Gate, make_gate
from asyncify.limiter import Limiter
from asyncify.pairs import registry
from asyncify.runnable import Dual
from asyncify.signatures import check_pair, check_side, describe, is_async

__all__ = ["concurrency", "dual"]

Function = Callable[..., Any]


def dual(
    fn: Function | None = None,
    /,
    *,
    sync: Function | None = None,
    async_: Function | None = None,
    name: str | None = None,
    bridge: Bridge = "thread",
) -> Any:
    """Keep the sync and the async implementation of one function together, as one runnable.

    Five forms::

        @dual(async_=fetch_async)                           # on the sync function
        @dual(sync=fetch_sync)                              # on the async function
        fetch = dual(sync=fetch_sync, async_=fetch_async)   # from two functions that exist
        @dual(sync=fetch_sync, async_=fetch_async)          # the same, over a stub that names and documents it
        @dual                                               # one side now, and @fetch.async_ when it is written

    The third and the fourth are told apart by the first call of the pair. One plain function with the pair's own
    parameters and an empty body is a stub being decorated; with a body it is a `PairError`, for which of the three
    should run? Anything else is an ordinary call.

    Args:
        fn: the function to decorate.
        sync: the sync side.
        async_: the async side.
        name: what the registry calls the pair, after its module; by default the function's qualified name.
        bridge: how a missing side is made: "thread" (async from sync on threads of its own, sync from async on a
            background event loop), "error" (not at all), or an `Executor` for the async side of a sync function.

    Returns:
        A `Dual`; or, with one of `sync` and `async_` alone, a decorator for the other.

    Raises:
        PairError: the sides do not make a pair.
        NameTakenError: a different function is registered under the name.
    """
    _check_bridge(bridge)
    if fn is None and sync is None and async_ is None and name is None and bridge == "thread":
        raise PairError(
            "dual() was given no function; write @dual on one, @dual(async_=...) on the sync one, or "
            "dual(sync=..., async_=...)"
        )
    if fn is not None and (sync is not None or async_ is not None):
        raise PairError("dual: give a function to decorate, or sync= and async_=, but not both")
    if sync is not None:
        check_side(_function(sync), "sync", "dual(sync=...)")
    if async_ is not None:
        check_side(_function(async_), "async", "dual(async_=...)")
    if sync is not None and async_ is not None:
        pair = _make_pair(sync, sync, async_, name=name, bridge=bridge)
        pair.expect_stub(_decorate_stub)
        return pair

    def decorate(fn: Function) -> Dual[Any, Any]:
        if sync is not None:
            return _make_pair(fn, sync, fn, name=name, bridge=bridge)
        if async_ is not None:
            return _make_pair(fn, fn, async_, name=name, bridge=bridge)
        return _make_pair(fn, *_side_of(fn), name=name, bridge=bridge)

    return decorate if fn is None else decorate(fn)


def concurrency(
    *,
    limit: int | Adaptive | None = None,
    per_second: float | None = None,
    per_minute: float | None = None,
    per_hour: float | None = None,
    burst: int | None = None,
    key: Callable[[Any], Hashable] | None = None,
    cost: float | Callable[[Any], float] | None = None,
    timeout: float | None = None,
    limiter: Limiter | AsyncLimiter | BaseRateLimiter | None = None,
    name: str | None = None,
) -> Callable[[Function], Dual[Any, Any]]:
    """Put one limit on a function or a pair, for every path, thread, event loop, pipe and batch together.

    A plain function becomes a pair. The order with `dual` is free. What `key` and `cost` are called with is the
    argument of a function that needs one, and else a mapping of all its arguments by name.

    Args:
        limit: calls that may run at once; or an `Adaptive`, which finds the number.
        per_second, per_minute, per_hour: cost that may start in any such window; the shortest also sets the pace.
        burst: calls that may start back to back; the windows still hold.
        key: a function of the input; each key has the limits for itself.
        cost: what a call costs, 1 unless given, or a function of the input that tells.
        timeout: seconds that a call may wait before it gets a `LimitTimeout`.
        limiter: a `Limiter` to share with other pairs, an `aiolimiter.AsyncLimiter` or a LangChain
            `BaseRateLimiter`, instead of limits of its own.
        name: what errors and `repr` call the limiter.

    Returns:
        A decorator; the pair that it returns is the one that it was given, if it was given one.

    Raises:
        TypeError, ValueError: the arguments limit nothing, contradict each other, or can't be meant.
        PairError: what is decorated is no function, or has a limit already.
    """
    try:
        gate = make_gate(
            limiter,
            key=key,
            cost=cost,
            timeout=timeout,
            name=name,
            limit=limit,
            per_second=per_second,
            per_minute=per_minute,
            per_hour=per_hour,
            burst=burst,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"@concurrency: {error}") from None

    def decorate(fn: Function) -> Dual[Any, Any]:
        if isinstance(fn, Dual):
            if fn.gate is not None:
                raise PairError(
                    f"@concurrency: {describe(fn)} has a limit already ({fn.gate.limiter!r}); give both in one place, "
                    "as in @concurrency(limit=10, per_second=50)"
                )
            fn.furnish(gate=gate)
            return fn
        return _make_pair(fn, *_side_of(fn), gate=gate)

    return decorate


def _make_pair(
    decorated: Function,
    sync: Function | None,
    async_: Function | None,
    *,
    name: str | None = None,
    bridge: Bridge = "thread",
    gate: Gate | None = None,
) -> Dual[Any, Any]:
    """Check everything, then make the pair and register it.

    A side may be a pair of one side, which is what `@concurrency` makes of a plain function; its limit becomes that
    of the new pair.
    """
    gates = [side.gate for side in (sync, async_) if isinstance(side, Dual) and side.gate is not None]
    if len(gates) > 1:
        raise PairError(f"dual: both sides of {describe(decorated)} have a limit; put one @concurrency over the pair")
    fn, sync, async_ = _function(decorated), _function(sync), _function(async_)
    if sync is not None:
        check_side(sync, "sync", "dual")
    if async_ is not None:
        check_side(async_, "async", "dual")
    if sync is not None and async_ is not None:
        check_pair(sync, async_, "dual")
    if isinstance(bridge, Executor) and sync is None:
        raise PairError(f"dual: {describe(fn)} is async, and an executor can only run a sync side; drop bridge=")
    pair: Dual[Any, Any] = Dual(async_ or fn, name=name) if sync is None else Dual(sync, async_, name)
    pair.furnish(wears=fn, gate=gate or next(iter(gates), None), bridge=bridge)
    registry.add(pair, fn, name)
    pair.pickle_by_reference()
    return pair


@overload
def _function(side: Function) -> Function: ...
@overload
def _function(side: None) -> None: ...
@overload
def _function(side: Function | None) -> Function | None: ...
def _function(side: Function | None) -> Function | None:
    """Return the function of a side that may be a pair of one side."""
    if not isinstance(side, Dual):
        return side
    if hasattr(side, "func") and hasattr(side, "afunc"):
        raise PairError(f"dual: {describe(side)} is a pair with both sides already")
    return side.func if hasattr(side, "func") else side.afunc


def _side_of(fn: Function) -> tuple[Function | None, Function | None]:
    """Return a function as the sync or the async side, whichever it is."""
    plain = _function(fn)
    return (None, fn) if callable(plain) and is_async(plain) else (fn, None)


def _decorate_stub(pair: Dual[Any, Any], stub: Function) -> None:
    registry.rename(pair, stub)
    pair.furnish(wears=stub)


def _check_bridge(bridge: Bridge) -> None:
    if not isinstance(bridge, Executor) and bridge not in ("thread", "error"):
        raise PairError(f'dual: bridge={bridge!r} is none; write "thread", "error", or a concurrent.futures.Executor')
