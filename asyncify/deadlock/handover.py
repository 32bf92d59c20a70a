"""Hand the permits that a waiting thread or task holds to the work that it waits for, by a `Link`.

The work runs in another thread or task. If a call in it waits for a limiter in turn, these permits can't end before.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from asyncify.background import background
from asyncify.deadlock.holds import Link, held_by_this_task
from asyncify.relay import Relay
from asyncify.sources import END

__all__ = [
    "achunks_linked",
    "asked",
    "await_linked",
    "call_linked",
    "chunks_linked",
    "run_in_background",
    "waited_for_by_task",
]


def run_in_background(call: Callable[[], Awaitable[Any]]) -> Any:
    """Await the awaitable that `call` makes on the background loop, while this thread waits for its result."""
    context, link = _waited_for_by_thread()
    return background.run(call if link is None else partial(_acall_linked, link, call), context)


def _waited_for_by_thread() -> tuple[Context, Link | None]:
    """Return the context for a coroutine that this thread waits for, and a link that hands it this thread's permits."""
    context, link = background.context_of_waiter(), Link()
    link.hold_up_this_thread()
    return context, link.lead_to(context)


def waited_for_by_task() -> tuple[Context, Link | None]:
    """Return the context for a thread that this task waits for, and a link that hands it this task's permits."""
    context = copy_context()
    return context, Link(held_by_this_task()).lead_to(context)


def call_linked(link: Link, work: Callable[[], Any]) -> Any:
    """Do work that another thread or task waits for, at the end of its link."""
    try:
        with link:
            return work()
    finally:
        link.end()


async def _acall_linked(link: Link, call: Callable[[], Awaitable[Any]]) -> Any:
    """Await work that another thread or task waits for, at the end of its link."""
    try:
        with link:
            return await call()
    finally:
        link.end()


def chunks_linked(link: Link, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Yield the chunks; the reader may wait while a chunk is made or the generator is closed, but at no other time."""
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


async def achunks_linked(link: Link, chunks: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    """Yield the chunks; the reader may wait while a chunk is made or the generator is closed, but at no other time."""
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


def asked(link: Link, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Yield the chunks that another thread makes; the reader hands over its permits while it waits for a chunk."""

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


async def await_linked(link: Link, step: Awaitable[Any]) -> Any:
    """Await what another thread does; this task hands over its permits while it waits."""
    link.held = held_by_this_task()
    try:
        return await step
    finally:
        link.leave()
