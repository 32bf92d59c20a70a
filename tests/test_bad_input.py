"""What bad input gets: a typed error that names the function and says what to write, and no trace left behind."""

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import asyncify
from asyncify import Dual, Limiter, NameTakenError, PairError, PairNotFoundError, registry

# A type checker would refuse most of what is given here.
dual: Any = asyncify.dual
concurrency: Any = asyncify.concurrency


def _fetch(query: str) -> str:
    return query


def _fetch_too(query: str) -> str:
    return query


async def _afetch(query: str) -> str:
    return query


async def _afetch_too(query: str) -> str:
    return query


async def _afetch_text(text: str) -> str:
    return text


async def _afetch_default(query: str = "EUR") -> str:
    return query


async def _afetch_keyword(*, query: str) -> str:
    return query


def _stream(query: str) -> Iterator[str]:
    yield query


async def _astream(query: str) -> AsyncIterator[str]:
    yield query


def _nothing() -> str:
    return ""


async def _anothing() -> str:
    return ""


def _config_alone(config: dict[str, str]) -> str:
    return ""


async def _injected_alone(config: dict[str, str], run_manager: object) -> str:
    return ""


class _Standing:
    """Pairs that are there before, so that a failed registration could disturb them."""

    pair: Dual[Any, Any] = dual(sync=_fetch, async_=_afetch)
    limited: Dual[Any, Any] = concurrency(limit=2)(_fetch_too)
    both: Dual[Any, Any] = concurrency(limit=2)(dual(sync=_fetch, async_=_afetch, name="both"))


def _shown() -> list[tuple[str, int, str]]:
    gc.collect()  # pairs of tests before, that nobody holds any more, are forgotten at a time of Python's choice
    return [(record.name, id(record.pair), repr(record.pair)) for record in registry]


_later: Any = Dual(_fetch)

_LIMIT_A_MODEL = (
    r"limit a model or a pipe as a whole: "
    r'concurrency\(limit=10\)\(dual\(sync=model.stream, async_=model.astream, name="llm"\)\)$'
)

BAD_PAIRS: list[tuple[str, Callable[[], object], str]] = [
    ("two sync functions", lambda: dual(sync=_fetch, async_=_fetch_too), r"_fetch_too .* is not async, so it can't"),
    ("two async functions", lambda: dual(sync=_afetch, async_=_afetch_too), r"_afetch .* is async, so it can't"),
    ("sync on sync", lambda: dual(sync=_fetch)(_fetch_too), r"@dual\(sync=...\): .*_fetch_too .* give it as sync="),
    ("async on async", lambda: dual(async_=_afetch)(_afetch_too), r"@dual\(async_=...\): .*_afetch_too .* as async_="),
    ("sides the wrong way round", lambda: dual(sync=_afetch, async_=_fetch), r"_afetch .* give it as async_="),
    ("a number", lambda: dual(3), r"@dual: expected a function, got 3"),
    ("a number as sync", lambda: dual(sync=3), r"sync=...\): expected a function, got 3"),
    ("a text as async", lambda: dual(async_="x"), r"expected a function, got 'x'"),
    ("a number decorated", lambda: dual(async_=_afetch)(3), r"expected a function, got 3"),
    ("another name", lambda: dual(sync=_fetch, async_=_afetch_text), r"sync +\(query: .*\n  async +\(text: "),
    ("another default", lambda: dual(sync=_fetch, async_=_afetch_default), r"async +\(query: str = 'EUR'\)"),
    ("another kind", lambda: dual(sync=_fetch, async_=_afetch_keyword), r"async +\(\*, query: str\)"),
    ("another signature, decorated", lambda: dual(async_=_afetch_text)(_fetch), r"make them the same"),
    ("a generator and a function", lambda: dual(sync=_stream, async_=_afetch), r"_stream .* is a generator and .*_afe"),
    ("a function and a generator", lambda: dual(sync=_fetch, async_=_astream), r"_astream .* is a generator and .*_f"),
    ("no parameter on one side", lambda: dual(sync=_fetch, async_=_anothing), r"\(query: .*\n  async +\(\) -> str"),
    ("no parameter, decorated", lambda: dual(async_=_afetch)(_nothing), r"make them the same"),
    (
        "no parameter but config",
        lambda: dual(_config_alone),
        r"_config_alone .* takes only config, which LangChain fills in, .*; rename config, .*\(query, config\)$",
    ),
    (
        "no parameter but config and run_manager",
        lambda: dual(_injected_alone),
        r"_injected_alone .* takes only config and run_manager, .* rename config, .*\(query, config, run_manager\)$",
    ),
    (
        "two functions without their names",
        lambda: dual(_fetch, _afetch),
        r"^dual: <function _afetch at .*> was given without a name; of two functions write dual\(sync=f, async_=af\)$",
    ),
    ("a function and sides", lambda: dual(_fetch, async_=_afetch), r"dual: give a function to decorate, or sync= and"),
    ("a bridge that is none", lambda: dual(_fetch, bridge="loop"), r"bridge='loop' is not a bridge; write"),
    ("an empty name", lambda: dual(_fetch, name=""), r"name='' is not a name; write name="),
    ("a name that is no text", lambda: dual(_fetch, name=3), r"name=3 is not a name"),
    (
        "an executor for an async function",
        lambda: dual(_afetch, bridge=ThreadPoolExecutor(1)),
        r"_afetch .* is async, and an executor can only run a sync side",
    ),
    ("a pair decorated by @dual(async_=...)", lambda: dual(async_=_afetch)(_Standing.both), r"with both sides already"),
    ("a pair decorated again", lambda: dual(_Standing.both), r"is a pair with both sides already"),
    (
        "a limit on each side",
        lambda: dual(sync=_Standing.limited, async_=concurrency(limit=1)(_afetch)),
        r"_fetch_too .* and .*_afetch .* have a limit each; put one @concurrency over the pair",
    ),
    (
        "a limit on a pipe",
        lambda: concurrency(limit=1)(Dual(_fetch) | str.upper),
        rf"(?s)@concurrency: expected a function, got .*; decorate the functions in it, or {_LIMIT_A_MODEL}",
    ),
    (
        "a pair of a pipe",
        lambda: dual(Dual(_fetch) | str.upper),
        rf"(?s)@dual: expected a function, .*{_LIMIT_A_MODEL}",
    ),
    (
        "a limit without brackets on a pipe",
        lambda: concurrency(Dual(_fetch) | str.upper),
        rf"(?s)@concurrency: .* is no function; .* or {_LIMIT_A_MODEL}",
    ),
    (
        "a sync function as the second side",
        lambda: Dual[Any, Any](_fetch).async_(_fetch_too),  # type: ignore[arg-type]
        r"side; write the async one; if it returns an awaitable, write async def get\(name\): return await client.get",
    ),
    ("a limit on a number", lambda: concurrency(limit=1)(3), r"@concurrency: expected a function, got 3"),
    ("a limit on config alone", lambda: concurrency(limit=1)(_config_alone), r"@concurrency: .*_config_alone .* only"),
    (
        "a second limit",
        lambda: concurrency(limit=1)(_Standing.both),
        r"_fetch .* has a limit already \(<Limiter .*give both in one place",
    ),
]

BAD_LIMITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, TypeError, r"@concurrency: nothing to limit: give a limit or a rate"),
    ({"timeout": 3}, TypeError, r"nothing to limit"),
    ({"limit": 0}, ValueError, r"@concurrency: limit=0: must be at least 1"),
    ({"limit": -1}, ValueError, r"limit=-1: must be at least 1"),
    ({"limit": True}, TypeError, r"limit=True: must be a whole number"),
    ({"limit": 2.0}, TypeError, r"limit=2.0: must be a whole number"),
    ({"limit": math.nan}, TypeError, r"limit=nan: must be a whole number"),
    ({"limit": math.inf}, TypeError, r"limit=inf: must be a whole number"),
    ({"limit": "10"}, TypeError, r"limit='10': must be a whole number"),
    *(
        ({rate: value}, error, rf"@concurrency: {rate}={shown}: must be {rule}")
        for rate in ("per_second", "per_minute")
        for value, error, shown, rule in (
            (0, ValueError, "0", "above 0 and finite"),
            (-5, ValueError, "-5", "above 0 and finite"),
            (math.nan, ValueError, "nan", "above 0 and finite"),
            (math.inf, ValueError, "inf", "above 0 and finite"),
            (True, TypeError, "True", "a number"),
            ("50", TypeError, "'50'", "a number"),
        )
    ),
    ({"limit": 1, "burst": 3}, ValueError, r"burst=3: needs a rate, as in per_second=50, burst=3"),
    ({"per_second": 5, "burst": 0}, ValueError, r"burst=0: must be at least 1"),
    ({"per_second": 5, "burst": 6}, ValueError, r"burst=6: must be no more than the rate, which is 5 per second"),
    ({"per_second": 1, "burst": 2}, ValueError, r"burst=2: must be no more than the rate, which is 1 per second"),
    ({"per_second": 5, "burst": True}, TypeError, r"burst=True: must be a whole number"),
    ({"limit": 1, "timeout": 0}, ValueError, r"timeout=0: must be above 0"),
    ({"limit": 1, "timeout": "3"}, TypeError, r"timeout='3': must be a number"),
    ({"limit": 1, "name": 3}, TypeError, r"@concurrency: name=3 is not a name; write name="),
    ({"limit": 1, "key": len, "name": ""}, TypeError, r"@concurrency: name='' is not a name"),
    ({"limiter": 10}, TypeError, r"@concurrency: limiter=10 is no limiter; write limiter=Limiter\(limit=10\)"),
    ({"limiter": Limiter(limit=1), "limit": 2}, TypeError, r"limiter= brings its own limits, so limit can't be given"),
    ({"limiter": Limiter(limit=1), "per_second": 2, "burst": 1}, TypeError, r"so per_second, burst can't be given"),
]


@pytest.mark.parametrize(("act", "message"), [bad[1:] for bad in BAD_PAIRS], ids=[bad[0] for bad in BAD_PAIRS])
def test_what_makes_no_pair_is_refused(act: Callable[[], object], message: str) -> None:
    """A `PairError` names the function and says what to write; the registry is as it was."""
    before = _shown()

    with pytest.raises(PairError, match=message):
        act()
    assert _shown() == before


@pytest.mark.parametrize(("limits", "error", "message"), BAD_LIMITS, ids=[str(bad[0]) for bad in BAD_LIMITS])
def test_a_limit_that_limits_nothing_is_refused(limits: dict[str, Any], error: type[Exception], message: str) -> None:
    """The arguments of `concurrency` are checked where they are written, before there is a function."""
    with pytest.raises(error, match=message):
        concurrency(**limits)


def test_a_name_taken_by_another_function_is_refused() -> None:
    """The error names both functions and offers `name=`; the first keeps the name."""
    first = dual(_fetch, name="taken")
    before = _shown()

    with pytest.raises(NameTakenError) as caught:
        dual(_fetch_too, name="taken")
    assert str(caught.value) == (
        f"the name {__name__}.taken is taken by {__name__}._fetch ({__file__}:{_fetch.__code__.co_firstlineno}), so "
        f"{__name__}._fetch_too ({__file__}:{_fetch_too.__code__.co_firstlineno}) can't have it; give it another, as "
        'in dual(..., name="other")'
    )
    assert _shown() == before
    assert registry[f"{__name__}.taken"].pair is first


def test_a_stub_whose_name_is_taken_is_refused() -> None:
    """A pair that can't take its stub's name keeps the one that it has."""

    @dual
    def quote(query: str) -> str:
        return query

    pair = dual(sync=_fetch, async_=_afetch)
    before = _shown()

    def stub(query: str) -> None: ...

    stub.__qualname__ = quote.__qualname__
    with pytest.raises(NameTakenError, match=r"\.quote is taken by"):
        pair(stub)
    assert _shown() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("no_such_thing_at_all", r"'no_such_thing_at_all'; there is none like it; is its", id="none"),
        pytest.param("bothh", rf"no pair is called 'bothh'; did you mean {__name__}.both\?", id="near a short name"),
        pytest.param(f"{__name__}.boht", rf"did you mean {__name__}.both", id="near a full name"),
    ],
)
def test_a_name_that_finds_no_pair_lists_those_near(name: str, message: str) -> None:
    """The error lists near names, by their full names."""
    with pytest.raises(PairNotFoundError, match=message):
        registry[name]
    with pytest.raises(PairNotFoundError, match=message), registry.override(name, lambda query: query):
        pass
    assert name not in registry


def test_a_short_name_of_several_pairs_lists_them() -> None:
    """A short name that two pairs share finds neither, and the error lists both in full."""
    pairs = [dual(_fetch, name="a.shared"), dual(_fetch_too, name="b.shared")]

    with pytest.raises(PairNotFoundError, match=rf"several pairs: {__name__}.a.shared, {__name__}.b.shared; write one"):
        registry["shared"]
    assert "shared" not in registry
    assert registry["a.shared"].pair is pairs[0]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(lambda: registry.override(_Standing.pair), r"_fetch: give one fake for both paths", id="nothing"),
        pytest.param(
            lambda: registry.override(_Standing.pair, _fetch, sync=_fetch), r"give one fake for both", id="both"
        ),
        pytest.param(lambda: registry.override(_Standing.pair, 3), r"_fetch: a fake is a function, not 3", id="3"),  # type: ignore[arg-type]
        pytest.param(
            lambda: registry.override(_fetch, _fetch),  # type: ignore[arg-type]
            r"takes a pair or its name, not <function",
            id="no pair",
        ),
        pytest.param(
            lambda: registry.override(_Standing.pair, sync=_afetch),
            r"sync=.*_afetch .* is async; give it as",
            id="colour",
        ),
    ],
)
def test_a_fake_that_can_not_be_called_is_refused(act: Callable[[], Any], message: str) -> None:
    """The pair runs as before."""
    with pytest.raises(TypeError, match=message), act():
        pass
    assert _Standing.pair._fakes == ()


_given_two = {"input": {"pair": "EUR", "day": 3}, "config": 3}


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda pair: pair.invoke(**_given_two), id="invoke"),
        pytest.param(lambda pair: asyncio.run(pair.ainvoke(**_given_two)), id="ainvoke"),
        pytest.param(lambda pair: list(pair.stream(**_given_two)), id="stream"),
        pytest.param(lambda pair: (pair | pair).invoke(**_given_two), id="pipe"),
        pytest.param(lambda pair: (pair | {"a": pair}).steps[-1].invoke(**_given_two), id="dict"),
    ],
)
def test_a_second_argument_that_is_no_config_is_refused(run: Callable[[Any], object]) -> None:
    """Such as the second of a function's own: it is told how a runnable takes several."""
    pair = Dual(lambda given: given)

    with pytest.raises(TypeError, match=r"config=3: must be a config.* one input: a mapping if .*, and \.call\(\)"):
        run(pair)


@pytest.mark.parametrize("config", [3, "EUR", {"EUR"}], ids=repr)
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda pair, config: pair.batch(["EUR"], config), id="batch"),
        pytest.param(lambda pair, config: asyncio.run(pair.abatch(["EUR"], config)), id="abatch"),
        pytest.param(lambda pair, config: pair.batch_as_completed(["EUR"], config), id="batch_as_completed"),
        pytest.param(lambda pair, config: pair.abatch_as_completed(["EUR"], config), id="abatch_as_completed"),
    ],
)
def test_configs_of_a_batch_that_are_none_are_refused(run: Callable[[Any, Any], object], config: object) -> None:
    """At once, where the batch is asked for."""
    with pytest.raises(TypeError, match=r"config=.*: must be one config, .*, or a list of one for each input"):
        run(Dual(_fetch), config)


def test_a_bad_limit_on_a_function_names_the_function() -> None:
    """Written as a decorator, it is told with the name of the function below it, which is not made yet."""
    with pytest.raises(ValueError, match=r"limit=0") as caught:

        @concurrency(
            per_second=5,
            limit=0,
        )
        @dual
        def fetch(query: str) -> str:
            return query

    assert str(caught.value) == (
        f"@concurrency on {__name__}.test_a_bad_limit_on_a_function_names_the_function.<locals>.fetch: "
        "limit=0: must be at least 1, as in limit=10"
    )


def test_a_bad_limit_on_nothing_names_the_decorator_alone() -> None:
    """Where no function stands below it, there is none to name."""
    with pytest.raises(ValueError, match=r"^@concurrency: limit=0"):
        concurrency(limit=0)


def test_a_limit_without_its_name_is_told() -> None:
    """`@concurrency` without its brackets, and a bare number, limit nothing: the error shows what to write."""
    decorate: Any = concurrency
    with pytest.raises(TypeError, match=r"^@concurrency: 10 was given without a name; write @concurrency\(limit=10\)"):
        decorate(10)
    with pytest.raises(TypeError, match=r"^@concurrency: <function _fetch at .*> was given without a name"):
        decorate(_fetch)
    with pytest.raises(TypeError, match=r"^@concurrency: <Dual _fetch .*> was given without a name"):
        decorate(Dual(_fetch))
    with pytest.raises(TypeError, match=r"^@concurrency: 5 was given .*; write @concurrency\(limit=5\)"):
        decorate(5)


def test_a_limiter_without_the_name_of_its_limit_is_told() -> None:
    """With the call to write, and not how many arguments Python takes."""
    limiter: Any = Limiter
    with pytest.raises(TypeError, match=r"^Limiter: 5 was given without a name; write Limiter\(limit=5\), say$"):
        limiter(5)
    with pytest.raises(TypeError, match=r"^Limiter: True was given without a name; write Limiter\(limit=10\), say$"):
        limiter(True)  # noqa: FBT003
