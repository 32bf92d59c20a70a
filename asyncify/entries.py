"""Entries: a side with its limit around it, which is what actually runs.

Each of the four makers below stands beside its twin. A slot is held from admission until the function itself has
ended, which for a thread may be after its caller has given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import aclosing, closing
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import iscoroutine
from typing import Any, Literal, cast

from asyncify.background import END, background
from asyncify.bridge import DEFAULT_THREADS, ThreadPool, call_guarded
from asyncify.drive import timed
from asyncify.errors import BridgeError
from asyncify.executors import Outcome, Parcel, check_sendable, portable_config, refusal, ticket_for
from asyncify.gate import FREE_PASS, Gate, Pass
from asyncify.holds import Link, held_by_this_task
from asyncify.relay import Relay
from asyncify.signatures import Shape, describe, shape_of
from asyncify.traps import telling_if_held

__all__ = ["Bridge", "Entries", "Entry", "Kind", "make_entries", "run_in_background"]

Bridge = Literal["thread", "error"] | Executor
Kind = Literal["native", "bridged", "missing"]
Function = Callable[..., Any]
Submit = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Future[Any], Link | None]]
"""Has a call made, and returns its future and the link to it of what the waiting task holds, if there is one."""


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
    """The two entries of a pair.

    `timed` are the same two over an async function that is timed step by step, for as long as there is a watch; None
    where nobody wrote an async function.
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
) -> Entries:
    """Put the limit around both sides, and make the one that is missing.

    A side without parameters of its own, as a mock that has come in its place, takes its input as `called_like` does.
    With `warn`, a sync call that is made on an event loop and holds it is told.
    """
    if gate is not None:
        fn = cast("Function", async_ if sync is None else sync)
        gate = gate.before(called_like if shape_of(fn).takes_anything else fn)
    first = None if sync is None else _side(sync, called_like)
    make = partial(_entries, first, gate=gate, bridge=bridge, name=name, warn=warn)
    if async_ is None:
        return make(None)
    side = _side(async_, called_like)
    watched = replace(side, run=timed(async_, name, is_generator=side.shape.is_generator))
    return replace(make(side), timed=make(watched))


def _side(fn: Function, called_like: Function) -> Entry:
    shape = shape_of(fn)
    return Entry(fn, fn, shape.called_like(shape_of(called_like)) if shape.takes_anything else shape, "native")


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
            permit.leave(error)
            raise
        permit.leave()
        return result

    def stream(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        permit = gate.enter(args, kwargs)
        try:
            with closing(_Limited(fn(*args, **kwargs), permit)) as chunks:
                result = yield from chunks
        except BaseException as error:
            permit.leave(error)
            raise
        permit.leave()
        return result

    return stream if shape.is_generator else run


class _Limited(Generator[Any, Any, Any]):
    """A generator that is under a permit while it makes a chunk, and in between is not, as another may read it on."""

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
            permit.leave(error)
            raise
        permit.leave()
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
            permit.leave(error)
            raise
        permit.leave()

    return stream if shape.is_generator else run


def _bridged(side: Entry, gate: Gate | None, bridge: Bridge) -> Entry:
    """Make the sync side of an async function: on the background loop."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return run_in_background(partial(side.run, *args, **kwargs))

    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        context, link = background.context_of_waiter(), Link()
        context.run(link.begin)
        return _asked(link, background.stream(_achunks_linked(link, side.run(*args, **kwargs)), context))

    if bridge == "error":
        return replace(side, run=_refuse(side.fn), kind="missing")
    entry = stream if side.shape.is_generator else run
    return replace(side, run=entry if gate is None else _limited(entry, side.shape, gate), kind="bridged")


def _abridged(side: Entry, gate: Gate | None, bridge: Bridge, name: str) -> Entry:
    """Make the async side of a sync function: on threads of its own, or on the executor that it was given."""
    if bridge == "error":
        return replace(side, run=_arefuse(side.fn, side.shape), kind="missing")
    if isinstance(bridge, Executor):
        return replace(side, run=_delegated(side.fn, side.shape, gate, bridge), kind="bridged")

    def threads() -> int | None:
        return None if gate is not None and gate.limiter.bounds_calls else DEFAULT_THREADS  # a limit may be resized

    pool = ThreadPool(threads, name)
    return replace(side, run=_threaded(side.fn, side.shape, gate, pool), kind="bridged")


def _threaded(fn: Function, shape: Shape, gate: Gate | None, pool: ThreadPool) -> Function:
    async def run(*args: Any, **kwargs: Any) -> Any:
        permit: Pass = FREE_PASS if gate is None else await gate.aenter(args, kwargs)
        permit.step_out()
        work = partial(_under, permit, partial(fn, *args, **kwargs))
        context, link = _waited_for_by_task()
        if link is None:
            return await pool.call(work, permit.end, context)
        try:
            return await pool.call(partial(_call_linked, link, work), permit.end, context)
        finally:
            link.leave()

    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        chunks: Generator[Any, Any, Any] = fn(*args, **kwargs)
        permit: Pass = FREE_PASS if gate is None else await gate.aenter(args, kwargs)
        permit.step_out()
        context, link = copy_context(), Link()
        context.run(link.begin)
        threaded = pool.stream(_chunks_linked(link, _chunks_under(permit, chunks)), permit.end, context)
        relay: Relay[Any] = Relay(threaded)
        try:
            while (chunk := await _aasked(link, anext(relay, END))) is not END:
                with relay:
                    yield chunk
        finally:
            await _aasked(link, threaded.aclose())

    return stream if shape.is_generator else run


def run_in_background(call: Callable[[], Awaitable[Any]]) -> Any:
    """Await what `call` makes on the background loop, and wait for it in this thread."""
    context, link = _waited_for_by_thread()
    return background.run(call if link is None else partial(_acall_linked, link, call), context)


def _waited_for_by_thread() -> tuple[Context, Link | None]:
    """Return the context for a coroutine that this thread waits for, and the link to it of what this thread holds."""
    context, link = background.context_of_waiter(), Link()
    link.hold_up_this_thread()
    return context, link.lead_to(context)


def _waited_for_by_task() -> tuple[Context, Link | None]:
    """Return the context for a thread that this task waits for, and the link to it of what this task holds."""
    context = copy_context()
    return context, Link(held_by_this_task()).lead_to(context)


def _call_linked(link: Link, work: Callable[[], Any]) -> Any:
    try:
        with link:
            return work()
    finally:
        link.end()


async def _acall_linked(link: Link, call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        with link:
            return await call()
    finally:
        link.end()


def _chunks_linked(link: Link, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Yield the chunks; the reader may wait while one is made, and while they are closed, and not in between."""
    try:
        while True:
            with link:
                chunk = next(chunks, END)
            if chunk is END:
                return
            yield chunk
    finally:
        with link:
            chunks.close()
        link.end()


async def _achunks_linked(link: Link, chunks: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    """Yield the chunks; the reader may wait while one is made, and while they are closed, and not in between."""
    relay: Relay[Any] = Relay(chunks)
    try:
        while True:
            with link:
                chunk = await anext(relay, END)
            if chunk is END:
                return
            with relay:
                yield chunk
    finally:
        with link:
            await chunks.aclose()
        link.end()


def _asked(link: Link, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Yield the chunks that another thread makes; whoever asks for one waits with what it holds."""

    def ask(step: Callable[[], Any]) -> Any:
        link.hold_up_this_thread()
        try:
            return step()
        finally:
            link.leave()

    try:
        while (chunk := ask(partial(next, chunks, END))) is not END:
            yield chunk
    finally:
        ask(chunks.close)


async def _aasked(link: Link, step: Awaitable[Any]) -> Any:
    """Await what another thread does; this task waits with what it holds."""
    link.held = held_by_this_task()
    try:
        return await step
    finally:
        link.leave()


def _under(permit: Pass, work: Callable[[], Any]) -> Any:
    permit.move_to_this_thread()
    result = work()
    if iscoroutine(result):
        permit.step_out()  # it is awaited as part of the call, and this thread goes on to other work
    return result


def _chunks_under(permit: Pass, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    permit.move_to_this_thread()
    return (yield from chunks)


def _delegated(fn: Function, shape: Shape, gate: Gate | None, executor: Executor) -> Function:
    """Run a function by somebody's executor; one of threads gets the caller's context, no other can."""
    if isinstance(executor, ThreadPoolExecutor) and not shape.is_generator:
        return _submitting(partial(_submit_to_threads, executor, fn), partial(_receive, fn, executor), gate)
    check_sendable(fn, shape, executor)
    return _submitting(_sender(fn, shape, executor), partial(_unpack, fn, executor), gate)


def _submitting(submit: Submit, receive: Callable[[Future[Any]], Awaitable[Any]], gate: Gate | None) -> Function:
    async def run(*args: Any, **kwargs: Any) -> Any:
        permit: Pass = FREE_PASS if gate is None else await gate.aenter(args, kwargs)
        try:
            future, link = submit(args, kwargs)
        except BaseException as error:
            permit.leave(error)
            raise
        permit.step_out()
        future.add_done_callback(partial(_end, permit))
        try:
            result = await receive(future)
        except BaseException as error:
            # A call that still runs keeps another error than this one, whose traceback holds what it was called with.
            kept = error if future.done() else asyncio.CancelledError()
            future.add_done_callback(partial(_end_with, permit, kept))
            raise
        finally:
            if link is not None:
                link.leave()
        permit.end()
        return result

    return run


def _submit_to_threads(
    executor: ThreadPoolExecutor, fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Future[Any], Link | None]:
    context, link = _waited_for_by_task()
    work: Callable[[], Any] = partial(fn, *args, **kwargs)
    if link is not None:
        work = partial(_call_linked, link, work)
    try:
        return executor.submit(context.run, call_guarded, work), link
    except Exception as error:
        raise refusal(fn, executor, error) from error


async def _receive(fn: Function, executor: Executor, future: Future[Any]) -> Any:
    try:
        result = await _of_executor(fn, executor, future)
    except BaseException:
        future.add_done_callback(_close_unawaited)
        raise
    return await result if iscoroutine(result) else result


def _close_unawaited(future: Future[Any]) -> None:
    """Close the coroutine that a thread has given to a call which was given up meanwhile."""
    if not future.cancelled() and future.exception() is None and iscoroutine(made := future.result()):
        made.close()


async def _of_executor(fn: Function, executor: Executor, future: Future[Any]) -> Any:
    """Wait for a future; if it was cancelled and this task was not, the executor has dropped the call."""
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if future.cancelled() and task is not None and not task.cancelling():
            raise refusal(fn, executor, CancelledError("it was dropped")) from error
        raise


def _sender(fn: Function, shape: Shape, executor: Executor) -> Submit:
    """Return what sends a call of a function to another process."""
    ticket = cache(partial(ticket_for, fn, executor))  # asked by a call, when the pair's name leads to its function
    by_code = not isinstance(executor, ProcessPoolExecutor)  # which pickles a function by its name

    def submit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Future[Any], None]:
        if shape.takes_config and "config" in kwargs:
            kwargs = {**kwargs, "config": portable_config(kwargs["config"])}
        try:
            return executor.submit(Parcel(ticket() or fn, args, kwargs, by_code=by_code)), None
        except Exception as error:
            raise refusal(fn, executor, error) from error

    return submit


async def _unpack(fn: Function, executor: Executor, future: Future[Outcome]) -> Any:
    try:
        outcome = await _of_executor(fn, executor, future)
    except BridgeError:  # it was dropped, and says so itself
        raise
    except Exception as error:
        raise refusal(fn, executor, error) from error
    if (failure := outcome.error) is not None:
        raise failure
    try:
        return outcome.result
    except Exception as error:
        raise BridgeError(
            f"{describe(fn)}: what it returned in its process can't be read here ({type(error).__name__}: {error}); "
            "let it return plain data"
        ) from error


def _end(permit: Pass, future: Future[Any]) -> None:
    if future.cancelled():
        permit.end()
    elif (error := future.exception()) is not None:
        permit.end(error)
    else:
        outcome = future.result()
        if not iscoroutine(outcome):  # it is awaited as part of the call
            permit.end(outcome.error if isinstance(outcome, Outcome) else None)


def _end_with(permit: Pass, error: BaseException, _: Future[Any]) -> None:
    """End a call that has failed, or that its caller has left, once nothing of it runs."""
    permit.end(error)


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
