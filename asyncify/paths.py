"""How a pair runs, on the sync and on the async path: directly if nobody observes it, or inside a LangChain run.

This module, `runs`, `pipes`, `streams`, `schemas` and `runnable` know most of LangChain's insides.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing, closing
from typing import Any, TypeGuard, cast

from langchain_core.callbacks.manager import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.base import Runnable
from langchain_core.runnables.config import DEFAULT_RECURSION_LIMIT, RunnableConfig, ensure_config, patch_config
from typing_extensions import TypeVar

from asyncify.entries import Entries, Entry
from asyncify.pipes import Piped
from asyncify.relay import Relay
from asyncify.runs import context_of, is_reserved, observed, quiet_config, recoloured, signed
from asyncify.schemas import from_tool, is_from_tool
from asyncify.streams import astart_run, closable, fold, start_run

__all__ = ["Paths"]

Input = TypeVar("Input", default=Any)
Output = TypeVar("Output", default=Any)
Function = Callable[..., Any]
ChainRun = CallbackManagerForChainRun | AsyncCallbackManagerForChainRun


class Paths(Piped, RunnableLambda[Input, Output]):
    """A runnable that runs a sync and an async entry; its subclass `Dual` sets them, and is all else that a pair is."""

    __wrapped__: Function
    _live: Entries

    def __init_subclass__(cls, **options: Any) -> None:
        """Make pipes and batches run a subclass's own `invoke` and `ainvoke`, if it overrides them."""
        super().__init_subclass__(**options)
        made: Any = cls
        if cls.invoke is not Paths.invoke:
            made._run_unobserved = _run_by_invoke
        if cls.ainvoke is not Paths.ainvoke:
            made._start_unobserved = _start_by_ainvoke

    def _notice_override(self, name: str) -> None:
        """Make pipes and batches run an `invoke` or `ainvoke` that was set on this very instance, as a test does."""
        if name in _RUN_BY:
            unobserved, run = _RUN_BY[name]
            vars(self).pop(unobserved, None)
            if name in vars(self):
                vars(self)[unobserved] = functools.partial(run, self)

    @property
    def _runs_by_invoke(self) -> bool:
        """Whether an overridden `invoke` is run, which may do something else than run the sync side."""
        return getattr(self._run_unobserved, "__func__", None) is not Paths._run_unobserved

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Run the sync side on one input."""
        value: Any = input
        if type(value) is dict and is_from_tool(value):
            value, kwargs = from_tool(self.__wrapped__, value)
        entry = self._live.sync
        if _needs_a_run(entry) or (kwargs and is_reserved(kwargs)) or observed(config):
            return self._invoke_upstream(value, config, kwargs)
        return cast("Output", self._run(entry, value, config, kwargs))

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Run the async side on one input, in a task of its own."""
        value: Any = input
        if type(value) is dict and is_from_tool(value):
            value, kwargs = from_tool(self.__wrapped__, value)
        entry = self._live.async_
        if _needs_a_run(entry) or (kwargs and is_reserved(kwargs)) or observed(config):
            return await super().ainvoke(cast("Input", value), config, **kwargs)
        return cast("Output", await self._start(entry, value, config, kwargs))

    def _needs_a_run(self, *, is_async: bool) -> bool:
        """Tell whether a side needs a run of LangChain's even when nobody observes it."""
        return _needs_a_run(self._live.async_ if is_async else self._live.sync)

    def _run_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> Any:
        """Run the sync side, where the run is known to be unobserved."""
        return self._run(self._live.sync, value, config, kwargs)

    def _start_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> asyncio.Task[Any]:
        """Start the async side, where the run is known to be unobserved."""
        return self._start(self._live.async_, value, config, kwargs)

    def _invoke_upstream(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> Output:
        if hasattr(self, "func"):
            return super().invoke(value, config, **kwargs)
        return self._call_with_config(self._invoke, value, ensure_config(config), **kwargs)

    def _run(self, entry: Entry, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> Any:
        child = quiet_config(config, is_async=False)
        context = context_of(child)
        if entry.shape.takes_input_alone:
            output = context.run(entry.run, value, **kwargs)
        else:
            args, kwargs = _arguments(entry, value, child, kwargs)
            output = context.run(entry.run, *args, **kwargs)
        if _is_runnable(output):
            return context.run(self._hand_on, output, value, child)
        return output

    def _hand_on(self, output: Runnable[Any, Any], value: Any, config: RunnableConfig) -> Any:
        return output.invoke(value, self._one_deeper(config, value))

    def _start(
        self, entry: Entry, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]
    ) -> asyncio.Task[Any]:
        """Start the async side in a task of its own."""
        child = quiet_config(config, is_async=True)
        context = context_of(child)
        return asyncio.get_running_loop().create_task(self._arun(entry, value, child, kwargs), context=context)

    async def _arun(self, entry: Entry, value: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> Any:
        if entry.shape.takes_input_alone:
            output = await entry.run(value, **kwargs)
        else:
            args, kwargs = _arguments(entry, value, config, kwargs)
            output = await entry.run(*args, **kwargs)
        if _is_runnable(output):
            return await output.ainvoke(value, self._one_deeper(config, value))
        return output

    # LangChain calls the next four on an observed run, inside the run that it has started.

    @signed
    def _invoke(
        self, input_: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> Any:
        entry = self._live.sync
        args, kwargs = self._inject(entry, input_, run_manager, config, kwargs)
        if entry.shape.is_generator:
            with closing(entry.run(*args, **kwargs)) as chunks:
                return functools.reduce(fold, chunks, None)
        output = entry.run(*args, **kwargs)
        if _is_runnable(output):
            return output.invoke(input_, self._one_deeper(config, input_))
        return output

    @signed
    async def _ainvoke(
        self, value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> Any:
        entry = self._live.async_
        args, kwargs = self._inject(entry, value, run_manager, config, kwargs)
        if entry.shape.is_generator:
            folded = None
            async with aclosing(entry.run(*args, **kwargs)) as chunks:
                async for chunk in chunks:
                    folded = fold(folded, chunk)
            return folded
        output = await entry.run(*args, **kwargs)
        if _is_runnable(output):
            return await output.ainvoke(value, self._one_deeper(config, value))
        return output

    @signed
    def _transform(
        self,
        chunks: Iterator[Any],
        run_manager: CallbackManagerForChainRun | None,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Generator[Any, None, None]:
        value = functools.reduce(fold, chunks, None)
        entry = self._live.sync
        args, kwargs = self._inject(entry, value, run_manager, config, kwargs)
        if entry.shape.is_generator:
            with closing(entry.run(*args, **kwargs)) as output_chunks:
                yield from output_chunks
            return
        output = entry.run(*args, **kwargs)
        if _is_runnable(output):
            yield from output.stream(value, self._one_deeper(config, value))
        else:
            yield output

    @signed
    async def _atransform(
        self,
        chunks: AsyncIterator[Any],
        run_manager: AsyncCallbackManagerForChainRun | None,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        value = None
        async for chunk in chunks:
            value = fold(value, chunk)
        entry = self._live.async_
        args, kwargs = self._inject(entry, value, run_manager, config, kwargs)
        if entry.shape.is_generator:
            made = entry.run(*args, **kwargs)
        else:
            output = await entry.run(*args, **kwargs)
            if not _is_runnable(output):
                yield output
                return
            made = closable(output.astream(value, self._one_deeper(config, value)))
        async with aclosing(made) as output_chunks:
            relay: Relay[Any] = Relay(output_chunks)
            async for chunk in relay:
                with relay:
                    yield chunk

    def _begin(self, config: RunnableConfig | None) -> tuple[RunnableConfig, CallbackManagerForChainRun | None]:
        """Begin a streaming run; return the config for what is inside it, and its manager, None if nobody needs one."""
        if self._live.sync.shape.takes_run_manager or observed(config):
            return start_run(config, self.get_name())
        return quiet_config(config, is_async=False), None

    async def _abegin(
        self, config: RunnableConfig | None
    ) -> tuple[RunnableConfig, AsyncCallbackManagerForChainRun | None]:
        """Begin an async streaming run; return its inner config, and its manager, None if nobody needs one."""
        if self._live.async_.shape.takes_run_manager or observed(config):
            return await astart_run(config, self.get_name())
        return quiet_config(config, is_async=True), None

    def _inject(
        self, entry: Entry, value: Any, run_manager: ChainRun | None, config: RunnableConfig, kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the function's arguments, with a config and a run manager if the function has parameters for them."""
        if run_manager is None:
            return _arguments(entry, value, config, kwargs)
        shape = entry.shape
        args, kwargs = shape.arguments(entry.fn, value, kwargs)
        manager = _in_colour_of(is_async=shape.is_async, run_manager=run_manager)
        if shape.takes_config:
            kwargs["config"] = patch_config(config, callbacks=manager.get_child())
        if shape.takes_run_manager:
            kwargs["run_manager"] = manager
        return args, kwargs

    def _one_deeper(self, config: RunnableConfig, value: Any) -> RunnableConfig:
        """Return the config, one recursion level deeper, for a runnable that the function has returned."""
        limit = config.get("recursion_limit", DEFAULT_RECURSION_LIMIT)
        if limit <= 0:
            raise RecursionError(f"Recursion limit reached when invoking {self} with input {value}.")
        return patch_config(config, recursion_limit=limit - 1)


def _run_by_invoke(pair: Runnable[Any, Any], value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> Any:
    return pair.invoke(value, config, **kwargs)


def _start_by_ainvoke(
    pair: Runnable[Any, Any],
    value: Any,
    config: RunnableConfig | None,
    kwargs: dict[str, Any],
) -> asyncio.Task[Any]:
    async def call() -> Any:
        # An override may raise as it is called, or return an awaitable that is no coroutine.
        return await pair.ainvoke(value, config, **kwargs)

    return asyncio.create_task(call())


_RUN_BY: dict[str, tuple[str, Function]] = {
    "invoke": ("_run_unobserved", _run_by_invoke),
    "ainvoke": ("_start_unobserved", _start_by_ainvoke),
}
"""For `invoke` and `ainvoke`: the method that an unobserved pipe or batch calls instead, and the function that replaces
that method once `invoke` or `ainvoke` is overridden, so that the override runs."""


def _needs_a_run(entry: Entry) -> bool:
    return entry.shape.is_generator or entry.shape.takes_run_manager


def _arguments(
    entry: Entry, value: Any, config: RunnableConfig, kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the function's arguments on an unobserved run, with a config if it has a parameter for one."""
    shape = entry.shape
    args, kwargs = shape.arguments(entry.fn, value, kwargs)
    if shape.takes_config:
        kwargs = {**kwargs, "config": recoloured(config, is_async=shape.is_async)}
    return args, kwargs


_NO_RUNNABLES = frozenset((type(None), bool, bytes, dict, float, int, list, str, tuple))
"""The types of most outputs: an `isinstance` of the abstract class `Runnable` takes seven times as long."""


def _is_runnable(output: object) -> TypeGuard[Runnable[Any, Any]]:
    return type(output) not in _NO_RUNNABLES and isinstance(output, Runnable)


def _in_colour_of(*, is_async: bool, run_manager: ChainRun) -> ChainRun:
    """Return the run manager in the function's colour: with methods to await for an async function, or plain ones."""
    if is_async == isinstance(run_manager, AsyncCallbackManagerForChainRun):
        return run_manager
    if isinstance(run_manager, AsyncCallbackManagerForChainRun):
        return run_manager.get_sync()
    return AsyncCallbackManagerForChainRun(
        run_id=run_manager.run_id,
        handlers=run_manager.handlers,
        inheritable_handlers=run_manager.inheritable_handlers,
        parent_run_id=run_manager.parent_run_id,
        tags=run_manager.tags,
        inheritable_tags=run_manager.inheritable_tags,
        metadata=run_manager.metadata,
        inheritable_metadata=run_manager.inheritable_metadata,
    )
