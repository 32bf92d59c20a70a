"""`Dual`, a pair as a LangChain runnable: how a pair is put together, bound, called, described and pickled."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dataclasses
import functools
import importlib
import inspect
import operator
import pickle
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
)
from concurrent.futures import Executor
from itertools import chain
from types import MethodType, new_class
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, Protocol, Self, TypeGuard, cast, final, overload

from langchain_core.runnables.base import Runnable, RunnableSerializable
from langchain_core.runnables.config import RunnableConfig
from langchain_core.utils.pydantic import TypeBaseModel
from pydantic import BaseModel
from typing_extensions import ParamSpec, TypeVar

from asyncify.batches import is_bounded
from asyncify.deadlock.handover import run_in_background
from asyncify.entries import Bridge, Entries, Entry, make_entries
from asyncify.errors import AsyncifyWarning, BridgedWarning, PairError, UnboundedWarning
from asyncify.executors import goes_as_code
from asyncify.forks import PROGRAM
from asyncify.gate import Gate
from asyncify.limiter import Limiter
from asyncify.paths import Paths
from asyncify.schemas import (
    asks_for_tool,
    description_of,
    keys_schema,
    parameters_schema,
    resolved_input,
    resolved_output,
    schema_of_types,
    tool_of,
    tool_schema,
)
from asyncify.sides import ASYNC_SIDE, SYNC_SIDE, BoundSide, Mark, Side
from asyncify.signatures import (
    MARKS,
    Shape,
    check_pair,
    code_marks,
    coroutine_marks,
    describe,
    has_empty_body,
    is_async,
    is_new_version,
    plain,
    same_parameters,
    without_partials,
)
from asyncify.traps import MANY_BRIDGED, MANY_UNBOUNDED, tell_bridged, tell_unbounded
from asyncify.watches import subscribe

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool  # which takes long to import, and most programs make no tool

__all__ = [
    "AnyDual",
    "Binding",
    "Dual",
    "Nothing",
    "Returning",
    "function_of",
    "gate_of",
    "in_its_class",
    "is_pair",
    "side_beside",
    "unwrapped",
]

Input = TypeVar("Input", default=Any)
Output = TypeVar("Output", default=Any)
Params = ParamSpec("Params", default=...)
Returned = TypeVar("Returned", default=Output)
Called = TypeVar("Called", default=Output)
# With Any in the first two places, mypy would infer Any for all results of `asyncio.gather`.
Acalled = TypeVar("Acalled", default=Coroutine[None, object, Output])
P = ParamSpec("P")
Q = ParamSpec("Q")
T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A")
R_co = TypeVar("R_co", covariant=True)
T_co = TypeVar("T_co", covariant=True)
Function = Callable[..., Any]
Binding = Literal["instance", "class", "nothing"]


@final
class Nothing:
    """For type checkers, a type that no function returns: only `Any` matches it, and what never returns."""


# An argument may have an Any somewhere in its type, as each pair has. Where it matches two overloads that take
# different types, mypy gives up and infers Any. So overloads take it as `Returning` its own R, whatever R is besides:
# to mypy, that is the argument's own type.


class Returning(Protocol[P, R_co, T_co]):
    """A function or a pair that returns R, where R is a subtype of T."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co: ...  # type: ignore[overload-cannot-match]


class Dual(Paths[Input, Output], Generic[Input, Output, Params, Returned, Called, Acalled]):
    """A sync and an async implementation of one function, as one runnable.

    It is a drop-in for `RunnableLambda`: it takes the same arguments, registers nothing, and can be used in the same
    places. A side that is not given is made from the other: the async side runs on threads of the pair's own, the sync
    side on a background event loop.

    Called directly, or by `call` and `acall`, a pair takes the function's own arguments. As a runnable it takes one
    input: for a function that needs two arguments or more, a mapping that is spread by name.

    Its type is `Dual[Input, Output]`, with four further, optional parameters: `Params` are the function's own
    parameters; `Returned`, `Called` and `Acalled` are the results of a direct call, `call` and `acall`, where these are
    not simply `Output`.

    Args:
        func: the sync function; or the async one, if there is no other.
        afunc: the async function.
        name: the runnable's name; by default the function's.

    Attributes:
        func: the sync implementation, if there is one.
        afunc: the async implementation, if there is one.
    """

    func: Callable[Params, Called]  # type: ignore[assignment]
    afunc: Callable[Params, Acalled]  # type: ignore[assignment]
    __qualname__: str
    __wrapped__: Function

    if TYPE_CHECKING:
        # The overloads of `Runnable`, and one more. A pair of an async function is both a runnable and a function that
        # returns a coroutine; where one overload takes both, mypy matches it to neither.

        @overload
        def __or__(self, other: Mapping[str, Any]) -> RunnableSerializable[Input, dict[str, Any]]: ...
        @overload
        def __or__(
            self,
            other: Callable[[Output], Runnable[Output, T]] | Callable[[Output], Awaitable[Runnable[Output, T]]],
        ) -> RunnableSerializable[Input, T]: ...
        @overload
        def __or__(
            self,
            other: Runnable[Output, T]
            | Callable[[Iterator[Output]], Iterator[T]]
            | Callable[[AsyncIterator[Output]], AsyncIterator[T]]
            | Callable[[Output], T],
        ) -> RunnableSerializable[Input, T]: ...
        @overload
        def __or__(  # type: ignore[overload-cannot-match]  # pyright: ignore[reportOverlappingOverload]
            self, other: Runnable[Output, T]
        ) -> RunnableSerializable[Input, T]: ...
        def __or__(self, other: Any) -> RunnableSerializable[Input, Any]: ...

        @overload
        def pipe(self, *others: Runnable[Any, T], name: str | None = None) -> RunnableSerializable[Input, T]: ...
        @overload
        def pipe(
            self, *others: Runnable[Any, T] | Callable[[Any], T], name: str | None = None
        ) -> RunnableSerializable[Input, T]: ...
        def pipe(self, *others: Any, name: str | None = None) -> RunnableSerializable[Input, Any]:
            """Make a pipe of the pair and the others, as `|` does."""
            ...

        def stream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Generator[Output]:
            """Stream the sync side's output for one input; the result is a generator, so it can be closed."""
            ...

        def astream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncGenerator[Output]:
            """Stream the async side's output for one input; the result is a generator, so it can be closed."""
            ...

    if not TYPE_CHECKING:
        func = Side(SYNC_SIDE, "sync")
        afunc = Side(ASYNC_SIDE, "async")

        def __class_getitem__(cls, given: Any) -> Any:
            """Fill in the defaults of type parameters: Python 3.13.0 fails at one that follows a `ParamSpec`'s."""
            given = given if isinstance(given, tuple) else (given,)
            defaults = (Any, Any, ..., Any, Any, Any) if cls is Dual else ()  # a subclass has parameters of its own
            return super().__class_getitem__((*given, *defaults[len(given) :]))

    @overload
    def __init__(
        self: Dual[Any, Any, P, Any],
        func: Callable[P, Nothing],
        afunc: Callable[P, Awaitable[Any]] | None = None,
        name: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: Dual[Any, T, P, Coroutine[None, object, T]],
        func: Returning[P, R, Awaitable[T]],
        afunc: None = None,
        name: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: Dual[Any, T, P, AsyncGenerator[T, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]],
        func: Returning[P, R, AsyncIterable[T]],
        afunc: None = None,
        name: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: Dual[Any, T, P, Generator[T, Any, Any], Generator[T, Any, Any], AsyncGenerator[T, Any]],
        func: Returning[P, R, Iterator[T]],
        afunc: Callable[P, AsyncIterable[T]] | None = None,
        name: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: Dual[Any, T, P, T],
        func: Callable[P, T],
        afunc: Callable[P, Awaitable[T]] | None = None,
        name: str | None = None,
    ) -> None: ...
    # The last two are for functions that disagree. They take each by its own type, to mypy the same as in those before.
    @overload
    def __init__(
        self, func: Callable[P, R], afunc: Callable[Q, Awaitable[A]] | None = None, name: str | None = None
    ) -> None: ...
    @overload
    def __init__(
        self, func: Callable[P, R], afunc: Callable[Q, AsyncIterable[A]] | None = None, name: str | None = None
    ) -> None: ...
    def __init__(self, func: Function, afunc: Function | None = None, name: str | None = None) -> None:
        """Make a pair of one function or two."""
        super().__init__(func, afunc, name)
        self._is_named: bool = name is not None
        self._gate: Gate | None = None
        self._bridge: Bridge = "thread"
        self._warn = True
        self._told: set[type[AsyncifyWarning]] = set()
        self._fakes: tuple[Entries, ...] = ()
        self._on_stub: Callable[[AnyDual, Function], None] | None = None
        self._by_reference = False
        self._binding: Binding = "nothing"
        self._is_method = False
        self._place: tuple[str, str] | None = None
        self._furnish(wears=func)

    # --- how a pair is put together: what `decorators` and `pairs` call ---

    def _furnish(
        self,
        *,
        wears: Function | None = None,
        gate: Gate | None = None,
        bridge: Bridge | None = None,
        warn: bool | None = None,
    ) -> None:
        """Set what is given: the function whose name, docs, signature and colour the pair wears, a limit, a bridge."""
        if wears is not None:
            functools.update_wrapper(self, wears, updated=())
            self.__isabstractmethod__: bool = getattr(wears, "__isabstractmethod__", False)
            is_second = wears is vars(self).get(ASYNC_SIDE) and wears is not vars(self).get(SYNC_SIDE)
            self._is_async_def = is_async(wears) or is_second
            own_name = getattr(wears, "__name__", "<lambda>")
            if own_name != "<lambda>" and not self._is_named:
                self.name = own_name
        self._gate = gate or self._gate
        self._bridge = bridge or self._bridge
        self._warn = self._warn if warn is None else warn
        self._assemble()

    def __setattr__(self, name: str, value: Any, /) -> None:
        """Set an attribute; a side that is replaced, as a test does by `patch.object(pair, "func", fake)`, is run."""
        super().__setattr__(name, value)
        self._notice_change(name)

    def __delattr__(self, name: str, /) -> None:
        """Delete an attribute; if it is a side, assemble the pair without it."""
        super().__delattr__(name)
        self._notice_change(name)

    def _notice_change(self, name: str) -> None:
        if name in ("func", "afunc") and "_entries" in vars(self) and (hasattr(self, "func") or hasattr(self, "afunc")):
            self._assemble()
        self._notice_override(name)

    def _assemble(self) -> None:
        self._entries = make_entries(
            getattr(self, "func", None),
            getattr(self, "afunc", None),
            gate=self._gate,
            bridge=self._bridge,
            name=self.get_name(),
            called_like=self.__wrapped__,
            warn=self._warn,
            is_method=self._is_method,
        )
        called = self._entries.async_ if self._is_async_def else self._entries.sync
        self._marks: dict[str, object] = {}
        if called.shape.is_generator or self._is_async_def:
            is_generator = called.shape.is_generator
            self._marks = code_marks(plain(called.fn)) if is_generator else coroutine_marks(self.__wrapped__)
            vars(self).setdefault("__name__", self.get_name())  # a partial has none, but a function does
        self._set_fakes(self._fakes)

    def _set_fakes(self, fakes: tuple[Entries, ...]) -> None:
        """Run the last of these fakes instead of the pair's own entries; without fakes, run the pair's own."""
        self._fakes = fakes
        subscribe(self)

    def _set_watched(self, *, on: bool) -> None:
        """Have calls from now on run the async side step by step under the timer, or else as it is."""
        live = self._fakes[-1] if self._fakes else self._entries
        self._live = live.timed if on and live.timed is not None else live

    @property
    def limiter(self) -> Any:
        """The limiter of both sides: a `Limiter`, one for each key, or a foreign one; None if there is no limit.

        Its type is Any, as it depends on the arguments of `concurrency`.
        """
        return None if self._gate is None else self._gate.limiter

    # --- as a method ---

    def __set_name__(self, owner: type, name: str) -> None:
        """Become a method if the pair's function was written in this class; take this name if it had another there."""
        where, _, written = getattr(self, "__qualname__", "").rpartition(".")
        if (self.__module__, where) == (owner.__module__, owner.__qualname__):
            if vars(owner).get(written) is not self:
                self.__qualname__ = f"{where}.{name}"
            self._become_method()
            sides: list[object] = [vars(self).get(SYNC_SIDE), vars(self).get(ASYNC_SIDE)]
            for side in sides:
                hear: Any = getattr(type(side), "__set_name__", None)
                if hear is not None:  # a side's decorator has a `__set_name__` of its own
                    hear(side, owner, name)

    def _become_method(self) -> None:
        """Bind the sides that bind by themselves, as one decorated by `wrapt` does, to the first argument."""
        self._is_method = self._binding != "nothing"
        self._assemble()

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(
        self: Dual[Input, Output, [Nothing], Returned, Called, Acalled], instance: object, owner: Any = None
    ) -> Dual[Input, Output, ..., Returned, Called, Acalled]: ...
    @overload
    def __get__(
        self: Dual[Input, Output, Concatenate[Any, P], Returned, Called, Acalled],
        instance: object,
        owner: Any = None,  # not `type | None`: pyright does not take the class of an enum's member for a type
    ) -> Dual[Input, Output, P, Returned, Called, Acalled]: ...
    def __get__(self, instance: object, owner: Any = None) -> AnyDual:
        """Bind as the decorated function would: each access makes an equal pair, under the same limit."""
        if self._binding == "nothing" or (self._binding == "instance" and instance is None):
            return self
        return _bound_kind(type(self))(self, instance if self._binding == "instance" else owner or type(instance))

    # --- the second side, written later ---

    def sync(self, fn: Callable[Params, Output | Iterator[Output]]) -> Self:
        """Add the sync side to a pair that has only the async one; a decorator that returns the pair."""
        plain = function_of(fn, "sync")
        if hasattr(self, "func") and not is_new_version(plain, self.func):
            raise PairError(f"{describe(self)} has a sync side already: {describe(self.func)}")
        _check_is_of_class(self, "async_", sys._getframe(1).f_locals)
        check_pair(plain, self.afunc, f"{self.get_name()}.sync")
        gate = gate_of(self, fn)
        self.func = plain
        self._furnish(gate=gate)
        return self

    def async_(self, fn: Callable[Params, Awaitable[Output] | AsyncIterable[Output]]) -> Self:
        """Add the async side to a pair that has only the sync one; a decorator that returns the pair."""
        plain = function_of(fn, "async")
        if hasattr(self, "afunc") and not is_new_version(plain, self.afunc):
            raise PairError(f"{describe(self)} has an async side already: {describe(self.afunc)}")
        if isinstance(self._bridge, Executor):
            raise PairError(f"{describe(self)} has its async side by bridge={self._bridge!r}; drop that, or this side")
        _check_is_of_class(self, "sync", sys._getframe(1).f_locals)
        check_pair(self.func, plain, f"{self.get_name()}.async_")
        gate = gate_of(self, fn)
        self.afunc = plain
        self._furnish(gate=gate)
        return self

    # --- called like the decorated function ---

    def __call__(self, *args: Params.args, **kwargs: Params.kwargs) -> Returned:
        """Do what the decorated function did, within the limit: for an `async def`, return an awaitable."""
        if self._on_stub is not None and self._is_stub_call(args, kwargs):
            return cast("Returned", self)
        run = self._live.async_.run if self._is_async_def else self._live.sync.run
        return cast("Returned", run(*args, **kwargs))

    if not TYPE_CHECKING:
        # Hides the hints of this method: code that asks for these first, as LangGraph does, then asks the function's.
        __call__.__no_type_check__ = True

    def _is_stub_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        on_stub = self._on_stub
        if on_stub is None or kwargs or len(args) != 1 or not _is_stub_of(args[0], self._entries.sync.fn):
            self._on_stub = None
            return False
        if not has_empty_body(unwrapped(args[0])):
            raise PairError(
                f"{describe(args[0])} has a body, and so have the sync and the async side: which of the three should "
                "run? Leave only a docstring, or drop one of sync= and async_="
            )
        on_stub(self, args[0])
        self._on_stub = None
        return True

    def call(self, *args: Params.args, **kwargs: Params.kwargs) -> Called:
        """Run the sync side, within the limit, with the function's own arguments."""
        return cast("Called", self._live.sync.run(*args, **kwargs))

    def acall(self, *args: Params.args, **kwargs: Params.kwargs) -> Acalled:
        """Run the async side, within the limit, with the function's own arguments, in the caller's task."""
        return cast("Acalled", self._live.async_.run(*args, **kwargs))

    # --- called as a runnable ---

    def _admits(self) -> int | None:
        """Return how many calls the limit admits at once; None without a limit, or for a fake, which has none."""
        limiter = None if self._fakes else self.limiter
        return limiter._limits.limit if isinstance(limiter, Limiter) else None

    def _warn_of_traps(self, calls: int, *, bounded: bool) -> None:
        """Warn, once each, of the traps that an async batch of so many calls runs into."""
        if not self._warn or self._fakes:
            return
        entry, name = self._entries.async_, getattr(self, "name", None)
        bridged = entry.kind == "bridged" and not isinstance(self._bridge, Executor)
        unbounded = entry.kind == "native" and self._gate is None and not bounded
        if bridged and calls >= MANY_BRIDGED and self._is_news(BridgedWarning):
            tell_bridged(name or describe(entry.fn), entry.fn, calls)
        if unbounded and calls > MANY_UNBOUNDED and self._is_news(UnboundedWarning):
            tell_unbounded(name or describe(entry.fn), entry.fn, calls)

    def _is_news(self, warning: type[AsyncifyWarning]) -> bool:
        is_news = warning not in self._told
        self._told.add(warning)
        return is_news

    if not TYPE_CHECKING:  # type checkers use the overloads of `Runnable`

        def batch(self, inputs: Any, config: Any = None, **options: Any) -> Any:
            """Run as `RunnableLambda` does; a bridged sync side with a limit runs all inputs on the background loop."""
            bounded = is_bounded(config) or (self._gate is not None and self._gate.limiter._bounds_calls)
            if self._live.sync.kind == "bridged" and bounded and not self._runs_by_invoke:
                return run_in_background(functools.partial(self.abatch, inputs, config, **options))
            return super().batch(inputs, config, **options)

    # --- schemas and tools ---

    @functools.cached_property
    def deps(self) -> list[Runnable[Any, Any]]:
        """The runnables that the function uses, as LangChain finds them; none for a callable that has no hash."""
        try:
            return super().deps
        except TypeError:
            return []

    @property
    def InputType(self) -> Any:  # noqa: N802
        """The type of the input: that of the first parameter, even if its annotation is a string."""
        declared: Any = super().InputType
        return resolved_input(self.__wrapped__) if isinstance(declared, str) else declared

    @property
    def OutputType(self) -> Any:  # noqa: N802
        """The type of the output: that of the result or of a chunk, even if the annotation is a string."""
        declared: Any = super().OutputType
        return resolved_output(self.__wrapped__) if isinstance(declared, str) else declared

    def get_input_schema(self, config: RunnableConfig | None = None) -> TypeBaseModel:
        """Return the schema of the input: of a mapping, for a function of several required parameters, or of none."""
        shape = self._entries.sync.shape
        if len(shape.required) > 1 or shape.takes_nothing:
            return parameters_schema(self.__wrapped__, self.get_name("Input"))
        return super().get_input_schema(config)

    def get_input_jsonschema(self, config: RunnableConfig | None = None) -> dict[str, Any]:
        """Return the input's JSON schema; to LangChain's `tool`, which only checks for an object, return just that."""
        if asks_for_tool(sys._getframe().f_back):
            return {"type": "object"}
        return super().get_input_jsonschema(config)

    @property
    def input_schema(self) -> TypeBaseModel:
        """The schema of the input; for LangChain's `tool`, that of the function's parameters."""
        if asks_for_tool(sys._getframe().f_back):
            name = getattr(self, "__name__", self.get_name())  # the tool's default name
            return self._keys_schema() or tool_schema(self.__wrapped__, name)
        return self.get_input_schema()

    def _keys_schema(self) -> type[BaseModel] | None:
        """Return the schema of a drop-in's input keys, which a tool takes instead of parameters; None for others."""
        if self._by_reference or len(self._entries.sync.shape.required) > 1:
            return None
        return keys_schema(
            self.__wrapped__, self.get_name("Input"), cast("type[BaseModel]", super().get_input_schema())
        )

    def as_tool(
        self,
        args_schema: type[BaseModel] | None = None,
        *,
        name: str | None = None,
        description: str | None = None,
        arg_types: dict[str, type] | None = None,
    ) -> BaseTool:
        """Return a tool whose arguments are the function's parameters, and whose description is its docs.

        The tool of a drop-in, `Dual(func)`, has the arguments that a `RunnableLambda`'s would have, if its input is a
        mapping whose keys are known, such as a `TypedDict`.
        """
        is_told = args_schema is not None or arg_types is not None
        if is_told and not self._by_reference:
            return super().as_tool(args_schema, name=name, description=description, arg_types=arg_types)
        return tool_of(
            self,
            self.__wrapped__,
            name=name or self.get_name(),
            description=description,
            keys=self._keys_schema(),
            schema=args_schema if arg_types is None else schema_of_types(self.get_name("Input"), arg_types),
        )

    # --- identity ---

    def __eq__(self, other: object) -> bool:
        """Compare a decorated pair by identity, as a function: another of its function may have another limit.

        A drop-in is compared as a `RunnableLambda` is, by the sync side, or else the async one.
        """
        if self._by_reference or (is_pair(other) and other._by_reference):
            return self is other
        return super().__eq__(other)

    def __hash__(self) -> int:  # type: ignore[override]
        """Hash by what it is compared by."""
        if self._by_reference:
            return id(self)
        try:
            return hash(self.func if hasattr(self, "func") else self.afunc)
        except TypeError:  # a callable that has no hash
            return id(self)

    def __repr__(self) -> str:
        """Show sides and limit: `<Dual fetch sync+async 3/10 in flight, 7 waiting>`; for `tool`, return the docs."""
        if asks_for_tool(sys._getframe().f_back):
            return description_of(self.__wrapped__, self.get_name())
        kinds = {"sync": self._entries.sync.kind, "async": self._entries.async_.kind}
        real = "+".join(side for side, kind in kinds.items() if kind == "native")
        made = "".join(f" ({side} {kind})" for side, kind in kinds.items() if kind != "native")
        state = "" if self._gate is None else f" {self._gate.limiter._state()}"
        return f"<Dual {self.get_name()} {real}{made}{state}>"

    def __reduce__(self) -> Any:
        """Pickle a decorated pair by its module and name, any other pair by its functions."""
        if self._by_reference and not (goes_as_code() and self._has_no_name_elsewhere()):
            module, name = _place_of(self)
            is_own = (module, name) == (self.__module__, getattr(self, "__qualname__", ""))
            return name if is_own else (_held_at, (module, name, self.get_name()))
        if self._gate is not None:
            raise pickle.PicklingError(
                f"{describe(self)} has a limit, which holds in one process, so it can't be pickled; decorate a "
                "function at the top of a module that is imported, which is pickled by its name, or limit the pair "
                "where it arrives"
            )
        state = {k: v for k, v in vars(self).items() if k not in _MADE_ANEW}
        if self._by_reference and isinstance(self._bridge, Executor):
            state["_bridge"] = "thread"  # the pair may go to a process of that very executor
        return copyreg.__newobj__, (_lasting_kind(type(self)),), state  # type: ignore[attr-defined]

    def _has_no_name_elsewhere(self) -> bool:
        """Tell whether another program, which has a `__main__` of its own, can't find the pair by any name."""
        try:
            return _place_of(self)[0] in PROGRAM
        except pickle.PicklingError:
            return True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make anew what was not pickled: at once, or at first use if it came as code, which may be incomplete yet."""
        vars(self).update(state, _told=set(), _fakes=(), _on_stub=None)
        if goes_as_code():
            object.__setattr__(self, "__class__", _unpickled_kind(type(self)))
        else:
            self._assemble()

    def __copy__(self) -> Self:
        """Return a decorated pair itself, as for a function; or else a copy under the same limit, without fakes."""
        if self._by_reference:
            return self
        made = object.__new__(type(self))
        made._take_over(vars(self))
        made._set_fakes(())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy as `copy.copy` does; of a bound method, which takes its instance along, a copy under the same limit."""
        kept = vars(self)
        sides = [name for name in (SYNC_SIDE, ASYNC_SIDE, "__wrapped__") if name in kept]
        methods = {name: kept[name] for name in sides if isinstance(without_partials(kept[name]), MethodType)}
        if not methods:
            return copy.copy(self)
        made = memo[id(self)] = object.__new__(type(self))  # the instance may hold this very pair
        made._take_over(kept | copy.deepcopy(methods, memo))
        vars(made).pop("deps", None)
        made._assemble()
        return made

    def _take_over(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, _told=set(kept["_told"]), _fakes=())
        for name in ("invoke", "ainvoke"):
            self._notice_override(name)


class _Bound(Dual[Any, Any]):
    """A pair that is bound to one instance or class; each access makes a new one."""

    __setattr__ = object.__setattr__  # `Dual`'s would assemble the pair anew; a bound pair must be made quickly
    __delattr__ = object.__delattr__

    if not TYPE_CHECKING:
        func = BoundSide(SYNC_SIDE, "sync")
        afunc = BoundSide(ASYNC_SIDE, "async")

    _binding = "nothing"  # a bound pair is not bound again

    def __init__(self, pair: AnyDual, receiver: object) -> None:  # no `super().__init__()`: the pair is checked already
        self._pair = pair
        self._receiver = receiver
        self.name = pair.get_name()  # a lambda's pair has no attribute `name`
        self._on_stub = None
        self._is_async_def = pair._is_async_def
        functools.update_wrapper(self, MethodType(pair.__wrapped__, receiver), updated=())
        self.__qualname__ = getattr(pair, "__qualname__", self.name)
        kept = vars(pair)
        if SYNC_SIDE in kept:
            setattr(self, SYNC_SIDE, MethodType(kept[SYNC_SIDE], receiver))
        if ASYNC_SIDE in kept:
            setattr(self, ASYNC_SIDE, MethodType(kept[ASYNC_SIDE], receiver))

    def __getattr__(self, name: str) -> Any:
        """Return the pair's own attribute, also one that a subclass sets, but not its sides or dunder attributes."""
        kept = {} if name == "_pair" else vars(self._pair)
        is_own = name in (SYNC_SIDE, ASYNC_SIDE) or name.startswith("__")
        if name in kept and not is_own:
            return kept[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def __eq__(self, other: object) -> bool:
        """Compare by pair and receiver, each by identity, as methods are."""
        return isinstance(other, _Bound) and self._pair is other._pair and self._receiver is other._receiver

    def __hash__(self) -> int:  # type: ignore[override]
        """Hash by what it is compared by."""
        return hash((id(self._pair), id(self._receiver)))

    @property
    def _unbound(self) -> AnyDual:
        """The pair as it stands in the class."""
        return self._pair

    @property
    def _is_of_class(self) -> bool:
        """Whether the pair is bound as a class method, and not to an instance."""
        return self._pair._binding == "class" or self._is_class_method()

    def _is_class_method(self) -> bool:
        """Tell whether a `classmethod` wraps the pair: up to Python 3.12 that binds the pair as if to an instance."""
        classes: tuple[type, ...] = getattr(self._receiver, "__mro__", ())
        found: list[Any] = [vars(cls).get(self.__qualname__.rpartition(".")[2]) for cls in classes]
        return any(type(wraps) is classmethod and wraps.__func__ is self._pair for wraps in found)

    @property
    def _live(self) -> Entries:  # type: ignore[override]
        return self._bind(self._pair._live)

    @property
    def _entries(self) -> Entries:  # type: ignore[override]
        return self._bind(self._pair._entries)

    @property
    def deps(self) -> list[Runnable[Any, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unbound pair's: LangChain would cache the method that has them, and keep the instance alive for good."""
        return self._pair.deps

    def _bind(self, entries: Entries) -> Entries:
        sync, async_ = entries.sync, entries.async_
        return Entries(
            Entry(functools.partial(sync.run, self._receiver), sync.fn, _bound_shape(sync.shape), sync.kind),
            Entry(functools.partial(async_.run, self._receiver), async_.fn, _bound_shape(async_.shape), async_.kind),
        )

    def _warn_of_traps(self, calls: int, *, bounded: bool) -> None:
        """Warn as the unbound pair does: once for all instances."""
        self._pair._warn_of_traps(calls, bounded=bounded)

    def _furnish(self, **given: Any) -> None:
        """Refuse: a method can only be decorated in its class."""
        raise PairError(f"{describe(self)} is bound to {self._receiver!r}; decorate it in its class")

    def _set_fakes(self, fakes: tuple[Entries, ...]) -> None:
        """Refuse: a fake replaces the method of the whole class."""
        raise self._not_here()

    def _not_here(self) -> TypeError:
        name = self.__qualname__
        return TypeError(
            f"{name} is bound to {self._receiver!r}; override it in its class: registry.override({name}, ...)"
        )

    def __reduce__(self) -> Any:
        """Pickle as a method does: by its instance or class, and its name."""
        return getattr, (self._receiver, self._attribute())

    def _attribute(self) -> str:
        """Return the pair's name in its class: the function's name, or another if the class has the pair only there."""
        own = self.__qualname__.rpartition(".")[2]
        kind = self._receiver if self._is_of_class else type(self._receiver)
        classes: tuple[type, ...] = getattr(kind, "__mro__", ())
        held = chain.from_iterable(vars(cls).items() for cls in classes)
        names = [name for name, value in held if unwrapped(value) is self._pair]
        return own if own in names or not names else names[0]

    def __copy__(self) -> Self:
        """Return the bound pair itself, as `copy` does for a method."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the same pair, bound to a copy of the instance."""
        return type(self)(self._pair, copy.deepcopy(self._receiver, memo))


class _Unpickled(Dual[Any, Any]):
    """A pair that was unpickled with its functions' code, until its entries are first asked for."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Assemble the pair, and give it its lasting class: a `__getattr__` slows all attribute access down."""
            if name in _MADE_LATE:
                object.__setattr__(self, "__class__", _lasting_kind(type(self)))
                self._assemble()
            return object.__getattribute__(self, name)


@functools.cache
def _unpickled_kind(kind: type[AnyDual]) -> type[_Unpickled]:
    """Return the class of a pair of this kind that has been unpickled, but not yet assembled."""
    return _Unpickled if kind is Dual else cast("type[_Unpickled]", new_class(kind.__name__, (_Unpickled, kind)))


def _lasting_kind(kind: type[AnyDual]) -> type[AnyDual]:
    """Return the class that a pair of this kind has once it is assembled."""
    if not issubclass(kind, _Unpickled):
        return kind
    return Dual if kind is _Unpickled else cast("type[AnyDual]", kind.__bases__[1])


@functools.cache
def _bound_kind(kind: type[AnyDual]) -> type[_Bound]:
    """Return the class of bound pairs of this kind: for a subclass of `Dual`, it inherits that one's overrides."""
    return _Bound if kind is Dual else cast("type[_Bound]", new_class(f"Bound{kind.__name__}", (_Bound, kind)))


@functools.cache
def _bound_shape(shape: Shape) -> Shape:
    """Return the shape of a function without its first parameter."""
    return dataclasses.replace(
        shape, required=shape.required[1:], positional_only=shape.positional_only[1:], places=shape.places - 1
    )


for _name in MARKS:
    setattr(Dual, _name, Mark(_name))


_MADE_LATE = {"_entries", "_live", "_marks"}
"""Attributes that a pair has only once it is assembled."""

_MADE_ANEW = _MADE_LATE | {"_fakes", "_told", "_on_stub", "deps", "_place"}
"""Attributes of a pair that are not pickled but made anew."""


AnyDual = Dual[Any, Any, ..., Any, Any, Any]
"""The type of any pair, a streaming one included."""


def is_pair(value: object) -> TypeGuard[AnyDual]:
    """Tell whether a value is a pair."""
    return isinstance(value, Dual)


def function_of(side: Function, colour: Literal["sync", "async"] | None = None) -> Function:
    """Return the function of a side, which may be a class or static method, or a pair.

    A side is a pair if `@concurrency` has decorated it. If a pair has both sides, `colour` says which one is meant.

    Raises:
        PairError: the side is a pair with both sides, and no colour is given.
    """
    side = unwrapped(side)
    if not is_pair(side):
        return side
    if colour is None and hasattr(side, "func") and hasattr(side, "afunc"):
        raise PairError(f"{describe(side)} is a pair with both sides already, so it can't be decorated again")
    if colour == "async" and hasattr(side, "afunc"):
        return side.afunc
    return side.func if hasattr(side, "func") else side.afunc


def unwrapped(side: Function) -> Function:
    """Return the function or pair that a class or static method wraps, or else the side itself."""
    return cast("staticmethod[..., Any]", side).__func__ if isinstance(side, (classmethod, staticmethod)) else side


def side_beside(other: Function, side: Function) -> Function:
    """Return the side, or the unbound pair if it is bound to a class and the other side takes the class as well."""
    takes_class = isinstance(side, _Bound) and side._is_of_class and not same_parameters(side, function_of(other))
    return cast("_Bound", side)._unbound if takes_class else side


def _check_is_of_class(pair: AnyDual, other: str, body: dict[str, Any]) -> None:
    """Refuse a second side that is written in the body of a subclass: it would change the base class, too."""
    own = pair.__qualname__.rpartition(".")[0]
    written = body.get("__qualname__", own)
    is_of_class = own != "" and not own.endswith("<locals>")
    if is_of_class and written != own:
        raise PairError(
            f"a side that {written} gives {describe(pair)} would be {own}'s own, too; to override it in {written} "
            f"alone, write @dual({other}={own}.{pair.get_name()})"
        )


def in_its_class(pair: AnyDual) -> AnyDual:
    """Return the unbound pair if the pair is bound to a class, any other pair as it is."""
    return pair._unbound if isinstance(pair, _Bound) and pair._is_of_class else pair


def gate_of(*sides: Function | None) -> Gate | None:
    """Return the gate, and so the limit, that the sides bring along; None if they have none.

    Raises:
        PairError: two sides have different limits.
    """
    pairs = [pair for side in sides if side and is_pair(pair := unwrapped(side)) and pair._gate is not None]
    gates = [pair._gate for pair in pairs]
    if any(gate != gates[0] for gate in gates):
        raise PairError(
            f"{describe(pairs[0])} and {describe(pairs[1])} have a limit each; put one @concurrency over the pair"
        )
    return gates[0] if gates else None


def _place_of(pair: AnyDual) -> tuple[str, str]:
    """Return the module that holds a pair, and its name there; neither need be the function's."""
    qualname = getattr(pair, "__qualname__", "")
    with contextlib.suppress(AttributeError):
        if operator.attrgetter(qualname)(sys.modules.get(pair.__module__)) is pair:
            return pair.__module__, qualname
    kept: tuple[str, str] | None = vars(pair).get("_place")
    if kept is not None and _names_in(kept[0]).get(kept[1]) is pair:
        return kept
    for module in [pair.__module__, *(module for module in sys.modules if module not in PROGRAM)]:
        for name, value in list(_names_in(module).items()):
            if value is pair:
                pair._place = module, name  # kept, as a search of all modules takes milliseconds
                return module, name
    raise pickle.PicklingError(
        f"{describe(pair)} can't be pickled: no module that others can import holds it under a name; assign it to one "
        "at the top of a module, or write it in a class there"
    )


def _names_in(module: str) -> dict[str, Any]:
    """Return the names in a module, without its `__getattr__`, which would import a lazy module."""
    try:
        return cast("dict[str, Any]", object.__getattribute__(sys.modules.get(module), "__dict__"))
    except AttributeError:
        return {}


def _held_at(module: str, name: str, called: str) -> AnyDual:
    """Return the pair that a module holds under a name; raise if that is another by now, as under a loop variable."""
    pair = getattr(importlib.import_module(module), name, None)
    if not is_pair(pair) or pair.get_name() != called:
        raise pickle.UnpicklingError(
            f"{module}.{name} was the pair {called} when that was pickled, and is {pair!r} here; assign {called} to a "
            "name at the top of a module that holds nothing else"
        )
    return pair


def _is_stub_of(candidate: Any, fn: Function) -> bool:
    candidate = unwrapped(candidate)
    return inspect.isfunction(candidate) and candidate.__name__ != "<lambda>" and same_parameters(candidate, fn)
