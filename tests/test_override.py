"""`registry.override`: a fake in the place of a pair, wherever the pair is used."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from functools import wraps
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from langchain_core.runnables import RunnableLambda, RunnableParallel

from asyncify import Dual, Limiter, concurrency, dual, registry


async def _afetch(query: str) -> str:
    return f"async {query}"


@dual(async_=_afetch)
def fetch(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


async def _aconvert(amount: float, rate: float) -> float:
    return amount * rate


@dual(async_=_aconvert)
def convert(amount: float, rate: float) -> float:
    """Convert an amount; its input is a mapping."""
    return amount * rate


def _fake(query: str) -> str:
    return f"fake {query}"


async def _afake(query: str) -> str:
    return f"fake {query}"


class _Object:
    def __call__(self, query: str) -> str:
        return f"fake {query}"


FAKES: list[Callable[..., Any]] = [
    _fake,
    _afake,
    _Object(),
    lambda query: f"fake {query}",
    Dual(_fake, _afake),
    Dual(_afake),
    Mock(return_value="fake EUR"),
    AsyncMock(return_value="fake EUR"),
]


@pytest.mark.parametrize("fake", FAKES, ids=lambda fake: type(fake).__name__)
def test_a_fake_serves_the_sync_path(fake: Callable[..., Any]) -> None:
    """A fake of either colour, a mock and a pair answer `invoke`, `call` and a direct call."""
    with registry.override(fetch, fake):
        answers = [fetch.invoke("EUR"), fetch.call("EUR"), fetch("EUR"), *fetch.batch(["EUR"])]

    assert answers == ["fake EUR"] * 4
    assert fetch.invoke("EUR") == "sync EUR"


@pytest.mark.parametrize("fake", FAKES, ids=lambda fake: type(fake).__name__)
async def test_a_fake_serves_the_async_path(fake: Callable[..., Any]) -> None:
    """The async twin."""
    with registry.override(fetch, fake):
        answers = [await fetch.ainvoke("EUR"), await fetch.acall("EUR"), *await fetch.abatch(["EUR"])]

    assert answers == ["fake EUR"] * 3
    assert await fetch.ainvoke("EUR") == "async EUR"


async def test_each_path_may_have_its_own_fake() -> None:
    """`sync=` and `async_=` serve a path each."""
    with registry.override(fetch, sync=lambda query: "s", async_=_afake):
        assert [fetch.invoke("EUR"), await fetch.ainvoke("EUR")] == ["s", "fake EUR"]
    with registry.override(fetch, sync=lambda query: "s", async_=lambda query: "a"):
        assert [fetch.invoke("EUR"), await fetch.ainvoke("EUR")] == ["s", "a"]


async def test_a_pair_fakes_each_path_by_its_own_side() -> None:
    """As two fakes do."""
    with registry.override(fetch, Dual(lambda query: "s", _afake)):
        assert [fetch.invoke("EUR"), await fetch.ainvoke("EUR")] == ["s", "fake EUR"]


@pytest.mark.parametrize("fakes", [{"sync": _fake}, {"async_": _afake}], ids=str)
async def test_a_fake_for_one_path_alone_serves_both(fakes: dict[str, Any]) -> None:
    """The real function never runs while a fake stands in its place."""
    with registry.override(fetch, **fakes):
        assert [fetch.invoke("EUR"), await fetch.ainvoke("EUR")] == ["fake EUR"] * 2


async def test_a_sync_fake_runs_on_the_event_loop() -> None:
    """On the async path a sync fake takes no thread."""
    with registry.override(fetch, lambda query: threading.get_ident()):
        answer: Any = await fetch.ainvoke("EUR")

    assert answer == threading.get_ident()


def test_an_override_that_was_entered_lasts_until_it_is_exited() -> None:
    """As with `mock.patch(...).start()`, it is no matter whether anybody holds it."""
    pair = Dual(lambda query: f"real {query}")
    registry.override(pair, _fake).__enter__()
    gc.collect()
    assert pair.invoke("EUR") == "fake EUR"

    override = registry.override(fetch, _fake)
    assert override.__enter__() is fetch
    assert fetch.invoke("EUR") == "fake EUR"
    override.__exit__(None, None, None)
    assert fetch.invoke("EUR") == "sync EUR"


async def test_an_override_decorates_functions_of_either_colour() -> None:
    """The fake is there while they run, each time, and gone afterwards."""

    @registry.override(fetch, _fake)
    def run() -> str:
        return fetch.invoke("EUR")

    @registry.override("test_override.fetch", _fake)
    async def arun() -> str:
        await asyncio.sleep(0)
        return await fetch.ainvoke("EUR")

    for _ in range(2):
        assert (run(), await arun(), fetch.invoke("EUR")) == ("fake EUR", "fake EUR", "sync EUR")
    with pytest.raises(TypeError, match="chunks is a generator"):

        @registry.override(fetch, _fake)
        def chunks() -> Iterator[str]:
            yield fetch.invoke("EUR")


async def test_an_override_decorates_what_gives_a_coroutine() -> None:
    """No more than an `async def` does a call of another kind run without the fake as soon as it has begun."""

    class Report:
        async def __call__(self, query: str) -> Any:
            return await fetch.ainvoke(query)

    report = Report()

    assert await registry.override(fetch, _fake)(report)("EUR") == "fake EUR"
    assert await registry.override(fetch, _fake)(lambda query: report(query))("EUR") == "fake EUR"  # noqa: PLW0108


class _Tests:
    """Methods that are decorated, inside and out."""

    @registry.override(fetch, _fake)
    @staticmethod
    def static() -> Any:
        """Run with the fake."""
        return fetch("x")

    @registry.override(fetch, _fake)
    @classmethod
    async def of_class(cls) -> Any:
        """Run with the fake."""
        return await fetch.acall("x")


async def test_an_override_decorates_methods_and_pairs() -> None:
    """Under it a static method is one, and a pair of an `async def` is awaited."""
    override = registry.override(fetch, _fake)

    @override
    @dual
    async def through_a_pair(query: str) -> Any:
        await asyncio.sleep(0)
        return await fetch.acall(query)

    assert await through_a_pair("x") == _Tests.static() == await _Tests.of_class() == _fake("x")


def test_what_is_no_function_is_not_decorated() -> None:
    """A class would come back as a function, which no test runner finds; a pair of a generator runs after its call."""
    override: Any = registry.override(fetch, _fake)
    for given in (_Tests, 3):
        with pytest.raises(TypeError, match="is no function, around each call of which a block could be entered"):
            override(given)

    @wraps(_aticks)
    def collect(query: str) -> list[Any]:
        return [fetch(query)]

    assert override(collect)("x") == [_fake("x")]
    with pytest.raises(TypeError, match="feed is a generator, which runs after its call"):

        @override
        @dual(name="decorated_feed")
        def feed(query: str) -> Iterator[Any]:
            yield fetch(query)

    with pytest.raises(TypeError, match="stub is a generator, which runs after its call"):

        @override
        @dual(sync=_ticks, async_=_aticks)
        def stub(query: str) -> Iterator[str]:
            """Have only a name."""
            raise NotImplementedError


async def test_a_pipe_composed_before_runs_the_fake() -> None:
    """Pipes, dicts and bindings that hold the pair need not be made anew."""
    pipe = fetch | RunnableLambda(str.upper)
    parallel = RunnableParallel(quote=fetch.with_config(tags=["x"]), other=RunnableLambda(len))
    with registry.override(fetch, _fake):
        assert [pipe.invoke("eur"), await pipe.ainvoke("eur")] == ["FAKE EUR"] * 2
        assert parallel.invoke("EUR") == await parallel.ainvoke("EUR") == {"quote": "fake EUR", "other": 3}

    assert [pipe.invoke("eur"), await pipe.ainvoke("eur")] == ["SYNC EUR", "ASYNC EUR"]


def test_a_fake_serves_every_thread() -> None:
    """An override is no matter of one thread or one context."""
    with ThreadPoolExecutor(4) as threads, registry.override(fetch, _fake):
        assert list(threads.map(fetch.invoke, ["EUR"] * 8)) == ["fake EUR"] * 8


async def test_a_fake_serves_tasks_that_ran_before() -> None:
    """A task whose context is older than the override meets the fake."""
    start = asyncio.Event()

    async def later() -> str:
        await start.wait()
        return str(await fetch.ainvoke("EUR"))

    task = asyncio.create_task(later())
    await asyncio.sleep(0)
    with registry.override(fetch, _fake):
        start.set()

        assert await task == "fake EUR"


def test_a_pair_is_found_by_its_name() -> None:
    """A full and a short name do as well as the pair."""
    for name in (f"{__name__}.fetch", "test_override.fetch"):
        with registry.override(name, _fake) as pair:
            assert pair is fetch
            assert fetch.invoke("EUR") == "fake EUR"


def test_a_pair_that_is_not_registered_is_overridden_by_itself() -> None:
    """A `Dual` made by hand has no name, and can be faked all the same."""
    pair: Dual[Any, Any] = Dual(lambda query: "real")

    with registry.override(pair, _fake):
        assert pair.invoke("EUR") == "fake EUR"
    assert pair.invoke("EUR") == "real"


def test_nested_overrides_are_undone_in_order() -> None:
    """The inner fake counts, then the outer one, then the pair."""
    with registry.override(fetch, lambda query: "outer"):
        with registry.override(fetch, lambda query: "inner"):
            assert fetch.invoke("EUR") == "inner"
        assert fetch.invoke("EUR") == "outer"
    assert fetch.invoke("EUR") == "sync EUR"


def test_one_override_may_be_entered_within_itself() -> None:
    """Each `with` over it is an override of its own, and the outer one lasts to its own end."""
    fake = registry.override(fetch, lambda query: f"fake {query}")
    with fake:
        with fake as pair:
            assert pair.invoke("EUR") == "fake EUR"
        assert fetch.invoke("EUR") == "fake EUR"
    assert fetch.invoke("EUR") == "sync EUR"


def test_overrides_undone_out_of_order_leave_the_newest() -> None:
    """Undoing the first leaves the second in place, and undoing that the pair."""
    first, second = ExitStack(), ExitStack()
    first.enter_context(registry.override(fetch, lambda query: "first"))
    second.enter_context(registry.override(fetch, lambda query: "second"))

    first.close()
    assert fetch.invoke("EUR") == "second"
    second.close()
    assert fetch.invoke("EUR") == "sync EUR"


def test_one_fake_pair_twice_is_undone_twice() -> None:
    """Two overrides by the same pair are two overrides."""
    fake: Dual[Any, Any] = Dual(_fake)
    with registry.override(fetch, fake):
        with registry.override(fetch, fake):
            pass
        assert fetch.invoke("EUR") == "fake EUR"


def test_an_exception_in_the_block_undoes_the_override() -> None:
    """The fake goes however the block ends."""
    with pytest.raises(ZeroDivisionError), registry.override(fetch, _fake):
        raise ZeroDivisionError

    assert fetch.invoke("EUR") == "sync EUR"
    assert fetch._fakes == ()


def test_threads_that_override_at_once_leave_nothing() -> None:
    """Overrides that many threads put and take away at random are all gone in the end."""

    def override_often(_: int) -> None:
        for _ in range(200):
            with registry.override(fetch, _fake):
                fetch.invoke("EUR")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(override_often, range(4)))

    assert fetch._fakes == ()
    assert fetch.invoke("EUR") == "sync EUR"


def test_an_error_of_a_fake_is_the_callers() -> None:
    """What a fake raises arrives where the pair was called."""
    with registry.override(fetch, Mock(side_effect=ValueError("down"))), pytest.raises(ValueError, match="down"):
        fetch.invoke("EUR")


async def test_an_error_of_a_fake_is_the_async_callers() -> None:
    """The async twin."""
    with registry.override(fetch, Mock(side_effect=ValueError("down"))), pytest.raises(ValueError, match="down"):
        await fetch.ainvoke("EUR")


async def test_a_fake_is_called_as_the_function_is() -> None:
    """A mapping is spread by the parameters of the function, so that a mock sees what the function would."""
    mock = Mock(return_value=0)
    with registry.override(convert, mock):
        convert.invoke({"amount": 1, "rate": 2})
        await convert.ainvoke({"amount": 1, "rate": 2})

    assert [call.kwargs for call in mock.call_args_list] == [{"amount": 1, "rate": 2}] * 2
    assert [call.args for call in mock.call_args_list] == [()] * 2


class _Desk:
    @dual
    def price(self, amount: float) -> float:
        return amount


def _taking(query: str, *, rate: float) -> str:
    return query


@dual
def _now() -> str:
    return "now"


@pytest.mark.parametrize(
    ("pair", "fake", "said"),
    [
        (_Desk.price, lambda amount: amount, r"price: .*<lambda> .* takes \(amount\), and is given self, amount"),
        (convert, lambda given: given, r"convert: .* takes \(given\), and is given amount, rate"),
        (fetch, lambda: "fake", r"fetch: .* takes \(\), and is given query"),
        (Dual(_taking), lambda query, price: query, r"_taking: .* is given query, rate"),
        (fetch, Dual(lambda: "fake"), r"fetch: .* takes \(\), and is given query"),
    ],
)
def test_a_fake_that_can_not_be_called_as_the_function_is_is_refused(pair: Any, fake: Any, said: str) -> None:
    """At once, and by the pair's name; an error at the first call would tell neither."""
    with pytest.raises(TypeError, match=said):
        registry.override(pair, fake).__enter__()
    with pytest.raises(TypeError, match=said):
        registry.override(pair, sync=lambda *given, **options: None, async_=fake).__enter__()


@pytest.mark.parametrize(
    ("pair", "fake"),
    [
        (_Desk.price, lambda this, amount, fee=0: amount),
        (convert, lambda first, second: first),
        (convert, lambda *, amount, rate, **more: amount),
        (convert, lambda **given: given),
        (Dual(_taking), lambda question, *, rate: question),
        (_now, lambda: "fake"),
        (fetch, lambda query, config: query),
        (fetch, print),
        (fetch, Mock()),
        (fetch, str),
        (_now, lambda zone="UTC": zone),
    ],
)
def test_a_fake_may_have_parameters_of_its_own(pair: Any, fake: Any) -> None:
    """If those that the function needs find a place, by position or by name."""
    with registry.override(pair, fake) as faked:
        assert faked is pair
    assert pair._fakes == ()


@pytest.mark.parametrize("fake", [lambda: "fake", Mock(return_value="fake"), Dual(lambda: "fake")])
async def test_a_fake_of_a_function_without_parameters_is_given_nothing(fake: Any) -> None:
    """As the function is, and by the same inputs."""
    with registry.override(_now, fake):
        assert [_now(), _now.invoke(None), await _now.ainvoke({})] == ["fake"] * 3
        with pytest.raises(TypeError, match="takes no input"):
            _now.invoke("EUR")


async def test_a_fake_is_called_by_keyword_where_the_function_has_no_places() -> None:
    """Its own parameters may have some; an argument for each goes where the function would have it."""

    def scale(*, amount: float = 1, rate: float = 2) -> float:
        return amount * rate

    pair: Dual[Any, Any] = Dual(scale)
    with registry.override(pair, lambda rate=0, amount=0: (amount, rate)):
        assert pair.invoke(3) == (3, 0)
        assert await pair.ainvoke(3) == (3, 0)
    assert pair.invoke(3) == 6


def test_a_fake_may_ask_for_the_config() -> None:
    """LangChain hands the config to a fake that names it."""
    with registry.override(fetch, lambda query, config: config["tags"]):
        answer: Any = fetch.invoke("EUR", {"tags": ["desk"]})

    assert answer == ["desk"]


def test_the_limit_does_not_hold_for_a_fake() -> None:
    """A fake runs at once, however busy the limiter is."""

    @concurrency(limit=1)
    def limited(query: str) -> str:
        return query

    limiter = limited.limiter
    assert isinstance(limiter, Limiter)
    with limiter, registry.override(limited, _fake):
        assert limited.invoke("EUR") == "fake EUR"


async def test_a_generator_fakes_a_streaming_pair() -> None:
    """A sync generator streams on both paths."""

    @dual
    async def ticks(query: str) -> AsyncIterator[str]:
        yield "real"

    def fake(query: str) -> Iterator[str]:
        yield "fake "
        yield query

    with registry.override(ticks, fake):
        assert list(ticks.call("EUR")) == ["fake ", "EUR"]
        assert [chunk async for chunk in ticks.acall("EUR")] == ["fake ", "EUR"]
        assert [chunk async for chunk in ticks.astream("EUR")] == ["fake ", "EUR"]


def _ticks(query: str) -> Iterator[str]:
    yield from (query, "!")


async def _aticks(query: str) -> AsyncIterator[str]:
    yield query
    yield "!"


@pytest.mark.parametrize(
    ("fakes", "chunks"),
    [
        pytest.param({"fake": lambda query: iter([query, "!"])}, ["x", "!"], id="iterator"),
        pytest.param({"fake": Mock(side_effect=lambda query: iter([query, "!"]))}, ["x", "!"], id="mock"),
        pytest.param({"fake": AsyncMock(side_effect=lambda query: iter([query, "!"]))}, ["x", "!"], id="async"),
        pytest.param({"sync": lambda query: iter([query, "!"]), "async_": _aticks}, ["x", "!"], id="each its own"),
        pytest.param(
            {"sync": lambda query: iter([query, "!"]), "async_": lambda query: _aticks(query)},  # noqa: PLW0108
            ["x", "!"],
            id="a function that returns an async generator",
        ),
        pytest.param({"fake": lambda query: [query, "!"]}, ["x", "!"], id="list"),
        pytest.param({"fake": lambda query: query + "!"}, ["x!"], id="one chunk"),
    ],
)
async def test_what_a_fake_of_a_generator_returns_is_streamed(fakes: dict[str, Any], chunks: list[Any]) -> None:
    """A lambda can't yield, and a mock does not: an iterator that they return is what the function would have given."""

    @dual
    def feed(query: str) -> Iterator[str]:
        yield query

    with registry.override(feed, **fakes):
        assert list(feed.stream("x")) == chunks
        assert [chunk async for chunk in feed.astream("x")] == chunks
        assert list(feed("x")) == chunks


async def test_an_async_generator_that_a_fake_returns_is_closed_with_the_stream() -> None:
    """As that of the function."""
    ended: list[str] = []

    @dual(name="closed_feed")
    def feed(query: str) -> Iterator[str]:
        yield query

    async def afeed(query: str) -> AsyncIterator[str]:
        try:
            yield query
            yield "!"
        finally:
            ended.append(query)

    with registry.override(feed, sync=lambda query: [query], async_=lambda query: afeed(query)):  # noqa: PLW0108
        made: Any = feed.acall("x")
        async with aclosing(made) as chunks:
            assert await anext(chunks) == "x"

    assert ended == ["x"]


def test_the_second_side_may_come_while_a_fake_is_there() -> None:
    """A pair that is completed during an override keeps its fake until the end of it."""

    @dual
    def later(query: str) -> str:
        return "real"

    with registry.override(later, _fake):
        later.async_(_afetch)
        assert later.invoke("EUR") == "fake EUR"
    assert later.invoke("EUR") == "real"
