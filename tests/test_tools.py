"""Pairs as tools, as schemas and in graphs."""

from typing import Annotated, Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field, ValidationError

from asyncify import dual


class Rounding(BaseModel):
    """A pydantic type among the parameters."""

    digits: int = Field(default=2, description="digits after the point")


async def _afetch(query: str) -> str:
    return f"async {query}"


@dual(async_=_afetch)
def fetch(query: str) -> str:
    """Fetch one quote."""
    return f"sync {query}"


async def _aconvert(
    amount: float,
    rate: Annotated[float, Field(description="of one unit")],
    rounding: Rounding | None = None,
    unit: str = "USD",
) -> str:
    return f"async {convert.func(amount, rate, rounding, unit)}"


@dual(async_=_aconvert)
def convert(
    amount: float,
    rate: Annotated[float, Field(description="of one unit")],
    rounding: Rounding | None = None,
    unit: str = "USD",
) -> str:
    """Convert an amount."""
    return f"{round(amount * rate, (rounding or Rounding()).digits)} {unit}"


async def _arepeat(query: str, times: int = 2) -> str:
    return f"async {query * times}"


@dual(async_=_arepeat)
def repeat(query: str, times: int = 2) -> str:
    """Repeat a text."""
    return query * times


@dual
def compare(value: str, input: str) -> bool:
    """Compare two texts, whose names LangChain takes for its own."""
    return value == input


class Desk:
    """An owner of a method."""

    @dual
    def sell(self, amount: float, rate: float) -> float:
        """Sell an amount."""
        return -amount * rate


FULL = {"amount": 1.239, "rate": 2, "rounding": {"digits": 1}, "unit": "JPY"}

CASES: list[tuple[Any, dict[str, Any], Any, Any]] = [
    (fetch, {"query": "EUR"}, "sync EUR", "async EUR"),
    (convert, {"amount": 1.239, "rate": 2}, "2.48 USD", "async 2.48 USD"),
    (convert, FULL, "2.5 JPY", "async 2.5 JPY"),
    (repeat, {"query": "a"}, "aa", "async aa"),
    (repeat, {"query": "a", "times": 3}, "aaa", "async aaa"),
    (compare, {"value": "a", "input": "a"}, True, True),
    (Desk().sell, {"amount": 2, "rate": 3}, -6, -6),
]
each_case = pytest.mark.parametrize(("pair", "given", "sync", "async_"), CASES, ids=[case[0].name for case in CASES])


@each_case
async def test_as_tool_takes_the_functions_parameters(pair: Any, given: Any, sync: Any, async_: Any) -> None:
    """A tool made by `as_tool` runs the sync side by `invoke` and the async side by `ainvoke`."""
    made = pair.as_tool()

    assert made.invoke(given) == sync
    assert await made.ainvoke(given) == async_


@each_case
def test_as_tool_shows_the_functions_parameters(pair: Any, given: Any, sync: Any, async_: Any) -> None:
    """Name, docs and parameters are the function's."""
    made = pair.as_tool()

    assert (made.name, made.description) == (pair.name, pair.__doc__)
    assert set(given) <= set(made.args)
    assert set(made.args) == set(convert_to_openai_tool(pair)["function"]["parameters"]["properties"])


def test_a_tool_refuses_what_the_function_would() -> None:
    """A parameter that is missing or has the wrong type is refused before the function runs."""
    with pytest.raises(ValidationError, match="rate"):
        convert.as_tool().invoke({"amount": 1})
    with pytest.raises(ValidationError, match="amount"):
        convert.as_tool().invoke({"amount": "much", "rate": 2})


def test_as_tool_may_be_named_and_described() -> None:
    """`name=` and `description=` win over the function's."""
    made = fetch.as_tool(name="quotes", description="Quotes.")

    assert (made.name, made.description) == ("quotes", "Quotes.")


def test_a_tools_call_is_a_run_of_the_pair() -> None:
    """Who watches the tool sees the pair's run inside it."""
    seen: list[str] = []

    class Watcher(BaseCallbackHandler):
        def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append(kwargs["name"])

    fetch.as_tool().invoke({"query": "EUR"}, {"callbacks": [Watcher()]})

    assert seen == ["fetch"]


async def test_the_tool_decorator_takes_a_pair() -> None:
    """LangChain's `tool` makes a tool of a pair whose input is a mapping."""
    made = tool(convert)

    assert made.name == "convert"
    assert set(made.args) == set(FULL)
    assert made.invoke({"amount": 1.239, "rate": 2}) == "2.48 USD"
    assert await made.ainvoke(FULL) == "async 2.5 JPY"


def test_a_pair_converts_to_an_openai_tool() -> None:
    """The function's parameters, types, defaults and docs are in the declaration."""
    declared = convert_to_openai_tool(convert)["function"]

    assert (declared["name"], declared["description"]) == ("convert", "Convert an amount.")
    assert declared["parameters"]["required"] == ["amount", "rate"]
    assert declared["parameters"]["properties"]["unit"] == {"default": "USD", "type": "string"}
    assert declared["parameters"]["properties"]["amount"] == {"type": "number"}


def test_the_input_schema_of_a_mapping_has_its_fields() -> None:
    """Two required parameters or more make an object of them, with types, defaults and descriptions."""
    schema = convert.get_input_jsonschema()

    assert schema["required"] == ["amount", "rate"]
    assert schema["properties"]["rate"] == {"description": "of one unit", "title": "Rate", "type": "number"}
    assert schema["properties"]["unit"] == {"default": "USD", "title": "Unit", "type": "string"}
    assert schema["$defs"]["Rounding"]["properties"]["digits"]["description"] == "digits after the point"
    assert set(Desk().sell.get_input_jsonschema()["properties"]) == {"amount", "rate"}


def test_the_input_schema_of_one_value_is_its_type() -> None:
    """With one required parameter the schema is that of the value, as LangChain makes it."""
    assert fetch.get_input_jsonschema() == RunnableLambda(fetch.func).get_input_jsonschema() | {"title": "fetch_input"}
    assert repeat.get_input_jsonschema()["type"] == "string"
    assert fetch.get_output_jsonschema()["type"] == "string"


def test_a_graph_shows_a_pair_by_name() -> None:
    """A drawing of a pipe names the pair, and its input."""
    drawn = (convert | RunnableLambda(str.upper)).get_graph().draw_mermaid()

    assert "convert(convert)" in drawn
    assert "convert_input" in drawn
    assert "convert_input --> convert;" in drawn
