"""Work that a thread or a task waits for while another does it: it is handed what the waiter holds, by a link.

So if a call in that work waits for a limiter in its turn, it is known who can't go on before.
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
    """Await what `call` makes on the background loop, and wait for it in this thread."""
    context, link = _waited_for_by_thread()
    return background.run(call if link is None else partial(_acall_linked, link, call), context)


def _waited_for_by_thread() -> tuple[Context, Link | None]:
    """Return the context for a coroutine that this thread waits for, and the link to it of what this thread holds."""
    context, link = background.context_of_waiter(), Link()
    link.hold_up_this_thread()
    return context, link.lead_to(context)


def waited_for_by_task() -> tuple[Context, Link | None]:
    """Return the context for a thread that this task waits for, and the link to it of what this task holds."""
    context = copy_context()
    return context, Link(held_by_this_task()).lead_to(context)


def call_linked(link: Link, work: Callable[[], Any]) -> Any:
    """Do work that another thread or task waits for."""
    try:
        with link:
            return work()
    finally:
        link.end()


async def _acall_linked(link: Link, call: Callable[[], Awaitable[Any]]) -> Any:
    """Await work that another thread or task waits for."""
    try:
        with link:
            return await call()
    finally:
        link.end()


def chunks_linked(link: Link, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
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


async def achunks_linked(link: Link, chunks: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
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


def asked(link: Link, chunks: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
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


async def await_linked(link: Link, step: Awaitable[Any]) -> Any:
    """Await what another thread does; this task waits with what it holds."""
    link.held = held_by_this_task()
    try:
        return await step
    finally:
        link.leave()
