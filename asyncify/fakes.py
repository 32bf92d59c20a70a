"""Fakes: what stands in the place of a pair for a while, on both paths."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, aclosing
from types import TracebackType
from typing import Any

from asyncify.blocks import Block
from asyncify.entries import Entries, make_entries
from asyncify.relay import Relay
from asyncify.runnable import AnyDual, is_pair
from asyncify.signatures import Shape, describe, is_async, is_generator, signature_of
from asyncify.streams import closable

__all__ = ["Override", "fake_entries"]

Function = Callable[..., Any]


class Override(Block):
    """A fake in the place of a pair, for a `with` block or while a function runs that it decorates.

    Args:
        put: puts the fake there, and returns the pair and what puts back what was there.
    """

    def __init__(self, put: Callable[[], tuple[AnyDual, Callable[[], None]]]) -> None:
        self._put = put
        self._entered: list[Callable[[], None]] = []

    def _around_a_call(self) -> AbstractContextManager[AnyDual]:
        return Override(self._put)

    def __enter__(self) -> AnyDual:
        """Put the fake there, until this is exited, and return the pair."""
        pair, put_back = self._put()
        self._entered.append(put_back)
        return pair

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put back what was there."""
        self._entered.pop()()


def fake_entries(pair: AnyDual, fake: Function | None, sync: Function | None, async_: Function | None) -> Entries:
    """Return what runs in a pair's place: one fake for both sides, or one for each."""
    _check_fakes(pair, fake, sync, async_)
    if is_pair(fake):
        return _called_like(fake._entries, pair._entries)
    if fake is not None:
        sync, async_ = (None, fake) if is_async(fake) else (fake, None)
    twin = sync if async_ is None else async_
    if twin is not None and not is_async(twin):
        async_ = _on_the_loop(twin)
    if pair._entries.sync.shape.is_generator:
        sync = sync if sync is None or is_generator(sync) else _streamed(sync)
        async_ = async_ if async_ is None or is_generator(async_) else _astreamed(async_)
    made = make_entries(sync, async_, gate=None, bridge="thread", name=pair.get_name(), called_like=pair.__wrapped__)
    return _called_like(made, pair._entries)


def _check_fakes(pair: object, fake: Function | None, sync: Function | None, async_: Function | None) -> None:
    if not is_pair(pair):
        raise TypeError(f"override takes a pair or its name, not {pair!r}")
    if (fake is None) == (sync is None and async_ is None):
        raise TypeError(
            f"override of {pair.get_name()}: give one fake for both paths, as in override(pair, fake), or one for "
            "each, as in override(pair, sync=..., async_=...)"
        )
    candidates: tuple[object, ...] = (fake, sync, async_)
    for candidate in candidates:
        if candidate is not None and not callable(candidate):
            raise TypeError(f"override of {pair.get_name()}: a fake is a function, not {candidate!r}")
    if sync is not None and is_async(sync):
        raise TypeError(f"override of {pair.get_name()}: sync={describe(sync)} is async; give it as async_=")
    for function in (fake, sync, async_):
        if function is not None and not _may_take(function, pair._entries.sync.shape):
            raise TypeError(
                f"override of {pair.get_name()}: {describe(function)} takes {signature_of(function)}, and is given "
                f"{', '.join(pair._entries.sync.shape.required)}"
            )


def _may_take(fake: Function, own: Shape) -> bool:
    """Tell whether a fake has a place for what the pair's function needs, whichever way that is given."""
    signature = signature_of(fake)
    if signature is None:
        return True
    with_places = [name for name in own.required if name not in own.keyword_only]
    for by_place in ([], with_places):
        by_name = dict.fromkeys(name for name in own.required if name not in by_place)
        try:
            signature.bind_partial(*by_place, **by_name)
        except TypeError:
            continue
        return True
    return False


def _called_like(fake: Entries, own: Entries) -> Entries:
    """Return the fake's entries, which take their input as the functions do whose place they have."""
    sync, async_ = fake.sync, fake.async_
    return Entries(
        dataclasses.replace(sync, shape=sync.shape.called_like(own.sync.shape)),
        dataclasses.replace(async_, shape=async_.shape.called_like(own.async_.shape)),
        timed=None if fake.timed is None else _called_like(fake.timed, own),
    )


def _on_the_loop(fake: Function) -> Function:
    """Return the async twin of a sync fake; it takes no thread, as a fake answers at once."""

    @functools.wraps(fake, updated=())
    async def run(*args: Any, **kwargs: Any) -> Any:
        result = fake(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    @functools.wraps(fake, updated=())
    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        for chunk in fake(*args, **kwargs):
            yield chunk

    return stream if is_generator(fake) else run


def _streamed(fake: Function) -> Function:
    """Return a fake of a generator that returns its chunks, or the only one, as one that yields them."""

    @functools.wraps(fake, updated=())
    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from _chunks_of(fake(*args, **kwargs))

    return stream


def _astreamed(fake: Function) -> Function:
    """Return an async fake of a generator that returns its chunks, or the only one, as one that yields them."""

    @functools.wraps(fake, updated=())
    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        result: Any = await fake(*args, **kwargs)
        if not hasattr(result, "__anext__"):
            for chunk in _chunks_of(result):
                yield chunk
            return
        async with aclosing(closable(result)) as chunks:
            relay: Relay[Any] = Relay(chunks)
            async for chunk in relay:
                with relay:
                    yield chunk

    return stream


def _chunks_of(result: Any) -> Iterable[Any]:
    """Return the chunks that a fake gives: what can be nothing else than several, or else the only one."""
    has_several = type(result) in (list, tuple) or hasattr(result, "__next__")
    return result if has_several else (result,)
