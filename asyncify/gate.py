"""Gates: what stands in front of one pair, and how the pair's calls use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import BoundArguments, Parameter, Signature
from typing import Any

from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import BaseRateLimiter

from asyncify.arguments import check_not_negative, check_positive
from asyncify.foreign import ForeignLimiter
from asyncify.keyed import KeyedLimiter
from asyncify.limiter import Limiter
from asyncify.permits import Pass
from asyncify.signatures import INJECTED, describe, is_async, signature_of, sole_input, takes_one_argument

__all__ = ["Gate", "make_gate"]

Function = Callable[..., Any]


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
    _bound(signature, args, kwargs)  # raises if an argument is missing
    return None


def _all_arguments(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    bound = _bound(signature, args, kwargs)
    bound.apply_defaults()
    return bound.arguments


def _bound(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
    """Bind a call's arguments, without a config or a run manager that only the other side takes."""
    given = {name: value for name, value in kwargs.items() if name not in INJECTED or name in signature.parameters}
    return signature.bind(*args, **given)


def _with_optional_injected(signature: Signature) -> Signature:
    """Return the signature with the parameters that LangChain injects made optional."""
    return Signature(
        [
            parameter.replace(default=None)
            if parameter.name in INJECTED and parameter.default is Parameter.empty
            else parameter
            for parameter in signature.parameters.values()
        ],
        __validate_parameters__=False,  # the parameters behind may have no default
    )


@dataclass(frozen=True, slots=True)
class Gate:
    """How the calls of one pair use a limiter.

    Args:
        limiter: the limiter, or one for each key.
        cost: what a call costs, or a function of its input that returns it.
        timeout: seconds that a call may wait; by default the limiter's own.
    """

    limiter: Limiter | KeyedLimiter | ForeignLimiter
    cost: float | Callable[[Any], float] = 1
    timeout: float | None = None
    _is_nameless: bool = False
    _title: str = ""
    _input: Callable[[tuple[Any, ...], dict[str, Any]], Any] = _first_argument

    def rename(self, name: str | None) -> None:
        """Name the limiter after the pair that it is put on, unless it has a name of its own or is shared."""
        if self._is_nameless and not isinstance(self.limiter, ForeignLimiter):
            self.limiter.name = name

    def before(self, fn: Function) -> Gate:
        """Return this gate for the calls of `fn`, whose arguments make the input of `cost` and `key`.

        For a function that has or needs one argument, the input is that argument; for any other, a mapping of all
        arguments by name. For a method it is always the mapping, with the instance or class in it.
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
        return limiter._enter(cost, 1, self.timeout)

    async def aenter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Wait in this task until the call may start."""
        limiter = self.limiter
        if isinstance(limiter, ForeignLimiter):
            return await limiter.aenter()
        cost = self._cost_of(limiter, args, kwargs)
        if isinstance(limiter, KeyedLimiter):
            return await limiter.aenter(self._key_of(limiter, args, kwargs), cost, self.timeout)
        return await limiter._aenter(cost, 1, self.timeout)

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
        cost = check_not_negative(f"{self._title}: cost", self._ask("cost", self.cost, args, kwargs), "cost=20")
        if isinstance(limiter, Limiter):  # a key's own checks it itself, as it may have been resized
            limiter._limits.check_affordable(cost, self._title)
        return cost

    def _ask(self, what: str, function: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the user's function gives for the input of a call; a note on its error names its origin."""
        try:
            return function(self._input(args, kwargs))
        except Exception as error:
            error.add_note(f"in {what}= of {self._title}")
            raise


def make_gate(
    limiter: Limiter | KeyedLimiter | AsyncLimiter | BaseRateLimiter | None,
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
        made = limiter if isinstance(limiter, (Limiter, KeyedLimiter)) else ForeignLimiter(limiter)
    else:
        made = Limiter(**limits) if key is None else KeyedLimiter(key, **limits)
    if cost is not None and not callable(cost):
        cost = check_not_negative("cost", cost, "cost=20")
    if cost is not None or timeout is not None:
        _check_usable(made, cost)
    is_nameless = limiter is None and limits.get("name") is None
    return Gate(made, 1 if cost is None else cost, timeout, is_nameless)


def _check_takes_input(name: str, function: Function) -> None:
    if is_async(function):
        raise TypeError(f"{name}={describe(function)}: is async; it is asked before a call waits, so write a def")
    if not takes_one_argument(function):
        raise TypeError(
            f"{name}={describe(function)}: is called with one argument, the input, and takes {signature_of(function)}; "
            f'the input of a function of several parameters is a mapping, as in {name}=lambda call: call["size"]'
        )


def _check_usable(
    limiter: Limiter | KeyedLimiter | ForeignLimiter, cost: float | Callable[[Any], float] | None
) -> None:
    if isinstance(limiter, ForeignLimiter):
        raise TypeError("cost= and timeout= need a limiter of asyncify's; a foreign one knows neither")
    if cost is None:
        return
    if not limiter._limits.rates:
        raise ValueError("cost= needs a rate, as in per_minute=90_000, cost=count_tokens")
    if not callable(cost):
        limiter._limits.check_affordable(cost, f"cost={cost!r}")
