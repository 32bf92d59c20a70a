"""One table of everything that is a function: each is a pair, and each is run on both sides, in every way."""

import copy
import functools
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tools import tool
from pydantic import BaseModel, ConfigDict

from asyncify import Dual, concurrency, dual, dual_patch

# --- functions, in the five forms, with a limit over and under ---


def sync_fetch(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


async def async_fetch(query: str) -> str:
    """Fetch one quote."""
    return f"async {query}"


@dual(async_=async_fetch)
def on_sync(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


@dual(sync=sync_fetch)
async def on_async(query: str) -> str:
    """Fetch one quote."""
    return f"async {query}"


from_two = dual(sync=sync_fetch, async_=async_fetch)


@dual(sync=sync_fetch, async_=async_fetch)
def over_stub(query: str) -> str:
    """Fetch one quote."""
    raise NotImplementedError


@dual
def later(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


later.async_(async_fetch)


@concurrency(limit=2)
@dual(async_=async_fetch)
def limit_over(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


@dual(async_=async_fetch)
@concurrency(limit=2)
def limit_under(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


# --- methods ---


async def _aclass(cls: Any, query: str) -> str:
    return f"async {query}"


class Fetches(Protocol):
    """A protocol with a pair in it, for those who inherit it."""

    async def _afetch(self, query: str) -> str:
        return f"async {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"


class Explicit(Fetches):
    """A class that inherits a protocol's pair."""


class Desk:
    """Methods of every kind."""

    async def _afetch(self, query: str) -> str:
        return f"async {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"

    @property
    def chosen(self) -> Dual[Any, Any]:
        """A property that returns a pair."""
        return self.fetch

    @dual(async_=_aclass)
    @classmethod
    def class_inner(cls, query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"

    @classmethod
    @dual(async_=_aclass)
    def class_outer(cls, query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"

    @concurrency(limit=2)
    @dual(async_=async_fetch)
    @staticmethod
    def static_inner(query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"

    @staticmethod
    @concurrency(limit=2)
    @dual(async_=async_fetch)
    def static_outer(query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"

    def sync_ticks(self, query: str) -> Iterator[str]:
        """Stream one quote."""
        yield "sync "
        yield query

    async def async_ticks(self, query: str) -> AsyncIterator[str]:
        """Stream one quote."""
        yield "async "
        yield query

    ticks = dual(sync=sync_ticks, async_=async_ticks)


class Child(Desk):
    """An override of one side, which asks `super()` for its own."""

    @dual(sync=Desk.fetch)  # type: ignore[arg-type]  # its `self` is the parent's
    async def fetch(self, query: str) -> str:  # type: ignore[override]  # it is called as an async def
        """Fetch one quote."""
        return await super().fetch.acall(query)

    @property
    def inherited(self) -> Dual[Any, Any]:
        """The parent's pair, bound to the child."""
        return super().fetch


class Slots:
    """A class without a dict."""

    __slots__ = ()

    async def _afetch(self, query: str) -> str:
        return f"async {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"


@dataclass(frozen=True, slots=True)
class Data:
    """A dataclass with slots, which is made twice."""

    label: str = ""
    fetch = Desk.fetch


class Model(BaseModel):
    """A pydantic model, which is told that a pair is no field."""

    model_config = ConfigDict(ignored_types=(Dual,))

    async def _afetch(self, query: str) -> str:
        return f"async {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"


# --- other people's code ---


class Theirs:
    """A class of somebody else's."""

    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"

    @staticmethod
    def of_none(query: str) -> str:
        """Fetch one quote."""
        return f"sync {query}"


async def _amethod(self: Any, query: str) -> str:
    return f"async {query}"


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    """Their methods are pairs, as long as a test runs."""
    with (
        dual_patch(f"{__name__}:Theirs.fetch", async_=_amethod),
        dual_patch(f"{__name__}:Theirs.of_none", async_=async_fetch),
    ):
        yield


async def _arates(amount: str, rate: str, unit: str = "") -> str:
    return f"async {amount}{rate}{unit}"


@dual(async_=_arates)
def rates(amount: str, rate: str, unit: str = "") -> str:
    """Take a mapping, spread over several parameters."""
    return f"sync {amount}{rate}{unit}"


def partly(pair: Any) -> Runnable[Any, Any]:
    """Return partials of both sides, as a runnable."""
    return RunnableLambda(functools.partial(pair.call, rate="U"), functools.partial(pair.acall, rate="U"))


QUERY = "EUR"
BY_NAME = {"query": "EUR"}
SPREAD = {"amount": "E", "rate": "U", "unit": "R"}

TABLE: dict[str, tuple[Callable[[], Any], Any]] = {
    "on the sync function": (lambda: on_sync, QUERY),
    "on the async function": (lambda: on_async, QUERY),
    "of two functions": (lambda: from_two, QUERY),
    "over a stub": (lambda: over_stub, QUERY),
    "the other side later": (lambda: later, QUERY),
    "a limit over the pair": (lambda: limit_over, QUERY),
    "a limit under the pair": (lambda: limit_under, QUERY),
    "a drop-in": (lambda: Dual(sync_fetch, async_fetch), QUERY),
    "a method": (lambda: Desk().fetch, QUERY),
    "a property": (lambda: Desk().chosen, QUERY),
    "a class method inside, by the class": (lambda: Desk.class_inner, QUERY),
    "a class method inside, by an instance": (lambda: Child().class_inner, QUERY),
    "a class method outside, by the class": (lambda: Child.class_outer, QUERY),
    "a class method outside, by an instance": (lambda: Desk().class_outer, QUERY),
    "a static method inside, by the class": (lambda: Desk.static_inner, QUERY),
    "a static method inside, by an instance": (lambda: Child().static_inner, QUERY),
    "a static method outside, by the class": (lambda: Child.static_outer, QUERY),
    "a static method outside, by an instance": (lambda: Desk().static_outer, QUERY),
    "an override of one side": (lambda: Child().fetch, QUERY),
    "super()": (lambda: Child().inherited, QUERY),
    "a slots class": (lambda: Slots().fetch, QUERY),
    "a dataclass": (lambda: Data().fetch, QUERY),
    "a pydantic model": (lambda: Model().fetch, QUERY),
    "a protocol": (lambda: Explicit().fetch, QUERY),
    "generators": (lambda: Desk().ticks, QUERY),
    "a patched method": (lambda: Theirs().fetch, QUERY),
    "a patched static method": (lambda: Theirs.of_none, QUERY),
    "a mapping spread": (lambda: rates, SPREAD),
    "as_tool": (on_sync.as_tool, BY_NAME),
    "as_tool of a mapping": (rates.as_tool, SPREAD),
    "as_tool of a method": (Desk().fetch.as_tool, BY_NAME),
    "tool": (lambda: tool(on_sync), BY_NAME),
    "tool of a mapping": (lambda: tool(rates), SPREAD),
    "tool of a method": (lambda: tool(Desk().fetch), BY_NAME),
    "tool of a class method": (lambda: tool("fetch", Desk.class_outer), BY_NAME),
    "pickled": (lambda: pickle.loads(pickle.dumps(limit_over)), QUERY),  # noqa: S301
    "pickled, bound": (lambda: pickle.loads(pickle.dumps(Desk().fetch)), QUERY),  # noqa: S301
    "copied": (lambda: copy.copy(on_async), QUERY),
    "copied deeply": (lambda: copy.deepcopy(Desk().fetch), QUERY),
    "partials": (lambda: partly(Dual(lambda query, rate: f"sync {query}{rate}R", _arates_of_two)), "E"),
}


async def _arates_of_two(query: str, rate: str) -> str:
    return f"async {query}{rate}R"


each_function = pytest.mark.parametrize(("make", "given"), TABLE.values(), ids=TABLE)


@each_function
def test_it_runs_on_the_sync_side(make: Callable[[], Any], given: Any) -> None:
    """Invoked, in a batch, streamed, in a pipe and in a dict."""
    made = make()
    pipe = RunnableLambda(lambda value: value) | made | {"quote": RunnableLambda(str.upper)}

    assert made.invoke(given) == "sync EUR"
    assert made.batch([given, given]) == ["sync EUR"] * 2
    assert "".join(made.stream(given)) == "sync EUR"
    assert pipe.invoke(given) == {"quote": "SYNC EUR"}


@each_function
async def test_it_runs_on_the_async_side(make: Callable[[], Any], given: Any) -> None:
    """The async twin."""
    made = make()
    pipe = RunnableLambda(lambda value: value) | made | {"quote": RunnableLambda(str.upper)}

    assert await made.ainvoke(given) == "async EUR"
    assert await made.abatch([given, given]) == ["async EUR"] * 2
    assert "".join([chunk async for chunk in made.astream(given)]) == "async EUR"
    assert await pipe.ainvoke(given) == {"quote": "ASYNC EUR"}
