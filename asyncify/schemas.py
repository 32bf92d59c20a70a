"""What a function's parameters are to a model: a schema, and a tool that takes them one by one.

LangChain's `tool` makes one of a runnable too, if its input is an object: it asks for the schema, takes the `repr` for
a description, and calls the runnable with a mapping. A pair answers `tool`, and nobody else, as its function would.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, get_args, get_origin, get_type_hints

from langchain_core.callbacks import Callbacks
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.utils.pydantic import get_fields
from pydantic import BaseModel, ConfigDict, Field, RootModel, create_model
from typing_extensions import is_typeddict

from asyncify.errors import PairError
from asyncify.runs import RESERVED
from asyncify.signatures import INJECTED, UNRESOLVED, describe, resolved, shape_of, signature_of, without_partials

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool  # which takes long to import, and most programs make no tool

__all__ = [
    "asks_for_tool",
    "description_of",
    "from_tool",
    "is_from_tool",
    "keys_schema",
    "parameters_schema",
    "resolved_input",
    "resolved_output",
    "schema_of_types",
    "tool_of",
    "tool_schema",
]

Function = Callable[..., Any]

_CALLBACKS = "callbacks"
"""The parameter that a tool gives the callback manager of its run, whatever its type."""


@dataclass(frozen=True, slots=True)
class _Argument:
    """One that `tool` hands on: its type tells a mapping of arguments from a mapping that is an input itself."""

    value: Any


class _Parameters(BaseModel):
    """A model of a function's parameters, which may be of any class."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


class _Arguments(_Parameters):
    """A model out of which `tool` reads the arguments that it hands on."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return _Argument(value) if name in type(self).model_fields else value


def asks_for_tool(frame: FrameType | None) -> bool:
    """Tell whether the frame is that of `tool`, just making a tool; there is none where the interpreter itself asks."""
    if frame is None or frame.f_code.co_name != "_tool_factory":
        return False
    return frame.f_globals.get("__name__") == "langchain_core.tools.convert"


def is_from_tool(value: Any) -> TypeGuard[dict[str, _Argument]]:
    """Tell whether a dict is what a tool made by `tool` calls a pair with."""
    return type(next(iter(value.values()), None)) is _Argument


def from_tool(fn: Function, value: dict[str, _Argument]) -> tuple[Any, dict[str, Any]]:
    """Return what such a mapping means: the input, and what is handed on beside it."""
    return _split(fn, {name: argument.value for name, argument in value.items()})


def tool_schema(fn: Function, name: str) -> type[BaseModel]:
    """Return the function's parameters as `tool` is to take them."""
    _check_names(fn)
    return _arguments_schema(fn, name, _Arguments)


def resolved_input(fn: Function) -> Any:
    """Return the type of the first parameter, whose annotation may be a string."""
    return next((_hints(fn).get(parameter.name, Any) for parameter in _parameters(fn)), Any)


def resolved_output(fn: Function) -> Any:
    """Return the type of the result, whose annotation is a string; of an iterator that of its chunks."""
    try:
        result = resolved(fn, inspect.signature(fn).return_annotation)
    except UNRESOLVED:
        return Any
    return get_args(result)[0] if get_origin(result) in (Iterator, AsyncIterator) else result


def keys_schema(fn: Function, name: str, own: type[BaseModel]) -> type[BaseModel] | None:
    """Return the keys of an input that is a mapping, where LangChain takes them for a tool's arguments.

    These are a `TypedDict`'s, and those that LangChain has seen the function read: `own` is its schema of the input.
    """
    kind = resolved_input(fn)
    if is_typeddict(kind):
        keys: dict[str, Any] = {key: (value, ...) for key, value in get_type_hints(kind).items()}
        return create_model(name, **keys)
    return None if own is kind or issubclass(own, RootModel) else own


def description_of(fn: Function, name: str) -> str:
    """Return what a model is told of the function: its docs, or else its name; of a partial, its function's."""
    return inspect.getdoc(without_partials(fn)) or name


def schema_of_types(name: str, types: dict[str, type]) -> type[BaseModel]:
    """Return a model with a required field of each type."""
    fields: dict[str, Any] = {field: (kind, ...) for field, kind in types.items()}
    return create_model(name, **fields)


def parameters_schema(fn: Function, name: str) -> type[BaseModel]:
    """Return a model whose fields are the function's parameters, with their types and defaults."""
    return create_model(name, __base__=_Parameters, **_fields(fn))


def _arguments_schema(fn: Function, name: str, base: type[BaseModel]) -> type[BaseModel]:
    """Return a model of what a tool calls the function with; what LangChain injects is in it, kept from the model."""
    from langchain_core.tools import InjectedToolArg  # noqa: PLC0415  (only a tool needs it)

    _check_types(fn)
    injected: dict[str, Any] = dict.fromkeys(_configs(fn), (Annotated[Any, InjectedToolArg], None))
    fields = {name: field for name, field in _fields(fn).items() if name != _CALLBACKS}
    return create_model(name, __base__=base, __doc__=inspect.getdoc(without_partials(fn)), **fields | injected)


def _fields(fn: Function) -> dict[str, Any]:
    hints = _hints(fn)
    return {
        parameter.name: (
            _described(hints.get(parameter.name, Any)),
            ... if parameter.default is Parameter.empty else parameter.default,
        )
        for parameter in _parameters(fn)
    }


def _described(kind: Any) -> Any:
    """Return a type with a text beside it, as in `Annotated[str, "a city"]`, for its description, as LangChain does."""
    said = [extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, str)]
    return Annotated[kind, Field(description=said[0])] if said else kind


def _configs(fn: Function) -> list[str]:
    """Return the parameters that a tool gives the config of its call, as their type says."""
    return [name for name, hint in _hints(fn).items() if any(t is RunnableConfig for t in (hint, *get_args(hint)))]


def _check_types(fn: Function) -> None:
    """Check that the type of each parameter is known.

    Raises:
        PairError: one is not, and it could be one that is to be kept from the model.
    """
    hints = _hints(fn)
    if unknown := [parameter for parameter in _parameters(fn) if parameter.name not in hints]:
        raise PairError(
            f"{describe(fn)} can't be a tool: nothing is known at run time of the type in {unknown[0]}, which a model "
            "might not be meant to see; import what it names outside of TYPE_CHECKING, at the top of the module"
        )


def _check_names(fn: Function) -> None:
    """Check that a model has arguments to give, and that what a tool hands on beside the input reaches the function.

    Raises:
        PairError: there are none, though it takes some; or one is called as something of LangChain's own or as
            what pydantic keeps private.
    """
    parameters, configs = _parameters(fn), _configs(fn)
    if all(parameter.name == _CALLBACKS for parameter in parameters) and not shape_of(fn).takes_nothing:
        raise PairError(f"{describe(fn)} can't be a tool: it has no parameter that a model could give by its name")
    required = [p.name for p in parameters if p.default is Parameter.empty and p.name not in configs]
    if private := [name for name in required if name.startswith("_")]:
        raise PairError(
            f"{describe(fn)} can't be a tool: a model gives no argument whose name begins with an underscore; rename "
            f"{', '.join(private)}"
        )
    beside = [] if len(shape_of(fn).required) > 1 else [parameter.name for parameter in parameters[1:]]
    if taken := RESERVED.intersection(beside):
        raise PairError(
            f"{describe(fn)} can't be a tool: LangChain keeps {', '.join(taken)} for itself where a function has one "
            "required parameter; rename it"
        )


def _parameters(fn: Function) -> list[Parameter]:
    signature = signature_of(fn)
    parameters: list[Parameter] = [] if signature is None else [*signature.parameters.values()]
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [p for p in parameters if p.name not in INJECTED and p.kind not in variadic]


def _hints(fn: Function) -> dict[str, Any]:
    """Return the parameters' types, each for itself, without those that only a type checker can resolve."""
    hints: dict[str, Any] = {}
    for parameter in _parameters(fn):
        with contextlib.suppress(*UNRESOLVED):
            hints[parameter.name] = resolved(fn, parameter.annotation)
    return hints


def tool_of(
    runnable: Runnable[Any, Any],
    fn: Function,
    *,
    name: str,
    description: str | None,
    keys: type[BaseModel] | None,
    schema: type[BaseModel] | None,
) -> BaseTool:
    """Return a tool that calls the runnable, on either path, with the function's parameters or its input's keys.

    `schema` describes the parameters otherwise than the function does; or the keys of its input, if that is a mapping.
    """
    from langchain_core.tools import StructuredTool  # noqa: PLC0415  (only a tool needs it)

    is_of_keys = schema is not None and _describes_keys(fn, schema)
    if keys is None and not is_of_keys:
        _check_names(fn)

    def taken(alone: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if keys is not None:
            return (alone[0] if alone else given), {}
        if alone or is_of_keys:
            given = {_parameters(fn)[0].name: alone[0] if alone else given}
        return _split(fn, given)

    def run(*alone: Any, callbacks: Callbacks = None, **given: Any) -> Any:
        value, rest = taken(alone, given)
        return runnable.invoke(value, {"callbacks": callbacks}, **rest)

    async def arun(*alone: Any, callbacks: Callbacks = None, **given: Any) -> Any:
        value, rest = taken(alone, given)
        return await runnable.ainvoke(value, {"callbacks": callbacks}, **rest)

    return StructuredTool.from_function(
        run,
        arun,
        name=name,
        description=description or description_of(fn, name),
        args_schema=schema or keys or _arguments_schema(fn, name, _Parameters),
    )


def _describes_keys(fn: Function, schema: type[BaseModel] | dict[str, Any]) -> bool:
    """Tell whether a schema names none of a function's parameters, the one required of which takes a mapping."""
    kind = resolved_input(fn)
    kind = get_origin(kind) or kind
    is_mapping = isinstance(kind, type) and issubclass(kind, Mapping)
    if not is_mapping or len(shape_of(fn).required) > 1:
        return False
    described: Mapping[str, Any] = schema.get("properties", {}) if isinstance(schema, dict) else get_fields(schema)
    return described.keys().isdisjoint(parameter.name for parameter in _parameters(fn))


def _split(fn: Function, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a tool's arguments as a runnable takes them: its input, and what is handed on beside it.

    Among them is what LangChain injects into a function by a parameter's type or name, and into no runnable.
    """
    uses = _uses_of(fn)
    if uses.configs or uses.callbacks:
        config = ensure_config()  # that of the tool's run, which is the ambient one
        given |= dict.fromkeys(uses.configs, config)
        if uses.callbacks:
            given[_CALLBACKS] = config.get("callbacks")
    if uses.first is None:
        return given, {}
    value = given.pop(uses.first.name, uses.first.default)
    if value is Parameter.empty:
        raise TypeError(
            f"{describe(fn)} takes {uses.first.name}: the tool's arguments have no {uses.first.name}; they have "
            f"{', '.join(given) or 'nothing'}"
        )
    return value, given


@dataclass(frozen=True, slots=True)
class _Uses:
    """What a function makes of a tool's arguments."""

    configs: tuple[str, ...]
    """The parameters that are given the config."""

    callbacks: bool
    """Whether it is given the callbacks."""

    first: Parameter | None
    """The parameter that is the input; None if all of them are."""


_known: weakref.WeakKeyDictionary[Function, _Uses] = weakref.WeakKeyDictionary()


def _uses_of(fn: Function) -> _Uses:
    """Look at a function once, so that no call of a tool has to."""
    with contextlib.suppress(KeyError, TypeError):  # of what has no hash, or takes no weak reference
        return _known[fn]
    parameters = _parameters(fn)
    is_spread = len(shape_of(fn).required) > 1 or not parameters
    uses = _Uses(
        configs=tuple(_configs(fn)),
        callbacks=any(parameter.name == _CALLBACKS for parameter in parameters),
        first=None if is_spread else parameters[0],
    )
    with contextlib.suppress(TypeError):
        _known[fn] = uses
    return uses
