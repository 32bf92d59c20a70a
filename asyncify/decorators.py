"""`dual` and `concurrency`: check, assemble, register. No machinery."""

from __future__ import annotations

import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Hashable,
    Iterator,
)
from concurrent.futures import Executor
from functools import partial
from types import CodeType, FrameType, MethodType
from typing import TYPE_CHECKING, Any, Never, ParamSpec, Protocol, TypeVar, overload

from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import Runnable

from asyncify.adaptive import Adaptive
from asyncify.arguments import unnamed
from asyncify.classmethods import watch_class_body
from asyncify.entries import Bridge
from asyncify.errors import PairError
from asyncify.gate import Gate, make_gate
from asyncify.limiter import Limiter
from asyncify.pairs import registry
from asyncify.runnable import (
    AnyDual,
    Binding,
    Dual,
    Nothing,
    Returning,
    function_of,
    gate_of,
    is_pair,
    side_beside,
    unwrapped,
)
from asyncify.signatures import check_pair, check_side, describe, is_async

__all__ = ["concurrency", "dual"]

Function = Callable[..., Any]
P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

_LIMITED_MODEL = (
    "; decorate the functions in it, or limit a model or a pipe as a whole: "
    'concurrency(limit=10)(dual(sync=model.stream, async_=model.astream, name="llm"))'
)
"""What to write where a runnable is given for a function."""

# The overloads overlap on purpose: a coroutine function is a function too, and the first one that fits is meant.

if TYPE_CHECKING:
    # Two functions in one call have to agree, where a checker would rather join their results to a union. Pyright joins
    # none under an invariant variable; mypy solves a bare callable first, and holds one in a union to what was solved.

    class _Awaited(Protocol[T]):  # type: ignore[misc]  # pyright: ignore[reportInvalidTypeVarUse]
        """What a coroutine function returns, of a result that may not be joined with another."""

        def __await__(self) -> T: ...

    class _Iterated(Protocol[T]):  # type: ignore[misc]  # pyright: ignore[reportInvalidTypeVarUse]
        """What an async generator function returns, of chunks that may not be joined with others."""

        def __aiter__(self) -> T: ...

    class _OverStub(Dual[Any, T, P, T]):
        """A pair of two functions, whose first call may decorate a stub."""

        @overload
        def __call__(
            self, stub: Callable[P, Coroutine[Any, Any, T]], /
        ) -> Dual[Any, T, P, Coroutine[None, object, T]]: ...
        @overload
        def __call__(self, stub: Callable[P, T], /) -> Dual[Any, T, P, T]: ...
        @overload
        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    class _OverStreamStub(Dual[Any, T, P, Generator[T, Any, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]):
        """A pair of two generators, whose first call may decorate a stub."""

        @overload
        def __call__(  # type: ignore[overload-overlap]
            self, stub: Callable[P, AsyncIterable[T]], /
        ) -> Dual[Any, T, P, AsyncGenerator[T, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]: ...
        @overload
        def __call__(  # type: ignore[overload-overlap]
            self, stub: Callable[P, Iterator[T]], /
        ) -> Dual[Any, T, P, Generator[T, Any, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]: ...
        @overload
        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Generator[T, Any, Any]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    OverStub = TypeVar("OverStub", bound=_OverStub[Any, ...] | _OverStreamStub[Any, ...])


class Decorator(Protocol):
    """Makes a pair of a function, or of what was already one."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, fn: OverStub, /
    ) -> OverStub: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, fn: Callable[P, Nothing], /
    ) -> Dual[Any, Any, P, Any]: ...
    @overload
    def __call__(self, fn: Returning[P, R, Awaitable[T]], /) -> Dual[Any, T, P, Coroutine[None, object, T]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, fn: Returning[P, R, AsyncIterable[T]], /
    ) -> Dual[Any, T, P, AsyncGenerator[T, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, fn: Returning[P, R, Iterator[T]], /
    ) -> Dual[Any, T, P, Generator[T, Any, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]: ...
    @overload
    def __call__(self, fn: Callable[P, T], /) -> Dual[Any, T, P, T]: ...


@overload
def dual(fn: Nothing, /, *, name: str | None = None, bridge: Bridge = "thread", warn: bool = True) -> Any: ...
@overload
def dual(  # type: ignore[overload-overlap]
    fn: Callable[P, Nothing], /, *, name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Dual[Any, Any, P, Any]: ...
@overload
def dual(
    fn: Returning[P, R, Awaitable[T]], /, *, name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Dual[Any, T, P, Coroutine[None, object, T]]: ...
@overload
def dual(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
    fn: Returning[P, R, AsyncIterable[T]], /, *, name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Dual[Any, T, P, AsyncGenerator[T, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]: ...
@overload
def dual(  # type: ignore[overload-overlap]
    fn: Returning[P, R, Iterator[T]], /, *, name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Dual[Any, T, P, Generator[T, Any, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]: ...
@overload
def dual(
    fn: Callable[P, T], /, *, name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Dual[Any, T, P, T]: ...
@overload
def dual(
    *,
    sync: Callable[P, Iterator[T]] | staticmethod[P, Iterator[T]],
    async_: Callable[P, _Iterated[AsyncIterator[T]]],
    name: str | None = None,
    bridge: Bridge = "thread",
    warn: bool = True,
) -> _OverStreamStub[T, P]: ...
@overload
def dual(
    *,
    sync: Callable[P, T] | staticmethod[P, T],
    async_: Callable[P, _Awaited[Generator[Any, Any, T]]],
    name: str | None = None,
    bridge: Bridge = "thread",
    warn: bool = True,
) -> _OverStub[T, P]: ...
@overload
def dual(  # type: ignore[overload-overlap]
    *, async_: Dual[Any, T, ..., T, T, Any], name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Callable[[Callable[P, T]], Dual[Any, T, P, T]]: ...
@overload
def dual(
    *,
    sync: Dual[Any, T, ..., Coroutine[None, object, T], T, Any],
    name: str | None = None,
    bridge: Bridge = "thread",
    warn: bool = True,
) -> Callable[[Callable[P, Awaitable[T]]], Dual[Any, T, P, Coroutine[None, object, T]]]: ...
@overload
def dual(
    *, async_: Callable[P, AsyncIterable[T]], name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Callable[
    [Callable[P, Iterator[T]]], Dual[Any, T, P, Generator[T, Any, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]]
]: ...
@overload
def dual(
    *,
    async_: Callable[P, Awaitable[T]],
    name: str | None = None,
    bridge: Bridge = "thread",
    warn: bool = True,
) -> Callable[[Callable[P, T]], Dual[Any, T, P, T]]: ...
@overload
def dual(  # type: ignore[overload-overlap]
    *, sync: Callable[P, Nothing], name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Callable[[Callable[P, Awaitable[T]]], Dual[Any, T, P, Coroutine[None, object, T]]]: ...
@overload
def dual(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
    *, sync: Returning[P, R, Iterator[T]], name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Callable[
    [Callable[P, AsyncIterable[T]]],
    Dual[Any, T, P, AsyncGenerator[T, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]],
]: ...
@overload
def dual(
    *, sync: Callable[P, T], name: str | None = None, bridge: Bridge = "thread", warn: bool = True
) -> Callable[[Callable[P, Awaitable[T]]], Dual[Any, T, P, Coroutine[None, object, T]]]: ...
@overload
def dual(*, name: str | None = None, bridge: Bridge = "thread", warn: bool = True) -> Decorator: ...
def dual(
    fn: Any = None,
    /,
    *given: Never,
    sync: Function | None = None,
    async_: Function | None = None,
    name: str | None = None,
    bridge: Bridge = "thread",
    warn: bool = True,
) -> Any:
    """Keep the sync and the async implementation of one function together, as one runnable.

    Five forms::

        @dual(async_=fetch_async)                           # on the sync function
        @dual(sync=fetch_sync)                              # on the async function
        fetch = dual(sync=fetch_sync, async_=fetch_async)   # from two functions that exist
        @dual(sync=fetch_sync, async_=fetch_async)          # the same, over a stub that names and documents it
        @dual                                               # one side now, and @fetch.async_ when it is written

    The third and the fourth are told apart by the first call of the pair. One plain function with the pair's own
    parameters and an empty body (a docstring, `...`, `pass`, `raise NotImplementedError`) is a stub being decorated;
    with a body it is a `PairError`, for which of the three should run? Anything else is an ordinary call.

    Args:
        fn: the function to decorate.
        sync: the sync side.
        async_: the async side.
        name: what the registry calls the pair, after its module, and the runnable's name; by default the function's.
        bridge: how a missing side is made: "thread" (async from sync on threads of its own, sync from async on a
            background event loop), "error" (not at all), or an `Executor` for the async side of a sync function.
        warn: whether to warn of the traps that its calls run into (docs/traps.md).

    Returns:
        A `Dual`; or, with one of `sync` and `async_` alone, a decorator for the other.

    Raises:
        PairError: the sides do not make a pair.
        NameTakenError: a different function is registered under the name.
    """
    _check_options(name, bridge)
    if given:
        raise PairError(f"dual: {given[0]!r} was given without a name; of two functions write dual(sync=f, async_=af)")
    if fn is not None and (sync is not None or async_ is not None):
        raise PairError("dual: give a function to decorate, or sync= and async_=, but not both")
    if sync is not None:
        check_side(function_of(sync, "sync"), "sync", "dual(sync=...)")
    if async_ is not None:
        check_side(function_of(async_, "async"), "async", "dual(async_=...)")
    if sync is not None and async_ is not None:
        stands = function_of(sync, "sync") if is_pair(sync) else sync
        pair = _make_pair(stands, sync, async_, name=name, bridge=bridge, warn=warn)
        pair._on_stub = partial(_decorate_stub, name)
        return pair

    def decorate(fn: Function) -> AnyDual:
        if sync is not None:
            other = side_beside(fn, sync)
            return _make_pair(fn, other, fn, where="@dual(sync=...)", name=name, bridge=bridge, warn=warn)
        if async_ is not None:
            other = side_beside(fn, async_)
            return _make_pair(fn, fn, other, where="@dual(async_=...)", name=name, bridge=bridge, warn=warn)
        return _make_pair(fn, *_side_of(fn, "@dual"), where="@dual", name=name, bridge=bridge, warn=warn)

    return decorate if fn is None else decorate(fn)


def concurrency(
    *given: Never,
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
    warn: bool | None = None,
) -> Decorator:
    """Put one limit on a function or a pair, for every path, thread, event loop, pipe and batch together.

    For example::

        @concurrency(limit=10, per_second=50)                 # above or below @dual; a plain function becomes a pair
        @concurrency(limit=2, key=lambda query: query["tenant"], timeout=30)
        @concurrency(per_minute=90_000, cost=count_tokens)
        @concurrency(limit=Adaptive(min=1, max=100))
        @concurrency(limiter=openai)                          # a `Limiter`, shared

    `key` and `cost` are called with the one argument that the function has, or needs; else, and for a method (its
    first parameter is called `self` or `cls`), with a mapping of all arguments by name.

    Args:
        limit: calls that may run at once; or an `Adaptive`, which finds the number.
        per_second, per_minute, per_hour: cost that may start in any such window; the shortest also sets the pace.
        burst: calls that may start back to back; the windows still hold.
        key: a function of the input; each key has the limits for itself.
        cost: what a call costs in the rates, 1 unless given; or a function of the input.
        timeout: seconds that a call may wait before it gets a `LimitTimeout`.
        limiter: a `Limiter` to share with other pairs, an `aiolimiter.AsyncLimiter` or a LangChain
            `BaseRateLimiter`, instead of limits of its own; beside a `Limiter` `cost` and `timeout` may be given. A
            pair's `limiter` serves too: with `key`, as the limits of each key.
        name: what errors and `repr` call the limiter; by default as the pair or the function that it is put on.
        warn: `False` silences the warnings of traps; by default as given to `dual`.

    Returns:
        A decorator, which returns the pair that it was given, or one that it makes of a function.

    Raises:
        TypeError, ValueError: the arguments limit nothing, contradict each other, or can't be meant.
        PairError: what is decorated is no function, or has a limit already.
    """
    if given:
        model: Any = given[0]
        if not is_pair(model) and isinstance(model, Runnable):
            raise PairError(f"@concurrency: {model!r} is no function{_LIMITED_MODEL}")
        raise unnamed("@concurrency", model)
    new_gate = partial(
        make_gate,
        limiter,
        key=key,
        cost=cost,
        timeout=timeout,
        limit=limit,
        per_second=per_second,
        per_minute=per_minute,
        per_hour=per_hour,
        burst=burst,
    )
    try:
        new_gate(name=name)  # bad arguments are told here, and each function that is decorated gets a limit of its own
    except (TypeError, ValueError) as error:
        raise type(error)(f"@concurrency{_on_function(sys._getframe(1))}: {error}") from None

    def gate_for(fn: Function) -> Gate:
        gate = new_gate(name=name)
        gate.rename(_name_of(fn))
        return gate

    def decorate(fn: Function, /) -> Any:
        pair = unwrapped(fn)
        if is_pair(pair):
            if pair._gate is not None:
                raise PairError(
                    f"@concurrency: {describe(pair)} has a limit already ({pair._gate.limiter!r}); give both in one "
                    "place, as in @concurrency(limit=10, per_second=50)"
                )
            pair._furnish(gate=gate_for(pair), warn=warn)
            if fn is not pair:
                pair._binding = _binding_of(fn)
            return pair
        return _make_pair(fn, *_side_of(fn, "@concurrency"), where="@concurrency", gate=gate_for(pair), warn=warn)

    return decorate


def _name_of(fn: Function) -> str | None:
    """Return the name that a pair was given, or else that a function was written with, after that of its class."""
    if is_pair(fn) and fn._is_named:
        return fn.name
    name: str = getattr(fn, "__qualname__", "").rpartition("<locals>.")[2]
    return name if name and name != "<lambda>" else None  # a partial has none


def _on_function(frame: FrameType) -> str:
    """Name the function that a decorator of this frame's current line will be put on, if there is one.

    The code of a function begins at the line of its first decorator, so it is the one that reaches over this line.
    """
    line = frame.f_lineno
    for code in frame.f_code.co_consts:
        if isinstance(code, CodeType) and code.co_firstlineno <= line < max(end or 0 for _, _, end in code.co_lines()):
            return f" on {frame.f_globals.get('__name__')}.{code.co_qualname}"
    return ""


def _make_pair(
    decorated: Function,
    sync: Function | None,
    async_: Function | None,
    *,
    where: str = "dual",
    name: str | None = None,
    bridge: Bridge = "thread",
    gate: Gate | None = None,
    warn: bool | None = None,
) -> AnyDual:
    """Check everything, then make the pair and register it.

    A side may be a pair, of one side where `@concurrency` has made it of a plain function; its limit becomes that of
    the new pair, which takes its place in the registry if it is the one decorated.
    """
    gate = gate or gate_of(sync, async_)
    warn = warn is not False and all(
        given._warn for side in (sync, async_) if side and is_pair(given := unwrapped(side))
    )
    plain_sync = None if sync is None else function_of(sync, "sync")
    plain_async = None if async_ is None else function_of(async_, "async")
    fn = function_of(decorated)
    check_pair(plain_sync, plain_async, where)
    if isinstance(bridge, Executor) and plain_sync is None:
        raise PairError(f"{where}: {describe(fn)} is async, and an executor can only run a sync side; drop bridge=")
    if isinstance(bridge, Executor) and plain_async is not None:
        raise PairError(
            f"{where}: {describe(fn)} has an async side, {describe(plain_async)}, so nothing is left for the executor "
            "to run; drop bridge=, or the async side"
        )
    pair: AnyDual = Dual(fn, name=name) if plain_sync is None else Dual(plain_sync, plain_async, name)
    pair._furnish(wears=fn, gate=gate, bridge=bridge, warn=warn)
    pair._binding = _binding_of(decorated)
    former = unwrapped(decorated)
    replaced = former if is_pair(former) else None
    registry._add(pair, fn, name, instead_of=replaced)
    if replaced is not None and replaced._gate is not None:
        replaced._gate.rename(_name_of(pair))
    pair._by_reference = True
    watch_class_body()
    return pair


def _side_of(fn: Function, where: str) -> tuple[Function | None, Function | None]:
    """Return a function as the sync or the async side, whichever it is."""
    plain: object = function_of(fn)
    if not callable(plain):
        instead = _LIMITED_MODEL if isinstance(plain, Runnable) else ""
        raise PairError(f"{where}: expected a function, got {plain!r}{instead}")
    return (None, fn) if is_async(plain) else (fn, None)


def _binding_of(decorated: object) -> Binding:
    """Return how a pair is bound that is made of this: as that would be."""
    if is_pair(decorated):
        return decorated._binding
    if isinstance(decorated, classmethod):
        return "class"
    # A partial of Python 3.13 has a __get__, which binds nothing yet.
    binds = hasattr(type(decorated), "__get__") and not isinstance(decorated, (staticmethod, MethodType, partial))
    return "instance" if binds else "nothing"


def _decorate_stub(name: str | None, pair: AnyDual, stub: Function) -> None:
    pair._binding = _binding_of(stub)
    registry._add(pair, unwrapped(stub), name, instead_of=pair)
    pair._furnish(wears=unwrapped(stub))


def _check_options(name: object, bridge: object) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise PairError(f'dual: name={name!r} is not a name; write name="quotes"')
    if not isinstance(bridge, Executor) and bridge not in ("thread", "error"):
        raise PairError(
            f'dual: bridge={bridge!r} is not a bridge; write "thread", "error", or a concurrent.futures.Executor'
        )
