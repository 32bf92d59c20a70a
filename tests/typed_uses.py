"""What type checkers make of pairs: never run, checked by mypy and pyright, both strict.

A line that must be an error carries `# type: ignore`; both checkers report one that is not needed.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
# ruff: noqa: D103  (what a function here is for is the comment over it)

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
)
from contextlib import aclosing, closing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NoReturn, ParamSpec, TypeVar, assert_type

from langchain_core.runnables import RunnableBranch, RunnableLambda, RunnableParallel
from langchain_core.runnables.base import Runnable, RunnableSerializable

from asyncify import Dual, Limiter, aeach, concurrency, dual, dual_patch, each, registry
from asyncify.runnable import AnyDual

Quote = dict[str, float]
P = ParamSpec("P")
R = TypeVar("R")


def fetch_sync(query: str, count: int = 1) -> Quote:
    return {query: count}


async def fetch_async(query: str, count: int = 1) -> Quote:
    return {query: count}


async def other_result(query: str, count: int = 1) -> list[float]:
    return [count]


async def other_parameters(text: str) -> Quote:
    return {text: 1}


async def other_type(query: str, count: str = "1") -> Quote:
    return {query: float(count)}


async def fewer_parameters(query: str) -> Quote:
    return {query: 1}


async def no_result(query: str, count: int = 1) -> None:
    return


def retrying(fn: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """Stand for a decorator of coroutine functions that says no more of what it returns."""
    return fn


def optional_sync(query: str) -> Quote | None:
    return {query: 1}


async def optional_async(query: str) -> Quote | None:
    return {query: 1}


def whole_sync(query: str) -> bool:
    return bool(query)


async def whole_async(query: str) -> bool:
    return bool(query)


async def number_async(query: str) -> float:
    return float(query)


def number_sync(query: str) -> float:
    return float(query)


def ticks_sync(query: str) -> Iterator[float]:
    yield 1.0


async def ticks_async(query: str) -> AsyncIterator[float]:
    yield 1.0


def generator_sync(query: str) -> Generator[float, None, None]:
    yield 1.0


async def generator_async(query: str) -> AsyncGenerator[float, None]:
    yield 1.0


async def iterable_async(query: str) -> AsyncIterable[float]:
    yield 1.0


async def other_chunks(query: str) -> AsyncIterator[str]:
    yield query


async def other_ticks(text: str) -> AsyncIterator[float]:
    yield 1.0


class Callables:
    def __call__(self, query: str) -> float:
        return float(query)

    def number(self, query: str) -> float:
        return float(query)

    async def anumber(self, query: str) -> float:
        return float(query)


class AsyncCallable:
    async def __call__(self, query: str) -> float:
        return float(query)


upper = RunnableLambda(str.upper)


# --- the five forms ---


@dual(async_=fetch_async)
def on_sync(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual(sync=fetch_sync)
async def on_async(query: str, count: int = 1) -> Quote:
    return {query: count}


from_two = dual(sync=fetch_sync, async_=fetch_async)


@dual(sync=fetch_sync, async_=fetch_async)
def over_stub(query: str, count: int = 1) -> Quote:
    """Fetch one quote."""
    raise NotImplementedError


@dual(sync=fetch_sync, async_=fetch_async, name="quotes")
async def over_async_stub(query: str, count: int = 1) -> Quote:
    """Fetch one quote."""
    raise NotImplementedError


@dual
def one_side(query: str, count: int = 1) -> Quote:
    return {query: count}


both_sides = one_side.async_(fetch_async)


@dual
async def trim(query: str) -> str:
    return query.strip()


@dual(name="named")
async def one_async_side(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual
def none_alone() -> float:
    return 1.0


async def none_async() -> float:
    return 1.0


@concurrency(limit=1)
@dual(async_=none_async)
def none_limited() -> float:
    return 1.0


class NoParameters:
    """A method that takes nothing but its instance."""

    @concurrency(limit=1)
    def load(self) -> Quote:
        return {}


async def without_parameters() -> None:
    """A call takes nothing, an input is None."""
    checked: Dual[Any, float, []] = none_alone
    load = NoParameters().load
    assert_type(checked(), float)
    assert_type(none_limited.call(), float)
    assert_type(await none_limited.acall(), float)
    assert_type(await none_alone.ainvoke(None), float)
    assert_type(load(), Quote)
    assert_type(await load.acall(), Quote)
    none_alone("EUR")  # type: ignore[call-arg]
    load("EUR")  # type: ignore[call-arg]


async def sync_forms() -> None:
    """Forms that stand for a `def` return its result."""
    assert_type(on_sync("EUR"), Quote)
    assert_type(from_two("EUR", count=2), Quote)
    assert_type(over_stub("EUR", 2), Quote)
    assert_type(one_side(query="EUR"), Quote)
    assert_type(both_sides("EUR"), Quote)


async def async_forms() -> None:
    """Forms that stand for an `async def` return an awaitable."""
    awaitable: Coroutine[Any, Any, Quote] = on_async("EUR")
    assert_type(await awaitable, Quote)
    assert_type(await on_async("EUR", count=2), Quote)
    assert_type(await over_async_stub("EUR"), Quote)
    assert_type(await one_async_side("EUR"), Quote)


async def sides() -> None:
    """`call` and `acall` take the function's parameters, in every form."""
    assert_type(on_sync.call("EUR", count=2), Quote)
    assert_type(on_async.call("EUR", count=2), Quote)
    assert_type(from_two.call("EUR"), Quote)
    assert_type(over_stub.call("EUR"), Quote)
    assert_type(over_async_stub.call("EUR"), Quote)
    assert_type(await on_sync.acall("EUR", count=2), Quote)
    assert_type(await on_async.acall("EUR"), Quote)
    assert_type(await from_two.acall("EUR"), Quote)
    assert_type(await over_stub.acall("EUR"), Quote)
    assert_type(await one_side.acall("EUR"), Quote)
    assert_type(await one_async_side.acall("EUR"), Quote)
    assert_type(on_sync.func("EUR", count=2), Quote)
    assert_type(await on_async.afunc("EUR", count=2), Quote)
    assert_type(ticks.func("EUR"), Generator[float, Any, Any])
    assert_type(dual(sync=on_sync.func, async_=on_async.afunc)("EUR"), Quote)
    on_sync.func(3)  # type: ignore[arg-type]


async def as_runnables() -> None:
    """As a runnable a pair gives the function's result."""
    assert_type(on_sync.invoke("EUR"), Quote)
    assert_type(on_async.invoke("EUR"), Quote)
    assert_type(await on_sync.ainvoke("EUR"), Quote)
    assert_type(await on_async.ainvoke("EUR"), Quote)
    assert_type(on_sync.batch(["EUR"]), list[Quote])
    assert_type(await on_async.abatch(["EUR"]), list[Quote])
    assert_type(on_sync | RunnableLambda(len), RunnableSerializable[Any, int])
    assert_type(upper | on_sync, RunnableSerializable[str, Quote])
    assert_type((upper | on_async).invoke("eur"), Quote)
    assert_type((trim | trim).invoke("EUR"), str)
    assert_type((trim | trim | one_async_side).invoke("EUR"), Quote)
    assert_type((RunnableLambda(str.upper) | trim | trim).invoke("EUR"), str)
    checked: Dual[str, Quote] = on_sync
    assert_type(checked | RunnableLambda(len), RunnableSerializable[str, int])
    assert_type(checked.pipe(on_async), RunnableSerializable[str, Quote])
    assert_type(checked.pipe(on_async, on_sync, name="twice").invoke("EUR"), Quote)
    assert_type(on_async.pipe(from_two, one_async_side), RunnableSerializable[Any, Quote])
    assert_type(on_async.pipe(limit_over_async), RunnableSerializable[Any, Quote])
    assert_type(on_sync.pipe(ticks), RunnableSerializable[Any, float])
    assert_type(on_sync.pipe(RunnableLambda(len)), RunnableSerializable[Any, int])
    assert_type(checked.pipe(len), RunnableSerializable[str, int])
    assert_type(checked.pipe(on_async, lambda _: {"EUR": 1.0}), RunnableSerializable[str, Quote])
    choice: RunnableBranch[str, Quote] = RunnableBranch((bool, on_sync), on_async)
    assert_type(choice.invoke("EUR"), Quote)
    two_results: RunnableParallel[str] = RunnableParallel({"quote": on_sync, "count": dual(len)})
    assert_type(two_results.invoke("EUR"), dict[str, Any])
    checked.pipe(3)  # type: ignore[call-overload]
    checked.invoke(3)  # type: ignore[arg-type]


def wrong_arguments() -> None:
    """A wrong argument is an error wherever the function's own parameters are taken."""
    on_sync(3)  # type: ignore[arg-type]
    on_sync(text="EUR")  # type: ignore[call-arg]
    from_two.call("EUR", "2")  # type: ignore[arg-type]
    over_stub.acall()  # type: ignore[call-arg, unused-coroutine]
    one_async_side("EUR", number=2)  # type: ignore[call-arg, unused-coroutine]


def wrong_sides() -> None:
    """Sides that disagree in parameters or in result, or have the wrong colour, are errors."""
    dual(async_=other_parameters)(fetch_sync)  # type: ignore[arg-type]
    dual(async_=other_result)(fetch_sync)  # type: ignore[arg-type]
    dual(sync=fetch_sync)(other_parameters)  # type: ignore[arg-type]
    dual(sync=fetch_sync)(other_result)  # type: ignore[arg-type]
    dual(sync=fetch_sync)(fetch_sync)  # type: ignore[arg-type]
    dual(fetch_sync, fetch_async)  # type: ignore[call-overload]
    dual(sync=fetch_sync, async_=fetch_sync)  # type: ignore[arg-type]
    dual(sync=fetch_sync, async_=other_parameters)  # type: ignore[arg-type]
    dual(sync=fetch_sync, async_=other_type)  # type: ignore[arg-type]
    dual(sync=fetch_sync, async_=other_result)  # type: ignore[arg-type]
    dual(async_=other_result, sync=fetch_sync)  # type: ignore[arg-type]
    dual(sync=fetch_sync, async_=ticks_async)  # type: ignore[arg-type]
    dual(sync=ticks_sync, async_=fetch_async)  # type: ignore[arg-type]
    dual(sync=lambda query: str(query), async_=whole_async)  # type: ignore[arg-type, return-value]  # noqa: PLW0108
    one_side.async_(other_parameters)  # type: ignore[arg-type]
    one_side.async_(other_result)  # type: ignore[arg-type]
    one_side.async_(fetch_sync)  # type: ignore[arg-type]
    one_async_side.sync(other_parameters)  # type: ignore[arg-type]
    from_two(other_parameters)  # type: ignore[arg-type]


def agreeing_sides() -> None:
    """Whatever is a pair of functions of one type is a pair: unions, lambdas, methods, callables, partials."""
    assert_type(dual(sync=optional_sync, async_=optional_async)("EUR"), Quote | None)
    assert_type(dual(sync=lambda query: 1.5, async_=number_async).call("EUR"), float)
    assert_type(dual(sync=Callables().number, async_=Callables().anumber)("EUR"), float)
    assert_type(dual(AsyncCallable()).call("EUR"), float)
    assert_type(dual(sync=Callables(), async_=Callables().anumber)("EUR"), float)
    assert_type(dual(sync=partial(fetch_sync, count=2), async_=partial(fetch_async, count=2))("EUR"), Quote)
    assert_type(dual(sync=concurrency(limit=3)(fetch_sync), async_=fetch_async)("EUR", count=2), Quote)


def narrower_sides() -> None:
    """The pair's result is what its first side promises, or in one call its async side; the other may be narrower."""
    assert_type(dual(async_=number_async)(whole_sync)("EUR"), float)
    assert_type(dual(sync=number_sync)(whole_async).call("EUR"), float)
    assert_type(dual(number_sync).async_(whole_async)("EUR"), float)
    assert_type(dual(sync=whole_sync, async_=number_async)("EUR"), float)
    dual(async_=whole_async)(number_sync)  # type: ignore[arg-type]
    dual(sync=whole_sync)(number_async)  # type: ignore[arg-type]
    dual(whole_sync).async_(number_async)  # type: ignore[arg-type]
    dual(async_=whole_async, sync=number_sync)  # type: ignore[arg-type]


def what_checkers_miss() -> None:
    """Parameters that only one side has, with defaults; and to mypy, an async side that returns None."""
    dual(async_=fewer_parameters)(fetch_sync)
    dual(sync=fetch_sync, async_=fewer_parameters)
    dual(sync=fetch_sync, async_=no_result)  # pyright: ignore[reportArgumentType, reportCallIssue]


# --- an async side that returns an awaitable: as one that another decorator has been over may say ---

retried_async = retrying(fetch_async)
retried_other = retrying(other_result)


@dual(async_=retried_async)
def on_retried(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual(sync=fetch_sync)
@retrying
async def retried_on_sync(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual
@retrying
async def retried_alone(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual(name="retried")
@retrying
async def retried_named(query: str, count: int = 1) -> Quote:
    return {query: count}


@concurrency(limit=3)
@retrying
async def retried_limited(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual(sync=fetch_sync, async_=retried_async)
async def retried_over_stub(query: str, count: int = 1) -> Quote:
    """Fetch one quote."""
    raise NotImplementedError


async def awaitables() -> None:
    """All that holds for an `async def` holds for them."""
    assert_type(dual(sync=fetch_sync, async_=retried_async)("EUR", count=2), Quote)
    assert_type(await dual(sync=fetch_sync, async_=retried_async).acall("EUR"), Quote)
    assert_type(await retried_over_stub("EUR"), Quote)
    assert_type(on_retried("EUR", count=2), Quote)
    assert_type(await on_retried.acall("EUR"), Quote)
    assert_type(await retried_on_sync("EUR", count=2), Quote)
    assert_type(retried_on_sync.call("EUR"), Quote)
    assert_type(await retried_alone("EUR", count=2), Quote)
    assert_type(retried_alone.call("EUR"), Quote)
    assert_type(await retried_alone.ainvoke("EUR"), Quote)
    assert_type(retried_alone.sync(fetch_sync).call("EUR"), Quote)
    assert_type(await retried_named("EUR", count=2), Quote)
    assert_type(await retried_limited("EUR", count=2), Quote)
    assert_type(retried_limited.invoke("EUR"), Quote)
    assert_type(await one_side.async_(retried_async).acall("EUR"), Quote)
    assert_type(await Dual(retried_async)("EUR", count=2), Quote)
    assert_type(Dual(fetch_sync, retried_async)("EUR", count=2), Quote)
    assert_type(dual(sync=any_sync, async_=retrying(any_async))("EUR"), Any)
    retried_alone(3)  # type: ignore[arg-type, unused-coroutine]


def wrong_awaitables() -> None:
    """They have to agree, too."""
    dual(sync=fetch_sync, async_=retried_other)  # type: ignore[arg-type]
    dual(sync=fetch_sync, async_=retrying(other_parameters))  # type: ignore[arg-type]
    dual(sync=ticks_sync, async_=retried_async)  # type: ignore[arg-type]
    dual(async_=retried_other)(fetch_sync)  # type: ignore[arg-type]
    dual(async_=retried_async)(ticks_sync)  # type: ignore[arg-type]
    dual(sync=fetch_sync)(retried_other)  # type: ignore[arg-type]
    dual(sync=ticks_sync)(retried_async)  # type: ignore[arg-type]
    one_side.async_(retried_other)  # type: ignore[arg-type]


# --- generators ---


@dual(async_=ticks_async)
def ticks(query: str) -> Iterator[float]:
    yield 1.0


@dual(sync=ticks_sync)
async def aticks(query: str) -> AsyncIterator[float]:
    yield 1.0


two_ticks = dual(sync=ticks_sync, async_=ticks_async)


@dual
async def ticks_alone(query: str) -> AsyncIterator[float]:
    yield 1.0


@dual(async_=iterable_async)
def ticks_on_iterable(query: str) -> Iterator[float]:
    yield 1.0


@dual(sync=ticks_sync)
async def iterable_on_sync(query: str) -> AsyncIterable[float]:
    yield 1.0


@dual
async def iterable_alone(query: str) -> AsyncIterable[float]:
    yield 1.0


@concurrency(limit=3)
async def iterable_limited(query: dict[str, Any]) -> AsyncIterable[float]:
    yield 1.0


async def wrong_streams() -> None:
    """Generators have to agree as functions have, in every form."""
    dual(async_=ticks_async)(fetch_sync)  # type: ignore[arg-type]
    dual(async_=other_chunks)(ticks_sync)  # type: ignore[arg-type]
    dual(sync=ticks_sync)(other_chunks)  # type: ignore[arg-type]
    dual(sync=ticks_sync)(other_ticks)  # type: ignore[arg-type]
    dual(sync=ticks_sync, async_=other_chunks)  # type: ignore[arg-type]
    dual(sync=ticks_sync, async_=other_ticks)  # type: ignore[arg-type]
    ticks_alone.sync(fetch_sync)  # type: ignore[arg-type]
    dual(async_=iterable_async)(fetch_sync)  # type: ignore[arg-type]
    dual(sync=fetch_sync)(iterable_async)  # type: ignore[arg-type]
    dual(sync=fetch_sync, async_=iterable_async)  # type: ignore[arg-type]
    one_side.async_(iterable_async)  # type: ignore[arg-type]


async def streams() -> None:
    """Streaming pairs give generators when called, and chunks as runnables."""
    assert_type(ticks("EUR"), Generator[float, Any, Any])
    assert_type(aticks("EUR"), AsyncGenerator[float, Any])
    assert_type(two_ticks("EUR"), Generator[float, Any, Any])
    assert_type(ticks.call("EUR"), Generator[float, Any, Any])
    assert_type(aticks.call("EUR"), Generator[float, Any, Any])
    assert_type(ticks.acall("EUR"), AsyncGenerator[float, Any])
    assert_type(ticks_alone.acall("EUR"), AsyncGenerator[float, Any])
    assert_type(ticks_alone.call("EUR"), Generator[float, Any, Any])
    assert_type(ticks.stream("EUR"), Generator[float])
    assert_type(ticks.astream("EUR"), AsyncGenerator[float])
    with closing(ticks.stream("EUR")) as chunks, closing(ticks("EUR")) as own_chunks:
        assert_type(next(chunks), float)
        assert_type(own_chunks.send("a word"), float)
    async with aclosing(ticks.astream("EUR")) as achunks, aclosing(aticks("EUR")) as own_achunks:
        assert_type(await anext(achunks), float)
        assert_type(await own_achunks.asend("a word"), float)
    assert_type(await ticks.ainvoke("EUR"), float)
    assert_type(dual(sync=generator_sync, async_=generator_async).acall("EUR"), AsyncGenerator[float, Any])
    assert_type(dual(sync=generator_sync, async_=ticks_async).call("EUR"), Generator[float, Any, Any])
    ticks(3)  # type: ignore[arg-type]


async def iterables() -> None:
    """An async generator may be annotated as an `AsyncIterable`, too."""
    assert_type(ticks_on_iterable.acall("EUR"), AsyncGenerator[float, Any])
    assert_type(iterable_on_sync("EUR"), AsyncGenerator[float, Any])
    assert_type(iterable_on_sync.call("EUR"), Generator[float, Any, Any])
    assert_type(iterable_alone("EUR"), AsyncGenerator[float, Any])
    assert_type(iterable_alone.call("EUR"), Generator[float, Any, Any])
    assert_type(await iterable_alone.ainvoke("EUR"), float)
    assert_type(iterable_limited({"EUR": 1}), AsyncGenerator[float, Any])
    assert_type(dual(ticks_sync).async_(iterable_async)("EUR"), Generator[float, Any, Any])
    assert_type(dual(sync=ticks_sync, async_=iterable_async).acall("EUR"), AsyncGenerator[float, Any])
    assert_type(Dual(iterable_async)("EUR"), AsyncGenerator[float, Any])
    assert_type(Dual(ticks_sync, iterable_async)("EUR"), Generator[float, Any, Any])


# --- results that are Any ---


def any_sync(query: str) -> Any:
    return query


async def any_async(query: str) -> Any:
    return query


@dual
def any_alone(query: str) -> Any:
    return query


@dual(async_=any_async)
def any_on_sync(query: str) -> Any:
    return query


@dual(sync=any_sync)
async def any_on_async(query: str) -> Any:
    return query


@concurrency(limit=3)
def any_limited(query: str) -> Any:
    return query


@dual(name="never")
def never(query: str) -> NoReturn:
    raise ValueError(query)


@dual
async def any_in_parameters(query: dict[str, Any]) -> Quote:
    return {"EUR": query["EUR"]}


@concurrency(limit=3)
async def any_in_result(query: str) -> dict[str, Any]:
    return {query: 1}


@dual
@retrying
async def any_in_retried(query: dict[str, Any]) -> Quote:
    return {"EUR": query["EUR"]}


@dual
def any_in_generator(query: dict[str, Any]) -> Generator[float, None, None]:
    yield 1.0


@dual(sync=any_in_generator.func)
async def any_in_async_generator(query: dict[str, Any]) -> AsyncGenerator[float, None]:
    yield 1.0


class Feed:
    @dual
    def read(self, query: str) -> Any:
        return query


async def any_function(fn: Any) -> None:
    """What `Any` is made to is `Any`."""
    assert_type(dual(fn), Any)
    assert_type(concurrency(limit=3)(fn), Any)
    assert_type(Dual(fn)("EUR"), Any)


async def any_results(feed: Feed) -> None:
    """`Any` is neither taken for an awaitable nor for an iterator; nor is what never returns."""
    assert_type(any_alone("EUR"), Any)
    assert_type(any_alone.call("EUR"), Any)
    assert_type(any_alone.invoke("EUR"), Any)
    assert_type(any_on_sync("EUR"), Any)
    assert_type(await any_on_async("EUR"), Any)
    assert_type(any_on_async.call("EUR"), Any)
    assert_type(any_limited("EUR"), Any)
    assert_type(Dual(any_sync)("EUR"), Any)
    assert_type(dual(sync=any_sync, async_=any_async)("EUR"), Any)
    assert_type(never("EUR"), Any)
    assert_type(feed.read("EUR"), Any)
    any_alone(3)  # pyright: ignore[reportArgumentType]
    feed.read(3)  # pyright: ignore[reportArgumentType]


async def partly_any() -> None:
    """`Any` in a part of a type leaves the rest as it is."""
    assert_type(await any_in_parameters({"EUR": 1}), Quote)
    assert_type(any_in_parameters.call({"EUR": 1}), Quote)
    assert_type(await any_in_result("EUR"), dict[str, Any])
    assert_type(any_in_result.invoke("EUR"), dict[str, Any])
    assert_type(await any_in_retried({"EUR": 1}), Quote)
    assert_type(any_in_generator({"EUR": 1}), Generator[float, Any, Any])
    assert_type(any_in_async_generator({"EUR": 1}), AsyncGenerator[float, Any])
    any_in_parameters(3)  # type: ignore[arg-type, unused-coroutine]
    any_in_result(3)  # type: ignore[arg-type, unused-coroutine]


# --- limits, in either order ---


@concurrency(limit=3)
@dual(async_=fetch_async)
def limit_over(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual(async_=fetch_async)
@concurrency(per_second=3)
def limit_under(query: str, count: int = 1) -> Quote:
    return {query: count}


@concurrency(limiter=Limiter(limit=3))
async def limit_alone(query: str, count: int = 1) -> Quote:
    return {query: count}


@concurrency(limit=3)
def limit_on_ticks(query: str) -> Iterator[float]:
    yield 1.0


@concurrency(limit=3)
@dual
def limit_over_def(query: str) -> Quote:
    return {query: 1}


@concurrency(limit=3)
@dual
async def limit_over_async(query: str, count: int = 1) -> Quote:
    return {query: count}


@concurrency(limit=3)
@dual(sync=fetch_sync)
async def limit_over_both(query: str, count: int = 1) -> Quote:
    return {query: count}


@concurrency(limit=3)
@dual
def limit_over_ticks(query: str) -> Iterator[float]:
    yield 1.0


@concurrency(limit=3)
@dual(name="limited ticks")
async def limit_over_aticks(query: str) -> AsyncIterator[float]:
    yield 1.0


@concurrency(limit=3)
@dual
async def limit_over_any(query: dict[str, Any]) -> dict[str, Any]:
    return query


@concurrency(limit=3)
@dual
async def limit_over_any_ticks(query: dict[str, Any]) -> AsyncIterator[float]:
    yield 1.0


@dual
@concurrency(limit=3)
def limit_under_def(query: str) -> Quote:
    return {query: 1}


@dual
@concurrency(limit=3)
async def limit_under_async(query: str, count: int = 1) -> Quote:
    return {query: count}


@dual
@concurrency(limit=3)
def limit_under_ticks(query: str) -> Iterator[float]:
    yield 1.0


@dual(name="more limited ticks")
@concurrency(limit=3)
async def limit_under_aticks(query: str) -> AsyncIterator[float]:
    yield 1.0


@dual
@concurrency(limit=3)
async def limit_under_any(query: dict[str, Any]) -> dict[str, Any]:
    return query


limit_over_two = concurrency(limit=3)(from_two)
limit_over_two_ticks = concurrency(limit=3)(two_ticks)


@concurrency(limit=3)(dual(sync=fetch_sync, async_=fetch_async))
def limited_stub(query: str, count: int = 1) -> Quote:
    """Fetch one quote."""
    raise NotImplementedError


async def limits_over() -> None:
    """It changes nothing over a pair, whatever that is of."""
    assert_type(limit_over_def("EUR"), Quote)
    assert_type(await limit_over_def.acall("EUR"), Quote)
    assert_type(await limit_over_async("EUR", count=2), Quote)
    assert_type(limit_over_async.call("EUR"), Quote)
    assert_type(await limit_over_async.acall("EUR"), Quote)
    assert_type(await limit_over_async.ainvoke("EUR"), Quote)
    assert_type(limit_over_async | RunnableLambda(len), RunnableSerializable[Any, int])
    assert_type(await limit_over_both("EUR", count=2), Quote)
    assert_type(limit_over_both.call("EUR"), Quote)
    assert_type(limit_over_ticks("EUR"), Generator[float, Any, Any])
    assert_type(limit_over_ticks.acall("EUR"), AsyncGenerator[float, Any])
    assert_type(limit_over_aticks("EUR"), AsyncGenerator[float, Any])
    assert_type(limit_over_aticks.call("EUR"), Generator[float, Any, Any])
    assert_type(await limit_over_aticks.ainvoke("EUR"), float)
    assert_type(await limit_over_any({"EUR": 1}), dict[str, Any])
    assert_type(limit_over_any.call({"EUR": 1}), dict[str, Any])
    assert_type(limit_over_any_ticks({"EUR": 1}), AsyncGenerator[float, Any])
    assert_type(limit_over_two("EUR", count=2), Quote)
    assert_type(await limit_over_two.acall("EUR"), Quote)
    assert_type(limit_over_two_ticks("EUR"), Generator[float, Any, Any])
    assert_type(limited_stub("EUR", count=2), Quote)
    assert_type(concurrency(limit=3)(dual(fetch_async)).call("EUR"), Quote)
    limit_over_async(3)  # type: ignore[arg-type, unused-coroutine]
    limit_over_aticks(3)  # type: ignore[arg-type]
    limit_over_any(3)  # type: ignore[arg-type, unused-coroutine]


async def limits_under() -> None:
    """It changes nothing under `dual`."""
    assert_type(limit_under_def("EUR"), Quote)
    assert_type(await limit_under_async("EUR", count=2), Quote)
    assert_type(limit_under_async.call("EUR"), Quote)
    assert_type(await limit_under_async.ainvoke("EUR"), Quote)
    assert_type(limit_under_ticks("EUR"), Generator[float, Any, Any])
    assert_type(limit_under_aticks("EUR"), AsyncGenerator[float, Any])
    assert_type(limit_under_aticks.call("EUR"), Generator[float, Any, Any])
    assert_type(await limit_under_any({"EUR": 1}), dict[str, Any])
    limit_under_async(3)  # type: ignore[arg-type, unused-coroutine]
    limit_under_aticks(3)  # type: ignore[arg-type]


async def limits() -> None:
    """A limit changes nothing in the types."""
    assert_type(limit_over("EUR", count=2), Quote)
    assert_type(await limit_over.acall("EUR"), Quote)
    assert_type(limit_under("EUR", count=2), Quote)
    assert_type(await limit_under.acall("EUR"), Quote)
    assert_type(await limit_alone("EUR", count=2), Quote)
    assert_type(limit_alone.call("EUR"), Quote)
    assert_type(limit_on_ticks.acall("EUR"), AsyncGenerator[float, Any])
    limit_over.limiter.stats()
    limit_over.limiter["EUR"].resize(limit=4)
    limit_over(3)  # type: ignore[arg-type]
    limit_under(3)  # type: ignore[arg-type]
    limit_alone(3)  # type: ignore[arg-type, unused-coroutine]
    concurrency(limit="3")  # type: ignore[arg-type]
    concurrency(3)  # type: ignore[arg-type]
    Limiter(3)  # type: ignore[arg-type]
    concurrency(limit=3)(3)  # type: ignore[call-overload]


# --- methods ---


class Desk:
    async def _afetch(self, query: str, count: int = 1) -> Quote:
        return {query: count}

    @dual(async_=_afetch)
    def fetch(self, query: str, count: int = 1) -> Quote:
        return {query: count}

    @concurrency(limit=3)
    async def news(self, query: str) -> str:
        return query

    @dual
    def ticks(self, query: str) -> Iterator[float]:
        yield 1.0

    @dual
    @staticmethod
    def of_none(query: str) -> str:
        return query


class LimitedDesk:
    @concurrency(limit=3)
    @dual
    def over_def(self, query: str) -> Quote:
        return {query: 1}

    @concurrency(limit=3)
    @dual
    async def over_async(self, query: str, count: int = 1) -> Quote:
        return {query: count}

    @concurrency(limit=3)
    @dual
    def over_ticks(self, query: str) -> Iterator[float]:
        yield 1.0

    @concurrency(limit=3)
    @dual
    async def over_aticks(self, query: dict[str, Any]) -> AsyncIterator[float]:
        yield 1.0

    @dual
    @concurrency(limit=3)
    def under_def(self, query: str) -> Quote:
        return {query: 1}

    @dual
    @concurrency(limit=3)
    async def under_async(self, query: str, count: int = 1) -> Quote:
        return {query: count}

    @dual
    @concurrency(limit=3)
    def under_ticks(self, query: str) -> Iterator[float]:
        yield 1.0

    @dual
    @concurrency(limit=3)
    async def under_aticks(self, query: dict[str, Any]) -> AsyncIterator[float]:
        yield 1.0


async def limited_methods(desk: LimitedDesk) -> None:
    """A limit changes nothing in the types of methods."""
    assert_type(desk.over_def("EUR"), Quote)
    assert_type(await desk.over_async("EUR", count=2), Quote)
    assert_type(desk.over_async.call("EUR"), Quote)
    assert_type(desk.over_ticks("EUR"), Generator[float, Any, Any])
    assert_type(desk.over_aticks({"EUR": 1}), AsyncGenerator[float, Any])
    assert_type(desk.over_aticks.call({"EUR": 1}), Generator[float, Any, Any])
    assert_type(desk.under_def("EUR"), Quote)
    assert_type(await desk.under_async("EUR", count=2), Quote)
    assert_type(desk.under_async.call("EUR"), Quote)
    assert_type(desk.under_ticks("EUR"), Generator[float, Any, Any])
    assert_type(desk.under_aticks({"EUR": 1}), AsyncGenerator[float, Any])
    desk.over_async(3)  # type: ignore[arg-type, unused-coroutine]
    desk.over_aticks(3)  # type: ignore[arg-type]
    desk.under_async(3)  # type: ignore[arg-type, unused-coroutine]


async def methods(desk: Desk) -> None:
    """A bound pair takes the parameters without `self`."""
    assert_type(desk.fetch("EUR", count=2), Quote)
    assert_type(desk.fetch.call("EUR"), Quote)
    assert_type(await desk.fetch.acall("EUR"), Quote)
    assert_type(await desk.fetch.ainvoke("EUR"), Quote)
    assert_type(await desk.news("EUR"), str)
    assert_type(desk.news.call("EUR"), str)
    assert_type(desk.ticks.acall("EUR"), AsyncGenerator[float, Any])
    assert_type(desk.fetch | RunnableLambda(len), RunnableSerializable[Any, int])
    assert_type(Desk.fetch(desk, "EUR"), Quote)
    assert_type(Desk.of_none("EUR"), str)
    desk.fetch(3)  # type: ignore[arg-type]
    desk.fetch.call(text="EUR")  # type: ignore[call-arg]


async def at_once(desk: Desk) -> None:
    """Each result keeps its type."""
    assert_type(await asyncio.gather(desk.news("EUR"), desk.fetch.acall("EUR")), tuple[str, Quote])
    news: Coroutine[None, None, str] = desk.news("EUR")  # as an `async def`'s is often written
    assert_type(await news, str)
    desk.news("EUR")  # type: ignore[unused-coroutine]


class Side(Enum):
    BID = "bid"

    @dual
    def quote(self, query: str) -> str:
        return query


def members() -> None:
    """A member of an enum binds as any instance."""
    assert_type(Side.BID.quote("EUR"), str)


@dataclass
class Step:
    run: Dual[str, Quote]

    @property
    def bound(self) -> Dual[str, Quote]:
        return self.run


def attributes(step: Step) -> None:
    """What is said of the input of a pair that an object holds or gives is kept."""
    assert_type(step.run.invoke("EUR"), Quote)
    assert_type(step.bound.call("EUR"), Quote)
    step.run.invoke(3)  # type: ignore[arg-type]
    step.bound.invoke(3)  # type: ignore[arg-type]


class Dealer(Desk):
    @dual(async_=Desk.fetch)
    def fetch(self, query: str, count: int = 2) -> Quote:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {query: count}

    @dual(sync=Desk.news)
    async def news(self, query: str) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return query


class Broker(Desk):
    @dual(sync=Desk.fetch)  # type: ignore[arg-type]
    async def fetch(self, query: str, count: int = 2) -> Quote:  # type: ignore[override]
        return {query: count}


async def overrides(dealer: Dealer, broker: Broker) -> None:
    """A side beside the parent's pair has parameters of its own; a pair of the other colour is an error."""
    assert_type(dealer.fetch("EUR", count=2), Quote)
    assert_type(await dealer.fetch.acall("EUR"), Quote)
    assert_type(await broker.fetch("EUR"), Quote)
    news: str = await dealer.news("EUR")  # to mypy it is Any
    dealer.fetch(news, "2")  # type: ignore[arg-type]
    dual(async_=Desk.fetch)(whole_sync)  # type: ignore[arg-type]


# --- the drop-in, the registry, other people's code ---


async def drop_in(pair: Dual[str, Quote]) -> None:
    """`Dual` stands for `RunnableLambda` in an annotation, and infers when it is made."""
    assert_type(pair("EUR"), Quote)
    assert_type(pair.invoke("EUR"), Quote)
    assert_type(await pair.ainvoke("EUR"), Quote)
    assert_type(await pair.acall("EUR"), Quote)
    assert_type(Dual(fetch_sync)("EUR"), Quote)
    assert_type(Dual(fetch_sync, fetch_async).call("EUR", count=2), Quote)
    assert_type(await Dual(fetch_async)("EUR"), Quote)
    assert_type(Dual(ticks_sync).acall("EUR"), AsyncGenerator[float, Any])
    pair.invoke(3)  # type: ignore[arg-type]


def sync_of_any(query: dict[str, Any]) -> Quote:
    return {"EUR": query["EUR"]}


async def async_of_any(query: dict[str, Any]) -> Quote:
    return {"EUR": query["EUR"]}


def ticks_of_any(query: dict[str, Any]) -> Iterator[float]:
    yield 1.0


async def aticks_of_any(query: dict[str, Any]) -> AsyncGenerator[float, None]:
    yield 1.0


async def drop_ins_of_any() -> None:
    """`Any` in a part of a function's type leaves the rest as it is."""
    assert_type(Dual(sync_of_any)({"EUR": 1}), Quote)
    assert_type(await Dual(async_of_any)({"EUR": 1}), Quote)
    assert_type(Dual(async_of_any).call({"EUR": 1}), Quote)
    assert_type(Dual(ticks_of_any)({"EUR": 1}), Generator[float, Any, Any])
    assert_type(Dual(aticks_of_any)({"EUR": 1}), AsyncGenerator[float, Any])
    assert_type(Dual(sync_of_any, async_of_any)({"EUR": 1}), Quote)
    assert_type(Dual(ticks_of_any, aticks_of_any)({"EUR": 1}), Generator[float, Any, Any])
    assert_type(await Dual(any_async)("EUR"), Any)
    assert_type(Dual(any_sync, any_async)("EUR"), Any)
    assert_type(Dual[str, Quote](fetch_sync, fetch_async)("EUR"), Quote)
    Dual(number_sync, lambda query: number_async(query.strip()))  # pyright knows the type of the lambda
    Dual(sync_of_any, fetch_sync)  # type: ignore[arg-type]
    Dual(sync_of_any)(3)  # type: ignore[arg-type]
    Dual(async_of_any)(3)  # type: ignore[arg-type, unused-coroutine]


async def annotated(
    of_async_def: Dual[str, Quote, ..., Coroutine[Any, Any, Quote]],
    of_either: Dual[str, Quote, ..., Any],
    of_generator: Dual[str, float, ..., Any, Any, Any],
    any_pair: AnyDual,
    runnable: Runnable[str, Quote],
) -> None:
    """What is said of a pair in an annotation is what it gives."""
    assert_type(await of_async_def("EUR"), Quote)
    assert_type(of_async_def.call("EUR"), Quote)
    assert_type(await of_async_def.acall("EUR"), Quote)
    assert_type(of_either("EUR"), Any)
    assert_type(of_either.call("EUR"), Quote)
    assert_type(await of_either.acall("EUR"), Quote)
    assert_type(of_generator("EUR"), Any)
    assert_type(of_generator.invoke("EUR"), float)
    assert_type(of_generator.astream("EUR"), AsyncGenerator[float])
    assert_type(any_pair.invoke("EUR"), Any)
    assert_type(runnable.invoke("EUR"), Quote)
    of_async_def.invoke(3)  # type: ignore[arg-type]
    of_either.invoke(3)  # type: ignore[arg-type]
    of_generator.invoke(3)  # type: ignore[arg-type]
    runnable.invoke(3)  # type: ignore[arg-type]


async def annotations() -> None:
    """`Dual[str, Quote]` is a pair of a `def`; each other kind has an annotation, and so have all together."""
    await annotated(on_async, on_sync, ticks, two_ticks, on_sync)
    await annotated(one_async_side, on_async, aticks, on_async, on_async)
    await annotated(on_sync, over_stub, two_ticks, aticks, from_two)  # type: ignore[arg-type]
    await annotated(on_async, ticks, ticks, ticks, from_two)  # type: ignore[arg-type]
    streams: list[Runnable[str, float]] = [ticks, aticks, two_ticks]
    pairs: list[AnyDual] = [on_sync, on_async, from_two, over_stub, ticks, aticks, two_ticks]
    assert_type(streams[0].invoke("EUR"), float)
    assert_type(pairs[0].invoke("EUR"), Any)
    await drop_in(on_sync)
    await drop_in(from_two)
    await drop_in(on_async)  # type: ignore[arg-type]
    await drop_in(ticks)  # type: ignore[arg-type]


def fakes() -> None:
    """A fake is any function; a pair is named or given."""
    with registry.override(on_sync, fetch_async), registry.override("quotes", sync=fetch_sync):
        on_sync("EUR")
    registry.override(fetch_sync, fetch_sync)  # type: ignore[arg-type]


def patches() -> None:
    """A patch is undone by what it returns."""
    with dual_patch("quotes:Client.fetch", async_=fetch_async) as patch:
        assert_type(patch.target, str)
        concurrency(limit=3)(patch.pair)
    dual_patch("quotes:fetch", async_="fetch").undo()  # type: ignore[arg-type]


async def streams_over_many_inputs(*, catch: bool) -> None:
    """`each` and `aeach` give the outputs of any runnable; in place of an output, an exception, if that was asked."""
    pair = dual(sync=fetch_sync, async_=fetch_async)

    for output in each(pair, ["usd"]):
        assert_type(output, Quote)
    for output_or_error in each(pair, ["usd"], return_exceptions=True):
        assert_type(output_or_error, Quote | Exception)
        if isinstance(output_or_error, Exception):
            raise output_or_error
        assert_type(output_or_error, Quote)
    for _, numbered in each(pair, ["usd"], ordered=False, return_exceptions=catch, via="async"):
        assert_type(numbered, Quote | Exception)
    async for output in aeach(pair.with_retry(), ["usd"], return_exceptions=False):
        assert_type(output, Quote)
    async for output_or_error in aeach(pair, ["usd"], return_exceptions=True):
        assert_type(output_or_error, Quote | Exception)
    async for index, output in aeach(pair, ["usd"], ordered=False):
        assert_type((index, output), tuple[int, Quote])
    async for index, output_or_error in aeach(pair, ["usd"], ordered=False, return_exceptions=True):
        assert_type((index, output_or_error), tuple[int, Quote | Exception])
