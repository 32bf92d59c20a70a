"""`dual_patch`: functions of somebody else's module become pairs where they stand, and are put back."""

import builtins
import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import wrapt
from langchain_core.runnables import RunnableLambda

from asyncify import Dual, PairError, concurrency, dual_patch, registry
from asyncify.traps import MANY_BRIDGED
from tests.waiting import SAFETY_NET

SOURCE = '''
import asyncio
import functools


def fetch(query):
    """Fetch one quote."""
    return f"sync {query}"


async def afetch(query):
    return f"async {query}"


@functools.wraps(afetch)
def handed_on(query):
    return afetch(query)


def other(text):
    return text


class Client:
    def fetch(self, query):
        return f"sync client {query}"

    def handed_on(self, query) -> "asyncio.Future":
        return afetch(query)

    @classmethod
    def of_class(cls, query):
        return f"sync {cls.__name__} {query}"

    @staticmethod
    def of_none(query):
        return f"sync {query}"


class Child(Client):
    pass
'''


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that nobody has imported yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"foreign_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def module(foreign: str) -> ModuleType:
    """The module, imported."""
    return importlib.import_module(foreign)


async def _afetch(query: str) -> str:
    return f"patched {query}"


async def _amethod(self: Any, query: str) -> str:
    return f"patched {type(self).__name__} {query}"


async def _aclass(cls: Any, query: str) -> str:
    return f"patched {cls.__name__} {query}"


async def test_a_function_becomes_a_pair_where_it_stands(module: ModuleType) -> None:
    """Who looks it up finds a pair with both sides, under its own name."""
    with dual_patch(f"{module.__name__}:fetch", async_=_afetch) as patch:
        found: Any = module.fetch

        assert [found("EUR"), await found.ainvoke("EUR")] == ["sync EUR", "patched EUR"]
        assert found.__doc__ == "Fetch one quote."
        assert registry[f"{module.__name__}.fetch"].pair is patch.pair
        assert repr(patch) == f"<Patch {module.__name__}:fetch applied>"
        assert found is patch.pair


def test_undo_puts_the_function_back(module: ModuleType) -> None:
    """The very function is back, and the registry has forgotten the pair, and no other."""
    original = module.fetch
    patch = dual_patch(f"{module.__name__}:fetch", async_=_afetch)
    pair = patch.pair
    with dual_patch(f"{module.__name__}:other") as other:
        patch.undo()

        assert registry[f"{module.__name__}.other"].pair is other.pair

    assert module.fetch is original
    assert isinstance(pair, Dual)
    assert f"{module.__name__}.fetch" not in registry
    assert repr(patch).endswith(":fetch undone>")


def test_a_patch_can_be_done_again_after_it_was_undone(module: ModuleType) -> None:
    """The second pair has the name of the first."""
    patches = []
    for _ in range(2):
        patches.append(dual_patch(f"{module.__name__}:fetch", async_=_afetch))
        patches[-1].undo()
    with dual_patch(f"{module.__name__}:fetch", async_=_afetch) as patch:
        assert registry[f"{module.__name__}.fetch"].pair is patch.pair


async def test_an_async_function_gets_a_sync_side(module: ModuleType) -> None:
    """`sync=` is for an async function."""
    with dual_patch(f"{module.__name__}:afetch", sync=lambda query: f"patched {query}"):
        assert module.afetch.invoke("EUR") == "patched EUR"
        assert await module.afetch("EUR") == "async EUR"


async def test_a_patch_without_a_side_is_bridged_and_may_be_limited(module: ModuleType) -> None:
    """A function may be patched only to be a runnable, or to get a limit."""
    with dual_patch(f"{module.__name__}:fetch") as patch:
        pair: Any = patch.pair
        concurrency(limit=1)(pair)

        assert await module.fetch.ainvoke("EUR") == "sync EUR"
        assert repr(module.fetch) == "<Dual fetch sync (async bridged) 0/1 in flight, 0 waiting>"


async def test_a_patch_may_be_silent(module: ModuleType) -> None:
    """Whoever patches somebody else's function may know of the traps already."""
    with dual_patch(f"{module.__name__}:fetch", warn=False) as patch:
        pair: Any = patch.pair

        assert await pair.abatch(["EUR"] * MANY_BRIDGED) == ["sync EUR"] * MANY_BRIDGED  # a warning is an error here


def test_a_patch_may_have_a_name_and_do_without_a_bridge(module: ModuleType) -> None:
    """Both are those of `dual`."""
    with dual_patch(f"{module.__name__}:fetch", name="patched_quotes", bridge="error") as patch:
        record = registry["patched_quotes"]

        assert record.pair is patch.pair
        assert (record.sync, record.async_) == ("native", "missing")
        assert patch.pair.get_name() == "patched_quotes"


async def test_methods_of_every_kind_are_patched(module: ModuleType) -> None:
    """A patched method binds as it did: to the instance, to the class, to nothing."""
    name = module.__name__
    with (
        dual_patch(f"{name}:Client.fetch", async_=_amethod),
        dual_patch(f"{name}:Client.of_class", async_=_aclass),
        dual_patch(f"{name}:Client.of_none", async_=_afetch),
    ):
        client, child = module.Client(), module.Child()

        assert [client.fetch("EUR"), await client.fetch.ainvoke("EUR")] == ["sync client EUR", "patched Client EUR"]
        assert await child.fetch.ainvoke("EUR") == "patched Child EUR"
        assert [child.of_class("EUR"), await child.of_class.ainvoke("EUR")] == ["sync Child EUR", "patched Child EUR"]
        assert [client.of_none("EUR"), await module.Client.of_none.ainvoke("EUR")] == ["sync EUR", "patched EUR"]
    assert isinstance(vars(module.Client)["of_class"], classmethod)
    assert isinstance(vars(module.Client)["of_none"], staticmethod)
    assert client.of_class("EUR") == "sync Client EUR"


async def test_a_def_that_is_awaited_is_patched_as_either_side(module: ModuleType) -> None:
    """A client's own `def` gets a sync side, and a sync function gets one as its async side."""
    name, handed_on = module.__name__, module.handed_on
    with (
        dual_patch(f"{name}:handed_on", sync=lambda query: f"patched {query}"),
        dual_patch(f"{name}:Client.handed_on", sync=lambda self, query: f"patched {query}"),
        dual_patch(f"{name}:fetch", async_=handed_on),
    ):
        for pair in (module.handed_on, module.Client().handed_on):
            assert [await pair("EUR"), await pair.ainvoke("EUR")] == ["async EUR", "async EUR"]
            assert pair.invoke("EUR") == "patched EUR"
        assert [module.fetch("EUR"), await module.fetch.ainvoke("EUR")] == ["sync EUR", "async EUR"]


async def test_a_method_that_others_have_decorated_sees_its_instance(module: ModuleType) -> None:
    """An instrumentation that was there first, by `wrapt`, is told whom the method is called on."""
    seen: list[object] = []

    def note(wrapped: Any, instance: object, args: Any, kwargs: Any) -> Any:
        seen.append(instance)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "Client.fetch", note)
    with dual_patch(f"{module.__name__}:Client.fetch", async_=_amethod):
        client = module.Client()

        assert [client.fetch("EUR"), await client.fetch.ainvoke("EUR")] == ["sync client EUR", "patched Client EUR"]
    assert seen == [client]


async def test_a_function_that_others_have_decorated_has_no_instance(module: ModuleType) -> None:
    """Its first argument is an argument."""
    seen: list[object] = []

    def note(wrapped: Any, instance: object, args: Any, kwargs: Any) -> Any:
        seen.append((instance, args))
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "fetch", note)
    with dual_patch(f"{module.__name__}:fetch"):
        assert [module.fetch("EUR"), module.fetch.invoke("EUR")] == ["sync EUR", "sync EUR"]
        assert await module.fetch.ainvoke("EUR") == "sync EUR"
    assert seen == [(None, ("EUR",))] * 3


def test_an_inherited_method_is_patched_in_the_subclass_alone(module: ModuleType) -> None:
    """The parent's method stays a method, and undoing leaves nothing in the subclass."""
    with dual_patch(f"{module.__name__}:Child.fetch", async_=_amethod):
        assert isinstance(module.Child().fetch, Dual)
        assert not isinstance(module.Client().fetch, Dual)

    assert "fetch" not in vars(module.Child)


def test_a_module_is_patched_when_it_is_imported(foreign: str) -> None:
    """A patch waits for a module that is not imported yet, and does not import it."""
    with dual_patch(f"{foreign}:fetch", async_=_afetch) as patch:
        assert foreign not in sys.modules
        assert repr(patch) == f"<Patch {foreign}:fetch waits for the import>"
        module = importlib.import_module(foreign)

        assert module.fetch is patch.pair
    assert not isinstance(module.fetch, Dual)


def test_a_patch_waits_for_another_thread_that_imports_the_module(foreign: str, tmp_path: Path) -> None:
    """It is there already, and what is to be patched is not."""
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(SAFETY_NET)

    vars(builtins)["_hold_import"] = hold
    (tmp_path / f"{foreign}.py").write_text(f"_hold_import()\n{SOURCE}")
    try:
        with ThreadPoolExecutor(2) as threads:
            importing = threads.submit(importlib.import_module, foreign)
            assert begun.wait(SAFETY_NET)
            patching = threads.submit(dual_patch, f"{foreign}:fetch", async_=_afetch)
            assert not wait([patching], timeout=0.05).done
            go_on.set()
            module, patch = importing.result(SAFETY_NET), patching.result(SAFETY_NET)
    finally:
        del vars(builtins)["_hold_import"]

    assert module.fetch is patch.pair
    patch.undo()


def test_a_patch_undone_before_the_import_leaves_the_module_alone(foreign: str) -> None:
    """Undoing a patch that still waits calls it off."""
    dual_patch(f"{foreign}:fetch", async_=_afetch).undo()

    assert not isinstance(importlib.import_module(foreign).fetch, Dual)


def test_a_second_patch_that_would_wait_is_refused(foreign: str) -> None:
    """It is told at once, and not by the import; when the first is undone the target is free again."""
    target = f"{foreign}:fetch"
    first = dual_patch(target, async_=_afetch)
    with pytest.raises(PairError, match=f"{target} is to be patched already, when {foreign} is imported"):
        dual_patch(target, async_=_afetch)
    first.undo()
    with dual_patch(target, async_=_afetch) as patch:
        assert importlib.import_module(foreign).fetch is patch.pair


def test_a_patch_that_does_not_fit_is_raised_by_the_import(foreign: str) -> None:
    """What can only be checked when the module is there is told there."""
    patch = dual_patch(f"{foreign}:nothing", async_=_afetch)

    with pytest.raises(PairError, match=f"there is no {foreign}:nothing"):
        importlib.import_module(foreign)
    assert repr(patch).endswith(":nothing undone>")
    assert foreign not in sys.modules


def test_patches_beside_one_that_does_not_fit_wait_for_the_next_import(foreign: str) -> None:
    """The import that fails leaves none of them behind; the next one has all but the one that does not fit."""
    with (
        dual_patch(f"{foreign}:fetch", async_=_afetch) as before,
        dual_patch("httpx:Client.get") as elsewhere,
        dual_patch(f"{foreign}:nothing", async_=_afetch),
        dual_patch(f"{foreign}:Client.fetch", async_=_amethod) as after,
    ):
        with pytest.raises(PairError, match=f"there is no {foreign}:nothing"):
            importlib.import_module(foreign)
        assert [str(patch).partition(" ")[2] for patch in (before, after)] == [
            f"{foreign}:fetch waits for the import>",
            f"{foreign}:Client.fetch waits for the import>",
        ]
        assert f"{foreign}.fetch" not in registry
        assert elsewhere.pair is not None
        module = importlib.import_module(foreign)

        assert module.fetch is before.pair
        assert module.Client().fetch("EUR") == "sync client EUR"
        assert isinstance(module.Client.fetch, Dual)
    assert not isinstance(module.fetch, Dual)
    assert not isinstance(module.Client.fetch, Dual)


def test_a_patch_of_what_outlives_a_failed_import_is_put_back(foreign: str, tmp_path: Path) -> None:
    """A class that the module has from elsewhere is as it was; a patch undone meanwhile is applied by no import."""
    (tmp_path / f"{foreign}.py").write_text("from httpx import Client\n")
    original = httpx.Client.get
    patch = dual_patch(f"{foreign}:Client.get")
    dual_patch(f"{foreign}:nothing")
    with pytest.raises(PairError, match=f"there is no {foreign}:nothing"):
        importlib.import_module(foreign)
    patch.undo()

    assert httpx.Client.get is original
    assert importlib.import_module(foreign).Client.get is original


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        pytest.param("fetch", {"async_": _afetch}, r"'.*fetch' is no path; write it as in 'package.mod", id="no colon"),
        pytest.param(":nothing", {"async_": _afetch}, r"there is no .*:nothing", id="no such function"),
        pytest.param(":Client.nothing", {}, r"there is no .*:Client.nothing", id="no such method"),
        pytest.param(
            ":other", {"async_": _afetch}, r"sync +\(text\).*\n +async +\(query: str\)", id="other parameters"
        ),
        pytest.param(":afetch", {"async_": _afetch}, r"afetch .* is async, so it can't be the sync", id="two async"),
        pytest.param(":fetch", {"async_": _afetch, "sync": len}, r"give the other one only", id="both sides"),
    ],
)
def test_a_bad_patch_is_refused(module: ModuleType, path: str, options: dict[str, Any], message: str) -> None:
    """The error says what is wrong, and the module is as it was."""
    before = dict(vars(module))

    with pytest.raises(PairError, match=message):
        dual_patch(f"{module.__name__}{path}", **options)
    assert dict(vars(module)) == before


def test_what_cant_be_replaced_is_left_alone() -> None:
    """A class written in C has no places for other methods; nothing is registered for it."""
    before = list(registry)

    with pytest.raises(
        PairError, match=r"dual_patch: datetime:datetime.now can't be replaced where it stands: .*immut"
    ) as refused:  # which keeps the pair that was made
        dual_patch("datetime:datetime.now")
    assert list(registry) == before
    assert refused.value.__cause__


def test_a_method_of_an_object_with_slots_is_left_alone(module: ModuleType) -> None:
    """It has no place for a method of its own."""

    class Slotted:
        __slots__ = ()
        fetch = module.Client.fetch

    vars(module)["client"] = Slotted()

    with pytest.raises(PairError, match=r":client.fetch can't be replaced where it stands: <.*Slotted.*> has slots"):
        dual_patch(f"{module.__name__}:client.fetch")


@pytest.mark.parametrize("target", [None, ":fetch", "foreign:"])
def test_a_target_is_a_path(target: Any) -> None:
    """Whatever else is given is refused by the same error."""
    with pytest.raises(PairError, match=rf"dual_patch: {target!r} is no path; write it as in"):
        dual_patch(target)


def test_a_patch_is_undone_of_a_module_that_was_reloaded(module: ModuleType) -> None:
    """The module has its own function again, and keeps it; of a class that was patched the old one gets its own."""
    client, before = module.Client, list(registry)
    patches = [dual_patch(f"{module.__name__}:{path}") for path in ("fetch", "Client.fetch")]
    importlib.reload(module)
    reloaded = module.fetch
    for patch in patches:
        patch.undo()

    assert module.fetch is reloaded
    assert client().fetch("EUR") == "sync client EUR"
    assert list(registry) == before
    with dual_patch(f"{module.__name__}:fetch") as again:
        assert module.fetch is again.pair


def test_a_second_patch_of_one_function_is_refused(module: ModuleType) -> None:
    """What is a pair already is not patched again."""
    target = f"{module.__name__}:fetch"
    with dual_patch(target, async_=_afetch) as patch:
        with pytest.raises(PairError, match=rf"{target} is a pair already \(<Dual fetch sync\+async>\); undo what"):
            dual_patch(target, async_=_afetch)

        assert module.fetch is patch.pair


def test_a_class_is_refused(module: ModuleType) -> None:
    """It would be none any more: `isinstance` and subclasses would break, far from here."""
    before = list(registry)
    with pytest.raises(PairError, match=rf"{module.__name__}:Client is a class; name one of its methods, as in "):
        dual_patch(f"{module.__name__}:Client")

    assert isinstance(module.Client, type)
    assert list(registry) == before


def test_undoing_twice_says_so(module: ModuleType) -> None:
    """A patch is undone once."""
    patch = dual_patch(f"{module.__name__}:fetch", async_=_afetch)
    patch.undo()

    with pytest.raises(PairError, match="is undone already"):
        patch.undo()


def test_undoing_in_the_wrong_order_says_so(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody else has put over the pair must go first; then the patch can be undone."""
    original = module.fetch
    patch = dual_patch(f"{module.__name__}:fetch", async_=_afetch)
    with monkeypatch.context() as over:
        over.setattr(module, "fetch", len)
        with pytest.raises(PairError, match=r":fetch is <built-in function len> by now, .*; undo that first"):
            patch.undo()
    patch.undo()

    assert module.fetch is original


async def test_httpx_has_one_client_for_both_paths() -> None:
    """A real package with a sync and an async client: `Client.get` gets the async client's way of doing it."""

    @functools.wraps(httpx.Client.get)
    async def aget(self: httpx.Client, url: str, **options: Any) -> httpx.Response:
        transport: Any = self._transport
        async with httpx.AsyncClient(transport=transport, base_url=self.base_url) as client:
            return await client.get(url, **options)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=str(request.url.path))

    with dual_patch("httpx:Client.get", async_=aget):
        client: Any = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://desk")
        pipe = client.get | RunnableLambda(lambda response: response.text)

        assert client.get("/rate").text == pipe.invoke("/rate") == "/rate"
        assert await pipe.ainvoke("/news") == "/news"
        assert await pipe.abatch(["/a", "/b"]) == ["/a", "/b"]
    assert not isinstance(httpx.Client.get, Dual)
