"""Pairs in classes: they bind like the methods they were, and all instances share one limit."""

import asyncio
import copy
import functools
import gc
import inspect
import operator
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, runtime_checkable
from unittest import mock

import pytest
import wrapt
from langchain_core.runnables import RunnableConfig, RunnableLambda
from pydantic import BaseModel, ConfigDict

from asyncify import Dual, PairError, concurrency, dual, registry, watch


class Plain:
    """Methods of every kind in an ordinary class."""

    label = "class"

    def __init__(self, label: str = "fx") -> None:
        self.label = label

    async def _afetch(self, query: str) -> str:
        """Fetch by the loop."""
        return f"async {self.label} {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {self.label} {query}"

    @concurrency(limit=2)
    async def limited(self, query: str) -> str:
        """Fetch within a limit."""
        return f"limited {self.label} {query}"

    @dual
    def convert(self, amount: float, rate: float) -> float:
        """Convert an amount."""
        return amount * rate

    @dual
    def ticks(self, query: str) -> Iterator[str]:
        """Stream quotes."""
        yield self.label
        yield query

    @ticks.async_
    async def aticks(self, query: str) -> AsyncIterator[str]:
        """Stream quotes."""
        yield f"async {self.label}"
        yield query

    @property
    def chosen(self) -> Dual[Any, Any]:
        """A property that returns a pair."""
        return self.fetch


class Slots:
    """A class without a dict, and without weak references."""

    __slots__ = ("label",)

    def __init__(self, label: str) -> None:
        self.label = label

    fetch = Plain.fetch


@dataclass
class Data:
    """A dataclass, whose instances have no hash."""

    label: str = "fx"

    async def _afetch(self, query: str) -> str:
        return f"async {self.label} {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {self.label} {query}"


@dataclass(frozen=True, slots=True)
class FrozenData:
    """A frozen dataclass with slots, which is made twice."""

    label: str = "fx"

    async def _afetch(self, query: str) -> str:
        return f"async {self.label} {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {self.label} {query}"


class Model(BaseModel):
    """A pydantic model, which is told that a pair is no field."""

    model_config = ConfigDict(ignored_types=(Dual,))

    label: str = "fx"

    async def _afetch(self, query: str) -> str:
        return f"async {self.label} {query}"

    @dual(async_=_afetch)
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"sync {self.label} {query}"


class Child(Plain):
    """A subclass that inherits the pair."""


class Override(Plain):
    """A subclass with an async side of its own and the inherited sync side."""

    @dual(sync=Plain.fetch)  # type: ignore[arg-type]  # its `self` is the parent's
    async def fetch(self, query: str) -> str:  # type: ignore[override]  # it is called as an async def
        """Fetch one quote."""
        return f"own {await super().fetch.acall(query)}"


@runtime_checkable
class Fetches(Protocol):
    """What every class here fulfils."""

    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        ...


OWNERS: list[Callable[[str], Any]] = [Plain, Slots, Data, FrozenData, lambda label: Model(label=label), Child]


def _id(owner: Any) -> str:
    return getattr(owner, "__name__", "Model").replace("<lambda>", "Model")


@pytest.mark.parametrize("owner", OWNERS, ids=_id)
def test_a_bound_pair_runs_the_sync_side(owner: Callable[[str], Any]) -> None:
    """Called, by `call`, as a runnable, in a batch: the instance comes along."""
    fx = owner("fx")

    assert fx.fetch("EUR") == "sync fx EUR"
    assert fx.fetch.call("EUR") == "sync fx EUR"
    assert fx.fetch.invoke("EUR") == "sync fx EUR"
    assert fx.fetch.batch(["EUR", "USD"]) == ["sync fx EUR", "sync fx USD"]


@pytest.mark.parametrize("owner", OWNERS, ids=_id)
async def test_a_bound_pair_runs_the_async_side(owner: Callable[[str], Any]) -> None:
    """The async twin."""
    fx = owner("fx")

    assert await fx.fetch.acall("EUR") == "async fx EUR"
    assert await fx.fetch.ainvoke("EUR") == "async fx EUR"
    assert await fx.fetch.abatch(["EUR", "USD"]) == ["async fx EUR", "async fx USD"]


@pytest.mark.parametrize("owner", OWNERS, ids=_id)
async def test_a_bound_pair_composes(owner: Callable[[str], Any]) -> None:
    """A bound pair stands on either side of a pipe, and in a dict, with both paths real."""
    fx = owner("fx")
    upper = RunnableLambda(str.upper)
    pipe = upper | fx.fetch | {"quote": upper, "again": fx.fetch}

    assert pipe.invoke("eur") == {"quote": "SYNC FX EUR", "again": "sync fx sync fx EUR"}
    assert await pipe.ainvoke("eur") == {"quote": "ASYNC FX EUR", "again": "async fx async fx EUR"}


@pytest.mark.parametrize("owner", OWNERS, ids=_id)
def test_each_access_gives_an_equal_pair(owner: Callable[[str], Any]) -> None:
    """Two look-ups on one instance are equal and hash alike; on another instance they are not."""
    fx, other = owner("fx"), owner("fx")

    assert fx.fetch == fx.fetch
    assert hash(fx.fetch) == hash(fx.fetch)
    assert fx.fetch != other.fetch
    assert len({fx.fetch, fx.fetch, other.fetch}) == 2
    assert isinstance(fx.fetch, Dual)


def test_bound_pairs_are_compared_as_methods_are() -> None:
    """By the pair, not its function, and by the very instance, whatever that is equal to."""

    @dataclass
    class Desk:
        label: str

        def plain(self, query: str) -> str:
            return query

        free = dual(plain, name="free")
        limited = concurrency(limit=1)(dual(plain, name="limited"))

    fx, equal = Desk("fx"), Desk("fx")

    assert fx == equal
    assert (fx.free == equal.free, fx.plain == equal.plain) == (False, False)
    assert (fx.free == fx.limited, fx.free == Desk.free, Desk.free == fx.free) == (False, False, False)
    assert fx.free == fx.free
    assert hash(fx.free) == hash(fx.free)  # of an instance that has no hash
    assert len({fx.free, fx.free, fx.limited, equal.free}) == 3
    assert fx.free != fx.plain
    assert fx.free not in (RunnableLambda(fx.plain), Dual(fx.plain))


async def test_the_sides_of_a_bound_pair_are_bound() -> None:
    """`func` and `afunc` are the methods themselves, without the limit."""
    assert Plain("fx").fetch.func("EUR") == "sync fx EUR"
    assert await Plain("fx").fetch.afunc("EUR") == "async fx EUR"


async def test_a_lambda_binds_too() -> None:
    """A pair of a lambda, which has no name but its attribute's, is a method like any other."""

    class Desk:
        double = dual(lambda self, amount: 2 * amount)

    assert Desk().double.invoke(3) == 6
    assert await Desk().double.ainvoke(3) == 6
    assert Desk().double.__qualname__ == Desk.double.__qualname__ == f"{Desk.__qualname__}.double"


def test_a_bound_pair_is_not_bound_again() -> None:
    """As an attribute of another class it stays the method of its own instance."""
    fx = Plain("fx")

    class Other:
        fetch = fx.fetch

    assert Other().fetch.invoke("EUR") == "sync fx EUR"


class Inside(ABC):
    """An abstract class with `abstractmethod` under `dual`."""

    @dual
    @abstractmethod
    def fetch(self, query: str) -> str:
        """Fetch one quote."""


class Outside(ABC):
    """An abstract class with `abstractmethod` over `dual`."""

    @abstractmethod
    @dual
    def fetch(self, query: str) -> str:
        """Fetch one quote."""


class Real(Inside, Outside):
    """What overrides them."""

    @dual
    def fetch(self, query: str) -> str:
        return query


def test_a_pair_may_be_abstract() -> None:
    """A class that does not override it can't be instantiated."""
    for base in (Inside, Outside):
        with pytest.raises(TypeError, match="abstract"):
            base()  # type: ignore[abstract]

    assert Real().fetch.invoke("EUR") == "EUR"


def test_a_pair_keeps_no_instance_alive() -> None:
    """An instance goes when its last owner goes, although its pair was used."""
    fx = Plain()
    fx.fetch.invoke("EUR")
    gone = weakref.ref(fx)
    del fx
    gc.collect()

    assert gone() is None


def test_a_bound_pair_keeps_its_instance() -> None:
    """A pair that was looked up holds its instance, as a bound method does."""
    fetch = Plain("kept").fetch

    assert fetch.invoke("EUR") == "sync kept EUR"


def test_the_class_gives_the_pair_itself() -> None:
    """On the class the pair takes the instance as its first argument."""
    assert Plain.fetch is Plain.__dict__["fetch"]
    assert Plain.fetch(Plain("fx"), "EUR") == "sync fx EUR"


def test_a_bound_pair_shows_what_the_method_would() -> None:
    """Name, docs and signature, without `self`; the limit in the `repr`."""
    fx = Plain()

    assert str(inspect.signature(fx.fetch)) == "(query: str) -> str"
    assert (fx.fetch.name, fx.fetch.__doc__) == ("fetch", "Fetch one quote.")
    assert repr(fx.limited) == "<Dual limited async (sync bridged) 0/2 in flight, 0 waiting>"
    assert registry[f"{__name__}.Plain.fetch"].pair is Plain.fetch


async def test_all_instances_share_the_limit() -> None:
    """Calls on many instances are together never more than the limit inside."""
    inside, peak = 0, 0

    class Desk:
        @concurrency(limit=2)
        async def fetch(self, query: str) -> str:
            nonlocal inside, peak
            inside += 1
            peak = max(peak, inside)
            await asyncio.sleep(0)
            inside -= 1
            return query

    calls = [Desk().fetch.ainvoke(str(number)) for number in range(10)]

    assert await asyncio.gather(*calls) == [str(number) for number in range(10)]
    assert peak == 2
    assert Desk().fetch.limiter is Desk.fetch.limiter


async def test_a_key_gives_each_instance_a_limit_of_its_own() -> None:
    """`key=` sees the instance: two calls on one wait for each other, those on two do not."""
    entered: list[str] = []
    leave = asyncio.Event()

    class Desk:
        @concurrency(limit=1, key=lambda call: id(call["self"]))
        async def fetch(self, query: str) -> str:
            entered.append(query)
            await leave.wait()
            return query

    one, other = Desk(), Desk()
    calls = [asyncio.ensure_future(desk.fetch.ainvoke(query)) for desk, query in ((one, "a"), (one, "b"), (other, "c"))]
    for _ in range(100):
        await asyncio.sleep(0)
    inside = list(entered)
    leave.set()

    assert inside == ["a", "c"]
    assert await asyncio.gather(*calls) == ["a", "b", "c"]


async def test_a_mapping_is_spread_over_a_methods_parameters() -> None:
    """With two parameters beside `self` the input is a mapping; with one it is the value."""
    fx = Plain()

    assert fx.convert.invoke({"amount": 3, "rate": 2}) == 6
    assert await fx.convert.ainvoke({"amount": 3, "rate": 2}) == 6
    with pytest.raises(TypeError, match="takes amount, rate: its input has no rate"):
        fx.convert.invoke({"amount": 3})


async def test_a_generator_method_streams() -> None:
    """A bound pair of generators streams on both paths."""
    fx = Plain()

    assert list(fx.ticks("EUR")) == ["fx", "EUR"]
    assert list(fx.ticks.stream("EUR")) == ["fx", "EUR"]
    assert [chunk async for chunk in fx.ticks.astream("EUR")] == ["async fx", "EUR"]


def test_a_property_may_return_a_pair() -> None:
    """What a property returns is not bound a second time."""
    assert Plain("fx").chosen.invoke("EUR") == "sync fx EUR"


async def test_super_finds_the_inherited_pair() -> None:
    """`super().fetch` binds the parent's pair to the child's instance."""
    child = Override("fx")

    assert await child.fetch.ainvoke("EUR") == "own async fx EUR"
    assert super(Override, child).fetch.invoke("EUR") == "sync fx EUR"


async def test_a_subclass_overrides_one_side() -> None:
    """`@dual(sync=Parent.fetch)` keeps the parent's sync side and gives a new async one; the parent's stays."""
    assert Override("fx").fetch.invoke("EUR") == "sync fx EUR"
    assert await Override("fx").fetch("EUR") == "own async fx EUR"
    assert await Plain("fx").fetch.ainvoke("EUR") == "async fx EUR"
    assert registry[f"{__name__}.Override.fetch"].pair is Override.fetch


def test_every_class_fulfils_a_protocol() -> None:
    """A class with a pair fulfils a protocol with a method of that name."""
    assert all(isinstance(owner("fx"), Fetches) for owner in OWNERS)


# --- under decorators whose `__get__` makes more of the instance than a first argument ---


@wrapt.decorator
def for_whom(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Return instead for whom it was called, and with what."""
    return instance, args, kwargs


@wrapt.decorator
async def afor_whom(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Return instead for whom it was called, and with what."""
    return instance, args, kwargs


class Told:
    """Methods under such decorators."""

    @dual
    @for_whom
    def of_sync(self, query: str) -> Any:
        """Fetch."""

    @concurrency(limit=1)
    @afor_whom
    async def of_async(self, query: str) -> Any:
        """Fetch."""

    @for_whom
    def _sync(self, query: str) -> Any:
        """Fetch."""

    @afor_whom
    async def _async(self, query: str) -> Any:
        """Fetch."""

    of_both = dual(sync=_sync, async_=_async)

    @dual
    @staticmethod
    @for_whom
    def of_none(query: str) -> Any:
        """Fetch."""


@pytest.mark.parametrize("name", ["of_sync", "of_async", "of_both"])
async def test_a_decorator_that_binds_by_itself_sees_the_instance(name: str) -> None:
    """In each way of calling it, as in a plain method."""
    told = Told()
    told_so: tuple[object, ...] = (told, ("EUR",), {})
    pair = getattr(told, name)

    assert pair.call("EUR") == pair.invoke("EUR") == getattr(Told, name).call(told, "EUR") == told_so
    assert await pair.acall("EUR") == await pair.ainvoke("EUR") == told_so
    assert pair.call(query="EUR") == (told, (), {"query": "EUR"})
    with watch():
        assert await pair.acall("EUR") == told_so


async def _at(place: str, self: Any, query: str) -> str:
    return f"{place} {type(self).__name__} {query}"


class Far:
    """An object whose method is the other side of a pair in a class."""

    async def fetch(far, self: Any, query: str) -> str:  # noqa: N805  (the other side's `self` is a parameter here)
        """Fetch."""
        return f"far {type(self).__name__} {query}"


class Named:
    """A decorator that asks for the name it has in the class, and needs it to bind."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = f"{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self.fn, instance, self.place)

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


class Bare:
    """A decorator that keeps neither name nor docs."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self.fn, instance)

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


class Odd:
    """Methods made of callables of all kinds."""

    @dual(async_=functools.partial(_at, "near"))
    def by_partial(self, query: str) -> str:
        """Fetch."""
        return f"sync {query}"

    @dual(async_=Far().fetch)
    def by_method(self, query: str) -> str:
        """Fetch."""
        return f"sync {query}"

    @dual
    @functools.cache  # noqa: B019  (of an instance that lives for one test)
    def cached(self, query: str) -> str:
        """Fetch."""
        return f"cached {query}"

    @dual
    @Named
    def named(self, place: str, query: str) -> str:
        """Fetch."""
        return f"{place} {query}"

    @dual
    @Bare
    def bare(self, query: str) -> str:
        """Fetch."""
        return f"bare {query}"


async def test_a_side_that_binds_nothing_gets_the_instance() -> None:
    """A partial and a bound method have a `__get__` from Python 3.13 on, and stay what they are."""
    assert await Odd().by_partial.ainvoke("EUR") == "near Odd EUR"
    assert await Odd().by_method.ainvoke("EUR") == "far Odd EUR"


def test_a_method_under_a_cache_is_called_through_its_class_in_every_way() -> None:
    """With its instance first, by name, and with none at all, as a test may do."""
    odd = Odd()

    assert Odd.cached(odd, "EUR") == Odd.cached.invoke({"self": odd, "query": "EUR"}) == "cached EUR"
    assert Odd.cached(None, "EUR") == "cached EUR"


def test_a_decorator_hears_its_name() -> None:
    """As it would without the pair around it."""
    call: Any = Odd().named

    assert call("EUR") == "Odd.named EUR"


async def test_a_decorator_without_a_name_makes_a_method_too() -> None:
    """It is called as the pair is."""
    odd: Any = Odd()

    assert odd.bare("EUR") == odd.bare.invoke("EUR") == await odd.bare.ainvoke("EUR") == "bare EUR"


async def test_an_executor_of_threads_calls_a_side_that_binds_by_itself() -> None:
    """The bridge makes no difference."""
    with ThreadPoolExecutor(1) as pool:

        class Bridged:
            @dual(bridge=pool)
            @for_whom
            def fetch(self, query: str) -> Any:
                """Fetch."""

        bridged = Bridged()
        assert await bridged.fetch.ainvoke("EUR") == (bridged, ("EUR",), {})


def test_a_decorator_of_a_static_method_sees_no_instance() -> None:
    """Its first argument is nobody's `self`."""
    assert Told().of_none.call("EUR") == Told.of_none.invoke("EUR") == (None, ("EUR",), {})


def test_a_decorator_of_a_function_that_a_class_only_names_sees_no_instance() -> None:
    """It is no method where it stands."""
    outside = dual(for_whom(lambda query: query), name="outside_of_classes")

    class Holder:
        pair = outside

    assert outside("EUR") == Holder.pair("EUR") == (None, ("EUR",), {})


# --- classmethod and staticmethod, in either order ---


async def _astatic(query: str) -> str:
    return f"async {query}"


async def _aclass(cls: type[Any], query: str) -> str:
    return f"async {cls.__name__} {query}"


class Kinds:
    """Class methods and static methods, with the decorators in either order."""

    @dual(async_=_aclass)
    @classmethod
    def class_inner(cls, query: str) -> str:
        """Fetch."""
        return f"sync {cls.__name__} {query}"

    @classmethod
    @dual(async_=_aclass)
    def class_outer(cls, query: str) -> str:
        """Fetch."""
        return f"sync {cls.__name__} {query}"

    @concurrency(limit=2)
    @classmethod
    def class_limited(cls, query: str) -> str:
        """Fetch."""
        return f"sync {cls.__name__} {query}"

    @dual(async_=_astatic)
    @staticmethod
    def static_inner(query: str) -> str:
        """Fetch."""
        return f"sync {query}"

    @staticmethod
    @dual(async_=_astatic)
    def static_outer(query: str) -> str:
        """Fetch."""
        return f"sync {query}"


class SubKinds(Kinds):
    """A subclass, which class methods are bound to."""


@pytest.mark.parametrize("name", ["class_inner", "class_outer", "class_limited"])
@pytest.mark.parametrize("owner", [Kinds, SubKinds, Kinds(), SubKinds()], ids=["class", "sub", "self", "subself"])
async def test_a_class_method_binds_the_class(owner: Any, name: str) -> None:
    """Looked up on a class or an instance, in either order of the decorators, a class method gets the class."""
    pair = getattr(owner, name)
    cls = owner if isinstance(owner, type) else type(owner)
    colour = "sync" if name == "class_limited" else "async"

    assert [pair("EUR"), pair.invoke("EUR")] == [f"sync {cls.__name__} EUR"] * 2
    assert await pair.ainvoke("EUR") == f"{colour} {cls.__name__} EUR"
    assert (pair | RunnableLambda(len)).invoke("EUR") == len(f"sync {cls.__name__} EUR")
    assert str(inspect.signature(pair)) == "(query: str) -> str"


class Row(NamedTuple):
    """A class that is made before it is given its methods."""

    query: str

    @classmethod
    @dual(async_=_aclass)
    def fetch(cls, query: str) -> str:
        return f"sync {cls.__name__} {query}"


class Currency(Enum):
    """A class whose body is no ordinary dict."""

    EUR = 1

    @classmethod
    @dual(async_=_aclass)
    def fetch(cls, query: str) -> str:
        return f"sync {cls.__name__} {query}"


class Late:
    """A class that is given a method when it is made."""


def _class(cls: type, query: str) -> str:
    return f"sync {cls.__name__} {query}"


LATE: Any = classmethod(_class)
Late.fetch = dual(sync=LATE, async_=_aclass)  # type: ignore[attr-defined]


@pytest.mark.parametrize("owner", [Row, Row("EUR"), Currency, Currency.EUR, Late, Late()], ids=str)
async def test_a_class_method_of_an_unusual_class_binds_the_class(owner: Any) -> None:
    """A named tuple, an enumeration, a class that is given it later."""
    cls = owner if isinstance(owner, type) else type(owner)

    assert owner.fetch.invoke("EUR") == f"sync {cls.__name__} EUR"
    assert await owner.fetch.ainvoke("EUR") == f"async {cls.__name__} EUR"


def test_a_class_method_beside_a_pair_is_left_as_it_is() -> None:
    """A class has nothing in it that it would not have without the pair."""

    class Beside:
        @classmethod
        def label(cls) -> str:
            return cls.__name__

        @classmethod
        @dual(async_=_aclass)
        def fetch(cls, query: str) -> str:
            return f"sync {cls.label()} {query}"

    class Without:
        label = fetch = None

    assert (Beside.label(), Beside().label()) == ("Beside", "Beside")
    assert Beside.fetch.invoke("EUR") == "sync Beside EUR"
    assert [name for name in vars(Beside) if name not in vars(Without)] == []


def test_a_pair_is_made_in_a_thread() -> None:
    """No module is being run there."""
    with ThreadPoolExecutor() as threads:
        pair = threads.submit(dual, operator.neg, name="made_in_a_thread").result()

    assert pair.invoke(1) == -1


def test_a_notebooks_cell_is_no_class_body() -> None:
    """Its code has a name of its own."""
    names: dict[str, Any] = {"dual": dual}
    cell = compile("pair = dual(lambda query: query)", "<cell>", "exec").replace(co_name="<cell line: 1>")
    exec(cell, names)  # noqa: S102  (of the test's own code)

    assert set(names) == {"__builtins__", "dual", "pair"}


@pytest.mark.parametrize("name", ["static_inner", "static_outer"])
@pytest.mark.parametrize("owner", [Kinds, SubKinds, Kinds(), SubKinds()], ids=["class", "sub", "self", "subself"])
async def test_a_static_method_binds_nothing(owner: Any, name: str) -> None:
    """Looked up on a class or an instance, in either order of the decorators, a static method is the pair."""
    pair = getattr(owner, name)

    assert [pair("EUR"), pair.invoke("EUR")] == ["sync EUR"] * 2
    assert await pair.ainvoke("EUR") == "async EUR"
    assert pair is getattr(Kinds, name)


class Handed:
    """Async methods of every kind that are a `def`, as a client's may be."""

    def _fetch(self, query: str) -> str:
        return f"sync {type(self).__name__} {query}"

    async def _afetch(self, query: str) -> str:
        return f"async {type(self).__name__} {query}"

    def _handed(self, query: str) -> Awaitable[str]:
        return self._afetch(query)

    @dual(async_=_handed)
    def sync_first(self, query: str) -> str:
        return self._fetch(query)

    @concurrency(limit=1)
    @dual(sync=_fetch)
    def async_first(self, query: str) -> Awaitable[str]:
        return self._afetch(query)

    @dual
    def later(self, query: str) -> str:
        return self._fetch(query)

    @later.async_
    def alater(self, query: str) -> Awaitable[str]:
        return self._afetch(query)

    @dual(sync=lambda cls, query: f"sync {cls.__name__} {query}")
    @classmethod
    def of_class(cls, query: str) -> Awaitable[str]:
        return cls()._afetch(query)

    @dual(sync=lambda query: f"sync Handed {query}")
    @staticmethod
    def of_none(query: str) -> Awaitable[str]:
        return Handed()._afetch(query)

    @staticmethod
    @dual(sync=lambda query: f"sync Handed {query}")
    def of_none_inside(query: str) -> Awaitable[str]:
        return Handed()._afetch(query)


@pytest.mark.parametrize(
    ("name", "is_async"),
    [
        ("sync_first", False),
        ("later", False),
        ("alater", False),
        ("async_first", True),
        ("of_class", True),
        ("of_none", True),
        ("of_none_inside", True),
    ],
)
async def test_a_method_may_be_a_def_that_is_awaited(name: str, *, is_async: bool) -> None:
    """It binds as any other, and is called as what was decorated."""
    pair: Any = getattr(Handed(), name)
    called = pair("EUR")

    assert (await called if is_async else called) == f"{'async' if is_async else 'sync'} Handed EUR"
    assert inspect.iscoroutinefunction(pair) is is_async
    assert (pair.call("EUR"), pair.invoke("EUR")) == ("sync Handed EUR", "sync Handed EUR")
    assert (await pair.acall("EUR"), await pair.ainvoke("EUR")) == ("async Handed EUR", "async Handed EUR")


def test_what_does_not_bind_makes_a_pair_that_does_not() -> None:
    """A builtin, a class, a partial and a bound method as a side stay unbound in a class, as they are themselves."""

    class Desk:
        size = dual(len, name="desk_size")
        number = dual(int, name="desk_number")
        bound = dual(Plain("fx").fetch.func, name="desk_bound")
        partial = dual(functools.partial(Plain.fetch.func, Plain("part")), name="desk_partial")

    desk: Any = Desk()

    assert [desk.size("EUR"), desk.number("7"), desk.bound("EUR")] == [3, 7, "sync fx EUR"]
    assert desk.partial("EUR") == "sync part EUR"


# --- fakes and refusals ---


def test_a_fake_of_a_method_gets_the_instance() -> None:
    """An override of the class's pair serves all instances, those bound before too."""
    fx = Plain("fx")
    before = fx.fetch
    with registry.override(Plain.fetch, lambda self, query: f"fake {self.label} {query}"):
        assert [before.invoke("EUR"), fx.fetch("EUR")] == ["fake fx EUR"] * 2
        assert Plain("other").fetch.invoke("EUR") == "fake other EUR"

    assert before.invoke("EUR") == "sync fx EUR"


def test_a_bound_pair_can_not_be_overridden() -> None:
    """The error says to override the pair of the class."""
    fx = Plain()

    with pytest.raises(TypeError, match=r"Plain.fetch is bound to .*: registry.override\(Plain.fetch, ...\)"):
        registry.override(fx.fetch, lambda query: query).__enter__()
    assert fx.fetch.invoke("EUR") == "sync fx EUR"


def test_a_bound_pair_can_not_be_decorated() -> None:
    """The error says to decorate it in its class."""
    with pytest.raises(PairError, match=r"Plain.fetch .* is bound to .*; decorate it in its class"):
        concurrency(limit=1)(Plain().fetch)


# --- class and static methods in the midst of decorators, copies, and what `key=` is given ---


async def afetch(cls: Any, query: str) -> str:
    """Fetch by the loop."""
    await asyncio.sleep(0)
    return f"async {cls.__name__} {query}"


async def afetch_static(query: str) -> str:
    """Fetch by the loop."""
    await asyncio.sleep(0)
    return f"async {query}"


def limited_pair(fn: Any) -> Any:
    """Decorate as a user's own decorator might."""
    return concurrency(limit=2)(dual(fn))


class Between:
    """Class and static methods between the decorators, or over them, in every order."""

    @concurrency(limit=2)
    @classmethod
    @dual(async_=afetch)
    def under_limit(cls, query: str) -> str:
        """Fetch."""
        return f"sync {cls.__name__} {query}"

    @dual(async_=afetch)
    @classmethod
    @concurrency(limit=2)
    def over_limit(cls, query: str) -> str:
        """Fetch."""
        return f"sync {cls.__name__} {query}"

    @concurrency(limit=2)
    @staticmethod
    @dual(async_=afetch_static)
    def static_under_limit(query: str) -> str:
        """Fetch."""
        return f"sync {query}"

    @dual(async_=afetch_static)
    @staticmethod
    @concurrency(limit=2)
    def static_over_limit(query: str) -> str:
        """Fetch."""
        return f"sync {query}"

    @classmethod
    @limited_pair
    def by_own_decorator(cls, query: str) -> str:
        """Fetch."""
        return f"sync {cls.__name__} {query}"


class Derived(Between):
    """A class that overrides one side of a class method."""

    @classmethod
    @dual(sync=Between.under_limit)
    async def under_limit(cls, query: str) -> str:  # type: ignore[override]  # it has the other colour
        """Fetch anew."""
        return f"derived {cls.__name__} {query}"


@pytest.mark.parametrize(
    ("pair", "sync", "async_"),
    [
        (Between.under_limit, "sync Between x", "async Between x"),
        (Between.over_limit, "sync Between x", "async Between x"),
        (Between.static_under_limit, "sync x", "async x"),
        (Between.static_over_limit, "sync x", "async x"),
        (Between.by_own_decorator, "sync Between x", "sync Between x"),
        (Between().under_limit, "sync Between x", "async Between x"),
        (Derived.under_limit, "sync Derived x", "derived Derived x"),
        (Derived.over_limit, "sync Derived x", "async Derived x"),
    ],
    ids=["under", "over", "static-under", "static-over", "own", "instance", "override", "inherited"],
)
async def test_a_class_method_in_the_midst_of_decorators_loses_nothing(pair: Any, sync: str, async_: str) -> None:
    """Both sides are there, and the limit."""
    assert pair.invoke("x") == pair.call("x") == sync
    assert await pair.ainvoke("x") == await pair.acall("x") == async_
    assert pair.limiter.stats().limit == 2


def test_a_class_method_is_faked_where_it_is_looked_up() -> None:
    """What is bound to a class stands for the one pair that there is."""
    with registry.override(Between.under_limit, lambda _cls, query: f"fake {query}"):
        assert Between.under_limit.invoke("x") == Derived.over_limit.invoke("x").replace("sync Derived", "fake")

    assert Between.under_limit.invoke("x") == "sync Between x"


class Spread:
    """Class methods of two parameters, whose input is a mapping."""

    @dual
    @classmethod
    def under(cls, amount: int, rate: int) -> int:
        return amount * rate

    @classmethod
    @dual
    def over(cls, amount: int, rate: int) -> int:
        return amount * rate


@pytest.mark.parametrize("pair", [Spread.under, Spread.over])
async def test_a_fake_of_a_class_method_gets_the_class_and_all_parameters(pair: Any) -> None:
    """Wherever the `classmethod` stands, on each version of Python."""
    call = {"amount": 2, "rate": 3}
    with registry.override(pair, lambda cls, amount, rate: (cls.__name__, amount, rate)):
        assert pair.invoke(call) == await pair.ainvoke(call) == ("Spread", 2, 3)

    assert pair.invoke(call) == 6


def fetch_sync(query: str) -> str:
    """Fetch."""
    return f"sync {query}"


class Stubs:
    """Stubs that are class or static methods."""

    @dual(sync=fetch_sync, async_=afetch_static)
    @staticmethod
    def static(query: str) -> str:
        """Named and documented here."""
        raise NotImplementedError

    @dual(sync=lambda cls, query: f"sync {cls.__name__} {query}", async_=afetch)
    @classmethod
    def of_class(cls, query: str) -> str:
        """Named and documented here."""
        raise NotImplementedError


def test_a_stub_may_be_a_class_or_static_method() -> None:
    """It is decorated, not called, and binds as it says."""
    stubs: Any = Stubs
    assert stubs.static.invoke("x") == stubs().static("x") == "sync x"
    assert stubs.of_class.invoke("x") == stubs().of_class("x") == "sync Stubs x"
    assert Stubs.static.__doc__ == "Named and documented here."


class Unlimited:
    """A class method without a limit."""

    @classmethod
    @dual
    def fetch(cls, query: str) -> str:
        """Fetch."""
        return f"sync {cls.__name__} {query}"


@pytest.mark.parametrize(
    ("bound", "says"),
    [(Plain("desk").fetch, "sync desk x"), (Unlimited.fetch, "sync Unlimited x")],
    ids=["instance", "class"],
)
async def test_a_bound_pair_may_be_a_side(bound: Any, says: str) -> None:
    """As a bound method may, in either form."""
    for made in (dual(sync=bound, async_=afetch_static), dual(sync=bound)(afetch_static)):
        assert made.invoke("x") == says
        assert await made.ainvoke("x") == "async x"
    assert bound._warn


def test_a_bound_pair_is_not_limited_where_it_is_looked_up() -> None:
    """The message says where; the pair of the class stays as it is."""
    with pytest.raises(PairError, match=r"is bound to .*; decorate it in its class"):
        concurrency(limit=2)(Unlimited.fetch)

    assert Unlimited.fetch.limiter is None
    assert Unlimited.fetch.invoke("x") == "sync Unlimited x"


def seen_by_key(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what `key=` is given for a call."""
    seen: list[Any] = []

    def key(given: Any) -> str:
        seen.append(given)
        return "key"

    concurrency(limit=1, key=key)(fn).call(*args, **kwargs)
    return seen[0]


def embed(text: str, model: str = "m") -> None:
    """Take one argument that is needed, and one that is not."""


def optional(text: str = "t", model: str = "m") -> None:
    """Take two that are not."""


def one_optional(text: str = "t") -> None:
    """Take one that is not."""


def named_only(model: str = "m", *, text: str) -> None:
    """Take one that is needed by name."""


def none() -> None:
    """Take none."""


class Desk:
    """Methods of which nothing is needed but their instance."""

    def quotes(self, count: int = 10) -> None:
        """Take one argument that is not needed."""

    def rates(self) -> None:
        """Take none."""


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "given"),
    [
        (embed, ("hello",), {}, "hello"),
        (embed, (), {"model": "x", "text": "hello"}, "hello"),
        (optional, (), {"model": "x"}, {"text": "t", "model": "x"}),
        (one_optional, (), {}, "t"),
        (one_optional, ("x",), {}, "x"),
        (named_only, ("x",), {"text": "hello"}, "hello"),
        (none, (), {}, {}),
        (Desk.quotes, (1, 3), {}, {"self": 1, "count": 3}),
        (Desk.rates, (1,), {}, {"self": 1}),
    ],
)
def test_key_is_given_the_argument_that_is_needed_or_all(fn: Any, args: Any, kwargs: Any, given: Any) -> None:
    """However the call is written; of a method always all, so that it can look at the instance."""
    assert seen_by_key(fn, *args, **kwargs) == given


async def test_a_method_of_a_builtin_type_takes_a_limit() -> None:
    """Even one that says of no module that it is its own."""
    pair: Any = concurrency(limit=2)(str.strip)

    assert pair.invoke(" x ") == await pair.ainvoke(" x ") == "x"
    assert copy.copy(pair) == pair


def test_a_second_side_in_a_subclass_is_refused() -> None:
    """It would be the base's, too: the error says how to override one side."""

    class Base:
        @dual
        def price(self, query: str) -> str:
            return "base"

        @dual
        async def quote(self, query: str) -> str:
            return "base"

    with pytest.raises(PairError, match=r"^a side that .*Live gives .* write @dual\(sync=.*Base.price\)$"):

        class Live(Base):
            @Base.price.async_  # type: ignore[arg-type]
            async def price_async(self, query: str) -> str:
                return "live"

    with pytest.raises(PairError, match=r"to override it in .*Later alone, write @dual\(async_=.*Base.quote\)$"):

        class Later(Base):
            @Base.quote.sync  # type: ignore[arg-type]
            def quote_sync(self, query: str) -> str:
                return "live"

    assert Base().price.invoke("x") == Base().quote.invoke("x") == "base"


async def test_a_second_side_may_come_from_another_class() -> None:
    """In the body of the pair's own class, or outside of any."""

    class Transport:
        async def fetch(self, query: str) -> str:
            return "by the loop"

    class Desk(Transport):
        @dual
        def price(self, query: str) -> str:
            return "here"

        price.async_(Transport.fetch)

        @dual
        def quote(self, query: str) -> str:
            return "here"

    Desk.quote.async_(Transport.fetch)

    @dual
    def of_no_class(query: str) -> str:
        return "here"

    class Written:
        @of_no_class.async_
        async def elsewhere(query: str) -> str:  # noqa: N805
            return "by the loop"

    assert await of_no_class.ainvoke("x") == "by the loop"
    assert await Desk().price.ainvoke("x") == await Desk().quote.ainvoke("x") == "by the loop"


def test_a_drop_in_is_no_method() -> None:
    """A `RunnableLambda` is none either, so a class that has one may have a drop-in; `dual` makes methods."""

    class Agent:
        clean = Dual(str.strip)
        limited = concurrency(limit=2)(Dual(str.strip))
        method = dual(lambda self, query: query.strip())

    assert Agent().clean.invoke(" x ") == Agent().limited.invoke(" x ") == Agent().method.invoke(" x ") == "x"
    assert Agent().clean is Agent.clean


class Shouted(Dual[Any, Any]):
    """A kind of pair of somebody's own, with a state of its own."""

    def __init__(self, func: Callable[..., Any], mark: str) -> None:
        super().__init__(func)
        self.mark = mark

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Do as a pair does, and shout."""
        return f"{super().invoke(input, config, **kwargs)}{self.mark}"


class Market:
    """A class with a pair of that kind."""

    shout = Shouted(lambda self, query: query, "!")
    shout._binding = "instance"


def test_a_kind_of_pair_stays_of_that_kind_when_it_binds() -> None:
    """What it makes of a method holds, in a pipe and in a batch as well."""
    shout: Any = Market().shout

    assert shout.invoke("x") == "x!"
    assert isinstance(shout, Shouted)
    assert (shout | RunnableLambda(str)).invoke("x") == "x!"
    assert shout.batch(["x", "y"]) == ["x!", "y!"]
    assert type(Market().shout) is type(shout)
    assert not hasattr(shout, "afunc")
    with pytest.raises(AttributeError, match="has no attribute 'typo'"):
        operator.attrgetter("typo")(shout)


def test_a_graph_of_a_bound_pair_keeps_no_instance_alive() -> None:
    """LangChain remembers what it has looked a function's runnables up for."""
    desk = Plain()
    instance = weakref.ref(desk)
    desk.fetch.get_graph().draw_mermaid()
    del desk
    gc.collect()

    assert instance() is None


@pytest.mark.parametrize("side", ["func", "afunc"])
@pytest.mark.parametrize("bound", [Plain().fetch, Kinds.class_inner])
def test_a_side_of_a_bound_pair_can_not_be_replaced(bound: Any, side: str) -> None:
    """It is made at each access, so the fake would never run; the error says where to put it."""
    written = bound.__qualname__
    with (
        pytest.raises(TypeError, match=rf"^{written} is bound to .*; override it in its class: registry.override\("),
        mock.patch.object(bound, side, print),
    ):
        pass

    assert getattr(bound, side) is not print


class _Quotes:
    async def afetch(this, self: Any, query: str) -> str:  # noqa: N805  (`self` is the desk, as in the other side)
        return f"async {self.name} {query}"

    __call__ = afetch


@pytest.mark.parametrize("side", [_Quotes().afetch, _Quotes()], ids=["a bound method", "an object"])
async def test_a_side_that_is_bound_to_another_object_gets_the_instance_too(side: Any) -> None:
    """As an argument: it is no function that would be a method of this class."""

    class Desk:
        name = "desk"

        @dual(async_=side)
        def fetch(self, query: str) -> str:
            return f"sync {self.name} {query}"

    assert Desk().fetch.invoke("EUR") == "sync desk EUR"
    assert await Desk().fetch.ainvoke("EUR") == "async desk EUR"
