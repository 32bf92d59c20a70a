"""Entries: a side with its limit around it, which is what actually runs.

Each of the four makers below stands beside its twin. A slot is held from admission until the function itself has
ended, which for a thread may be after its caller has given up.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import aclosing, closing
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from asyncify.bridge import DEFAULT_THREADS, ThreadPool, background, call_guarded
from asyncify.errors import BridgeError
from asyncify.gate import Gate, Pass
from asyncify.signatures import Shape, describe, shape_of

__all__ = ["Bridge", "Entries", "Entry", "Kind", "make_entries"]

Bridge = Literal["thread", "error"] | Executor
Kind = Literal["native", "bridged", "missing"]
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One side, ready to run.

    `run` takes the function's own arguments and gives its result: a generator for a generator function, a
    coroutine on the async side. `shape` is that of the function that runs in the end.
    """

    run: Function
    fn: Function
    shape: Shape
    kind: Kind


@dataclass(frozen=True, slots=True)
class Entries:
    """The two entries of a pair."""

    sync: Entry
    async_: Entry


def make_entries(
    sync: Function | None, async_: Function | None, *, gate: Gate | None, bridge: Bridge, name: str
) -> Entries:
    """Put the limit around both sides, and make the one that is missing."""
    fn = sync or async_
    if gate is not None and fn is not None:
        gate = gate.before(fn)
    if sync is not None and async_ is not None:
        return Entries(_native(sync, _limited, gate), _native(async_, _alimited, gate))
    if sync is not None:
        return Entries(_native(sync, _limited, gate), _abridged(sync, gate, bridge, name))
    if async_ is not None:
        return Entries(_bridged(async_, gate, bridge), _native(async_, _alimited, gate))
    raise AssertionError("a pair has at least one side")


def _native(fn: Function, limited: Callable[[Function, Shape, Gate], Function], gate: Gate | None) -> Entry:
    shape = shape_of(fn)
    return Entry(fn if gate is None else limited(fn, shape, gate), fn, shape, "native")


def _limited(fn: Function, shape: Shape, gate: Gate) -> Function:
    def run(*args: Any, **kwargs: Any) -> Any:
        permit = gate.enter(args, kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            permit.leave(error)
            raise
        permit.leave()
        return result

    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        permit = gate.enter(args, kwargs)
        try:
            with closing(fn(*args, **kwargs)) as chunks:
                yield from chunks
        finally:
            permit.leave()

    return stream if shape.is_generator else run


def _alimited(fn: Function, shape: Shape, gate: Gate) -> Function:
    async def run(*args: Any, **kwargs: Any) -> Any:
        permit = await gate.aenter(args, kwargs)
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            permit.leave(error)
            raise
        permit.leave()
        return result

    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        permit = await gate.aenter(args, kwargs)
        try:
            async with aclosing(fn(*args, **kwargs)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            permit.leave()

    return stream if shape.is_generator else run


def _bridged(fn: Function, gate: Gate | None, bridge: Bridge) -> Entry:
    """Make the sync side of an async function: on the background loop."""
    shape = shape_of(fn)

    def run(*args: Any, **kwargs: Any) -> Any:
        return background.run(partial(fn, *args, **kwargs), copy_context())

    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        context = copy_context()  # one for all chunks, as a generator has one life
        chunks = fn(*args, **kwargs)
        try:
            while True:
                try:
                    yield background.run(chunks.__anext__, context)
                except StopAsyncIteration:
                    return
        finally:
            background.run(chunks.aclose, context)

    if bridge == "error":
        return Entry(_refuse(fn, "sync"), fn, shape, "missing")
    entry = stream if shape.is_generator else run
    return Entry(entry if gate is None else _limited(entry, shape, gate), fn, shape, "bridged")


def _abridged(fn: Function, gate: Gate | None, bridge: Bridge, name: str) -> Entry:
    """Make the async side of a sync function: on threads of its own, or on the executor that it was given."""
    if bridge == "error":
        return Entry(_arefuse(fn, "async"), fn, shape_of(fn), "missing")
    bounded = gate is not None and gate.limiter.bounds_calls
    executor = ThreadPool(None if bounded else DEFAULT_THREADS, name) if isinstance(bridge, str) else bridge
    shape = shape_of(fn)

    async def run(*args: Any, **kwargs: Any) -> Any:
        permit = await gate.aenter(args, kwargs) if gate is not None else None
        try:
            future = _submit(executor, permit, fn, args, kwargs)
        except BaseException:
            if permit is not None:
                permit.leave()
            raise
        if permit is not None:
            permit.step_out()
            future.add_done_callback(partial(_end, permit))
        result = await asyncio.wrap_future(future)
        return await result if inspect.iscoroutine(result) else result

    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        permit = await gate.aenter(args, kwargs) if gate is not None else None
        context = copy_context()
        end = object()
        try:
            chunks = fn(*args, **kwargs)
            try:
                while True:
                    chunk = await asyncio.wrap_future(executor.submit(lambda: context.run(next, chunks, end)))
                    if chunk is end:
                        return
                    yield chunk
            finally:
                chunks.close()
        finally:
            if permit is not None:
                permit.leave()

    return Entry(stream if shape.is_generator else run, fn, shape, "bridged")


def _end(permit: Pass, future: Future[Any]) -> None:
    permit.end(None if future.cancelled() else future.exception())


def _submit(
    executor: Executor, permit: Pass | None, fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Future[Any]:
    if isinstance(executor, ThreadPool):
        return executor.submit(copy_context().run, _run_in_thread, permit, fn, args, kwargs)
    return executor.submit(call_guarded, fn, *args, **kwargs)


def _run_in_thread(permit: Pass | None, fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if permit is not None:
        permit.move_to_this_thread()
    return call_guarded(fn, *args, **kwargs)


def _refuse(fn: Function, colour: str) -> Function:
    def run(*_args: Any, **_kwargs: Any) -> Any:
        raise BridgeError(_refusal(fn, colour))

    return run


def _arefuse(fn: Function, colour: str) -> Function:
    async def run(*_args: Any, **_kwargs: Any) -> Any:
        raise BridgeError(_refusal(fn, colour))

    return run


def _refusal(fn: Function, colour: str) -> str:
    argument = "async_" if colour == "async" else "sync"
    return (
        f'{describe(fn)} has no {colour} side and bridge="error" forbids to make one; '
        f"write it and give it as {argument}=, or drop the bridge argument"
    )
