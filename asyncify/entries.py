"""Entries: a side with its limit around it, which is what a call actually runs.

Each sync maker below stands beside its async twin. A slot is held from admission until the function itself has
ended, which in a thread may be after the caller has given up.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Executor
from contextlib import aclosing, closing
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from inspect import iscoroutine
from typing import Any, Literal, cast

from asyncify.background import background
from asyncify.deadlock.handover import (
    achunks_linked,
    asked,
    await_linked,
    call_linked,
    chunks_linked,
    run_in_background,
    waited_for_by_task,
)
from asyncify.deadlock.holds import Link
from asyncify.delegated import delegated
from asyncify.errors import BridgeError
from asyncify.gate import Gate
from asyncify.permits import FREE_PASS, Pass
from asyncify.pools import DEFAULT_THREADS, ThreadPool
from asyncify.relay import Relay
from asyncify.signatures import Shape, binds_by_itself, describe, shape_of
from asyncify.sources import END
from asyncify.traps import telling_if_held
from asyncify.watches import timed

__all__ = ["Bridge", "Entries", "Entry", "Kind", "make_entries"]

Bridge = Literal["thread", "error"] | Executor
Kind = Literal["native", "bridged", "missing"]
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One side, ready to run.

    `run` takes the function's own arguments and returns its result: a generator for a generator function, a
    coroutine on the async side. `fn` is the function that runs in the end, and `shape` is its shape.
    """

    run: Function
    fn: Function
    shape: Shape
    kind: Kind


@dataclass(frozen=True, slots=True)
class Entries:
    """The two entries of a pair.

    `timed` are the same two, with the async function timed step by step; they are used while a watch is on. None if the
    pair has no native async function.
    """

    sync: Entry
    async_: Entry
    timed: Entries | None = None


def make_entries(
    sync: Function | None,
    async_: Function | None,
    *,
    gate: Gate | None,
    bridge: Bridge,
    name: str,
    called_like: Function,
    warn: bool = False,
    is_method: bool = False,
) -> Entries:
    """Put the limit around both sides, and make the missing side.

    A side that takes any arguments, such as a mock in the place of the function, takes its input as `called_like` does.
    With `warn`, a sync call that is made on an event loop and holds it up warns. With `is_method`, the first argument
    is the instance or class that the sides are bound to.
    """
    if gate is not None:
        fn = cast("Function", async_ if sync is None else sync)
        gate = gate.before(called_like if shape_of(fn).takes_anything else fn)
    first = None if sync is None else _side(sync, called_like, is_method=is_method)
    make = partial(_entries, first, gate=gate, bridge=bridge, name=name, warn=warn)
    if async_ is None:
        return make(None)
    side = _awaited(_side(async_, called_like, is_method=is_method))
    watched = replace(side, run=timed(side.run, name, is_generator=side.shape.is_generator))
    return replace(make(side), timed=make(watched))


def _side(fn: Function, called_like: Function, *, is_method: bool) -> Entry:
    shape = shape_of(fn)
    run = partial(_call_bound, fn) if is_method and binds_by_itself(fn) else fn
    return Entry(run, fn, shape.called_like(shape_of(called_like)) if shape.takes_anything else shape, "native")


def _awaited(side: Entry) -> Entry:
    """Return a side that is called as an async function, even if it is a `def` that returns an awaitable."""
    return replace(side, shape=replace(side.shape, is_async=True))


def _call_bound(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method as Python does, by its `__get__`, which may do more than pass the instance as first argument."""
    if not args or args[0] is None:  # called on the class, with the instance as a keyword, missing or None
        return fn(*args, **kwargs)
    receiver, *others = args
    return fn.__get__(receiver, type(receiver))(*others, **kwargs)


def _entries(
    sync: Entry | None, async_: Entry | None, *, gate: Gate | None, bridge: Bridge, name: str, warn: bool
) -> Entries:
    entry = _native(sync, gate) if sync is not None else _bridged(cast("Entry", async_), gate, bridge)
    other = _anative(async_, gate) if async_ is not None else _abridged(cast("Entry", sync), gate, bridge, name)
    if warn and entry.kind != "missing":
        run = telling_if_held(entry.run, name, is_generator=entry.shape.is_generator)
        entry = replace(entry, run=run)
    return Entries(entry, other)


def _native(side: Entry, gate: Gate | None) -> Entry:
    return side if gate is None else replace(side, run=_limited(side.run, side.shape, gate))


def _anative(side: Entry, gate: Gate | None) -> Entry:
    return side if gate is None else replace(side, run=_alimited(side.run, side.shape, gate))


def _limited(fn: Function, shape: Shape, gate: Gate) -> Function:
    def run(*args: Any, **kwargs: Any) -> Any:
        permit = gate.enter(args, kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            permit.finish(error)
            raise
        permit.finish()
        return result

    def stream(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        permit = gate.enter(args, kwargs)
        try:
            with closing(_Limited(fn(*args, **kwargs), permit)) as chunks:
                result = yield from chunks
        except BaseException as error:
            permit.finish(error)
            raise
        permit.finish()
        return result

    return stream if shape.is_generator else run


class _Limited(Generator[Any, Any, Any]):
    """A generator that is under a permit only while it makes a chunk, as its next reader may be in another thread."""

    def __init__(self, chunks: Generator[Any, Any, Any], permit: Pass) -> None:
        self._chunks = chunks
        self._permit = permit
        permit.step_out()

    def __next__(self) -> Any:
        return self._step(self._chunks.__next__)

    def send(self, value: Any, /) -> Any:
        return self._step(self._chunks.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._chunks.throw, *error)

    def close(self) -> None:
        self._step(self._chunks.close)

    def _step(self, step: Callable[..., Any], *given: Any) -> Any:
        self._permit.move_to_this_thread()
        try:
            return step(*given)
        finally:
            self._permit.step_out()


def _alimited(fn: Function, shape: Shape, gate: Gate) -> Function:
    async def run(*args: Any, **kwargs: Any) -> Any:
        permit = await gate.aenter(args, kwargs)
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            permit.finish(error)
            raise
        permit.finish()
        return result

    async def stream(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        permit = await gate.aenter(args, kwargs)
        try:
            async with aclosing(fn(*args, **kwargs)) as chunks:
                relay: Relay[Any] = Relay(chunks)
                async for chunk in relay:
                    permit.step_out()
                    try:
                        with relay:
                            relay.sent = yield chunk
                    finally:
                        permit.move_to_this_thread()
        except BaseException as error:
            permit.finish(error)
            raise
        permit.finish()

    return stream if shape.is_generator else run


def _bridged(side: Entry, gate: Gate | None, bridge: Bridge) -> Entry:
    """Make the sync side of an async function, which runs it on the background loop."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return run_in_background(partial(side.run, *args, **kwargs))

    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        context, link = background.context_of_waiter(), Link()
        context.run(link.begin)
        return asked(link, background.stream(achunks_linked(link, side.run(*args, **kwargs)), context))

    if bridge == "error":
        return replace(side, run=_refuse(side.fn), kind="missing")
    entry = stream if side.shape.is_generator else run
    return replace(side, run=entry if gate is None else _limited(entry, side.shape, gate), kind="bridged")


def _abridged(side: Entry, gate: Gate | None, bridge: Bridge, name: str) -> Entry:
    """Make the async side of a sync function, which runs it on the pair's own threads or on the given executor."""
    if bridge == "error":
        return replace(side, run=_arefuse(side.fn, side.shape), kind="missing")
    if isinstance(bridge, Executor):
        return replace(side, run=delegated(side.fn, side.shape, gate, bridge, run=side.run), kind="bridged")

    def threads() -> int | None:
        return None if gate is not None and gate.limiter._bounds_calls else DEFAULT_THREADS  # may be resized

    pool = ThreadPool(threads, name)
    return replace(side, run=_threaded(side.run, side.shape, gate, pool), kind="bridged")


def _threaded(fn: Function, shape: Shape, gate: Gate | None, pool: ThreadPool) -> Function:
    async def run(*args: Any, **kwargs: Any) -> Any:
        permit: Pass = FREE_PASS if gate is None else await gate.aenter(args, kwargs)
        permit.step_out()
        work = partial(_under, permit, partial(fn, *args, **kwargs))
        context, link = waited_for_by_task()
        if link is None:
            return await pool.call(work, permit.end, context)
        try:
            return await pool.call(partial(call_linked, link, work), permit.end, context)
        finally:
            link.leave()

    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        chunks: Generator[Any, Any, Any] = fn(*args, **kwargs)
        permit: Pass = FREE_PASS if gate is None else await gate.aenter(args, kwargs)
        permit.step_out()
        context, link = copy_context(), Link()
        context.run(link.begin)
        threaded = pool.stream(chunks_linked(link, _chunks_under(permit, chunks)), permit.end, context)
        relay: Relay[Any] = Relay(threaded)
        try:
            while (chunk := await await_linked(link, anext(relay, END))) is not END:
                with relay:
                    yield chunk
        finally:
            await await_linked(link, threaded.aclose())

    return stream if shape.is_generator else run


def _under(permit: Pass, work: Callable[[], Any]) -> Any:
    permit.move_to_this_thread()
    result = work()
    if iscoroutine(result):
        permit.step_out()  # the waiting task awaits it as part of the call; this thread goes on to other work
    return result


def _chunks_under(permit: Pass, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    permit.move_to_this_thread()
    return (yield from chunks)


def _refuse(fn: Function) -> Function:
    def run(*_args: Any, **_kwargs: Any) -> Any:
        raise BridgeError(_refusal(fn, "sync", "sync"))

    return run


def _arefuse(fn: Function, shape: Shape) -> Function:
    async def run(*_args: Any, **_kwargs: Any) -> Any:
        raise BridgeError(_refusal(fn, "async", "async_"))

    async def stream(*_args: Any, **_kwargs: Any) -> AsyncIterator[Any]:
        await run()
        yield

    return stream if shape.is_generator else run


def _refusal(fn: Function, colour: str, argument: str) -> str:
    return (
        f'{describe(fn)} has no {colour} side and bridge="error" forbids to make one; '
        f"write it and give it as {argument}=, or drop the bridge argument"
    )
