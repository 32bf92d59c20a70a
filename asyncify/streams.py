"""One run's stream: made in the reader's own task, in the run's context, and closed as soon as its reader stops.

LangChain makes a task for each chunk. That breaks a timeout or a task group inside the generator, as it belongs to the
task that it was entered in.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextvars import Context
from types import coroutine
from typing import Any, cast

from langchain_core.callbacks.manager import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.runnables.config import (
    RunnableConfig,
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
    patch_config,
)
from langchain_core.tracers._streaming import _StreamingCallbackHandler

from asyncify.deadlock.holds import Link, Steps, held_by_this_thread
from asyncify.permits import get_innermost
from asyncify.relay import Relay
from asyncify.runs import context_of

__all__ = ["astart_run", "astream_run", "closable", "fold", "only", "start_run", "stream_run"]

Run = CallbackManagerForChainRun | None
AsyncRun = AsyncCallbackManagerForChainRun | None


def fold(total: Any, chunk: Any) -> Any:
    """Add a chunk to a total as LangChain does: by `+`, or else the last chunk wins. No chunks have the total None."""
    if total is None:
        return chunk
    try:
        return total + chunk
    except TypeError:
        return chunk


class _Sum:
    """The sum of a stream's chunks, kept only while a callback handler is to be told of it."""

    def __init__(self) -> None:
        self.value: Any = None
        self.is_told = True

    def add(self, chunk: Any) -> None:
        """Add the next chunk."""
        if self.is_told:
            self.value = fold(self.value, chunk)

    def of(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """Hand the chunks on and add them up."""
        for chunk in chunks:
            self.add(chunk)
            yield chunk

    async def aof(self, chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Hand the chunks on and add them up."""
        async for chunk in chunks:
            self.add(chunk)
            yield chunk


def _started(chunks: Iterator[Any]) -> Iterator[Any]:
    """Make the first chunk now, and return an iterator over that chunk and the rest."""
    return itertools.chain([*itertools.islice(chunks, 1)], chunks)


async def _astarted(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Make the first chunk now, and return an iterator over that chunk and the rest."""
    end = object()
    first = await anext(chunks, end)

    async def again() -> AsyncIterator[Any]:
        if first is not end:
            yield first
        async for chunk in chunks:
            yield chunk

    return again()


async def only(value: Any) -> AsyncGenerator[Any]:
    """Stream one value."""
    yield value


def closable(chunks: AsyncIterator[Any]) -> AsyncGenerator[Any]:
    """Return the stream itself if it is a generator, and so can be closed, or else wrap it in one."""
    return cast("AsyncGenerator[Any]", chunks) if isinstance(chunks, AsyncGenerator) else _generated(chunks)


async def _generated(chunks: AsyncIterator[Any]) -> AsyncGenerator[Any]:
    async for chunk in chunks:
        yield chunk


def start_run(config: RunnableConfig | None, name: str) -> tuple[RunnableConfig, CallbackManagerForChainRun]:
    """Start a run as LangChain does; return the config for the runs inside it, and its manager."""
    config = ensure_config(config)
    run = get_callback_manager_for_config(config).on_chain_start(
        None, {"input": ""}, name=config.get("run_name") or name, run_id=config.pop("run_id", None)
    )
    return patch_config(config, callbacks=run.get_child()), run


async def astart_run(
    config: RunnableConfig | None, name: str
) -> tuple[RunnableConfig, AsyncCallbackManagerForChainRun]:
    """Start an async run as LangChain does; return the config for the runs inside it, and its manager."""
    config = ensure_config(config)
    run = await get_async_callback_manager_for_config(config).on_chain_start(
        None, {"input": ""}, name=config.get("run_name") or name, run_id=config.pop("run_id", None)
    )
    return patch_config(config, callbacks=run.get_child()), run


def stream_run(
    transform: Callable[[Iterator[Any], Run, RunnableConfig], Generator[Any]],
    chunks: Iterator[Any],
    begin: Callable[[], tuple[RunnableConfig, Run]],
) -> Iterator[Any]:
    """Yield the chunks of a run, and report its end; if the reader stops early, the error is `GeneratorExit`.

    The previous run of a pipe starts first, and outside this run's context: so `begin`, which returns this run's config
    and its manager (None if nobody observes), is called only when the first input chunk is there.
    """
    received, sent, end = _Sum(), _Sum(), object()
    inputs = _started(received.of(chunks))
    config, run = begin()
    received.is_told = sent.is_told = run is not None and bool(run.handlers)  # else an endless stream would be kept
    context = context_of(config)
    outputs = transform(inputs, run, config)
    tapped = outputs if run is None else _tap(outputs, run)
    link = Link()
    try:
        while True:
            alone = get_innermost() is None
            chunk = context.run(next, tapped, end) if alone else _step(link, context, next, tapped, end)
            if chunk is end:
                break
            sent.add(chunk)
            yield chunk
    except BaseException as error:
        try:
            _step(link, context, outputs.close)
        finally:  # the generator may raise as it is closed
            if run is not None:
                run.on_chain_error(error, inputs=received.value)
        raise
    if run is not None:
        run.on_chain_end(sent.value, inputs=received.value)


async def astream_run(
    transform: Callable[[AsyncIterator[Any], AsyncRun, RunnableConfig], AsyncGenerator[Any]],
    chunks: AsyncIterator[Any],
    begin: Callable[[], Awaitable[tuple[RunnableConfig, AsyncRun]]],
) -> AsyncGenerator[Any, None]:
    """Yield the chunks of an async run, and report its end; if the reader stops early, the error is `GeneratorExit`."""
    received, sent = _Sum(), _Sum()
    inputs = await _astarted(received.aof(chunks))
    config, run = await begin()
    received.is_told = sent.is_told = run is not None and bool(run.handlers)
    context = context_of(config)
    outputs = transform(inputs, run, config)
    relay: Relay[Any] = Relay(outputs if run is None else closable(_atap(outputs, run)))
    steps = Steps(context)
    try:
        while True:
            try:
                chunk = await _take(anext(relay), steps)
            except StopAsyncIteration:
                break
            sent.add(chunk)
            with relay:
                yield chunk
    except BaseException as error:
        try:
            await _take(outputs.aclose(), steps)
        finally:
            if run is not None:
                await run.on_chain_error(error, inputs=received.value)
        raise
    finally:
        steps.close()
    if run is not None:
        await run.on_chain_end(sent.value, inputs=received.value)


def _step(link: Link, context: Context, step: Callable[..., Any], *args: Any) -> Any:
    """Take a step in another context, linked to the permits that this thread holds in its own."""
    link.held = held_by_this_thread()
    with link:
        return context.run(step, *args)


def _tap(chunks: Iterator[Any], run: CallbackManagerForChainRun) -> Iterator[Any]:
    """Pass the chunks through LangChain's event stream, if one listens to the run."""
    listeners: list[Any] = [handler for handler in run.handlers if isinstance(handler, _StreamingCallbackHandler)]
    return listeners[0].tap_output_iter(run.run_id, chunks) if listeners else chunks


def _atap(chunks: AsyncIterator[Any], run: AsyncCallbackManagerForChainRun) -> AsyncIterator[Any]:
    """Pass the chunks through LangChain's event stream, if one listens to the run."""
    listeners: list[Any] = [handler for handler in run.handlers if isinstance(handler, _StreamingCallbackHandler)]
    return listeners[0].tap_output_aiter(run.run_id, chunks) if listeners else chunks


@coroutine
def _take(awaitable: Awaitable[Any], steps: Steps) -> Generator[Any, Any, Any]:
    """Await something in this task, with each step of it in the stream's context."""
    context = steps.context
    waited = awaitable.__await__()
    try:
        steps.begin()
        waits_for = context.run(next, waited)
        while True:
            try:
                outcome = yield waits_for
            except BaseException as error:  # noqa: BLE001  (a cancellation above all: it belongs to the step)
                waits_for = context.run(waited.throw, error)
            else:
                waits_for = context.run(waited.send, outcome)
    except StopIteration as end:
        return end.value
    finally:
        steps.end()
