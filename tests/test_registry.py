"""The registry: every decorated pair by name, its record, and what happens when a module is loaded again."""

import functools
import gc
import importlib
import linecache
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asyncify import Dual, Limiter, NameTakenError, PairNotFoundError, Registry, concurrency, dual, registry


@dual
def quote(query: str) -> str:
    """Return a quote."""
    return f"sync {query}"


@concurrency(limit=3)
async def news(query: str, count: int = 1) -> str:
    """Return the news."""
    return f"async {query} {count}"


def test_a_record_tells_what_a_pair_is() -> None:
    """A record holds name, sides, signature, limiter, module, line and the pair."""
    record = registry[f"{__name__}.news"]

    assert (record.name, record.module) == (f"{__name__}.news", __name__)
    assert (record.sync, record.async_) == ("bridged", "native")
    assert str(record.signature) == "(query: str, count: int = 1) -> str"
    assert record.line == news.afunc.__code__.co_firstlineno
    assert isinstance(record.limiter, Limiter)
    assert record.pair is news


def test_a_record_is_frozen() -> None:
    """What the registry knows can't be changed by a reader."""
    with pytest.raises(AttributeError):
        registry["news"].line = 3  # type: ignore[misc]


def test_a_missing_side_is_recorded_as_missing() -> None:
    """Where a bridge is forbidden, a side is missing."""
    pair = dual(lambda query: query, bridge="error", name="no_bridge")

    assert registry["no_bridge"].pair is pair
    assert (registry["no_bridge"].sync, registry["no_bridge"].async_) == ("native", "missing")


def test_a_short_name_finds_a_pair() -> None:
    """The end of a full name is enough, from a dot on."""
    assert registry["news"].pair is news
    assert "news" in registry
    assert "ews" not in registry
    assert 3 not in registry


def test_the_registry_iterates_by_name() -> None:
    """Records come in the order of their names, and there are as many as `len` says."""
    names = [record.name for record in registry]

    assert {f"{__name__}.news", f"{__name__}.quote"} <= set(names)
    assert names == sorted(names)
    assert len(names) == len(registry)
    assert repr(registry) == f"<Registry of {len(registry)} pairs>"


def test_a_pair_made_by_hand_is_not_registered() -> None:
    """`Dual(...)` registers nothing."""
    before = len(registry)
    pair: Dual[Any, Any] = Dual(lambda query: query)

    assert len(registry) == before
    assert all(record.pair is not pair for record in registry)


def test_a_pair_that_nobody_holds_is_forgotten() -> None:
    """The registry keeps no pair alive, and nothing of it."""
    own = Registry()
    for number in range(10):
        own._add(Dual[Any, Any](lambda query: query), quote.func, f"pair_{number}")
    gc.collect()
    own._add(quote, quote.func)

    assert [record.name for record in own] == [f"{__name__}.quote"]
    assert set(own._origins) == {f"{__name__}.quote"}


def test_functions_without_a_name_get_a_number() -> None:
    """Lambdas and partials do not take each other's place."""
    lambdas = [dual(lambda query: query), dual(lambda query: query)]
    partials = [dual(functools.partial(quote.func)), dual(functools.partial(quote.func))]
    names = [record.name for pair in (*lambdas, *partials) for record in registry if record.pair is pair]

    prefix = f"{__name__}.test_functions_without_a_name_get_a_number.<locals>.<lambda>"
    assert names == [prefix, f"{prefix}#2", f"{__name__}.quote#2", f"{__name__}.quote#3"]


def test_functions_that_a_decorator_gives_one_name_get_a_number() -> None:
    """Without `functools.wraps` all of them are called `wrapper`; the same one, made again, keeps its place."""

    def decorate(fn: Any) -> Any:
        def wrapper(query: str) -> Any:
            return fn(query)

        return wrapper

    def bid(query: str) -> None: ...

    def ask(query: str) -> None: ...

    pairs = [dual(decorate(bid)), dual(decorate(ask))]
    again = dual(decorate(bid))
    name = f"{__name__}.{again.__qualname__}"

    assert [registry[name].pair, registry[f"{name}#2"].pair] == [again, pairs[1]]


def test_two_pairs_of_one_function_are_both_known() -> None:
    """A second pair of the same function gets a number; the first keeps its name."""

    async def one(query: str) -> str:
        return "one"

    async def two(query: str) -> str:
        return "two"

    def fetch(query: str) -> str:
        return query

    first, second = dual(sync=fetch, async_=one), dual(sync=fetch, async_=two)

    name = f"{__name__}.{fetch.__qualname__}"
    assert registry[name].pair is first
    assert registry[f"{name}#2"].pair is second


def test_a_stub_leaves_the_first_pair_of_the_function_alone() -> None:
    """Decorating a stub over a function that another pair uses takes nothing from that pair."""

    async def one(query: str) -> str:
        return "one"

    def fetch(query: str) -> str:
        return query

    first = dual(sync=fetch, async_=one)

    @dual(sync=fetch, async_=one)
    def other(query: str) -> Any:
        """Fetch."""

    assert registry[f"{__name__}.{fetch.__qualname__}"].pair is first
    assert registry[other.__qualname__].pair is other
    assert f"{fetch.__qualname__}#2" not in registry


def test_a_stub_may_have_the_name_of_the_sync_side() -> None:
    """A stub called as the function that it stands for keeps the registration."""

    async def one(query: str) -> str:
        return "one"

    def fetch(query: str) -> str:
        return query

    pair = dual(sync=fetch, async_=one)

    def stub(query: str) -> None: ...

    stub.__qualname__ = fetch.__qualname__
    pair(stub)  # type: ignore[arg-type]  # a stub that promises nothing

    assert registry[fetch.__qualname__].pair is pair


def test_a_limited_function_gives_its_place_to_the_pair_made_of_it() -> None:
    """`@dual(name=...)` over `@concurrency` leaves no second registration."""

    @concurrency(limit=1)
    def fetch(query: str) -> str:
        return query

    pair = dual(fetch, name="fetch_by_name")

    assert registry["fetch_by_name"].pair is pair
    assert fetch.__qualname__ not in registry


def test_a_limited_lambda_gives_its_place_to_the_pair_made_of_it() -> None:
    """The pair has the name that the lambda had, and no number."""
    pair = dual(concurrency(limit=1)(lambda query: query))

    names = [record.name for record in registry if record.pair is pair]
    assert names == [f"{__name__}.{pair.__qualname__}"]


def test_a_name_given_to_two_functions_is_refused() -> None:
    """Functions without a name of their own get no number where a name is given."""
    pair = dual(lambda query: query, name="given_twice")

    with pytest.raises(NameTakenError, match="is taken by "):
        dual(lambda query: f"{query}!", name="given_twice")
    assert registry["given_twice"].pair is pair


def test_a_callable_object_is_named_by_its_class() -> None:
    """An object has the name of its class."""

    class Fetcher:
        def __call__(self, query: str) -> str:
            return query

    pair = dual(Fetcher())

    record = registry[f"{__name__}.{Fetcher.__qualname__}"]
    assert record.pair is pair
    assert record.line == Fetcher.__call__.__code__.co_firstlineno


def test_the_method_of_a_builtin_is_named_by_its_type() -> None:
    """It has no module of its own; nothing tells two of them apart, so the newest has the name."""
    pairs = [dual("EUR {}".format), dual("USD {}".format)]

    record = registry["builtins.str.format"]
    assert record.pair is pairs[1]
    assert (record.module, record.line) == ("builtins", None)


def test_a_sum_of_threads_registers_all() -> None:
    """Registering, listing and looking up at once lose nothing and disturb nobody."""
    own = Registry()
    pairs: list[Dual[Any, Any]] = [Dual(lambda query: query) for _ in range(400)]
    start = threading.Barrier(5)
    failures: list[BaseException] = []

    def register(part: int) -> None:
        start.wait()
        for number in range(part, 400, 4):
            own._add(pairs[number], quote.func, f"pair_{number}")

    def read() -> None:
        start.wait()
        try:
            while len(list(own)) < 400:
                assert "nothing" not in own
        except BaseException as error:  # noqa: BLE001  (it is what the test looks for)
            failures.append(error)

    threads = [*(threading.Thread(target=register, args=(part,)) for part in range(4)), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert len(own) == 400


# --- the same function, loaded again ---

SOURCE = """
from asyncify import dual

@dual
def fetch(query):
    return "first"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with one pair, in a file that a test may edit."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "reloaded_quotes.py").write_text(SOURCE)
    importlib.invalidate_caches()
    module = importlib.import_module("reloaded_quotes")
    yield module
    del sys.modules["reloaded_quotes"]


def _rewrite(module: ModuleType, source: str) -> None:
    assert module.__file__ is not None
    Path(module.__file__).write_text(source)
    linecache.checkcache()
    importlib.invalidate_caches()
    importlib.reload(module)


def test_a_reloaded_module_takes_its_own_place(module: ModuleType) -> None:
    """`importlib.reload` registers the new pair under the old name."""
    old = module.fetch
    importlib.reload(module)

    assert module.fetch is not old
    assert registry["reloaded_quotes.fetch"].pair is module.fetch


def test_a_module_edited_and_reloaded_takes_its_own_place(module: ModuleType) -> None:
    """That an edit has moved the function to another line makes no difference."""
    old = module.fetch
    _rewrite(module, SOURCE.replace("@dual", "# a\n# comment\n\n@dual").replace("first", "second"))

    assert old.invoke("EUR") == "first"
    assert registry["reloaded_quotes.fetch"].pair.invoke("EUR") == "second"
    assert registry["reloaded_quotes.fetch"].line == 7


def test_a_module_that_defines_a_name_twice_is_refused(module: ModuleType) -> None:
    """Two functions of one name in one run of a module are different functions."""
    with pytest.raises(NameTakenError, match=r"reloaded_quotes.fetch is taken by .*reloaded_quotes.py:4.*py:7"):
        _rewrite(module, SOURCE + SOURCE.split("\n\n")[1])


def test_a_function_called_after_a_reload_takes_its_own_place(module: ModuleType) -> None:
    """A module that makes a pair in a call makes it again after an edit has moved the line."""
    source = "from asyncify import dual\n\ndef make():\n    @dual\n    def made(query): ...\n    return made\n"
    _rewrite(module, source)
    old = module.make()
    _rewrite(module, "\n" + source)
    pair = module.make()

    assert pair is not old
    assert registry["reloaded_quotes.make.<locals>.made"].pair is pair


def test_a_function_called_later_that_defines_a_name_again_is_refused(module: ModuleType) -> None:
    """It is another function than the one that the run of the module has defined."""
    _rewrite(module, SOURCE + "\ndef again():\n    global fetch\n    @dual\n    def fetch(query): ...\n")

    with pytest.raises(NameTakenError, match=r"reloaded_quotes\.fetch is taken by "):
        module.again()


def _run_cell(source: str, cell: str, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a notebook's cell: the module is `__main__`-like, and the file is named after the content."""
    if namespace is None:
        namespace = {"__name__": "notebook_main"}
    exec(compile(source, f"<ipython-input-{cell}>", "exec"), namespace)  # noqa: S102  (that is what a notebook does)
    return namespace


def test_a_cell_that_is_run_again_takes_its_own_place() -> None:
    """The same cell, and the cell after an edit, replace what they registered."""
    first = _run_cell(SOURCE, "1-aa")
    again = _run_cell(SOURCE, "1-aa")
    assert registry["notebook_main.fetch"].pair is again["fetch"]

    edited = _run_cell("\n\n" + SOURCE, "2-bb")
    assert registry["notebook_main.fetch"].pair is edited["fetch"]
    assert first["fetch"].invoke("EUR") == "first"


def test_a_cell_that_gives_a_name_to_another_function_is_refused() -> None:
    """A function of another name is no new version, in whichever cell it is."""
    source = "from asyncify import dual\ndef {0}(query): ...\n{0} = dual({0}, name='given_in_cells')\n"
    namespace = _run_cell(source.format("one"), "3-aa")

    with pytest.raises(NameTakenError, match=r"notebook_main\.given_in_cells is taken by "):
        _run_cell(source.format("two"), "4-aa")
    assert registry["given_in_cells"].pair is namespace["one"]


def test_a_function_called_in_and_out_of_cells_takes_its_own_place() -> None:
    """A cell's function may be called by a thread, and by a cell; an edited cell replaces what the former has made."""
    source = "from asyncify import dual\ndef make():\n    @dual\n    def made(query): ...\n    return made\n"
    namespace = _run_cell(source, "5-aa")
    name, pairs = "notebook_main.make.<locals>.made", [namespace["make"]()]
    _run_cell("made = make()", "6-aa", namespace)
    assert registry[name].pair is namespace["made"]

    pairs.append(_run_cell("\n" + source, "7-aa")["make"]())
    pairs.append(_run_cell("\n\n" + source, "8-aa")["make"]())
    assert registry[name].pair is pairs[-1]


def test_a_script_that_is_edited_and_run_again_takes_its_own_place(tmp_path: Path) -> None:
    """An IDE or a server runs it in one process, as one module and one file: the run tells them apart."""
    script = tmp_path / "script.py"
    runs: list[dict[str, Any]] = []
    for source in (SOURCE, SOURCE, "import os\n\n" + SOURCE):
        script.write_text(source)
        runs.append(runpy.run_path(str(script), run_name="run_again"))
        assert registry["run_again.fetch"].pair is runs[-1]["fetch"]

    script.write_text(SOURCE + SOURCE.split("\n\n")[1])
    with pytest.raises(NameTakenError):
        runpy.run_path(str(script), run_name="run_again")


def test_a_function_made_again_and_again_takes_its_own_place() -> None:
    """A factory's pairs share a line: the newest has the name."""

    def make(result: str) -> Any:
        @dual
        def made(query: str) -> str:
            return result

        return made

    pairs = [make("one"), make("two")]

    assert registry[pairs[0].__qualname__].pair is pairs[1]


def test_an_unknown_name_is_a_key_error() -> None:
    """The error is a `KeyError` too, and shows its message as it is."""
    with pytest.raises(KeyError) as caught:
        registry["newss"]
    assert isinstance(caught.value, PairNotFoundError)
    assert str(caught.value).startswith("no pair is called 'newss'; did you mean ")


@pytest.mark.parametrize("name", [3, None, Dual(len)], ids=repr)
def test_what_is_no_name_is_told(name: Any) -> None:
    """A pair above all, which a registry is not asked for by itself."""
    with pytest.raises(TypeError, match=r"^a pair is found by its name, a string, and not by "):
        registry[name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
def test_a_forked_child_finds_the_registry_free() -> None:
    """Whatever another thread was in the middle of: the fork waits for that."""
    is_held = threading.Event()

    def change() -> None:
        with registry._lock:
            is_held.set()
            time.sleep(0.1)

    thread = threading.Thread(target=change)
    thread.start()
    is_held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # which ends it
        os._exit("nobody" in registry)
    _, status = os.waitpid(child, 0)
    thread.join()

    assert os.waitstatus_to_exitcode(status) == 0
