"""Whether a run is observed, and the config that an unobserved run hands down to the runs inside it.

An observed run takes LangChain's own way. An unobserved run skips the callback managers, which nobody reads, and
must keep everything else that a user can see as LangChain has it: the child config above all.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from contextvars import Context, copy_context
from types import FunctionType
from typing import Any, TypeVar, cast

from langchain_core import globals as langchain_globals
from langchain_core.callbacks import manager as callback_managers
from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.callbacks.manager import AsyncCallbackManager, CallbackManager
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnableSequence
from langchain_core.runnables.config import (
    DEFAULT_RECURSION_LIMIT,
    RunnableConfig,
    ensure_config,
    patch_config,
    var_child_runnable_config,
)
from langchain_core.utils.env import env_var_is_set
from langchain_core.utils.uuid import uuid7

__all__ = [
    "RESERVED",
    "config_of_steps",
    "context_of",
    "is_reserved",
    "observed",
    "quiet_config",
    "recoloured",
    "signed",
]

F = TypeVar("F", bound=Callable[..., Any])

# Bound once: Python would look up a method of an imported name anew at each call.
_get_ambient = var_child_runnable_config.get
_set_ambient = var_child_runnable_config.set

RESERVED = frozenset(("run_type", "serialized", "func", "input_", "input", "value", "run_manager", "defers_inputs"))
"""Keyword arguments that LangChain's own path takes for itself: a call with one of them takes LangChain's way."""


def is_reserved(kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a keyword argument would collide with one of LangChain's own."""
    return not RESERVED.isdisjoint(kwargs)


# --- is a run observed ---


def observed(config: RunnableConfig | None) -> bool:
    """Tell whether a run would be observed if it were started with this config here and now.

    It would be if the config, or else the ambient config, has a handler; under LangSmith tracing in any of its forms;
    in debug mode; if a configure hook is set; or if some code has instrumented a method of LangChain's.

    Raises:
        TypeError: `config` is no config.
    """
    try:
        callbacks: Any = config.get("callbacks") if config else None
    except AttributeError:
        raise TypeError(
            f'config={config!r}: must be a config, as in {{"tags": ["t"]}}; a runnable takes one input: a mapping if '
            "the function needs several arguments, and .call() and .acall() take them as the function does"
        ) from None
    if callbacks is None and (ambient := _get_ambient()) is not None:
        callbacks = ambient.get("callbacks")
    return (
        (callbacks is not None and _has_handlers(callbacks))
        or langchain_globals.get_debug()
        or _is_instrumented()
        or _is_traced()
        or _is_hooked()
    )


def _has_handlers(callbacks: object) -> bool:
    if isinstance(callbacks, BaseCallbackManager):
        return bool(callbacks.handlers or callbacks.inheritable_handlers)
    return bool(callbacks)


def _original(method: Callable[..., Any]) -> object:
    """Return LangChain's own function from under an instrumentation, or None if it can't be found."""
    function = inspect.unwrap(method)
    return function if type(function) is FunctionType and function.__module__.startswith("langchain_core.") else None


# Tracing products see runs by wrapping one of these: a constructor of the callback managers or the function that
# configures them, to add a handler, or one of the methods that start a run.
_managers: Any = callback_managers
_lambda: Any = RunnableLambda
_sequence: Any = RunnableSequence
_parallel: Any = RunnableParallel
_sync_init = _original(CallbackManager.__init__)
_async_init = _original(AsyncCallbackManager.__init__)
_configure = _original(_managers._configure)
_lambda_invoke = _original(_lambda.invoke)
_lambda_ainvoke = _original(_lambda.ainvoke)
_sequence_invoke = _original(_sequence.invoke)
_sequence_ainvoke = _original(_sequence.ainvoke)
_parallel_invoke = _original(_parallel.invoke)
_parallel_ainvoke = _original(_parallel.ainvoke)


def _is_instrumented() -> bool:
    # Compared one by one, as a loop takes four times as long; and by `is`, as a wrapper's `==` may be its function's.
    return (
        CallbackManager.__init__ is not _sync_init
        or AsyncCallbackManager.__init__ is not _async_init
        or _managers._configure is not _configure
        or _lambda.invoke is not _lambda_invoke
        or _lambda.ainvoke is not _lambda_ainvoke
        or _sequence.invoke is not _sequence_invoke
        or _sequence.ainvoke is not _sequence_ainvoke
        or _parallel.invoke is not _parallel_invoke
        or _parallel.ainvoke is not _parallel_ainvoke
    )


@functools.cache
def _tracer_context() -> Any:
    # Imported late, as LangChain does: langsmith takes longer to import than all the rest.
    from langchain_core.tracers import context  # noqa: PLC0415

    return context


def _is_traced() -> bool:
    return (
        _langsmith_reader()()
        or _tracer_context().tracing_v2_callback_var.get() is not None
        or _is_set("LANGCHAIN_TRACING")
        or _is_set("LANGCHAIN_HANDLER")
    )


def _is_hooked() -> bool:
    for variable, _, _, switch in _tracer_context()._configure_hooks:
        if variable.get() is not None or (switch is not None and _is_set(switch)):
            return True
    return False


def _is_set(variable: str) -> bool:
    """Tell whether LangChain counts an environment variable as set.

    A look-up in `os.environ` encodes, decodes, and raises for a missing name. The dictionary under it shows at once
    that a name is missing, as it nearly always is.
    """
    try:
        if _environment_key(variable) not in os.environ._data:  # type: ignore[attr-defined]
            return False
    except AttributeError:  # some code has replaced `os.environ` by another mapping
        pass
    return env_var_is_set(variable)


@functools.cache
def _environment_key(variable: str) -> object:
    environ: Any = os.environ
    return environ.encodekey(variable)


@functools.cache
def _langsmith_reader() -> Callable[[], bool]:
    """Return the function that tells whether LangSmith would trace a run here and now.

    The function reads LangSmith's private context variables, and the environment through LangSmith's own reader, which
    caches what it reads. For a version that keeps the variables elsewhere, it asks LangSmith's public functions.
    """
    from langsmith import utils  # noqa: PLC0415

    try:
        from langsmith._internal import _context  # noqa: PLC0415

        kept: Any = _context
        parent, tags, metadata = kept._PARENT_RUN_TREE_REF, kept._TAGS, kept._METADATA
        enabled, _ = kept._TRACING_ENABLED, kept._GLOBAL_TRACING_ENABLED
    except (ImportError, AttributeError):
        return _ask_langsmith
    from_environment: Callable[..., str] = utils.get_env_var

    def read() -> bool:
        if parent.get() is not None or tags.get() or metadata.get():
            return True
        switch = enabled.get()
        if switch is None:
            switch = kept._GLOBAL_TRACING_ENABLED
        if switch is not None:
            return bool(switch)
        return from_environment("TRACING_V2", default=from_environment("TRACING", default="")) == "true"

    return read


def _ask_langsmith() -> bool:
    from langsmith.run_helpers import get_tracing_context  # noqa: PLC0415
    from langsmith.utils import tracing_is_enabled  # noqa: PLC0415  # pyright: ignore[reportUnknownVariableType]

    tracing = get_tracing_context()
    return bool(tracing["parent"] is not None or tracing["tags"] or tracing["metadata"] or tracing_is_enabled(tracing))


# --- what an unobserved run hands down ---

_MADE_LATE: dict[str, Callable[[], Any]] = {
    "handlers": list,
    "inheritable_handlers": list,
    "parent_run_id": uuid7,
    "tags": list,
    "inheritable_tags": list,
    "metadata": dict,
    "inheritable_metadata": dict,
}


class _MadeLate:
    """A callback manager whose attributes are made at their first access, which hardly ever comes."""

    def __getattr__(self, name: str) -> Any:
        make = _MADE_LATE.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.__dict__.setdefault(name, make())


class _QuietManager(_MadeLate, CallbackManager):
    """The callback manager of an unobserved run."""


class _AsyncQuietManager(_MadeLate, AsyncCallbackManager):
    """The callback manager of an unobserved async run."""


_new: Callable[[type], Any] = object.__new__  # `__init__` would make all attributes


def quiet_config(config: RunnableConfig | None, *, is_async: bool) -> RunnableConfig:
    """Return the config that an unobserved run hands to the runs inside it."""
    manager = _new(_AsyncQuietManager if is_async else _QuietManager)
    if not config and _get_ambient() is None:
        return {
            "tags": [],
            "metadata": {},
            "callbacks": manager,
            "recursion_limit": DEFAULT_RECURSION_LIMIT,
            "configurable": {},
        }
    child = ensure_config(config)
    child.pop("run_name", None)
    if (run_id := child.pop("run_id", None)) is not None:
        manager.parent_run_id = run_id
    parent = child.get("callbacks")
    if isinstance(parent, BaseCallbackManager):
        manager.add_tags(parent.inheritable_tags)
        manager.add_metadata(parent.inheritable_metadata)
    if tags := child.get("tags"):
        manager.add_tags(tags)
    if metadata := child.get("metadata"):
        manager.add_metadata(metadata)
    child["callbacks"] = manager
    return child


def config_of_steps(config: RunnableConfig | None) -> RunnableConfig | None:
    """Return the config for the steps of an unobserved pipe or dict: without `run_id`, which is its own run's."""
    return config and cast("RunnableConfig", {key: value for key, value in config.items() if key != "run_id"})


def recoloured(config: RunnableConfig, *, is_async: bool) -> RunnableConfig:
    """Return a copy of a quiet config for a function of this colour: an async function gets an async manager."""
    manager = _new(_AsyncQuietManager if is_async else _QuietManager)
    quiet = config.get("callbacks")
    for name in _MADE_LATE:
        value: Any = getattr(quiet, name)
        setattr(manager, name, value.copy() if isinstance(value, list | dict) else value)
    return patch_config(config, callbacks=manager)


def context_of(config: RunnableConfig) -> Context:
    """Return a copy of this context in which `config` is the ambient one."""
    context = copy_context()
    context.run(_set_ambient, config)
    return context


class _Signed:
    """A method that is bound with a ready `__signature__`; `inspect` computes that of an ordinary one each time."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        signature = inspect.signature(method)
        self._signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __get__(self, instance: object, owner: type) -> Any:
        bound: Any = functools.partial(self._method, instance)
        bound.__signature__ = self._signature
        return bound


def signed(method: F) -> F:
    """Cache the signature of a method: LangChain asks for it twice in each run, which takes a quarter of the run."""
    return cast("F", _Signed(method))
