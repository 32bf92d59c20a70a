"""The five forms of `dual`, on everything that can be called."""

import _thread
import asyncio
import copy
import dataclasses
import functools
import inspect
import itertools
import operator
import pydoc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import Context
from types import MethodType
from typing import Any, TypeVar, Union, get_args
from unittest import mock

import pytest
from langchain_core.callbacks import AsyncCallbackManagerForChainRun, BaseCallbackHandler
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.config import get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.runtime import get_runtime
from typing_extensions import TypedDict

from asyncify import BridgeError, Dual, PairError, aeach, concurrency, dual, each, registry
from tests.waiting import wait_until

Question = TypeVar("Question")
Answer = TypeVar("Answer")


def fetch_sync(query: str) -> str:
    """Fetch by threads."""
    return f"sync {query}"


async def fetch_async(query: str) -> str:
    """Fetch by the loop."""
    return f"async {query}"


class Fetcher:
    """A callable object."""

    def __call__(self, query: str) -> str:
        return f"sync {query}"


class AsyncFetcher:
    """A callable object with an async call."""

    async def __call__(self, query: str) -> str:
        return f"async {query}"


class Binding:
    """What a decorator written as a class returns, if it is to serve on methods."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


class BindingAsync(Binding):
    """Around a coroutine function."""

    async def __call__(self, *args: Any) -> Any:
        return await self.fn(*args)


class BindingChunks(Binding):
    """Around a generator function."""

    def __call__(self, *args: Any) -> Iterator[Any]:
        yield from self.fn(*args)


def on_sync() -> Dual[Any, Any]:
    """Form 1: on the sync function."""

    @dual(async_=fetch_async)
    def fetch(query: str) -> str:
        return fetch_sync(query)

    return fetch


def on_async() -> Dual[Any, Any]:
    """Form 2: on the async function."""

    @dual(sync=fetch_sync)
    async def fetch(query: str) -> str:
        return await fetch_async(query)

    return fetch


def from_two() -> Dual[Any, Any]:
    """Form 3: from two functions that exist."""
    return dual(sync=fetch_sync, async_=fetch_async)


def over_stub() -> Dual[Any, Any]:
    """Form 4: over a stub."""

    @dual(sync=fetch_sync, async_=fetch_async)
    def fetch(query: str) -> str:  # type: ignore[empty-body]
        """Fetch one quote."""

    return fetch


def over_async_stub() -> Dual[Any, Any]:
    """Form 4, over an async stub."""

    @dual(sync=fetch_sync, async_=fetch_async)
    async def fetch(query: str) -> str:  # type: ignore[empty-body]
        """Fetch one quote."""

    return fetch


def one_by_one() -> Dual[Any, Any]:
    """Form 5: the sync side first."""

    @dual
    def fetch(query: str) -> str:
        return fetch_sync(query)

    return fetch.async_(fetch_async)


def one_by_one_from_async() -> Dual[Any, Any]:
    """Form 5: the async side first."""

    @dual
    async def fetch(query: str) -> str:
        return await fetch_async(query)

    return fetch.sync(fetch_sync)


FORMS = [on_sync, on_async, from_two, over_stub, over_async_stub, one_by_one, one_by_one_from_async]
ASYNC_FORMS = {on_async, over_async_stub, one_by_one_from_async}

CALLABLES: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
    ("functions", fetch_sync, fetch_async),
    ("callable objects", Fetcher(), AsyncFetcher()),
    ("decorators that bind", Binding(fetch_sync), BindingAsync(fetch_async)),
    (
        "partials",
        functools.partial(lambda prefix, query: f"{prefix} {query}", "sync"),
        functools.partial(fetch_async),
    ),
    ("a lambda", lambda query: f"sync {query}", fetch_async),
]


@pytest.mark.parametrize("options", [{}, {"bridge": "thread"}, {"warn": True}, {"name": None}])
def test_options_written_out_as_they_are_by_default(options: dict[str, Any]) -> None:
    """`@dual(bridge="thread")` is `@dual`, and so is `@dual()`."""
    pair = dual(**options)(fetch_sync)

    assert pair.call("EUR") == "sync EUR"


@pytest.mark.parametrize("form", FORMS)
def test_invoke_runs_the_sync_side(form: Callable[[], Dual[Any, Any]]) -> None:
    """In every form `invoke` and `call` run the sync implementation."""
    pair = form()

    assert pair.invoke("EUR") == "sync EUR"
    assert pair.call("EUR") == "sync EUR"


@pytest.mark.parametrize("form", FORMS)
async def test_ainvoke_runs_the_async_side(form: Callable[[], Dual[Any, Any]]) -> None:
    """In every form `ainvoke` and `acall` run the async implementation."""
    pair = form()

    assert await pair.ainvoke("EUR") == "async EUR"
    assert await pair.acall("EUR") == "async EUR"


@pytest.mark.parametrize("form", FORMS)
async def test_a_call_does_what_the_decorated_function_did(form: Callable[[], Dual[Any, Any]]) -> None:
    """A `def` gives its result, an `async def` an awaitable."""
    result = form()("EUR")

    if form in ASYNC_FORMS:
        assert inspect.isawaitable(result)
        assert await result == "async EUR"
    else:
        assert result == "sync EUR"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_registers_the_pair(form: Callable[[], Dual[Any, Any]]) -> None:
    """The registry knows the pair, with both sides native."""
    pair = form()
    record = next(record for record in registry if record.pair is pair)

    assert (record.sync, record.async_) == ("native", "native")
    assert repr(pair).startswith(f"<Dual {pair.get_name()} sync+async")


@pytest.mark.parametrize(("sync", "async_"), [case[1:] for case in CALLABLES], ids=[case[0] for case in CALLABLES])
async def test_two_callables_make_a_pair(sync: Callable[..., Any], async_: Callable[..., Any]) -> None:
    """Whatever can be called can be a side."""
    pair = dual(sync=sync, async_=async_, name="callables")

    assert pair.invoke("EUR") == "sync EUR"
    assert await pair.ainvoke("EUR") == "async EUR"


async def test_a_decorator_that_binds_has_the_colour_of_its_call() -> None:
    """On its own it is the async side, or a generator, as its `__call__` is."""
    later = dual(BindingAsync(fetch_async))
    chunks = dual(BindingChunks(iter), name="chunks")

    assert await later("EUR") == later.invoke("EUR") == "async EUR"
    assert list(chunks.stream("EUR")) == ["E", "U", "R"]


async def test_a_proxy_that_answers_to_any_name_is_what_its_call_is() -> None:
    """As that of a remote service."""

    class Remote:
        def __getattr__(self, name: str) -> "Remote":
            return Remote()

        async def __call__(self, query: str) -> str:
            return f"async {query}"

    pair = dual(async_=Remote())(lambda query: f"sync {query}")

    assert await pair.ainvoke("EUR") == "async EUR"


def test_a_partial_must_keep_the_parameters_of_the_other_side() -> None:
    """A parameter that a partial gives by name stays, as keyword-only: the two sides then differ."""
    sync = functools.partial(lambda query, prefix: query, prefix="x")

    with pytest.raises(PairError, match="the two sides take different parameters"):
        dual(sync=sync, async_=fetch_async)


@pytest.mark.parametrize(("builtin", "value", "expected"), [(len, "EUR", 3), (operator.neg, 1, -1), (int, "7", 7)])
async def test_a_builtin_is_a_sync_side(builtin: Callable[..., Any], value: object, expected: object) -> None:
    """A builtin and a class serve as a sync side, and are bridged."""
    pair = dual(builtin, name=f"builtin_{builtin.__name__}")

    assert pair.invoke(value) == expected
    assert await pair.ainvoke(value) == expected


async def test_a_missing_side_is_bridged() -> None:
    """`@dual` alone gives a pair that works on both paths."""

    @dual
    def from_sync(query: str) -> str:
        return fetch_sync(query)

    @dual
    async def from_async(query: str) -> str:
        return await fetch_async(query)

    assert await from_sync.ainvoke("EUR") == "sync EUR"
    assert from_async.invoke("EUR") == "async EUR"


async def test_bridge_error_forbids_to_make_a_side() -> None:
    """With `bridge="error"` the missing side raises, and says what to write."""

    @dual(bridge="error")
    def fetch(query: str) -> str:
        return fetch_sync(query)

    with pytest.raises(BridgeError, match=r"fetch .* has no async side .* give it as async_="):
        await fetch.ainvoke("EUR")
    assert fetch.invoke("EUR") == "sync EUR"


# --- the first call: a stub or an ordinary call ---


def test_a_stub_gives_name_docs_and_signature() -> None:
    """Over a stub the pair is called, documented and registered as the stub."""
    pair = over_stub()

    assert inspect.unwrap(pair).__name__ == "fetch"
    assert pair.name == "fetch"
    assert pair.__doc__ == "Fetch one quote."
    assert f"{__name__}.over_stub.<locals>.fetch" in registry


def test_an_empty_body_makes_a_stub() -> None:
    """A body of `...`, of `pass` or of `raise NotImplementedError` is as empty as a docstring."""

    @dual(sync=fetch_sync, async_=fetch_async)
    def dots(query: str) -> Any: ...

    @dual(sync=fetch_sync, async_=fetch_async)
    def nothing(query: str) -> Any:
        pass

    @dual(sync=fetch_sync, async_=fetch_async)
    def unwritten(query: str) -> str:
        raise NotImplementedError

    assert [pair.get_name() for pair in (dots, nothing, unwritten)] == ["dots", "nothing", "unwritten"]


def test_a_stub_with_a_body_is_refused() -> None:
    """Three bodies are one too many; the pair can then still be given a proper stub."""
    pair: Dual[Any, Any] = dual(sync=fetch_sync, async_=fetch_async)

    def fetch(query: str) -> str:
        return query

    def stub(query: str) -> Any: ...

    with pytest.raises(PairError, match=r"fetch .* has a body, .* which of the three should run\?"):
        pair(fetch)
    assert pair(stub) is pair


def test_a_stub_keeps_the_name_that_dual_was_given() -> None:
    """`name=` wins over the name of the stub."""

    @dual(sync=fetch_sync, async_=fetch_async, name="quotes")
    def fetch(query: str) -> str:  # type: ignore[empty-body]
        """Fetch one quote."""

    assert registry[f"{__name__}.quotes"].pair is fetch
    assert fetch.name == "quotes"


def test_a_pair_that_was_called_takes_no_stub() -> None:
    """Only the first call can be a decoration."""
    pair: Dual[Any, Any] = dual(sync=fetch_sync, async_=fetch_async)
    pair("EUR")

    def stub(query: str) -> Any: ...

    assert pair(stub) == f"sync {stub}"


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param(lambda query: None, id="a lambda"),
        pytest.param(lambda: None, id="another lambda"),
        pytest.param(len, id="a builtin"),
        pytest.param(Fetcher(), id="an object"),
        pytest.param("EUR", id="text"),
    ],
)
def test_an_ordinary_argument_is_no_stub(argument: object) -> None:
    """A pair from two functions is called with whatever is no stub of it."""
    pair: Dual[Any, Any] = dual(sync=fetch_sync, async_=fetch_async)

    assert pair(argument) == f"sync {argument}"


def test_a_function_with_other_parameters_is_an_argument() -> None:
    """A function that does not take the pair's parameters is passed on."""
    pair: Dual[Any, Any] = dual(sync=fetch_sync, async_=fetch_async)

    def callback(event: str) -> None: ...

    assert pair(callback) == f"sync {callback}"


def test_a_pair_over_a_stub_takes_a_function_as_an_argument() -> None:
    """Once it has its stub, a pair takes anything as an argument."""
    pair = over_stub()

    def stub(query: str) -> Any: ...

    assert pair(stub) == f"sync {stub}"


# --- what a pair shows ---


@pytest.mark.parametrize("form", FORMS)
def test_the_signature_survives(form: Callable[[], Dual[Any, Any]]) -> None:
    """`inspect.signature` shows the function's parameters."""
    assert str(inspect.signature(form())) == "(query: str) -> str"


def test_help_shows_name_signature_and_docs() -> None:
    """`help` of a pair is the help of its function; on a class and on an instance, that of a method."""

    class Desk:
        @dual
        def sell(self, amount: float) -> float:
            """Sell an amount."""
            return amount

    shown = pydoc.plain(pydoc.render_doc(over_stub()))

    assert "fetch(query: str) -> str\n    Fetch one quote." in shown
    assert "sell(self, amount: float) -> float\n |      Sell an amount." in pydoc.plain(pydoc.render_doc(Desk))
    assert "sell(amount: float) -> float\n    Sell an amount." in pydoc.plain(pydoc.render_doc(Desk().sell))


def test_func_and_afunc_are_the_raw_implementations() -> None:
    """The two functions are at hand, unwrapped."""
    pair = from_two()

    assert pair.func is fetch_sync
    assert pair.afunc is fetch_async


_CELL = """
def version(number):
    async def later_async(query: str) -> str:
        return f"{number} {query}"
    return later_async
"""


def test_a_side_that_is_written_anew_takes_its_own_place() -> None:
    """As by a notebook's cell that is run again: each version of one is a file of its own."""

    def later(query: str) -> str:
        return query

    pair: Any = dual(later)
    for number, cell, above in ((1, "<cell 1>", ""), (2, "<cell 2>", "\n"), (3, "<cell 2>", "\n")):
        names: dict[str, Any] = {"__name__": "notebook"}
        exec(compile(above + _CELL, cell, "exec"), names)  # noqa: S102  (of the test's own code)
        pair.async_(names["version"](number))

        assert asyncio.run(pair.ainvoke("x")) == f"{number} x"
        assert asyncio.run((pair | str.upper).ainvoke("x")) == f"{number} X"
    assert pair.invoke("x") == "x"


@pytest.mark.parametrize(
    ("name", "module", "cell", "line"),
    [
        pytest.param("later_async", "notebook", "<cell 1>", "\n", id="another of its name in one file"),
        pytest.param("other_async", "notebook", "<cell 2>", "", id="of another name"),
        pytest.param("later_async", "script", "<cell 2>", "", id="of another module"),
    ],
)
def test_a_side_that_is_another_function_takes_no_place(name: str, module: str, cell: str, line: str) -> None:
    """Only the next version of a function takes its place."""
    first: dict[str, Any] = {"__name__": "notebook"}
    exec(compile(_CELL, "<cell 1>", "exec"), first)  # noqa: S102  (of the test's own code)
    another: dict[str, Any] = {"__name__": module}
    exec(compile(line + _CELL.replace("later_async", name), cell, "exec"), another)  # noqa: S102
    pair: Any = dual(sync=fetch_sync, async_=first["version"](1))

    with pytest.raises(PairError, match="has an async side already"):
        pair.async_(another["version"](2))
    assert asyncio.run(pair.ainvoke("x")) == "1 x"


def test_a_side_without_code_of_its_own_takes_no_place() -> None:
    """A partial, say, is no version of the function in it, nor is that one of the partial; nor is a mock."""
    sides: list[Any] = [fetch_async, functools.partial(fetch_async), mock.AsyncMock()]
    for first, second in itertools.product(sides[:2], sides):
        pair: Any = dual(sync=fetch_sync, async_=first)

        with pytest.raises(PairError, match="has an async side already"):
            pair.async_(second)


def test_the_second_side_is_added_once() -> None:
    """A side that is there already is not replaced."""
    with pytest.raises(PairError, match="has an async side already"):
        one_by_one().async_(fetch_async)
    with pytest.raises(PairError, match="has a sync side already"):
        one_by_one_from_async().sync(fetch_sync)


def test_a_second_side_that_does_not_fit_is_refused() -> None:
    """The second side is checked like the first, and the pair stays as it was."""

    @dual
    def fetch(query: str) -> str:
        return fetch_sync(query)

    async def other(text: str) -> str:
        return text

    with pytest.raises(PairError, match=r"fetch.async_: the two sides take different parameters"):
        fetch.async_(other)  # type: ignore[arg-type]
    assert registry[f"{__name__}.{fetch.__qualname__}"].async_ == "bridged"


def test_a_second_side_that_does_not_fit_is_refused_from_async() -> None:
    """The sync twin."""

    @dual
    async def fetch(query: str) -> str:
        return await fetch_async(query)

    def other(text: str) -> str:
        return text

    with pytest.raises(PairError, match=r"fetch.sync: the two sides take different parameters"):
        fetch.sync(other)  # type: ignore[arg-type]
    assert registry[f"{__name__}.{fetch.__qualname__}"].sync == "bridged"


def test_a_limit_on_the_decorated_side_is_the_limit_of_the_pair() -> None:
    """`@concurrency` below `@dual` limits the pair, which takes the place of the limited function."""

    @dual(async_=fetch_async)
    @concurrency(limit=3)
    def fetch(query: str) -> str:
        return fetch_sync(query)

    assert repr(fetch) == "<Dual fetch sync+async 0/3 in flight, 0 waiting>"
    assert registry[f"{__name__}.{fetch.__qualname__}"].pair is fetch


def test_a_pair_is_shown_where_no_python_asks() -> None:
    """As the interpreter does when it reports an error that nobody has caught."""
    shown: list[str] = []
    _thread.start_new_thread(shown.extend, (map(repr, [Dual(fetch_sync)]),))
    wait_until(lambda: shown != [])

    assert shown == ["<Dual fetch_sync sync (async bridged)>"]


async def _told_async(query: str) -> str:
    return query


def _coroutine_functions() -> dict[str, tuple[Any, bool]]:
    class Desk:
        @concurrency(limit=2)
        async def fetch(self, query: str) -> str:
            return query

    async def stream(query: str) -> AsyncIterator[str]:
        yield query

    @dual(sync=fetch_sync, async_=fetch_async)
    def stub(query: str) -> str:
        """Have only a name."""
        raise NotImplementedError

    return {
        "async def": (dual(fetch_async), True),
        "async def with a limit": (concurrency(limit=2)(fetch_async), True),
        "a method": (Desk().fetch, True),
        "def": (dual(fetch_sync), False),
        "def with an async side": (dual(sync=fetch_sync, async_=fetch_async), False),
        "a stub": (stub, False),
        "async generator": (dual(stream), False),
        "an async def that wraps a def": (dual(functools.wraps(fetch_sync)(_told_async), name="wraps a def"), True),
        "a partial": (dual(functools.partial(fetch_async), name="a partial of an async def"), True),
        "an object with an async call": (dual(AsyncFetcher(), name="an async object"), True),
    }


@pytest.mark.parametrize(("pair", "is_coroutine_function"), _coroutine_functions().values(), ids=_coroutine_functions())
def test_a_framework_is_told_whether_to_await_it(pair: Any, *, is_coroutine_function: bool) -> None:
    """Or a callback that is a pair of an `async def` would never run."""
    assert asyncio.iscoroutinefunction(pair) is is_coroutine_function
    assert inspect.iscoroutinefunction(pair) is is_coroutine_function
    assert inspect.iscoroutinefunction(functools.partial(pair, "x")) is is_coroutine_function


def handed_on(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function as openai's clients are: what it returns is handed on by a `def`."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


class _Client:
    """An async client, whose methods are `def`s."""

    def fetch(self, query: str) -> Awaitable[str]:
        return fetch_async(query)

    def fetch_either(self, query: str) -> Union[str, Awaitable[str]]:  # noqa: UP007  (as redis has it)
        return fetch_async(query)

    def fetch_or_none(self, query: str) -> Coroutine[Any, Any, str] | None:
        return fetch_async(query)

    def fetch_quoted(self, query: str) -> "Awaitable[str]":
        return fetch_async(query)

    def fetch_in_a_task(self, query: str) -> "asyncio.Future[str]":
        return asyncio.ensure_future(fetch_async(query))

    @handed_on
    async def fetch_handed_on(self, query: str) -> str:
        return await fetch_async(query)


@functools.wraps(fetch_sync)
async def _around_a_def(query: str) -> str:
    return await fetch_async(query)


def _quote_nowhere(query: str) -> "Awaitable[Nowhere]":  # type: ignore[name-defined]  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
    return fetch_async(query)


AWAITED: dict[str, Callable[..., Any]] = {
    "handed on": handed_on(fetch_async),
    "handed on twice": handed_on(handed_on(fetch_async)),
    "a partial, handed on": handed_on(functools.partial(fetch_async)),
    "a partial of what is handed on": functools.partial(handed_on(fetch_async)),
    "an async def around a def, handed on": handed_on(_around_a_def),
    "an object around it": Binding(fetch_async),
    "a method": _Client().fetch_handed_on,
    "an annotation": _Client().fetch,
    "an annotation of a union": _Client().fetch_either,
    "an annotation of a new union": _Client().fetch_or_none,
    "an annotation that is a string": _Client().fetch_quoted,
    "an annotation of a future": _Client().fetch_in_a_task,
    "an annotation of a partial": functools.partial(_Client().fetch),
}


@pytest.mark.parametrize("fetch", AWAITED.values(), ids=AWAITED)
async def test_a_def_that_shows_that_it_is_awaited_is_an_async_side(fetch: Callable[..., Any]) -> None:
    """Where it is said to be one, in every form; the sync side is what is called there."""

    def stub(query: str) -> str:
        """Have only a name."""
        raise NotImplementedError

    later: Any = dual(fetch_sync, name="later")
    over_stub: Any = dual(sync=fetch_sync, async_=fetch)
    pairs: list[Any] = [
        dual(async_=fetch)(fetch_sync),
        dual(sync=fetch_sync, async_=fetch),
        over_stub(stub),
        later.async_(fetch),
    ]
    for pair in pairs:
        assert (pair("a"), pair.call("a"), pair.invoke("a")) == ("sync a", "sync a", "sync a")
        assert (await pair.acall("a"), await pair.ainvoke("a")) == ("async a", "async a")
        assert (pair.batch(["a"]), await pair.abatch(["a"])) == (["sync a"], ["async a"])
        assert not inspect.iscoroutinefunction(pair)
        assert pair.afunc is fetch


@pytest.mark.parametrize("limited", [False, True], ids=["free", "limited"])
@pytest.mark.parametrize("fetch", AWAITED.values(), ids=AWAITED)
async def test_a_decorated_def_that_shows_that_it_is_awaited_is_called_as_one(fetch: Any, *, limited: bool) -> None:
    """The pair is a coroutine function too, whatever it was: who calls it awaits what it gives."""
    pair: Any = dual(sync=fetch_sync, name="fetch")(fetch)
    if limited:
        pair = concurrency(limit=2)(pair)

    assert (await pair("a"), await pair.acall("a"), await pair.ainvoke("a")) == ("async a", "async a", "async a")
    assert (pair.call("a"), pair.invoke("a")) == ("sync a", "sync a")
    assert asyncio.iscoroutinefunction(pair)
    assert inspect.iscoroutinefunction(pair)
    assert list(inspect.signature(pair).parameters) == ["query"]


@pytest.mark.parametrize("way", ["direct call", "acall", "ainvoke", "abatch"])
async def test_the_limit_holds_until_what_a_def_returned_has_been_awaited(way: str) -> None:
    """And not only until it has been returned."""
    inside: list[int] = []
    most: list[int] = []

    @handed_on
    async def fetch(query: int) -> int:
        inside.append(query)
        most.append(len(inside))
        for _ in range(10):
            await asyncio.sleep(0)
        inside.remove(query)
        return query

    pair: Any = concurrency(limit=2)(dual(sync=lambda query: query, name="fetch")(fetch))
    one_by_one: dict[str, Callable[[int], Any]] = {"direct call": pair, "acall": pair.acall, "ainvoke": pair.ainvoke}
    calls = map(one_by_one[way], range(6)) if way in one_by_one else [pair.abatch([*range(6)])]
    await asyncio.gather(*calls)

    assert (len(most), max(most)) == (6, 2)


@asynccontextmanager
async def _opened(query: str) -> AsyncIterator[str]:
    yield query


async def _chunks(query: str) -> AsyncIterator[str]:
    yield query


def _either(query: str) -> str | list[Awaitable[str]]:
    return query


NOT_AWAITED: dict[str, Callable[..., Any]] = {
    "def": handed_on(fetch_sync),
    "a context manager": _opened,
    "an async generator, handed on": handed_on(_chunks),
    "a list of awaitables": _either,
    "an annotation that means nothing at run time": _quote_nowhere,
    "a builtin": len,
    "a mock": mock.Mock(),
}


@pytest.mark.parametrize("fn", NOT_AWAITED.values(), ids=NOT_AWAITED)
def test_a_def_that_does_not_show_that_it_is_awaited_is_no_async_side(fn: Callable[..., Any]) -> None:
    """Two sync functions are a slip, mostly; the message says what to write where they are not."""
    wanted = r"not async, .* async def get\(name\): return await client.get\(name\)"
    for make in (lambda: dual(async_=fn), lambda: dual(sync=fetch_sync)(fn), lambda: dual(fetch_sync).async_(fn)):
        with pytest.raises(PairError, match=wanted):
            make()


async def test_a_def_alone_is_a_sync_side_whatever_it_returns() -> None:
    """It may well run what it wraps, as what makes a sync function of an async one does."""
    syncified = functools.wraps(fetch_async)(lambda query: asyncio.run(fetch_async(query)))
    pairs: list[Any] = [dual(syncified), concurrency(limit=2)(syncified), dual(sync=syncified, async_=fetch_async)]
    for pair in pairs:
        assert not inspect.iscoroutinefunction(pair)
        assert await asyncio.to_thread(pair, "a") == "async a"
        assert await asyncio.to_thread(pair.invoke, "a") == "async a"


@pytest.mark.parametrize("make", [lambda fn: dual(sync=fn, async_=fn, name="both"), lambda fn: Dual(fn, fn)])
async def test_a_def_that_is_both_sides_is_called_as_a_def(make: Callable[[Any], Any]) -> None:
    """A client's method may be either, as its client is."""
    pair = make(handed_on(fetch_async))

    assert not inspect.iscoroutinefunction(pair)
    assert await pair.ainvoke("a") == await pair("a") == "async a"


@pytest.mark.parametrize("make", [lambda *sides: dual(sync=sides[0], async_=sides[1]), Dual])
async def test_a_def_that_is_awaited_gets_a_run_manager_that_is(make: Callable[..., Any]) -> None:
    """As the async function that it hands on would."""

    async def afetch(query: str, run_manager: Any) -> Any:
        return run_manager

    pair = make(lambda query, run_manager: run_manager, handed_on(afetch))

    assert isinstance(await pair.ainvoke("a"), AsyncCallbackManagerForChainRun)


def test_a_pair_over_a_def_that_is_awaited_brings_its_limit() -> None:
    """`@concurrency` alone takes it for a sync function; as an async side it is what it is said to be."""
    limited: Any = concurrency(limit=2)(handed_on(fetch_async))
    pair: Any = dual(sync=fetch_sync, async_=limited, name="fetch")

    assert pair.limiter is limited.limiter
    assert asyncio.run(pair.ainvoke("a")) == "async a"


def _generators() -> dict[str, tuple[Any, bool]]:
    def stream(query: str, times: int = 1) -> Iterator[str]:
        yield from [query] * times

    async def astream(query: str, times: int = 1) -> AsyncIterator[str]:
        for _ in range(times):
            yield query

    class Desk:
        @dual
        def stream(self, query: str, times: int = 1) -> Iterator[str]:
            yield from [query] * times

    @dual(sync=stream, async_=astream)
    def stub(query: str, times: int = 1) -> Iterator[str]:
        """Have only a name."""
        raise NotImplementedError

    return {
        "generator": (dual(stream), False),
        "async generator": (dual(astream), True),
        "generator with an async side": (dual(sync=stream, async_=astream), False),
        "a method": (Desk().stream, False),
        "a stub": (stub, False),
        "a partial": (dual(functools.partial(stream), name="a partial of a generator"), False),
        "a partial of a pair": (dual(functools.partial(dual(astream)), name="a partial of a pair"), True),
    }


@pytest.mark.parametrize(("pair", "is_async"), _generators().values(), ids=_generators())
def test_a_framework_is_told_of_a_generator(pair: Any, *, is_async: bool) -> None:
    """Or what it yields would never be read."""
    for fn in (pair, functools.partial(pair, times=2)):
        assert inspect.isgeneratorfunction(fn) is not is_async
        assert inspect.isasyncgenfunction(fn) is is_async
        assert not inspect.iscoroutinefunction(fn)


@pytest.mark.parametrize("pair", [pair for pair, _ in _generators().values()], ids=_generators())
async def test_a_partial_of_a_generator_streams(pair: Any) -> None:
    """A pair of it yields what the pair in it yields, and not one generator."""
    twice = dual(functools.partial(pair, times=2), name="twice")

    assert list(twice.stream("a")) == ["a", "a"]
    assert [chunk async for chunk in twice.astream("a")] == ["a", "a"]


@pytest.mark.parametrize("side", ["func", "afunc"])
@pytest.mark.parametrize("limited", [False, True])
async def test_a_side_that_is_replaced_runs(side: str, *, limited: bool) -> None:
    """Tests that patch a `RunnableLambda` do so, and it is undone with the patch."""
    pair: Any = Dual(fetch_sync, fetch_async)
    pipe = (concurrency(limit=2)(pair) if limited else pair) | Dual(str.upper)

    def fake(query: str) -> str:
        return f"fake {query}"

    async def afake(query: str) -> str:
        return f"fake {query}"

    before = (pipe.invoke("x"), await pipe.ainvoke("x"))
    with mock.patch.object(pair, side, fake if side == "func" else afake):
        replaced = pipe.invoke("x") if side == "func" else await pipe.ainvoke("x")
        assert replaced == "FAKE X"

    assert (pipe.invoke("x"), await pipe.ainvoke("x")) == before


# --- without parameters ---


def now_sync() -> str:
    """Tell the time."""
    return "sync"


async def now_async() -> str:
    """Tell the time."""
    return "async"


def chunks_sync() -> Iterator[str]:
    """Yield chunks."""
    yield from ("sy", "nc")


async def chunks_async() -> AsyncIterator[str]:
    """Yield chunks."""
    for chunk in ("as", "ync"):
        yield chunk


@dual(sync=now_sync, async_=now_async)
def now_stub() -> str:
    """Tell the time."""
    raise NotImplementedError


class Loader:
    """Methods that take nothing but their instance or class."""

    async def _aload(self) -> str:
        return "async"

    @concurrency(limit=1)
    @dual(async_=_aload)
    def load(self) -> str:
        return "sync"

    @dual(async_=_aload)
    def told(self, config: RunnableConfig | None = None) -> str:
        return "sync" if config else "nothing told"

    @classmethod
    async def _aopen(cls) -> str:
        return "async"

    @dual(async_=_aopen)
    @classmethod
    def open(cls) -> str:
        return "sync"


WITHOUT_PARAMETERS: dict[str, Any] = {
    "two": dual(sync=now_sync, async_=now_async, name="now_two"),
    "stub": now_stub,
    "limit": concurrency(limit=1)(dual(sync=now_sync, async_=now_async, name="now_limited")),
    "generators": concurrency(limit=1)(dual(sync=chunks_sync, async_=chunks_async)),
    "method": Loader().load,
    "method with a config": Loader().told,
    "class method": Loader.open,
    "drop-in": Dual(now_sync, now_async),
}
without_parameters = pytest.mark.parametrize("pair", WITHOUT_PARAMETERS.values(), ids=WITHOUT_PARAMETERS)


@pytest.mark.parametrize("callbacks", [[], [BaseCallbackHandler()]], ids=["unobserved", "observed"])
@pytest.mark.parametrize("value", [None, {}], ids=repr)
@without_parameters
async def test_a_function_without_parameters_runs_on_an_empty_input(pair: Any, value: Any, callbacks: Any) -> None:
    """On None and on an empty mapping, on both paths, in batches and streams."""
    config: RunnableConfig = {"callbacks": callbacks}

    assert pair.invoke(value, config) == "".join(pair.stream(value, config)) == "sync"
    assert pair.batch([value, value], config) == [*each(pair, [value, value], config=config)] == ["sync"] * 2
    assert await pair.ainvoke(value, config) == "".join([x async for x in pair.astream(value, config)]) == "async"
    assert await pair.abatch([value, value], config) == ["async"] * 2
    assert [result async for result in aeach(pair, [value, value], config=config)] == ["async"] * 2


async def test_a_function_without_parameters_is_called_without_arguments() -> None:
    """Under a limit too, and over a bridge."""
    refresh = concurrency(limit=1)(now_sync)
    load = Loader().load

    assert refresh() == refresh.call() == await refresh.acall() == await refresh.ainvoke(None) == "sync"
    assert (load(), load.call(), await load.acall()) == ("sync", "sync", "async")
    assert (refresh.limiter.stats().admitted, load.limiter.stats().limit) == (4, 1)


@pytest.mark.parametrize(("value", "kind"), [("EUR", "str"), (0, "int"), ([], "list"), ({"a": 1}, "dict with keys")])
@without_parameters
async def test_a_function_without_parameters_refuses_an_input(pair: Any, value: Any, kind: str) -> None:
    """What it would drop is told, and what to write in a pipe."""
    said = rf"takes no input: give it None or an empty mapping, not {kind}; in a pipe put \(lambda _: None\) before it"

    with pytest.raises(TypeError, match=said):
        pair.invoke(value)
    with pytest.raises(TypeError, match=said):
        await pair.ainvoke(value)
    with pytest.raises(TypeError, match=said):
        await pair.ainvoke(value, {"callbacks": [BaseCallbackHandler()]})


@without_parameters
async def test_a_function_without_parameters_stands_in_a_pipe_behind_a_lambda(pair: Any) -> None:
    """As the error says; each path runs its own side."""
    pipe = RunnableLambda(str.upper) | (lambda _: None) | pair
    pairs = Dual(str.upper) | (lambda _: None) | pair | str.title

    assert (pipe.invoke("x"), await pipe.ainvoke("x")) == ("sync", "async")
    assert (pairs.invoke("x"), await pairs.ainvoke("x")) == ("Sync", "Async")


# --- with keywords of any name ---


def options_sync(**options: Any) -> dict[str, Any]:
    """Return what is given."""
    return {"side": "sync", **options}


async def options_async(**options: Any) -> dict[str, Any]:
    """Return what is given."""
    return {"side": "async", **options}


class Options:
    """A method of them."""

    async def _atake(self, **options: Any) -> dict[str, Any]:
        return await options_async(**options)

    @dual(async_=_atake)
    def take(self, **options: Any) -> dict[str, Any]:
        return options_sync(**options)


WITH_ANY_KEYWORDS: dict[str, Any] = {
    "function": dual(sync=options_sync, async_=options_async),
    "limit": concurrency(limit=1)(dual(sync=options_sync, async_=options_async, name="options_limited")),
    "method": Options().take,
    "drop-in": Dual(options_sync, options_async),
}


@pytest.mark.parametrize("callbacks", [[], [BaseCallbackHandler()]], ids=["unobserved", "observed"])
@pytest.mark.parametrize("pair", WITH_ANY_KEYWORDS.values(), ids=WITH_ANY_KEYWORDS)
async def test_a_function_of_any_keywords_takes_a_mapping(pair: Any, callbacks: Any) -> None:
    """Spread by name, beside what `bind` gives; anything else is told."""
    config: RunnableConfig = {"callbacks": callbacks}
    value = {"pair": "EUR", "day": 3}
    given = {**value, "fee": 1}

    assert pair.invoke(value, config) == {"side": "sync", **value}
    assert await pair.ainvoke(value, config) == {"side": "async", **value}
    assert (pair.bind(fee=1).invoke(value, config), pair.invoke({}, config)) == (
        {"side": "sync", **given},
        {"side": "sync"},
    )
    with pytest.raises(TypeError, match=r"takes keywords of any name: its input must be a mapping, not str"):
        pair.invoke("EUR", config)
    with pytest.raises(TypeError, match=r"takes keywords of any name: its input must be a mapping, not str"):
        await pair.ainvoke("EUR", config)


def test_a_key_of_any_keywords_is_a_mapping_of_them() -> None:
    """As the function takes it."""
    seen: list[Any] = []
    pair = concurrency(limit=1, key=seen.append)(Dual(options_sync))

    pair.invoke({"pair": "EUR"})
    assert seen == [{"pair": "EUR"}]


def _rate(base: str, quote: str) -> str:
    return f"{base}{quote}"


async def _arate(base: str, quote: str) -> str:
    return f"{base}{quote}"


@pytest.mark.parametrize("side", ["func", "afunc"])
async def test_a_mock_in_the_place_of_a_side_is_called_as_that_is(side: str) -> None:
    """A mock's own parameters say nothing: the input is spread, and what `key=` and `cost=` see is as it was."""
    seen: list[dict[str, str]] = []

    def note(call: Any) -> str:
        seen.append(dict(call))
        return "all"

    limited = concurrency(per_second=1000, key=note, cost=lambda call: len(call["base"]))
    written, mocks = (_rate, mock.Mock) if side == "func" else (_arate, mock.AsyncMock)
    pair: Any = limited(Dual(written))
    value = {"base": "EUR", "quote": "CHF"}
    with mock.patch.object(pair, side, mocks(return_value=1)) as made:
        assert pair.invoke(value) == 1
        assert await pair.ainvoke(value) == 1

    assert made.call_args_list == [mock.call(**value)] * 2
    assert seen == [value] * 2


def test_a_function_in_the_place_of_a_side_is_called_by_its_own_parameters() -> None:
    """Unlike a mock it has some."""
    pair: Any = Dual(fetch_sync)
    pair.func = _rate
    assert pair.invoke({"base": "EUR", "quote": "CHF"}) == "EURCHF"
    pair.func = lambda *, query: query
    assert pair.invoke("x") == "x"
    pair = Dual(_rate)
    pair.func = lambda call: call
    assert pair.invoke({"base": "EUR"}) == {"base": "EUR"}


def _decorated(fn: Callable[..., Any], kept: str) -> Any:
    """Return what a decorator that is a class makes: it keeps its function by a name, and what the function keeps."""

    class Decorated:
        def __init__(self) -> None:
            setattr(self, kept, fn)
            functools.update_wrapper(self, fn)

        def __call__(self, *args: Any) -> Any:
            return getattr(self, kept)(*args)

    return Decorated()


@pytest.mark.parametrize("kept", ["func", "_func", "fn", "afunc", "side"])
def test_a_decorator_that_is_a_class_keeps_the_limit(kept: str) -> None:
    """What it copies of a pair is not the pair's side without the limit."""
    pair: Any = concurrency(limit=1)(dual(sync=fetch_sync, async_=fetch_async, name=f"decorated_{kept}"))
    decorated = _decorated(pair, kept)

    assert getattr(decorated, kept) is pair
    assert decorated("x") == "sync x"
    assert pair.limiter.stats().admitted == 1


def test_a_side_that_nobody_wrote_is_not_there() -> None:
    """As of a `RunnableLambda`; the error says which."""
    with pytest.raises(AttributeError, match="this pair has no async function of its own"):
        _ = Dual(fetch_sync).afunc
    with pytest.raises(AttributeError, match="this pair has no sync function of its own"):
        _ = Dual(fetch_async).func


def test_a_subclass_may_keep_a_function_of_its_own() -> None:
    """By any name that is not the pair's."""

    class Shouting(Dual[Any, Any]):
        def __init__(self, func: Callable[[str], str]) -> None:
            self._func = func
            super().__init__(self._shout)

        def _shout(self, query: str) -> str:
            return self._func(query) + "!"

    assert Shouting(str.upper).invoke("x") == "X!"


@pytest.mark.parametrize("written", [fetch_sync, fetch_async])
def test_two_decorated_pairs_of_one_function_are_two(written: Callable[..., Any]) -> None:
    """They may differ in the limit; so a set, a dict or a cache has to keep both."""
    free: Any = dual(written, name="free")
    limited: Any = concurrency(limit=1)(dual(written, name="limited"))

    assert free != limited
    assert {free: "free", limited: "limited"} == {limited: "limited", free: "free"}
    assert len({free, limited, free}) == 2
    assert free == free  # noqa: PLR0124  (which a class says, too)
    assert [limited, free].index(free) == 1


@pytest.mark.parametrize("written", [fetch_sync, fetch_async])
@pytest.mark.parametrize("make", [Dual, RunnableLambda])
def test_a_decorated_pair_is_no_drop_in_of_its_function(make: Callable[..., Any], written: Callable[..., Any]) -> None:
    """Drop-ins are equal by their function; one that is decorated is equal to none, whichever stands first."""
    pair, other = dual(written, name="decorated"), make(written)

    assert (pair == other, other == pair) == (False, False)
    assert (Dual(written) == other, other == Dual(written)) == (True, True)


@pytest.mark.parametrize("written", [fetch_sync, fetch_async])
async def test_a_task_of_langgraph_keeps_the_limit(written: Callable[..., Any]) -> None:
    """Its `task` is such a decorator, and awaits an `async def`."""
    pair: Any = concurrency(limit=1)(dual(written, name=f"task of {written.__name__}"))
    made: Any = task(pair)

    @entrypoint()
    async def flow(query: str) -> list[str]:
        return list(await asyncio.gather(made(query), made(query)))

    assert await flow.ainvoke("x") == [await pair.acall("x")] * 2
    assert pair.limiter.stats().admitted == 3


async def test_a_task_of_langgraph_over_an_async_def_runs_the_async_side() -> None:
    """`task` takes a pair of a `def` for a sync function, so the side is awaited in an `async def`."""
    pair: Any = concurrency(limit=1)(dual(sync=fetch_sync, async_=fetch_async, name="pair_in_a_task"))

    @task
    async def fetch(query: str) -> str:
        return str(await pair.acall(query))

    @entrypoint()
    async def flow(query: str) -> list[str]:
        return list(await asyncio.gather(fetch(query), fetch(query), task(pair)(query)))

    assert await flow.ainvoke("x") == ["async x", "async x", "sync x"]
    assert pair.limiter.stats().admitted == 3


async def test_a_function_may_be_false() -> None:
    """As a mock with a length is, and any object that says so."""

    class Empty(list[str]):
        def __call__(self, query: str) -> str:
            return f"sync {query}"

    class Hashed(Empty):
        __hash__ = object.__hash__  # type: ignore[assignment]  # a list has none

    hash(Dual(Hashed()))
    pair: Any = Dual(Empty())

    assert pair.invoke("x") == "sync x"
    assert await pair.ainvoke("x") == "sync x"


@pytest.mark.parametrize("limited", [False, True])
async def test_an_invoke_that_is_replaced_runs(*, limited: bool) -> None:
    """On one pair too a pipe and a batch call what a test has put in its place, as of a `RunnableLambda`."""
    pair: Any = concurrency(limit=2)(Dual(fetch_async)) if limited else Dual(fetch_async)
    pipe = pair | Dual(str.upper)
    real = (pipe.invoke("x"), pair.batch(["x", "y"]), await pipe.ainvoke("x"), await pair.abatch(["x", "y"]))

    with (
        mock.patch.object(pair, "invoke", side_effect=lambda query, config=None: f"fake {query}"),
        mock.patch.object(pair, "ainvoke", side_effect=lambda query, config=None: f"afake {query}"),
    ):
        assert pipe.invoke("x") == "FAKE X"
        assert pair.batch(["x", "y"]) == ["fake x", "fake y"]
        assert await pipe.ainvoke("x") == "AFAKE X"
        assert await pair.abatch(["x", "y"]) == ["afake x", "afake y"]

    assert (pipe.invoke("x"), pair.batch(["x", "y"]), await pipe.ainvoke("x"), await pair.abatch(["x", "y"])) == real


def test_an_invoke_of_a_subclass_runs_in_a_batch_with_a_limit() -> None:
    """A batch of an async function with a limit goes to the background loop, unless `invoke` is another."""

    class Shouting(Dual[Any, Any]):
        def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            return super().invoke(input, config, **kwargs) + "!"

    pair: Any = concurrency(limit=2)(Shouting(fetch_async))

    assert pair.batch(["x", "y"]) == ["async x!", "async y!"]


def test_a_subclass_may_have_type_parameters_of_its_own() -> None:
    """It takes as many as it declares, as a subclass of RunnableLambda does."""

    class Named(Dual[Question, Answer]):
        pass

    class Quoting(Named[str, str]):
        pass

    assert get_args(Named[str, str]) == (str, str)
    assert Quoting(fetch_sync).invoke("x") == "sync x"


def test_an_executor_beside_an_async_side_is_refused() -> None:
    """There would be nothing for it to run."""
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(PairError, match=r"fetch_sync .* has an async side, .*fetch_async .*; drop bridge="):
            dual(sync=fetch_sync, async_=fetch_async, bridge=threads)
        pair: Any = dual(fetch_sync, name="by_threads", bridge=threads)
        with pytest.raises(
            PairError, match=r"fetch_sync .* has its async side by bridge=<.*>; drop that, or this side"
        ):
            pair.async_(fetch_async)


def test_a_copy_keeps_an_invoke_of_its_own() -> None:
    """And not that of the pair that it was copied from."""
    pair: Any = Dual(fetch_sync)
    pair.invoke = lambda query, config=None: "first"
    copied = copy.copy(pair)
    copied.invoke = lambda query, config=None: "second"

    assert (pair | str.upper).invoke("x") == (pair | Dual(str.upper)).invoke("x") == "FIRST"
    assert (copied | Dual(str.upper)).invoke("x") == "SECOND"
    assert (copy.copy(pair) | Dual(str.upper)).invoke("x") == "FIRST"


def test_a_pair_has_few_public_names_that_a_lambda_has_not() -> None:
    """What a subclass calls its own methods is its own affair."""

    class Greeter(Dual[str, str]):
        def admits(self, user: str) -> bool:
            return user == "root"

        def entries(self) -> list[str]:
            return []

    more = {name for name in dir(Dual(str.upper)) if not name.startswith("_")} - set(dir(RunnableLambda(str.upper)))

    assert more == {"acall", "afunc", "async_", "call", "limiter", "sync"}
    assert Greeter(str.upper).batch(["a", "b"]) == ["A", "B"]


@pytest.mark.parametrize("decorate", [dual, concurrency(limit=5)])
def test_a_def_around_a_pair_of_an_async_def_is_no_coroutine_function(decorate: Any) -> None:
    """`functools.wraps` copies what the pair keeps, and not that it is one."""
    pair: Any = decorate(fetch_async)

    @functools.wraps(pair)
    def blocking(query: str) -> Any:
        return asyncio.run(pair(query))

    assert asyncio.iscoroutinefunction(pair)
    assert inspect.iscoroutinefunction(pair)
    assert not asyncio.iscoroutinefunction(blocking)
    assert not inspect.iscoroutinefunction(blocking)
    assert RunnableLambda(blocking).invoke("x") == "async x"


def test_an_object_around_a_pair_of_a_generator_is_no_generator_function() -> None:
    """`functools.update_wrapper` copies what the pair keeps, and not its code."""

    class Collect:
        def __init__(self, function: Any) -> None:
            functools.update_wrapper(self, function)
            self.function = function

        def __call__(self, query: str) -> list[str]:
            return list(self.function(query))

    @dual
    def twice(query: str) -> Iterator[str]:
        yield query
        yield query

    assert inspect.isgeneratorfunction(twice)
    assert not inspect.isgeneratorfunction(Collect(twice))
    assert RunnableLambda(Collect(twice)).invoke("x") == ["x", "x"]


class Notes(TypedDict):
    answer: str


class Secret(TypedDict):
    secret: str


def hide(state: Notes) -> Secret:
    """Leave what only those see who ask for it."""
    return {"secret": "42"}


def reveal(state: Secret) -> Notes:
    """Ask for it."""
    return {"answer": state["secret"]}


@dataclasses.dataclass
class Page:
    """A state that is no mapping."""

    answer: str


@pytest.mark.parametrize("kind", [Notes, Page])
async def test_a_node_that_asks_for_what_langgraph_injects_is_told(kind: Any) -> None:
    """It gives that to plain functions only: the error says what to call in the node, by which it runs."""

    def asking(state: Any, runtime: Any, writer: Any) -> Any:
        raise AssertionError

    async def calling(state: Any) -> Any:
        get_stream_writer()("written")
        return {"answer": type(get_runtime()).__name__}

    said = (
        r"takes state, runtime, writer: .*; LangGraph gives runtime, writer to plain functions only: "
        r"call get_runtime\(\), get_stream_writer\(\) in it"
    )
    graph: Any = StateGraph(kind).add_node("node", Dual(asking)).add_edge(START, "node").compile()
    with pytest.raises(TypeError, match=said):
        graph.invoke({"answer": ""})
    with pytest.raises(TypeError, match=said):
        await graph.ainvoke({"answer": ""})

    graph = StateGraph(kind).add_node("node", Dual(calling)).add_edge(START, "node").compile()
    assert graph.invoke({"answer": ""}) == await graph.ainvoke({"answer": ""}) == {"answer": "Runtime"}
    assert [x async for x in graph.astream({"answer": ""}, stream_mode="custom")] == ["written"]


@pytest.mark.parametrize("decorate", [dual, Dual, concurrency(limit=5)])
def test_a_node_of_langgraph_gets_the_state_that_the_function_asks_for(decorate: Any) -> None:
    """LangGraph reads it from the hints of `__call__`, or else from those of the pair."""
    graph: Any = StateGraph(Notes).add_sequence([("hide", decorate(hide)), ("reveal", decorate(reveal))])
    graph.add_edge(START, "hide")

    assert graph.compile().invoke({"answer": ""}) == {"answer": "42"}


async def test_a_run_manager_in_the_other_colour_knows_the_same() -> None:
    """A bridged side's function has the tags and the metadata of its run."""

    async def fetch(query: str, run_manager: Any) -> Any:
        return run_manager.tags, run_manager.metadata

    pair, config = dual(fetch), RunnableConfig(tags=["t"], metadata={"of": "run"})

    assert pair.invoke("EUR", config) == (["t"], {"of": "run"})
    assert await pair.ainvoke("EUR", config) == (["t"], {"of": "run"})


async def test_a_run_inside_a_bridged_side_inherits_by_a_run_manager_in_the_other_colour() -> None:
    """A child of the manager hands down tags and metadata, where no config of a run around it does."""
    seen: list[Any] = []

    class Watcher(BaseCallbackHandler):
        def on_chain_start(
            self, serialized: Any, inputs: Any, *, tags: Any = None, metadata: Any = None, **kwargs: Any
        ) -> None:
            seen.append((inputs, sorted(tags), metadata))

    inner = Dual(fetch_sync, fetch_async)

    async def fetch(query: str, run_manager: Any) -> str:
        call = inner.ainvoke(f"inner {query}", {"callbacks": run_manager.get_child("child")})
        return await asyncio.create_task(call, context=Context())

    def read(query: str, run_manager: Any) -> str:
        return Context().run(inner.invoke, f"inner {query}", {"callbacks": run_manager.get_child("child")})

    config = RunnableConfig(tags=["t"], metadata={"of": "run"}, callbacks=[Watcher()])
    expected = [("EUR", ["t"], {"of": "run"}), ("inner EUR", ["child", "t"], {"of": "run"})]

    dual(fetch).invoke("EUR", config)
    assert seen == expected
    seen.clear()
    await dual(read).ainvoke("EUR", config)
    assert seen == expected
