"""What a function's parameters are to a model: a schema, and a tool that takes them one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, get_type_hints

from langchain_core.callbacks import Callbacks
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool, StructuredTool
from pydantic import BaseModel, create_model

from asyncify.signatures import INJECTED, shape_of, signature_of

__all__ = ["parameters_schema", "tool_of"]

Function = Callable[..., Any]


def parameters_schema(fn: Function, name: str) -> type[BaseModel]:
    """Return a model whose fields are the function's parameters, with their types and defaults."""
    hints = _hints(fn)
    fields: dict[str, Any] = {
        parameter.name: (
            hints.get(parameter.name, Any),
            ... if parameter.default is Parameter.empty else parameter.default,
        )
        for parameter in _parameters(fn)
    }
    return create_model(name, **fields)


def _parameters(fn: Function) -> list[Parameter]:
    signature = signature_of(fn)
    parameters: list[Parameter] = [] if signature is None else [*signature.parameters.values()]
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [p for p in parameters if p.name not in INJECTED and p.kind not in variadic]


def _hints(fn: Function) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.unwrap(fn), include_extras=True)
    except (NameError, TypeError):  # a name that only a type checker knows; an object that has no annotations
        return {}


def tool_of(runnable: Runnable[Any, Any], fn: Function, *, name: str, description: str | None) -> BaseTool:
    """Return a tool that takes the function's parameters and calls the runnable with them, on either path."""

    def run(callbacks: Callbacks = None, **given: Any) -> Any:
        value, rest = _split(fn, given)
        return runnable.invoke(value, {"callbacks": callbacks}, **rest)

    async def arun(callbacks: Callbacks = None, **given: Any) -> Any:
        value, rest = _split(fn, given)
        return await runnable.ainvoke(value, {"callbacks": callbacks}, **rest)

    return StructuredTool.from_function(
        run,
        arun,
        name=name,
        description=description or inspect.getdoc(fn) or name,
        args_schema=parameters_schema(fn, name),
    )


def _split(fn: Function, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a tool's arguments as a runnable takes them: its input, and what is handed on beside it."""
    if len(shape_of(fn).required) > 1:
        return given, {}
    first, *_ = _parameters(fn)
    return given.pop(first.name, first.default), given
