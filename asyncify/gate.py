"""Gates: what stands in front of one pair, and how the pair's calls use it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import BoundArguments, Parameter, Signature
from typing import Any, Protocol

from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.arguments import check_cost, check_positive
from asyncify.background import BackgroundLoop
from asyncify.forks import at_fork
from asyncify.limiter import Limiter
from asyncify.meter import Limits
from asyncify.permits import Permit, permits
from asyncify.signatures import INJECTED, describe, is_async, signature_of, sole_input
from asyncify.turnstile import check_affordable

__all__ = ["FREE_PASS", "ForeignLimiter", "Gate", "KeyedLimiter", "Pass", "make_gate"]

Function = Callable[..., Any]


class KeyedLimiter:
    """A limiter for each key: made on first use, forgotten when it is idle.

    `keyed["tenant"]` is the limiter of one key, `len(keyed)` how many are remembered.
    """

    def __init__(self, key: Callable[[Any], Hashable], name: str | None = None, **limits: Any) -> None:
        self.limits: Limits = Limiter(**limits, name=name).limits  # bad arguments are told now, not at the first call
        self.key = key
        self.name = name
        self._arguments = limits
        self._mark = object()  # by which it knows its own, without a cycle
        self.after_fork()
        _keyed.add(self)
        # Whoever is inside or waits keeps a limiter alive; `_recent` keeps those whose admissions still count.
        self._alive: weakref.WeakValueDictionary[Hashable, Limiter] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Hashable, Limiter] = OrderedDict()

    bounds_calls = False
    """There is a limit on the calls of a key, but none on their sum over all keys."""

    def after_fork(self) -> None:
        """Make a lock that no thread of the parent holds."""
        self._lock = threading.RLock()  # a finalizer may come here in the middle of what is done under it

    def enter(self, key: Hashable, cost: float, timeout: float | None) -> Permit:
        """Wait in this thread at the limiter of a key."""
        limiter = self[key]
        permit = limiter.enter(cost, 1, timeout)
        self._remember(key, limiter)
        return permit

    async def aenter(self, key: Hashable, cost: float, timeout: float | None) -> Permit:
        """Wait in this task at the limiter of a key."""
        limiter = self[key]
        permit = await limiter.aenter(cost, 1, timeout)
        self._remember(key, limiter)
        return permit

    def _remember(self, key: Hashable, limiter: Limiter) -> None:
        """Keep a limiter that was forgotten as idle between being looked up and admitting."""
        with self._lock:
            self._recent.setdefault(key, limiter)

    def __getitem__(self, key: Hashable) -> Limiter:
        """Return the limiter of a key; make it if there is none."""
        with self._lock:
            limiter = self._alive.get(key)
            if limiter is None:
                limiter = self._alive[key] = Limiter(name=f"{self.name or 'key'}[{key!r}]", **self._arguments)
                limiter.made_by = self._mark
            self._recent[key] = limiter
            self._recent.move_to_end(key)
            self._forget_idle()
        return limiter

    def _forget_idle(self) -> None:
        """Look at the two that were used longest ago: so a call pays little, and idle ones do not pile up."""
        for _ in range(2):
            key, limiter = next(iter(self._recent.items()))
            is_idle = len(self._recent) > 1 and limiter.is_idle()
            with suppress(KeyError):  # a finalizer has had it forgotten meanwhile
                if is_idle:
                    del self._recent[key]
                else:
                    self._recent.move_to_end(key)  # or a busy one would keep all others from being looked at

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._alive)

    def record(self, actual: float) -> None:
        """Correct, from inside a call, what it was estimated to cost."""
        for permit in permits():
            limiter = permit.issuer
            if isinstance(limiter, Limiter) and limiter.made_by is self._mark:
                limiter.record(actual)
                return
        raise RuntimeError(f"{self.name or 'keyed limiter'}: this context is not inside a call that it has admitted")

    def state(self) -> str:
        """Say how many keys are remembered."""
        return f"{len(self)} keys"

    def __repr__(self) -> str:
        """Show how many keys are remembered: `<KeyedLimiter quotes 12 keys>`."""
        name = f"{self.name} " if self.name else ""
        return f"<KeyedLimiter {name}{self.state()}>"


_keyed: weakref.WeakSet[KeyedLimiter] = weakref.WeakSet()


def _after_fork() -> None:
    for limiter in list(_keyed):
        limiter.after_fork()


at_fork(after_in_child=_after_fork)


class _FreePass:
    """What a foreign limiter grants, or none at all: there are no slots, so there is nothing to give back."""

    __slots__ = ()

    def leave(self, error: BaseException | None = None) -> None:
        """Do nothing."""

    def end(self, error: BaseException | None = None) -> None:
        """Do nothing."""

    def step_out(self) -> None:
        """Do nothing."""

    def move_to_this_thread(self) -> None:
        """Do nothing."""


FREE_PASS = _FreePass()

_waiting_loop = BackgroundLoop()
"""Where the waiting for an `AsyncLimiter` is done. No call runs on it, so none can wait there for itself."""


class ForeignLimiter:
    """Somebody else's rate limiter, made to serve both paths and every event loop.

    A LangChain `BaseRateLimiter` has both paths itself. An `aiolimiter.AsyncLimiter` belongs to the first event
    loop that uses it, so all its waiting is done on one loop in the background.
    """

    bounds_calls = False

    def __init__(self, limiter: AsyncLimiter | BaseRateLimiter) -> None:
        if not isinstance(limiter, (AsyncLimiter, BaseRateLimiter)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"limiter={limiter!r} is no limiter; write limiter=Limiter(limit=10), or give an "
                "aiolimiter.AsyncLimiter or a LangChain BaseRateLimiter"
            )
        self._limiter = limiter

    def enter(self) -> _FreePass:
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

    async def aenter(self) -> _FreePass:
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

    def state(self) -> str:
        """Say whose it is."""
        return f"limited by {type(self._limiter).__name__}"

    def __repr__(self) -> str:
        """Show whose it is: `<ForeignLimiter limited by AsyncLimiter>`."""
        return f"<ForeignLimiter {self.state()}>"


class Pass(Protocol):
    """What a gate grants a call."""

    def leave(self, error: BaseException | None = None) -> None:
        """End the call, in the context that entered; `error` is what it raised."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """End the call, from any thread and any context."""
        ...

    def step_out(self) -> None:
        """Leave this context: the call goes on elsewhere, or is a generator at its yield."""
        ...

    def move_to_this_thread(self) -> None:
        """Note that the call now runs in this thread and in this context."""
        ...


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _one_argument(only: Parameter, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if only.kind is Parameter.VAR_KEYWORD:
        return dict(kwargs)
    if args and only.kind is not Parameter.KEYWORD_ONLY:
        return args[0]
    if only.name in kwargs:
        return kwargs[only.name]
    if only.default is not Parameter.empty:
        return only.default
    _bound(signature, args, kwargs)  # it says what is missing
    return None


def _all_arguments(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    bound = _bound(signature, args, kwargs)
    bound.apply_defaults()
    return bound.arguments


def _bound(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
    """Bind the arguments of either side, of which the other may be the one that takes a config or a run manager."""
    given = {name: value for name, value in kwargs.items() if name not in INJECTED or name in signature.parameters}
    return signature.bind(*args, **given)


def _with_optional_injected(signature: Signature) -> Signature:
    """Return the signature under which a call may go without what LangChain gives to the side that asks for it."""
    return Signature(
        [
            parameter.replace(default=None)
            if parameter.name in INJECTED and parameter.default is Parameter.empty
            else parameter
            for parameter in signature.parameters.values()
        ],
        __validate_parameters__=False,  # those behind it may have no default
    )


@dataclass(frozen=True, slots=True)
class Gate:
    """How the calls of one pair use a limiter.

    Args:
        limiter: the limiter, or one for each key.
        cost: what a call costs, or a function of its input that tells.
        timeout: seconds that a call may wait; by default what the limiter says.
    """

    limiter: Limiter | KeyedLimiter | ForeignLimiter
    cost: float | Callable[[Any], float] = 1
    timeout: float | None = None
    _title: str = ""
    _input: Callable[[tuple[Any, ...], dict[str, Any]], Any] = _first_argument

    def before(self, fn: Function) -> Gate:
        """Return this gate for the calls of `fn`, whose arguments make the input of `cost` and `key`.

        The input is the argument of a function that has one, or needs one, and else a mapping of all arguments by
        name; of a method always that, with its instance or class in it.
        """
        signature = signature_of(fn)
        if signature is None:
            return dataclasses.replace(self, _title=describe(fn))
        signature = _with_optional_injected(signature)
        only = sole_input(fn)
        make_input = partial(_all_arguments, signature) if only is None else partial(_one_argument, only, signature)
        return dataclasses.replace(self, _title=describe(fn), _input=make_input)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Wait in this thread until the call may start."""
        limiter = self.limiter
        if isinstance(limiter, ForeignLimiter):
            return limiter.enter()
        cost = self._cost_of(limiter, args, kwargs)
        if isinstance(limiter, KeyedLimiter):
            return limiter.enter(self._key_of(limiter, args, kwargs), cost, self.timeout)
        return limiter.enter(cost, 1, self.timeout)

    async def aenter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Wait in this task until the call may start."""
        limiter = self.limiter
        if isinstance(limiter, ForeignLimiter):
            return await limiter.aenter()
        cost = self._cost_of(limiter, args, kwargs)
        if isinstance(limiter, KeyedLimiter):
            return await limiter.aenter(self._key_of(limiter, args, kwargs), cost, self.timeout)
        return await limiter.aenter(cost, 1, self.timeout)

    def _key_of(self, limiter: KeyedLimiter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        key: Hashable = self._ask("key", limiter.key, args, kwargs)
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(
                f"key= of {self._title} gave {key!r}, which has no hash; let it give a string, say"
            ) from error
        return key

    def _cost_of(self, limiter: Limiter | KeyedLimiter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        if not callable(self.cost):
            return self.cost
        cost = check_cost(f"{self._title}: cost", self._ask("cost", self.cost, args, kwargs))
        check_affordable(cost, limiter.limits, self._title)
        return cost

    def _ask(self, what: str, function: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function of the user's gives for the input of a call; an error of its own says whose it is."""
        try:
            return function(self._input(args, kwargs))
        except Exception as error:
            error.add_note(f"in {what}= of {self._title}")
            raise


def make_gate(
    limiter: Limiter | AsyncLimiter | BaseRateLimiter | None,
    *,
    key: Callable[[Any], Hashable] | None,
    cost: float | Callable[[Any], float] | None,
    timeout: float | None,
    **limits: Any,
) -> Gate:
    """Make the gate that the arguments of `concurrency` describe; `limits` are those of a `Limiter`.

    Raises:
        TypeError, ValueError: they limit nothing, contradict each other, or can't be meant.
    """
    if key is not None and not callable(key):
        raise TypeError(f"key={key!r}: must be a function of the input, as in key=lambda query: query.tenant")
    for name, function in (("key", key), ("cost", cost)):
        if callable(function):
            _check_takes_input(name, function)
    if timeout is not None:
        timeout = check_positive("timeout", timeout, "timeout=30")
    made: Limiter | KeyedLimiter | ForeignLimiter
    if limiter is not None:
        if given := [name for name, value in limits.items() if value is not None]:
            raise TypeError(
                f"limiter= brings its own limits, so {', '.join(given)} can't be given beside it; give them to the "
                "Limiter"
            )
        if key is not None:
            raise TypeError(
                "limiter= is one for all calls, so key can't be given beside it; give the limits themselves, as in "
                "limit=10, key=..., for a limiter of each key"
            )
        made = limiter if isinstance(limiter, Limiter) else ForeignLimiter(limiter)
    else:
        made = Limiter(**limits) if key is None else KeyedLimiter(key, **limits)
    if cost is not None and not callable(cost):
        cost = check_cost("cost", cost)
    if cost is not None or timeout is not None:
        _check_usable(made, cost)
    return Gate(made, 1 if cost is None else cost, timeout)


def _check_takes_input(name: str, function: Function) -> None:
    if is_async(function):
        raise TypeError(f"{name}={describe(function)}: is async; it is asked before a call waits, so write a def")
    signature = signature_of(function)
    if signature is None:
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"{name}={describe(function)}: is called with one argument, the input, and takes {signature}; the input of "
            f'a function of several parameters is a mapping, as in {name}=lambda call: call["size"]'
        ) from error


def _check_usable(
    limiter: Limiter | KeyedLimiter | ForeignLimiter, cost: float | Callable[[Any], float] | None
) -> None:
    if isinstance(limiter, ForeignLimiter):
        raise TypeError("cost= and timeout= need a limiter of asyncify's; a foreign one knows neither")
    if cost is None:
        return
    if not limiter.limits.rates:
        raise ValueError("cost= needs a rate, as in per_minute=90_000, cost=count_tokens")
    if not callable(cost):
        check_affordable(cost, limiter.limits, f"cost={cost!r}")
