"""What a function is, seen from outside."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from unittest.mock import AsyncMock, Mock

import pytest

from asyncify import Dual, PairError, dual
from asyncify.signatures import (
    check_pair,
    describe,
    has_empty_body,
    is_async,
    is_generator,
    same_parameters,
    shape_of,
    signature_of,
)


def _plain(query: str) -> str:
    return query


async def _coroutine(query: str) -> str:
    return query


def _generator(query: str) -> Iterator[str]:
    yield query


async def _async_generator(query: str) -> AsyncIterator[str]:
    yield query


class Callables:
    """A callable of either colour by its methods."""

    def method(self, query: str) -> str:
        return query

    async def amethod(self, query: str) -> str:
        return query

    async def __call__(self, query: str) -> str:
        return query


@pytest.mark.parametrize(
    ("fn", "colour", "yields"),
    [
        (_plain, False, False),
        (_coroutine, True, False),
        (_generator, False, True),
        (_async_generator, True, True),
        (functools.partial(_coroutine), True, False),
        (functools.partial(functools.partial(_async_generator)), True, True),
        (Callables().method, False, False),
        (Callables().amethod, True, False),
        (Callables(), True, False),
        (Callables, False, False),
        (len, False, False),
        (Mock(), False, False),
        (AsyncMock(), True, False),
    ],
    ids=str,
)
def test_colour_and_kind(fn: Callable[..., object], colour: bool, yields: bool) -> None:  # noqa: FBT001
    """Async or not, generator or not: of functions, partials, methods, objects, classes, mocks."""
    assert (is_async(fn), is_generator(fn)) == (colour, yields)


def _docstring_only(query: str) -> None:
    """Fetch."""


def _dots(query: str) -> None: ...


def _passing(query: str) -> None:
    pass


async def _async_stub(query: str) -> None:
    """Fetch."""


async def _async_dots(query: str) -> None: ...


def _returning_none(query: str) -> None:
    """Fetch."""
    return None  # noqa: RET501


def _not_implemented(query: str) -> str:
    raise NotImplementedError


def _not_implemented_for_a_reason(query: str) -> str:
    raise NotImplementedError("it is written twice")


@pytest.mark.parametrize(
    "fn",
    [
        _docstring_only,
        _dots,
        _passing,
        _async_stub,
        _async_dots,
        _returning_none,
        _not_implemented,
        _not_implemented_for_a_reason,
    ],
)
def test_an_empty_body_is_empty(fn: Callable[..., object]) -> None:
    """A docstring, _dots, `pass`, `return None` and `raise NotImplementedError` do nothing, in either colour."""
    assert has_empty_body(fn)


def _failing(query: str) -> str:
    raise ValueError


@pytest.mark.parametrize(
    "fn",
    [
        _plain,
        _coroutine,
        _generator,
        _async_generator,
        _failing,
        pytest.param(lambda query: 0, id="returns a constant"),
        pytest.param(lambda query: "text", id="returns a text"),
        pytest.param(lambda query: NotImplementedError("text"), id="returns an error"),
        pytest.param(lambda query: print, id="reads a global"),
    ],
)
def test_a_body_is_a_body(fn: Callable[..., object]) -> None:
    """Whatever returns, yields or reads something has a body."""
    assert not has_empty_body(fn)


def test_parameters_are_compared_by_name_kind_and_default() -> None:
    """Types and results may differ; names, kinds, order and defaults may not."""

    def base(a, b=1, *, c=2): ...

    def same(a: int, b: int = 1, *, c: int = 2) -> None: ...

    assert same_parameters(base, same)
    assert not same_parameters(base, lambda a, b=2, *, c=2: None)
    assert not same_parameters(base, lambda b, a=1, *, c=2: None)
    assert not same_parameters(base, lambda a, b=1, c=2: None)
    assert not same_parameters(base, lambda a, b=1, *, c: None)


def test_what_langchain_injects_is_not_compared() -> None:
    """Either side may ask for the config or the run manager."""
    assert same_parameters(lambda x, config: x, lambda x: x)
    assert same_parameters(lambda x: x, lambda x, run_manager: x)


def test_a_default_without_a_truth_is_compared() -> None:
    """A default whose `==` is no bool, an array say, is compared as it is written."""

    class Array:
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

        __hash__ = None  # type: ignore[assignment]

        def __repr__(self) -> str:
            return "array([1, 2])"

    one, other = Array(), Array()

    assert same_parameters(lambda x, y=one: x, lambda x, y=other: x)


def test_a_builtin_without_a_signature_is_taken_at_its_word() -> None:
    """`int` shows no signature on every version, and fits any other side."""
    assert signature_of(dict) is None
    assert same_parameters(dict, _plain)
    assert not shape_of(dict).takes_nothing


def test_describe_names_file_and_line() -> None:
    """Name, file and line; for a partial and a wrapped function those of the function inside."""
    where = f"{__name__}._plain ({__file__}:{_plain.__code__.co_firstlineno})"

    assert describe(_plain) == where
    assert describe(functools.partial(_plain)) == where
    assert describe(functools.wraps(_plain)(lambda *a: None)) == where
    assert describe(functools.partial(functools.wraps(_plain)(lambda *a: None), "EUR")) == where
    assert describe(len) == "builtins.len"
    assert describe(Callables()).startswith(f"{__name__}.Callables.__call__ (")


def test_sides_that_differ_are_shown_side_by_side() -> None:
    """The error shows both signatures, one under the other."""

    async def other(text: str = "x") -> str:
        return text

    with pytest.raises(PairError) as caught:
        check_pair(_plain, other, "dual")

    lines = str(caught.value).splitlines()
    assert lines[0] == "dual: the two sides take different parameters; make them the same"
    assert lines[1].startswith("  sync   (query: str) -> str  ")
    assert lines[2].startswith("  async  (text: str = 'x') -> str  ")


def _two(amount: float, rate: float, digits: int = 2) -> float:
    return round(amount * rate, digits)


def _positional(amount: float, rate: float, /) -> float:
    return amount * rate


def test_one_required_parameter_takes_the_value() -> None:
    """With one required parameter the input goes in as it is, a mapping too."""
    assert shape_of(_plain).arguments(_plain, {"query": 1}, {}) == (({"query": 1},), {})


def test_two_required_parameters_take_a_mapping() -> None:
    """With two the mapping is spread by name; keyword arguments fill in or win."""
    shape = shape_of(_two)

    assert shape.arguments(_two, {"amount": 1, "rate": 2, "digits": 3}, {}) == (
        (),
        {"amount": 1, "rate": 2, "digits": 3},
    )
    assert shape.arguments(_two, {"amount": 1, "rate": 2}, {"digits": 0}) == (
        (),
        {"amount": 1, "rate": 2, "digits": 0},
    )


def test_a_bound_keyword_leaves_one_parameter() -> None:
    """Where all but one of the required are bound, the input is that one."""
    assert shape_of(_two).arguments(_two, 1.5, {"rate": 2}) == ((1.5,), {"rate": 2})


def test_a_keyword_that_is_bound_keeps_its_place() -> None:
    """The input goes where it belongs, though that is not the first."""
    assert shape_of(_two).arguments(_two, 1.5, {"amount": 2}) == ((), {"amount": 2, "rate": 1.5})


def _named(digits: int = 2, *, amount: float) -> float:
    return round(amount, digits)


def test_a_parameter_that_has_no_place_takes_the_value_by_name() -> None:
    """Where it is the one that is needed."""
    assert shape_of(_named).arguments(_named, 1.5, {}) == ((), {"amount": 1.5})


def _by_keyword(*, amount: float = 1, rate: float = 2, **more: float) -> float:
    return amount * rate


class _Desk:
    @dual
    def convert(self, *, amount: float = 1, rate: float = 2) -> tuple[float, float]:
        return amount, rate


def test_the_value_is_the_first_keyword_where_nothing_has_a_place() -> None:
    """A function of keywords alone, all with defaults; beside the first one, which `bind` may give, it is the next."""
    shape = shape_of(_by_keyword)

    assert shape.arguments(_by_keyword, 1.5, {}) == ((), {"amount": 1.5})
    assert shape.arguments(_by_keyword, 1.5, {"amount": 3}) == ((), {"rate": 1.5, "amount": 3})
    assert Dual(_by_keyword).invoke(1.5) == 3.0
    assert dual(_by_keyword, name="by keyword").as_tool().invoke({"rate": 5}) == 5.0
    assert _Desk().convert.invoke(3) == (3, 2)


def _of_any(*amounts: float, rate: float = 2) -> float:
    return sum(amounts) * rate


def test_the_value_is_the_first_of_any_number() -> None:
    """They have places, so a keyword behind them keeps its default."""
    assert shape_of(_of_any).arguments(_of_any, 1.5, {}) == ((1.5,), {})


def test_positional_only_parameters_are_spread_by_position() -> None:
    """A parameter that has no keyword is still found in the mapping by its name."""
    assert shape_of(_positional).arguments(_positional, {"rate": 2, "amount": 1}, {}) == ((1, 2), {})


def _with_defaults(amount: float, rate: float, fee: float = 3, digits: int = 4, /) -> float:
    return round(amount * rate - fee, digits)


def test_a_positional_only_parameter_that_is_left_out_keeps_its_place() -> None:
    """It has its default, and the one behind it is not put there."""
    shape = shape_of(_with_defaults)

    assert shape.arguments(_with_defaults, {"amount": 1, "rate": 2, "digits": 9}, {}) == ((1, 2, 3, 9), {})
    assert shape.arguments(_with_defaults, {"amount": 1, "rate": 2}, {}) == ((1, 2), {})


def _defaulted(amount: float = 1, digits: int = 4, /) -> float:
    return round(amount, digits)


def _half_named(amount: float, /, rate: float, **more: float) -> float:
    return amount * rate


def test_a_positional_only_parameter_beside_the_input_goes_in_its_place() -> None:
    """It has no keyword, but `bind` and a call of the runnable give it by one."""
    shape, half, defaulted = shape_of(_positional), shape_of(_half_named), shape_of(_defaulted)

    assert shape.arguments(_positional, 1.5, {"rate": 2}) == ((1.5, 2), {})
    assert shape.arguments(_positional, 1.5, {"amount": 2}) == ((2, 1.5), {})
    assert half.arguments(_half_named, 1.5, {"amount": 2, "fee": 3}) == ((2,), {"rate": 1.5, "fee": 3})
    assert defaulted.arguments(_defaulted, 1.5, {"digits": 2}) == ((1.5, 2), {})
    assert defaulted.arguments(_defaulted, 1.5, {"amount": 2}) == ((1.5,), {"amount": 2})  # which Python refuses


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"two .* takes amount, rate: its input must be a mapping with these keys, not int"),
        ({"amount": 1}, r"two .* takes amount, rate: its input has no rate; it has amount"),
        ({}, r"its input has no amount, rate; it has nothing"),
        (
            {"amount": 1, "rate": 2, "digits": 0, "lang": "en", 3: 4},
            r"two .* takes amount, rate: its input also has lang, 3; pick the keys, or add \*\*rest to the function$",
        ),
    ],
)
def test_an_input_that_can_not_be_spread_is_refused(value: object, message: str) -> None:
    """The error names the function, what it takes and what was given."""
    with pytest.raises(TypeError, match=message):
        shape_of(_two).arguments(_two, value, {})


async def test_a_key_that_no_parameter_takes_is_told_of_either_side() -> None:
    """Of a method too; a function with `**rest` takes it."""

    async def acharge(amount: float, rate: float) -> float:
        return amount * rate

    class Desk:
        @dual
        def charge(self, amount: float, rate: float) -> float:
            return amount * rate

    def rest(amount: float, rate: float, **rest: float) -> dict[str, float]:
        return rest

    value = {"amount": 1, "rate": 2, "fee": 3}
    for pair in (Dual(acharge), Desk().charge, Dual(_positional)):
        with pytest.raises(TypeError, match=r"takes amount, rate: its input also has fee; pick the keys, or"):
            pair.invoke(value)
        with pytest.raises(TypeError, match=r"takes amount, rate: its input also has fee; pick the keys, or"):
            await pair.ainvoke(value)
    assert Dual(rest).invoke(value) == await Dual(rest).ainvoke(value) == {"fee": 3}


def test_a_positional_only_default_beside_any_keyword_is_one_of_them() -> None:
    """Python takes the name for a keyword, where a function has `**` for all of them."""

    def fetch(query: int = 1, count: int = 2, /, **more: int) -> tuple[int, int, dict[str, int]]:
        return query, count, more

    assert Dual(fetch).invoke(5, count=3) == fetch(5, count=3) == (5, 2, {"count": 3})
