"""What a function is, seen from outside: its colour, its parameters, whether its body is empty."""

from __future__ import annotations

import asyncio
import dataclasses
import dis
import functools
import inspect
import itertools
import math
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from types import CodeType, FunctionType, MethodType, SimpleNamespace, UnionType, WrapperDescriptorType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from asyncify.errors import PairError

__all__ = [
    "INJECTED",
    "MARKS",
    "UNRESOLVED",
    "Shape",
    "binds_by_itself",
    "check_pair",
    "check_side",
    "code_marks",
    "code_of",
    "coroutine_marks",
    "describe",
    "has_empty_body",
    "is_async",
    "is_generator",
    "is_new_version",
    "plain",
    "resolved",
    "same_parameters",
    "shape_of",
    "signature_of",
    "sole_input",
    "takes_one_argument",
    "without_partials",
]

INJECTED = ("config", "run_manager")
UNRESOLVED = (AttributeError, NameError, SyntaxError, TypeError)
"""What comes of an annotation that means something to type checkers only."""

_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_PLACES: dict[object, float] = {
    Parameter.POSITIONAL_ONLY: 1.0,
    Parameter.POSITIONAL_OR_KEYWORD: 1.0,
    Parameter.VAR_POSITIONAL: math.inf,
}


def without_partials(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function in a partial, which has no name, docs or code of its own; any other as it is."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return what decides the colour: the function in a partial, or the `__call__` of an object."""
    fn = without_partials(fn)
    if inspect.isfunction(fn) or inspect.ismethod(fn) or inspect.isclass(fn) or _has_code(fn):
        return fn
    call: Callable[..., Any] = type(fn).__call__
    return fn if isinstance(call, WrapperDescriptorType) else call  # that of a builtin says nothing of it


def _has_code(fn: object) -> bool:
    return isinstance(getattr(fn, "__code__", None), CodeType)  # a proxy may answer to any name


def binds_by_itself(fn: Callable[..., Any]) -> bool:
    """Tell whether this is an object that says itself how it becomes a method, as those of a decorator may do."""
    if isinstance(fn, (MethodType, functools.partial)):
        return False  # its `__get__`, which a partial has from Python 3.13 on, returns it as it is
    return hasattr(type(fn), "__get__") and type(fn) is not FunctionType  # what imitates one is no instance of it


def is_async(fn: Callable[..., Any]) -> bool:
    """Tell whether calling `fn` gives a coroutine or an async generator."""
    # The object itself is asked first: a mock says what it is, and its `__call__` does not.
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (fn, plain(fn)))


def _gives_awaitable(fn: Callable[..., Any]) -> bool:
    """Tell whether a `def` shows that it returns an awaitable: by what it wraps, or by its annotation.

    It may await that itself, as what makes a sync function of an async one does: so it takes a user to say what it is.
    """
    if _coroutine_function_in(fn) is not None:
        return True
    signature = signature_of(fn)
    try:
        result: Any = None if signature is None else signature.return_annotation
        return _is_awaitable(resolved(fn, result) if isinstance(result, str) else result)
    except UNRESOLVED:
        return False


def _coroutine_function_in(fn: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the first coroutine function under what partials and wrappers there are, None if there is none."""
    is_found = inspect.iscoroutinefunction
    inner = inspect.unwrap(plain(inspect.unwrap(without_partials(fn), stop=is_found)), stop=is_found)
    return inner if is_found(inner) else None


def _is_awaitable(kind: Any) -> bool:
    """Tell whether a type, or one in a union, is that of an awaitable."""
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(_is_awaitable(member) for member in get_args(kind))
    return isinstance(origin, type) and issubclass(origin, Awaitable)


def resolved(fn: Callable[..., Any], annotation: Any) -> Any:
    """Return the type that an annotation of the function stands for, in the function's module if it is a string."""
    written: Any = inspect.unwrap(plain(inspect.unwrap(fn)))
    alone = SimpleNamespace(__annotations__={"it": Any if annotation is Parameter.empty else annotation})
    names = getattr(written, "__globals__", None) or getattr(inspect.getmodule(written), "__dict__", {})
    declared = {parameter.__name__: parameter for parameter in getattr(written, "__type_params__", ())}
    return get_type_hints(alone, names, declared, include_extras=True)["it"]


def is_generator(fn: Callable[..., Any]) -> bool:
    """Tell whether calling `fn` gives a generator, of either colour."""
    written = plain(fn)
    return inspect.isgeneratorfunction(written) or inspect.isasyncgenfunction(written)


def signature_of(fn: Callable[..., Any]) -> Signature | None:
    """Return the signature, or None for a builtin that has none."""
    try:
        return inspect.signature(fn)
    except (ValueError, TypeError):
        return None


def takes_one_argument(fn: Callable[..., Any]) -> bool:
    """Tell whether `fn` can be called with one argument; of a builtin without a signature that is taken for granted."""
    signature = signature_of(fn)
    try:
        if signature is not None:
            signature.bind(None)
    except TypeError:
        return False
    return True


def code_of(fn: Callable[..., Any]) -> CodeType | None:
    """Return the code that stands in the source for this callable, or None for a builtin."""
    code: object = getattr(_written(fn), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _written(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that stands in the source, under what partials and wrappers there are."""
    return plain(inspect.unwrap(without_partials(fn)))


def describe(fn: Callable[..., Any]) -> str:
    """Name a function for an error message: its qualified name, its file and its line."""
    written = _written(fn)
    named = hasattr(written, "__qualname__") and hasattr(written, "__module__")  # a builtin type's method has no module
    name = f"{written.__module__}.{written.__qualname__}" if named else repr(fn)
    code = code_of(fn)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name


def coroutine_marks(fn: Callable[..., Any]) -> dict[str, object]:
    """Return the attributes by which frameworks tell a coroutine function, by `asyncio` or by `inspect`.

    Before Python 3.12 the latter takes no mark, but looks at the code.
    """
    marks: dict[str, object] = {"_is_coroutine": getattr(asyncio.coroutines, "_is_coroutine", None)}
    if sys.version_info >= (3, 12):
        marks |= vars(inspect.markcoroutinefunction(lambda: None))
    else:
        marks |= code_marks(_coroutine_function_in(fn) or _stand_in)
    return marks


async def _stand_in() -> None:
    """Have the code that is looked at, in the place of a `def` that returns an awaitable."""


def code_marks(written: Callable[..., Any]) -> dict[str, object]:
    """Return the attributes by which `inspect` takes an object for a function, and looks at its code."""
    return {name: getattr(written, name, None) for name in ("__code__", "__defaults__", "__kwdefaults__")}


MARKS = frozenset(coroutine_marks(lambda: None) | code_marks(lambda: None))
"""The names of all of these."""


def sole_input(fn: Callable[..., Any]) -> Parameter | None:
    """Return the parameter of a function that has one, or needs one; None of a method, which has its instance too."""
    signature = signature_of(fn)
    own = [p for p in signature.parameters.values() if p.name not in INJECTED] if signature is not None else []
    needed = [p for p in own if p.default is Parameter.empty and p.kind not in _VARIADIC]
    candidates = needed or own
    return candidates[0] if len(candidates) == 1 and own[0].name not in ("self", "cls") else None


def same_parameters(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Tell whether two functions take the same parameters: names, kinds, order and defaults.

    `config` and `run_manager` are left out: LangChain hands them to whichever side asks. A builtin that has no
    signature is taken at its word.
    """
    left, right = signature_of(a), signature_of(b)
    return left is None or right is None or _comparable(left) == _comparable(right)


def _comparable(signature: Signature) -> list[tuple[str, Any, str]]:
    # Defaults are compared as they are written: an array, say, has no truth in its `==`.
    return [
        (parameter.name, parameter.kind, repr(parameter.default))
        for parameter in signature.parameters.values()
        if parameter.name not in INJECTED
    ]


def is_new_version(fn: Any, former: Any) -> bool:
    """Tell whether a function is one that was there before, from a notebook's cell that has been run again."""
    code, old = getattr(fn, "__code__", None), getattr(former, "__code__", None)
    if type(code) is not CodeType or type(old) is not CodeType or code is old:
        return False  # a partial has no code, and that of a mock claims to be an instance
    is_namesake = (fn.__module__, fn.__qualname__) == (former.__module__, former.__qualname__)
    return is_namesake and (code.co_filename != old.co_filename or code.co_firstlineno == old.co_firstlineno)


def check_side(fn: object, colour: Literal["sync", "async"], where: str) -> None:
    """Check that `fn` can be this side of a pair; a `def` can be the async one, if it shows that it is awaited.

    Raises:
        PairError: it is no callable, has the other colour, or takes nothing but what LangChain fills in.
    """
    if not callable(fn):
        raise PairError(f"{where}: expected a function, got {fn!r}")
    fits = is_async(fn) or _gives_awaitable(fn) if colour == "async" else not is_async(fn)
    if not fits:
        other = "async_" if colour == "sync" else "sync"
        is_argument = where.startswith(("dual", "@"))  # and not the method of a pair, which has its other side
        wrapped = "; if it returns an awaitable, write async def get(name): return await client.get(name), say"
        raise PairError(
            f"{where}: {describe(fn)} is {'async' if colour == 'sync' else 'not async'}, so it can't be the {colour} "
            f"side; {f'give it as {other}=, or ' if is_argument else ''}write the {colour} one"
            f"{wrapped if colour == 'async' else ''}"
        )
    signature = signature_of(fn)
    injected = [] if signature is None else list(signature.parameters)
    if injected and all(name in INJECTED for name in injected):
        raise PairError(
            f"{where}: {describe(fn)} takes only {' and '.join(injected)}, which LangChain fills in, and a runnable is "
            f"called with one input; rename {injected[0]}, or add a parameter, as in "
            f"def fetch({', '.join(['query', *injected])})"
        )


def check_pair(sync: Callable[..., Any] | None, async_: Callable[..., Any] | None, where: str) -> None:
    """Check that two functions are two implementations of one; of a single one, that it can be that side.

    Raises:
        PairError: their colours, their parameters or their kinds (generator or not) do not fit.
    """
    if sync is not None:
        check_side(sync, "sync", where)
    if async_ is not None:
        check_side(async_, "async", where)
    if sync is None or async_ is None:
        return
    if is_generator(sync) != is_generator(async_):
        generator, other = (sync, async_) if is_generator(sync) else (async_, sync)
        raise PairError(
            f"{where}: {describe(generator)} is a generator and {describe(other)} is not; both must yield, or neither"
        )
    if not same_parameters(sync, async_):
        raise PairError(
            f"{where}: the two sides take different parameters; make them the same\n"
            f"  sync   {signature_of(sync)}  {describe(sync)}\n"
            f"  async  {signature_of(async_)}  {describe(async_)}"
        )


_EMPTY_BODY = {
    "RESUME",
    "NOP",
    "CACHE",
    "COPY_FREE_VARS",
    "MAKE_CELL",
    "RETURN_GENERATOR",
    "POP_TOP",
    "LOAD_CONST",
    "RETURN_CONST",
    "RETURN_VALUE",
    "CALL_INTRINSIC_1",  # these two end every coroutine since Python 3.12
    "RERAISE",
    "LOAD_GLOBAL",  # these, only for `raise NotImplementedError`, with or without parentheses, with or without a text
    "PUSH_NULL",
    "PRECALL",
    "CALL",
    "RAISE_VARARGS",
}


def has_empty_body(fn: Callable[..., Any]) -> bool:
    """Tell whether a function does nothing: a docstring, `...`, `pass`, `raise NotImplementedError`.

    The last is what a type checker accepts for a stub that promises a result.
    """
    allowed = {"LOAD_CONST": None, "RETURN_CONST": None, "LOAD_GLOBAL": "NotImplementedError"}
    instructions = list(dis.get_instructions(fn))
    is_text = [
        one.opname == "LOAD_CONST" and isinstance(one.argval, str) and after.opname in ("PRECALL", "CALL")
        for one, after in itertools.pairwise(instructions)
    ]
    reads, raises = (any(one.opname == name for one in instructions) for name in ("LOAD_GLOBAL", "RAISE_VARARGS"))
    return reads == raises and all(
        instruction.opname in _EMPTY_BODY
        and (instruction.opname not in allowed or instruction.argval == allowed[instruction.opname] or is_message)
        for instruction, is_message in zip(instructions, [*is_text, False], strict=True)
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """How a function takes its input and what it gives back, looked up once.

    `required` are the names of the parameters that have no default, without those that LangChain injects;
    `names` are those of all parameters, except for what stands for any number;
    `places` is how many arguments can be given without a name, and `takes_keywords` says that any name will do;
    `takes_input_alone` says that a call needs nothing but the input: neither spread over parameters, nor a config;
    and that what is given beside it is taken by name.
    """

    is_async: bool
    is_generator: bool
    takes_config: bool
    takes_run_manager: bool
    required: tuple[str, ...]
    positional_only: tuple[str, ...]
    keyword_only: tuple[str, ...]
    names: frozenset[str]
    places: float
    takes_keywords: bool
    takes_input_alone: bool = field(init=False)

    def __post_init__(self) -> None:
        """Work out what follows from the rest."""
        by_keyword = self.takes_keywords_alone or any(name in self.keyword_only for name in self.required)
        is_spread = by_keyword or len(self.required) > 1
        is_placed = len(self.positional_only) > 1
        is_special = is_spread or is_placed or self.takes_nothing or self.takes_any_keywords
        takes_input_alone = not (is_special or self.takes_config or self.takes_run_manager)
        object.__setattr__(self, "takes_input_alone", takes_input_alone)

    def called_like(self, own: Shape) -> Shape:
        """Return the shape of the same function, if it takes its input as another does in whose place it is."""
        return dataclasses.replace(
            self,
            required=own.required,
            positional_only=own.positional_only,
            keyword_only=own.keyword_only,
            names=own.names,
            places=own.places,
            takes_keywords=own.takes_keywords,
        )

    def arguments(
        self, fn: Callable[..., Any], value: Any, kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what to call `fn` with: the value itself, or a mapping spread over several parameters or `**` alone.

        Raises:
            TypeError: `fn` takes a mapping, and the value is none that has what it needs; or it takes no input.
        """
        if self.takes_nothing:
            kind, is_mapping = type(value).__name__, isinstance(value, Mapping)
            if value is None or (is_mapping and not value):
                return (), dict(kwargs)
            raise TypeError(
                f"{describe(fn)} takes no input: give it None or an empty mapping, not {kind}"
                f"{' with keys' if is_mapping else ''}; in a pipe put (lambda _: None) before it"
            )
        missing = [name for name in self.required if name not in kwargs]
        if len(missing) <= 1 and not self.takes_any_keywords:
            name = missing[0] if missing else self._optional_input(kwargs)
            if self.positional_only and name not in kwargs:
                return self._by_place(fn, {name: value, **kwargs})
            if name in self.keyword_only or name in self.required[1:]:  # the others before it are in `kwargs`
                return (), {name: value, **kwargs}
            return (value,), dict(kwargs)
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{describe(fn)} takes {', '.join(missing) or 'keywords of any name'}: its input must be a mapping"
                f"{' with these keys' if missing else ''}, not {type(value).__name__}{_instead_of(missing)}"
            )
        given = cast("Mapping[str, Any]", value)
        if absent := [name for name in missing if name not in given]:
            raise TypeError(
                f"{describe(fn)} takes {', '.join(missing)}: its input has no {', '.join(absent)}; "
                f"it has {', '.join(map(str, given)) or 'nothing'}{_instead_of(absent)}"
            )
        if not self.takes_keywords and (extra := [key for key in given if key not in self.names]):
            raise TypeError(
                f"{describe(fn)} takes {', '.join(missing)}: its input also has {', '.join(map(str, extra))}; pick "
                "the keys, or add **rest to the function"
            )
        return self._by_place(fn, {**given, **kwargs})

    @property
    def takes_anything(self) -> bool:
        """Whether it has no parameters of its own, but takes whatever it is given, as a mock does."""
        return self.places == math.inf and not (self.required or self.positional_only or self.keyword_only)

    @property
    def takes_nothing(self) -> bool:
        """Whether it has no parameters of its own at all."""
        return self.places <= 0 and not (self.keyword_only or self.takes_keywords)

    @property
    def takes_any_keywords(self) -> bool:
        """Whether it has no parameters but one for keywords of any name."""
        return self.takes_keywords and self.places <= 0 and not self.keyword_only

    @property
    def takes_keywords_alone(self) -> bool:
        """Whether nothing can be given by its place."""
        return self.places == 0 and bool(self.keyword_only)

    def _optional_input(self, kwargs: Mapping[str, Any]) -> str:
        """Return the parameter that takes the input where none has to be given; "" if the first place does."""
        if self.takes_keywords_alone:
            return next((name for name in self.keyword_only if name not in kwargs), "")
        return next(iter(self.positional_only), "")

    def _by_place(self, fn: Callable[..., Any], spread: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments by name as `fn` takes them: those that have no keyword by their place."""
        by_place = [name for name in self.positional_only if name in spread]
        if by_place != list(self.positional_only[: len(by_place)]):  # one that is left out has its default
            parameters = inspect.signature(fn).parameters
            by_place = list(self.positional_only[: self.positional_only.index(by_place[-1]) + 1])
            spread = {name: parameters[name].default for name in by_place} | spread
        return tuple(spread.pop(name) for name in by_place), spread


_OF_LANGGRAPH = {"runtime": "get_runtime", "store": "get_store", "writer": "get_stream_writer"}
"""What LangGraph gives a plain function by a parameter's name, and what gives it anywhere."""


def _instead_of(names: list[str]) -> str:
    """Say what to call instead of the parameters that LangGraph fills in, if there are any among these."""
    filled = [name for name in names if name in _OF_LANGGRAPH]
    calls = ", ".join(f"{_OF_LANGGRAPH[name]}()" for name in filled)
    return f"; LangGraph gives {', '.join(filled)} to plain functions only: call {calls} in it" if filled else ""


def shape_of(fn: Callable[..., Any]) -> Shape:
    """Look at a function once, so that no call has to."""
    signature = signature_of(fn)
    parameters = list(signature.parameters.values()) if signature is not None else []
    own = [parameter for parameter in parameters if parameter.name not in INJECTED]
    named = {parameter.name for parameter in parameters if parameter.kind in _NAMED}
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    return Shape(
        is_async=is_async(fn),
        is_generator=is_generator(fn),
        takes_config="config" in named,
        takes_run_manager="run_manager" in named,
        required=tuple(
            parameter.name
            for parameter in own
            if parameter.default is Parameter.empty and parameter.kind not in _VARIADIC
        ),
        positional_only=tuple(
            p.name
            for p in own
            if p.kind is Parameter.POSITIONAL_ONLY
            and (p.default is Parameter.empty or not takes_any)  # else the name is one of the keywords
        ),
        keyword_only=tuple(p.name for p in own if p.kind is Parameter.KEYWORD_ONLY),
        names=frozenset(parameter.name for parameter in parameters if parameter.kind not in _VARIADIC),
        places=math.inf if signature is None else sum(_PLACES.get(p.kind, 0) for p in own),
        takes_keywords=takes_any,
    )
