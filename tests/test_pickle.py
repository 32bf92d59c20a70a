"""Pairs that are pickled, copied and partially applied."""

import copy
import functools
import html
import inspect
import multiprocessing
import os
import pickle
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda

from asyncify import Dual, concurrency, dual, registry


async def _afetch(query: str) -> str:
    return f"async {query}"


def _fetch(query: str) -> str:
    return f"sync {query}"


def _handed_on(query: str) -> Awaitable[str]:
    return _afetch(query)


@dual(async_=_afetch)
def fetch(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


@concurrency(limit=3)
async def limited(query: str) -> str:
    """Fetch within a limit."""
    return f"limited {query}"


@dual(sync=_fetch, async_=_afetch)
def over_stub(query: str) -> str:
    """Fetch one quote."""
    raise NotImplementedError


from_two = dual(sync=_fetch, async_=_afetch)
handed_on = dual(sync=_fetch)(_handed_on)
from_lambda = dual(lambda query: f"sync {query}", name="pickled_lambda")
of_elsewhere = concurrency(limit=2)(html.escape)
of_partial = dual(functools.partial(html.escape, quote=False), name="of_partial")


@dual
def process(query: str) -> int:
    """Return the number of the process that it runs in."""
    return os.getpid()


@dataclass
class Desk:
    """An owner of methods."""

    label: str

    @dual
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"{self.label} {query}"

    @dual
    @classmethod
    def of_class(cls, query: str) -> str:
        """Fetch one quote."""
        return f"{cls.__name__} {query}"

    async def _alater(self, query: str) -> str:
        return f"async {self.label} {query}"

    def _later(self, query: str) -> str:
        return f"sync {self.label} {query}"

    later = dual(sync=_later, async_=_alater)

    def plain(self, query: str) -> str:
        """Fetch one quote, without a limit."""
        return f"{self.label} {query}"


class Branch(Desk):
    """An owner that has a pair of a function of its parent's, and overrides another."""

    plain_limited = concurrency(limit=1)(Desk.plain)

    @dual
    def fetch(self, query: str) -> str:
        """Fetch one quote."""
        return f"branch {self.label} {query}"

    def inherited(self) -> Any:
        """Return the parent's pair, bound."""
        return super().fetch


ALONE: list[Dual[Any, Any]] = [fetch, limited, over_stub, from_two, from_lambda, of_elsewhere, of_partial, handed_on]
PAIRS: list[Dual[Any, Any]] = [*ALONE, Desk.fetch, Desk.later]
COPIES = [lambda pair: pickle.loads(pickle.dumps(pair)), copy.copy, copy.deepcopy]  # noqa: S301
each_copy = pytest.mark.parametrize("copied", COPIES, ids=["pickle", "copy", "deepcopy"])


@each_copy
@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_a_module_level_pair_is_pickled_by_reference(pair: Dual[Any, Any], copied: Any) -> None:
    """Pickled, copied and loaded again it is the very pair, limit and all."""
    assert copied(pair) is pair


@each_copy
async def test_a_pair_made_by_hand_is_pickled_by_its_functions(copied: Any) -> None:
    """A `Dual` that nothing registers is copied as a `RunnableLambda` is."""
    for afetch in (_afetch, _handed_on):
        made = copied(Dual(_fetch, afetch, "made"))

        assert made.name == "made"
        assert [made.invoke("EUR"), await made.ainvoke("EUR")] == ["sync EUR", "async EUR"]


@each_copy
def test_a_bound_pair_goes_with_its_instance(copied: Any) -> None:
    """It is bound to the instance, or to a copy of it; on the class, to the class."""
    made = copied(Desk("fx").fetch)

    assert made.invoke("EUR") == "fx EUR"
    assert made.limiter is Desk.fetch.limiter
    assert copied(Desk.of_class).invoke("EUR") == "Desk EUR"


def test_a_deep_copy_of_a_bound_pair_has_an_instance_of_its_own() -> None:
    """A deep copy follows the instance, as that of a method does."""
    desk = Desk("fx")
    made: Any = copy.deepcopy(desk.fetch)
    desk.label = "changed"

    assert made("EUR") == "fx EUR"
    assert copy.copy(desk.fetch)("EUR") == "changed EUR"


def test_a_deep_copy_of_what_super_found_is_of_that_pair() -> None:
    """The child has another pair of the same name."""
    assert copy.deepcopy(Branch("fx").inherited())("EUR") == "fx EUR"


@each_copy
def test_a_bound_pair_that_its_class_has_under_another_name_keeps_its_limit(copied: Any) -> None:
    """The class has the plain function, too, under the name that the pair's function has."""
    made = copied(Branch("fx").plain_limited)

    assert made("EUR") == "fx EUR"
    assert made.limiter is Branch.plain_limited.limiter


def test_an_instance_with_pairs_is_pickled() -> None:
    """Pairs in the class are no part of the instance."""
    assert pickle.loads(pickle.dumps(Desk("fx"))) == Desk("fx")  # noqa: S301


def test_a_pipe_with_pairs_is_pickled() -> None:
    """A pipe is pickled with the references to its pairs."""
    pipe = fetch | limited
    made = pickle.loads(pickle.dumps(pipe))  # noqa: S301

    assert made.first is fetch
    assert made.invoke("EUR") == "limited sync EUR"


def test_a_local_pair_is_not_pickled() -> None:
    """The error says where a pair must stand."""

    @dual
    def local(query: str) -> str:
        return query

    with pytest.raises(pickle.PicklingError, match=r"local .* no module .* holds it under a name; assign it to one at"):
        pickle.dumps(local)


def test_a_name_that_holds_another_pair_by_now_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of a loop, at the top of a module, holds one after the other."""
    first, second = (dual(functools.partial(html.escape), name=f"turn_{number}") for number in range(2))
    monkeypatch.setitem(globals(), "each_in_turn", first)
    pickled = pickle.dumps(first)
    assert pickle.loads(pickled) is first  # noqa: S301
    monkeypatch.setitem(globals(), "each_in_turn", second)

    with pytest.raises(pickle.UnpicklingError, match=r"each_in_turn was the pair turn_0 .* <Dual turn_1 .* here"):
        pickle.loads(pickled)  # noqa: S301
    assert pickle.loads(pickle.dumps(second)) is second  # noqa: S301


def test_a_pair_that_the_program_alone_holds_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of another process may be another one, or may not have come so far."""
    pair = dual(functools.partial(html.escape), name="of_the_program")
    monkeypatch.setattr(sys.modules["__main__"], "of_the_program", pair, raising=False)

    with pytest.raises(pickle.PicklingError, match="no module that others can import holds it"):
        pickle.dumps(pair)


def test_a_lazy_module_is_not_imported_to_find_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attributes are not asked for."""

    class Lazy(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            raise ImportError("it is not installed")

    monkeypatch.setitem(sys.modules, "aaa_lazy", Lazy("aaa_lazy"))
    monkeypatch.setattr(of_elsewhere, "_place", None)

    assert pickle.loads(pickle.dumps(of_elsewhere)) is of_elsewhere  # noqa: S301


def test_a_pair_works_in_another_process() -> None:
    """A pair, a bound pair and a pair's method are sent to a pool of processes and run there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(process, "EUR").result()
        by_invoke = pool.submit(fetch.invoke, "EUR").result()
        by_bound = pool.submit(Desk("fx").fetch, "EUR").result()
        by_bound_of_another = pool.submit(Branch("fx").plain_limited, "EUR").result()
        by_partial = pool.submit(of_partial, "EUR & USD").result()
        again = pool.submit(process.invoke, "EUR").result()

    assert there == again != os.getpid()
    assert [by_invoke, by_bound, by_bound_of_another] == ["sync EUR", "fx EUR", "fx EUR"]
    assert by_partial == "EUR &amp; USD"


async def test_an_executor_of_processes_runs_a_bridged_side() -> None:
    """A sync side leaves the process by `bridge=`, and the pair is still one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pair = dual(process.func, bridge=pool, name="elsewhere")

        assert await pair.ainvoke("EUR") != os.getpid()
        assert pair.invoke("EUR") == os.getpid()


async def test_a_partial_of_a_pair_calls_it() -> None:
    """`functools.partial` of a pair, of `call` and of `acall` fill in arguments."""

    @dual
    def convert(amount: float, rate: float) -> float:
        return amount * rate

    assert functools.partial(convert, 2)(3) == 6
    assert functools.partial(convert.call, rate=2)(3) == 6
    assert await functools.partial(convert.acall, 2)(3) == 6
    assert str(inspect.signature(functools.partial(convert, 2))) == "(rate: float) -> float"


# --- copies ---


def local_pair() -> Any:
    """Return a decorated pair that no module holds."""

    @concurrency(limit=2)
    @dual
    def local(query: str) -> str:
        return query

    return local


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_decorated_pair_is_copied_as_a_function_is(copied: Callable[[Any], Any]) -> None:
    """It is itself, whether a module holds it or not, in a pipe as well."""
    pair = local_pair()

    assert copied(pair) is pair
    assert copy.deepcopy(pair | RunnableLambda(str)).invoke("x") == "x"
    assert asdict(Holder(pair)) == {"pair": pair}


class Agent:
    """What makes pairs of its own methods, by whatever makes one."""

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name = name
        self.think = make(self._think)
        self.pipe = self.think | make(functools.partial(self._say, times=2))
        self.both = make(self._think)
        self.both.async_(self._athink)

    def _think(self, query: str) -> str:
        return f"{self.name} {query}"

    async def _athink(self, query: str) -> str:
        return f"async {self.name} {query}"

    def _say(self, query: str, times: int) -> str:
        return f"{self.name}: {query}" * times


MAKERS: dict[str, Callable[..., Any]] = {
    "drop-in": Dual,
    "decorated": dual,
    "limited": lambda fn: concurrency(limit=2)(dual(fn)),
    "limited drop-in": lambda fn: concurrency(limit=2)(Dual(fn)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
async def test_a_deep_copy_of_an_object_has_pairs_of_its_own_methods(make: Callable[..., Any]) -> None:
    """As it has bound methods of its own; on both paths, in a pipe, and the original keeps its own."""
    ann = Agent("ann", make)
    assert ann.think.deps == []
    bob = copy.deepcopy(ann)
    bob.name = "bob"

    for agent in (ann, bob):
        name = agent.name
        assert agent.think("x") == agent.think.invoke("x") == await agent.think.ainvoke("x") == f"{name} x"
        assert agent.pipe.invoke("x") == await agent.pipe.ainvoke("x") == f"{name}: {name} x" * 2
        assert (agent.both.invoke("x"), await agent.both.ainvoke("x")) == (f"{name} x", f"async {name} x")
        assert agent.think.__wrapped__.__self__ is agent.think.func.__self__ is agent
    assert bob.think.limiter is ann.think.limiter


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_deep_copy_of_a_pair_of_a_method_is_the_one_that_its_instance_has(make: Callable[..., Any]) -> None:
    """They are copied together, whichever is copied."""
    ann = Agent("ann", make)
    made = copy.deepcopy(ann.think)

    assert made.func.__self__ is not ann
    assert made.func.__self__.think is made


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_copy_of_an_object_shares_its_pairs(make: Callable[..., Any]) -> None:
    """As it shares all else that it has, bound methods too."""
    ann = Agent("ann", make)

    assert copy.copy(ann).think is ann.think
    assert copy.copy(ann.think).func.__self__ is ann


def test_a_deep_copy_of_a_faked_pair_of_a_method_has_no_fake() -> None:
    """The fake goes with its `with` block, which knows nothing of the copy."""
    ann = Agent("ann", dual)
    with registry.override(ann.think, lambda query: f"fake {query}"):
        bob = copy.deepcopy(ann)

    assert bob.think.invoke("x") == ann.think.invoke("x") == "ann x"


async def test_a_deep_copy_of_a_pair_of_a_method_keeps_an_invoke_of_its_own() -> None:
    """One that a test has put there."""
    ann = Agent("ann", dual)
    ann.think.invoke = lambda query, config=None: "replaced"
    bob = copy.deepcopy(ann)

    assert bob.think.invoke("x") == "replaced"
    assert bob.think.batch(["x"]) == ["replaced"]
    assert await bob.think.ainvoke("x") == "ann x"


def test_a_pair_of_a_method_of_a_class_is_copied_without_the_class() -> None:
    """A class is what it is, wherever it is."""
    pair = dual(Desk.of_class.func, name="of_class")

    assert copy.deepcopy(pair).func == Desk.of_class.func


@dataclass
class Holder:
    """A dataclass that has a pair."""

    pair: Any


class Named(Dual[Any, Any]):
    """A kind of pair of somebody's own."""


def upper(query: str) -> str:
    """Return a text in capitals."""
    return query.upper()


async def aupper(query: str) -> str:
    """Return a text in capitals, by the loop."""
    return f"async {query.upper()}"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
async def test_a_copy_of_a_drop_in_has_all_that_it_has(copied: Callable[[Any], Any]) -> None:
    """Its class, its name, both sides, the limit; what is done to the one later is not done to the other."""
    pair: Any = concurrency(limit=2)(Named(upper))
    pair.async_(aupper)
    pair.name = "renamed"
    made = copied(pair)
    pair.name = "again"

    assert (type(made), made.name, made.limiter) == (Named, "renamed", pair.limiter)
    assert made.invoke("x") == "X"
    assert await made.ainvoke("x") == "async X"


def test_a_copy_of_a_faked_drop_in_has_no_fake() -> None:
    """The fake goes with its `with` block, which knows nothing of the copy."""
    pair: Any = Dual(upper)
    with registry.override(pair, lambda query: f"fake {query}"):
        made = copy.copy(pair)

    assert made.invoke("x") == pair.invoke("x") == "X"


async def test_a_drop_in_is_pickled_with_its_class_both_sides_and_name() -> None:
    """A side that was written later, too."""
    pair: Any = Named(upper)
    pair.async_(aupper)
    pair.name = "renamed"
    made = pickle.loads(pickle.dumps(pair))  # noqa: S301  (our own)

    assert (type(made), made.name) == (Named, "renamed")
    assert (made.invoke("x"), await made.ainvoke("x")) == ("X", "async X")


class Tagged(Dual[Any, Any]):
    """A kind of pair that is made in another way, and has more to it."""

    def __init__(self, tag: str) -> None:
        super().__init__(upper, aupper)
        self.tag = tag


def _pickled(pair: object) -> Any:
    return pickle.loads(pickle.dumps(pair))  # noqa: S301  (our own)


@pytest.mark.parametrize("copied", [copy.copy, _pickled])
async def test_a_kind_of_drop_in_keeps_what_it_has(copied: Callable[[Any], Any]) -> None:
    """However it is made: as of any object, its attributes go with it."""
    pair = Tagged("blue")
    assert pair.deps == []
    made = copied(pair)

    assert (made.tag, made.invoke("x"), await made.ainvoke("x")) == ("blue", "X", "async X")


def test_a_drop_in_with_a_limit_is_not_pickled_without_it() -> None:
    """The message says what to write."""
    with pytest.raises(pickle.PicklingError, match="has a limit, which holds in one process"):
        pickle.dumps(concurrency(limit=2)(Dual(str.upper)))
