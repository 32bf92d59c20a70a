"""The async side that runs a pair's sync side on an executor given by the user, under the pair's limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from functools import cache, partial
from inspect import iscoroutine
from typing import Any

from asyncify.deadlock.handover import call_linked, waited_for_by_task
from asyncify.deadlock.holds import Link
from asyncify.errors import BridgeError
from asyncify.executors import Outcome, Parcel, check_sendable, is_process_pool, portable_config, refusal, ticket_for
from asyncify.gate import Gate
from asyncify.permits import FREE_PASS, Pass
from asyncify.pools import call_guarded
from asyncify.signatures import Shape, describe

__all__ = ["delegated"]

Function = Callable[..., Any]
Submit = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Future[Any], Link | None]]
"""Submits a call; returns its future, and the link that hands it the waiting task's permits, None if there is none."""


def delegated(fn: Function, shape: Shape, gate: Gate | None, executor: Executor, *, run: Function) -> Function:
    """Return an async function that runs `fn` on the executor.

    Only a `ThreadPoolExecutor` can run the call in the caller's context; there it calls `run` in place of `fn`.
    """
    if isinstance(executor, ThreadPoolExecutor) and not shape.is_generator:
        return _submitting(partial(_submit_to_threads, executor, fn, run), partial(_receive, fn, executor), gate)
    check_sendable(fn, shape, executor)
    return _submitting(_sender(fn, shape, executor), partial(_unpack, fn, executor), gate)


def _submitting(submit: Submit, receive: Callable[[Future[Any]], Awaitable[Any]], gate: Gate | None) -> Function:
    async def run(*args: Any, **kwargs: Any) -> Any:
        permit: Pass = FREE_PASS if gate is None else await gate.aenter(args, kwargs)
        try:
            future, link = submit(args, kwargs)
        except BaseException as error:
            permit.finish(error)
            raise
        permit.step_out()
        future.add_done_callback(partial(_end, permit))
        try:
            result = await receive(future)
        except BaseException as error:
            # A call that still runs keeps a fresh error: the traceback of this one would keep its arguments alive.
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
    executor: ThreadPoolExecutor, fn: Function, run: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Future[Any], Link | None]:
    context, link = waited_for_by_task()
    work: Callable[[], Any] = partial(run, *args, **kwargs)
    if link is not None:
        work = partial(call_linked, link, work)
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
    """Close the coroutine that a thread has returned after the waiting task gave up."""
    if not future.cancelled() and future.exception() is None and iscoroutine(made := future.result()):
        made.close()


async def _of_executor(fn: Function, executor: Executor, future: Future[Any]) -> Any:
    """Wait for a future; if it was cancelled and this task was not, raise that the executor has dropped the call."""
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if future.cancelled() and task is not None and not task.cancelling():
            raise refusal(fn, executor, CancelledError("it was dropped")) from error
        raise


def _sender(fn: Function, shape: Shape, executor: Executor) -> Submit:
    """Return a function that sends a call of `fn` to another process."""
    ticket = cache(partial(ticket_for, fn, executor))  # at the first call: only then does the name lead to the pair
    by_code = not is_process_pool(executor)  # that one pickles a function by its name

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
    except BridgeError:  # raised by `_of_executor`: the call was dropped
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
        if not iscoroutine(outcome):  # else the waiting task awaits it as part of the call
            permit.end(outcome.error if isinstance(outcome, Outcome) else None)


def _end_with(permit: Pass, error: BaseException, _: Future[Any]) -> None:
    """End a call that has failed, or that its caller has left; as a done callback, once no part of it runs."""
    permit.end(error)
