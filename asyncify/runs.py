"""Is a run observed, and what does a run that nobody observes hand down to those inside it.

An observed run takes LangChain's own way. An unobserved one skips the callback managers that no one reads, and
must leave everything else that a user can see as it is: the child config above all.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context, copy_context
from types import FunctionType
from typing import Any, cast
from uuid import UUID

from langchain_core import globals as langchain_globals
from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.callbacks.manager import AsyncCallbackManager, CallbackManager
from langchain_core.runnables.config import (
    DEFAULT_RECURSION_LIMIT,
    RunnableConfig,
    ensure_config,
    patch_config,
    var_child_runnable_config,
)
from langchain_core.utils.env import env_var_is_set
from langchain_core.utils.uuid import uuid7

__all__ = ["RESERVED", "context_of", "is_reserved", "observed", "quiet_config", "recoloured"]

RESERVED = frozenset(
    ("run_type", "serialized", "func", "input_", "input", "value", "run_manager", "config", "defers_inputs")
)
"""Keyword arguments that LangChain's own path takes for itself: with one of them a call goes that way."""


def _is_pristine(init: object) -> bool:
    # Instrumentors (OpenInference, OpenLLMetry) add their handler by wrapping this constructor.
    return (
        isinstance(init, FunctionType)
        and init.__module__ == "langchain_core.callbacks.base"
        and not hasattr(init, "__wrapped__")
    )


def observed(config: RunnableConfig | None) -> bool:
    """Tell whether anybody watches a run that is started with this config here and now.

    True for a handler in the config or else in the ambient config, LangSmith tracing in any of its forms, debug
    mode, a configure hook that is set, and a callback manager class that somebody has instrumented.
    """
    callbacks = config.get("callbacks") if config else None
    if callbacks is None and (ambient := var_child_runnable_config.get()) is not None:
        callbacks = ambient.get("callbacks")
    if callbacks and (isinstance(callbacks, list) or callbacks.handlers or callbacks.inheritable_handlers):
        return True
    return (
        langchain_globals.get_debug()
        or not _is_pristine(CallbackManager.__init__)
        or not _is_pristine(AsyncCallbackManager.__init__)
        or _traced()
    )


def _traced() -> bool:
    # Imported late, as LangChain does: langsmith takes longer to import than all the rest.
    from langchain_core.tracers.context import (  # noqa: PLC0415
        _configure_hooks,  # pyright: ignore[reportPrivateUsage]
        tracing_v2_callback_var,
    )
    from langsmith.run_helpers import get_tracing_context  # noqa: PLC0415
    from langsmith.utils import tracing_is_enabled  # noqa: PLC0415  # pyright: ignore[reportUnknownVariableType]

    tracing = get_tracing_context()
    return (
        tracing["parent"] is not None
        or bool(tracing["tags"] or tracing["metadata"])
        or bool(tracing_is_enabled(tracing))
        or tracing_v2_callback_var.get() is not None
        or env_var_is_set("LANGCHAIN_TRACING")
        or env_var_is_set("LANGCHAIN_HANDLER")
        or any(
            variable.get() is not None or (switch is not None and handler is not None and env_var_is_set(switch))
            for variable, _, handler, switch in _configure_hooks
        )
    )


class _LazyRunId:
    """The run id that a child sees as its parent's, drawn when it is first looked at."""

    def __get__(self, manager: BaseCallbackManager, owner: type) -> UUID:
        run_id = manager.__dict__.get("parent_run_id")
        if run_id is None:
            run_id = manager.__dict__["parent_run_id"] = uuid7()
        return cast("UUID", run_id)

    def __set__(self, manager: BaseCallbackManager, run_id: UUID | None) -> None:
        manager.__dict__["parent_run_id"] = run_id


class _QuietManager(CallbackManager):
    """The callback manager of an unobserved run."""

    parent_run_id = _LazyRunId()  # pyright: ignore[reportAssignmentType]  (it stands in for the attribute)


class _AsyncQuietManager(AsyncCallbackManager):
    """The callback manager of an unobserved async run."""

    parent_run_id = _LazyRunId()  # pyright: ignore[reportAssignmentType]  (it stands in for the attribute)


def quiet_config(config: RunnableConfig | None, *, is_async: bool) -> RunnableConfig:
    """Return the config that an unobserved run hands to what runs inside it."""
    manager = (_AsyncQuietManager if is_async else _QuietManager)([])
    if not config and var_child_runnable_config.get() is None:
        return {
            "tags": [],
            "metadata": {},
            "callbacks": manager,
            "recursion_limit": DEFAULT_RECURSION_LIMIT,
            "configurable": {},
        }
    child = ensure_config(config)
    child.pop("run_name", None)
    child.pop("run_id", None)
    parent = child.get("callbacks")
    if isinstance(parent, BaseCallbackManager):
        manager.add_tags(parent.inheritable_tags)
        manager.add_metadata(parent.inheritable_metadata)
    manager.add_tags(child.get("tags") or [])
    manager.add_metadata(child.get("metadata") or {})
    child["callbacks"] = manager
    return child


def recoloured(config: RunnableConfig, *, is_async: bool) -> RunnableConfig:
    """Return a copy of a quiet config for a function of this colour: an async one gets an async manager."""
    manager = cast("BaseCallbackManager", config.get("callbacks"))
    callbacks = (_AsyncQuietManager if is_async else _QuietManager)(
        [],
        parent_run_id=manager.parent_run_id,
        tags=manager.tags.copy(),
        inheritable_tags=manager.inheritable_tags.copy(),
        metadata=manager.metadata.copy(),
        inheritable_metadata=manager.inheritable_metadata.copy(),
    )
    return patch_config(config, callbacks=callbacks)


def context_of(config: RunnableConfig) -> Context:
    """Return a copy of this context in which `config` is the ambient one."""
    context = copy_context()
    context.run(var_child_runnable_config.set, config)
    return context


def is_reserved(kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a keyword argument would collide with one of LangChain's own."""
    return bool(kwargs) and not RESERVED.isdisjoint(kwargs)
