"""Pairs as tools, as schemas and in graphs."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping  # noqa: F401  (an annotation in a string names one)
from contextlib import contextmanager
from typing import Annotated, Any, Optional, TypeVar

import pytest
from langchain_core.callbacks import BaseCallbackHandler, Callbacks
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import InjectedToolArg, StructuredTool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode
from langgraph.prebuilt.tool_node import ToolRuntime
from pydantic import BaseModel, Field, ValidationError
from typing_extensions import TypedDict

from asyncify import Dual, Limiter, PairError, concurrency, dual


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


async def _anow() -> str:
    return "async now"


@dual(async_=_anow)
def now() -> str:
    """Tell the time."""
    return "now"


@dual
def compare(value: str, input: str) -> bool:
    """Compare two texts, whose names LangChain takes for its own."""
    return value == input


@dual
def count(quotes: dict[str, float]) -> int:
    """Count quotes, in a mapping that is the input itself."""
    return len(quotes)


@dual
def greet(word: str = "hello") -> str:
    """Greet."""
    return word


class Order(TypedDict):
    """A mapping whose keys are known."""

    amount: float
    rate: float


@dual
def order(order: Order) -> float:
    """Order an amount."""
    return order["amount"] * order["rate"]


@dual
def round_up(rounding: Rounding) -> int:
    """Round up, to digits that are a model."""
    return rounding.digits + 1


class Desk:
    """An owner of a method."""

    @dual
    def close(self, query: str) -> str:
        """Close a position."""
        return query

    @dual
    def open(self) -> str:
        """Open the desk."""
        return "open"

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
    (count, {"quotes": {"EUR": 1.0}}, 1, 1),
    (greet, {}, "hello", "hello"),
    (order, {"order": {"amount": 2, "rate": 3}}, 6, 6),
    (round_up, {"rounding": {"digits": 4}}, 5, 5),
    (Desk().sell, {"amount": 2, "rate": 3}, -6, -6),
    (Desk().close, {"query": "EUR"}, "EUR", "EUR"),
    (now, {}, "now", "async now"),
    (Desk().open, {}, "open", "open"),
]
each_case = pytest.mark.parametrize(("pair", "given", "sync", "async_"), CASES, ids=[case[0].name for case in CASES])


FORMS: dict[str, Any] = {
    "as_tool": lambda pair: pair.as_tool(),
    "tool": tool,
    "tool with a name": lambda pair: tool(pair.name, pair),
    "tool with options": tool(return_direct=False),
    "tool with both": lambda pair: tool(pair.name, return_direct=False)(pair),
}
each_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


@each_form
@each_case
async def test_a_tool_takes_the_functions_parameters(make: Any, pair: Any, given: Any, sync: Any, async_: Any) -> None:
    """A tool runs the sync side by `invoke` and the async side by `ainvoke`."""
    made = make(pair)

    assert made.invoke(given) == sync
    assert await made.ainvoke(given) == async_


@each_form
@each_case
def test_a_tool_shows_the_functions_parameters(make: Any, pair: Any, given: Any, sync: Any, async_: Any) -> None:
    """Name, docs and parameters are the function's."""
    made = make(pair)

    assert (made.name, made.description) == (pair.name, pair.__doc__)
    assert set(given) <= set(made.args)
    assert set(made.args) == set(convert_to_openai_tool(pair)["function"]["parameters"]["properties"])


def book(room: Annotated[str, "its number"], nights: Annotated[int, Field(ge=1), "how many"] = 1) -> str:
    """Book a room."""
    return room * nights


@pytest.mark.parametrize("make", [tool, lambda pair: pair.as_tool()], ids=["tool", "as_tool"])
def test_a_tool_is_told_to_a_model_as_that_of_the_function(make: Any) -> None:
    """So are the title and the docs of its schema, and a text that describes a parameter."""
    made: Any = make(dual(book, name="book"))
    expected: Any = StructuredTool.from_function(book)

    assert made.args_schema.model_json_schema() == expected.args_schema.model_json_schema()
    assert made.tool_call_schema.model_json_schema() == expected.tool_call_schema.model_json_schema()
    assert convert_to_openai_tool(made) == convert_to_openai_tool(expected)
    assert made.args["room"]["description"] == "its number"


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


@each_form
async def test_a_tools_calls_pass_the_pairs_limit(make: Any) -> None:
    """The limit counts what a tool calls, on both paths."""
    limited = concurrency(limit=3, name="tools")(dual(async_=_afetch, name=f"limited_{id(make)}")(fetch.func))
    made = make(limited)
    made.invoke({"query": "EUR"})
    await made.ainvoke({"query": "EUR"})

    assert isinstance(limited.limiter, Limiter)
    assert limited.limiter.stats().admitted == 2


def test_tool_may_name_and_describe_a_pair() -> None:
    """What `tool` is given wins over the function's, as for a function."""
    made = tool("quotes", fetch, description="Quotes.")

    assert (made.name, made.description) == ("quotes", "Quotes.")


def test_a_pair_is_a_tool_of_a_graphs_tool_node() -> None:
    """`ToolNode`, and so an agent, takes a pair as it takes a function."""
    node = ToolNode([fetch, convert])

    assert [(made.name, made.description) for made in node.tools_by_name.values()] == [
        ("fetch", "Fetch one quote."),
        ("convert", "Convert an amount."),
    ]


async def test_a_tool_node_calls_a_pair_without_parameters() -> None:
    """As it calls a function without any."""
    graph = StateGraph(MessagesState).add_node("tools", ToolNode([now])).add_edge(START, "tools").compile()
    calls: Any = {"messages": [AIMessage("", tool_calls=[{"name": "now", "args": {}, "id": "1"}])]}

    assert graph.invoke(calls)["messages"][-1].content == "now"
    assert (await graph.ainvoke(calls))["messages"][-1].content == "async now"


def _by_config(query: str, run_config: RunnableConfig) -> str:
    return f"{query} {run_config['configurable']['user']} {type(run_config['callbacks']).__name__}"


def _by_optional_config(query: str, run_config: RunnableConfig | None = None) -> str:
    assert run_config
    return _by_config(query, run_config)


def _by_config_alone(run_config: RunnableConfig) -> str:
    return _by_config("EUR", run_config)


def _by_callbacks(query: str, callbacks: Callbacks = None) -> str:
    return f"{query} me {type(callbacks).__name__}"


INJECTED: list[Any] = [_by_config, _by_optional_config, _by_config_alone, _by_callbacks]


@pytest.mark.parametrize("callbacks", [[], [BaseCallbackHandler()]], ids=["unobserved", "observed"])
@pytest.mark.parametrize("fn", INJECTED)
@each_form
async def test_a_tool_gives_what_langchain_injects_and_hides_it(make: Any, fn: Any, callbacks: Any) -> None:
    """A config by its type and callbacks by their name, as for a function; a model can't give them."""
    made = make(dual(name=f"{fn.__name__}_{id(make)}_{len(callbacks)}")(fn))
    given = {"query": "EUR"} if "query" in made.args else {}
    config: RunnableConfig = {"configurable": {"user": "me"}, "callbacks": callbacks}

    assert set(made.args) <= {"query"}
    assert made.invoke(given | {"run_config": {"configurable": {"user": "forged"}}}, config) == "EUR me CallbackManager"
    assert await made.ainvoke(given, config) == "EUR me AsyncCallbackManager"


@dual
def consult(query: str, runtime: ToolRuntime, state: Annotated[dict[str, Any], InjectedState]) -> str:
    """Ask."""
    return f"{query} {runtime.tool_call_id} {len(state['messages'])}"


async def test_a_tool_node_injects_into_a_pair_what_it_injects_into_a_function() -> None:
    """Its runtime, by the parameter's type, and the graph's state, by its annotation; the model sees neither."""
    graph: Any = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([consult])).add_edge(START, "tools")
    app = graph.compile()
    call = {"name": "consult", "args": {"query": "EUR"}, "id": "7", "type": "tool_call"}
    given = {"messages": [AIMessage("", tool_calls=[call])]}

    assert app.invoke(given)["messages"][-1].content == "EUR 7 1"
    assert (await app.ainvoke(given))["messages"][-1].content == "EUR 7 1"
    assert set(tool(consult).args) == {"query"}


async def test_a_tool_of_one_parameter_takes_it_alone() -> None:
    """As with `RunnableLambda(f).as_tool()`, one text may be given without its name."""
    made = fetch.as_tool()

    assert made.invoke("EUR") == "sync EUR"
    assert await made.ainvoke("EUR") == "async EUR"


def _read(words: Any) -> str:
    return f"{words['amount']} {words['rate']}"


@pytest.mark.parametrize("fn", [order.func, _read])
@each_form
@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
def test_a_drop_in_takes_the_keys_of_its_input(make: Any, fn: Any) -> None:
    """`Dual(func)` stands for a `RunnableLambda`: a mapping whose keys LangChain knows gives a tool its arguments."""
    made = make(Dual(fn, name="order"))

    assert set(made.args) == {"amount", "rate"}
    assert made.invoke({"amount": 2, "rate": 3}) == fn({"amount": 2, "rate": 3})
    assert made.args == RunnableLambda(fn).as_tool(description="Orders.").args


class _Parcel(BaseModel):
    weight: float


def _weigh(parcel: _Parcel) -> float:
    return parcel.weight


def _count(texts: list[str]) -> int:
    return len(texts)


@pytest.mark.parametrize(("fn", "given", "result"), [(_weigh, {"weight": 2}, 2.0), (_count, ["a", "b", "c"], 3)])
@each_form
def test_a_drop_in_whose_input_is_no_mapping_takes_it_by_its_name(make: Any, fn: Any, given: Any, result: Any) -> None:
    """The fields of a model are not arguments: the function would get a mapping of them in the model's place."""
    (name,) = inspect.signature(fn).parameters
    made = make(Dual(fn))

    assert list(made.args) == [name]
    assert made.invoke({name: given}) == result


def test_a_drop_in_that_takes_keys_may_call_its_parameter_anything() -> None:
    """No model gives it by that name."""
    made = Dual(lambda _order: _order["pair"], name="order").as_tool()

    assert made.invoke({"pair": "EUR"}) == "EUR"


@each_form
def test_a_config_without_a_type_is_kept_from_the_model(make: Any) -> None:
    """The function gets it, as of any call."""

    def tagged(query: str, config) -> str:  # type: ignore[no-untyped-def]
        """Fetch."""
        return f"{query} {config['tags']}"

    made = make(dual(tagged, name=f"tagged_{id(make)}"))

    assert list(made.args) == ["query"]
    assert made.invoke({"query": "EUR"}, {"tags": ["t"]}) == "EUR ['t']"


@each_form
def test_a_drop_in_with_two_required_parameters_takes_these(make: Any) -> None:
    """Not the keys of the first."""

    def price(order: Order, unit: str) -> str:
        """Price an order."""
        return f"{order['amount']} {unit}"

    made = make(Dual(price))

    assert set(made.args) == {"order", "unit"}
    assert made.invoke({"order": {"amount": 2, "rate": 3}, "unit": "USD"}) == "2.0 USD"


def test_only_tool_sees_other_schemas_and_docs() -> None:
    """Whoever else asks is told the input's own schema and the pair's `repr`; a mapping stays what it is."""
    tool(count)

    assert count.get_input_jsonschema()["additionalProperties"] == {"type": "number"}
    assert count.input_schema is not tool(count).args_schema
    assert repr(count) == "<Dual count sync (async bridged)>"
    assert count.invoke({"quotes": 1.0, "other": 2.0}) == 2


@each_form
def test_a_parameter_of_langchains_own_name_is_told(make: Any) -> None:
    """Beside the input it would never reach the function."""

    @dual(name=f"search_{id(make)}")
    def search(query: str, input: str = "") -> str:
        return query + input

    with pytest.raises(PairError, match="LangChain keeps input for itself"):
        make(search)


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


def test_the_input_schema_of_a_function_without_parameters_is_empty() -> None:
    """Of a method too: an empty mapping is what it may be given."""
    for pair in (now, Desk().open, Dual(_anow)):
        schema: Any = pair.get_input_schema()
        assert (schema.model_validate({}).model_dump(), schema.model_fields) == ({}, {})
        assert pair.get_input_jsonschema()["type"] == "object"


def test_the_input_schema_of_one_value_is_its_type() -> None:
    """With one required parameter the schema is that of the value, as LangChain makes it."""
    model: Any = repeat.input_schema

    assert fetch.get_input_jsonschema() == RunnableLambda(fetch.func).get_input_jsonschema() | {"title": "fetch_input"}
    assert repeat.get_input_jsonschema()["type"] == "string"
    assert model.model_json_schema() == repeat.get_input_jsonschema()
    assert fetch.get_output_jsonschema()["type"] == "string"


def test_an_annotation_may_be_a_string() -> None:
    """As under `from __future__ import annotations`: the names are those of the function's module."""

    @dual(name="late")
    def late(rounding: Any) -> Any:
        return rounding.digits + 1

    late.func.__annotations__["rounding"] = "Rounding"

    assert late.get_input_jsonschema()["properties"]["digits"]["type"] == "integer"
    assert tool(late).invoke({"rounding": {"digits": 4}}) == 5


@pytest.mark.parametrize(
    ("written", "kind"),
    [("Rounding", Rounding), ("Iterator[Rounding]", Rounding), ("list[Rounding]", list[Rounding]), ("Unknown", Any)],
)
def test_the_annotation_of_a_result_may_be_a_string(written: str, kind: Any) -> None:
    """As that of a parameter may be; the schema of the output knows it."""

    def late_result(query: str) -> Any: ...

    late_result.__annotations__["return"] = written
    pair = dual(late_result, name=f"late result {written}")

    assert pair.OutputType == kind
    assert ("Rounding" in str(pair.get_output_jsonschema())) == (kind is not Any)


def _pay(order: Any, token: Any, note: Any = "") -> Any:
    return type(order).__name__, token, note


def test_an_annotation_that_only_a_checker_knows_hides_no_other() -> None:
    """Each parameter has its own type, whatever the result or another parameter is said to be."""
    pay = dual(name="pay")(_pay)
    token = Annotated[str, InjectedToolArg]
    pay.func.__annotations__ = {"order": "Rounding", "token": token, "note": "str", "return": "Unknown"}
    made = [tool(pay), pay.as_tool()]
    pay.func.__annotations__["note"] = "Unknown"

    assert [set(each.args) for each in made] == [{"order", "note"}] * 2
    assert made[0].invoke({"order": {"digits": 1}, "token": "t"}) == ("Rounding", "t", "")
    assert pay.get_input_jsonschema()["properties"]["token"]["type"] == "string"
    assert pay.InputType is Rounding


@pytest.mark.parametrize("unknown", ["Unknown", "typing.Unknown", "list[Rounding", "'str' | None"])
@each_form
def test_a_tools_parameter_of_a_type_that_only_a_checker_knows_is_told(make: Any, unknown: str) -> None:
    """It might be one that the model must not see."""

    @dual(name=f"hidden_{id(make)}_{unknown}")
    def hidden(query: str, token: Any) -> None: ...

    hidden.func.__annotations__["token"] = unknown

    with pytest.raises(PairError, match="nothing is known at run time of the type in token: "):
        make(hidden)
    assert hidden.as_tool(Described).args.keys() == {"query"}


@each_form
def test_an_annotation_is_looked_up_in_what_is_no_module(make: Any) -> None:
    """A function knows its names itself, wherever it was run, as in a notebook or a template."""
    source = "class Amount(int): ...\ndef pay(amount: 'Amount | None' = None): 'Pay.'"
    namespace: dict[str, Any] = {"__name__": f"nowhere_{id(make)}"}
    exec(source, namespace)  # noqa: S102  (that is what such a program does)

    made = make(dual(namespace["pay"]))
    assert made.args_schema.model_fields["amount"].annotation == namespace["Amount"] | None


def test_an_annotation_may_name_a_type_parameter() -> None:
    """It is found where it is declared, which since Python 3.12 is the function itself."""
    item = TypeVar("item")
    first: Any = lambda items: items[0]  # noqa: E731  (annotated below, as the syntax would)
    first.__annotations__, first.__type_params__ = {"items": "list[item]"}, (item,)

    assert dual(first, name="first").InputType.__args__ == (item,)


def late(rounding: "Rounding", more: int = 1) -> int:
    """Add digits."""
    return rounding.digits + more


class Wrapper:
    """A callable made of a function, by a module that does not know the function's names."""

    __call__ = eval("lambda self, *args: 0", {})  # noqa: S307

    def __init__(self, fn: Any) -> None:
        functools.update_wrapper(self, fn)


any_late: Any = late


@pytest.mark.parametrize(
    "fn", [Wrapper(late), functools.partial(contextmanager(any_late), more=2)], ids=["wrapper", "partial"]
)
def test_an_annotation_is_looked_up_where_it_is_written(fn: Any) -> None:
    """Under whatever wraps the function, names are those of its own module."""
    assert dual(fn, name="late wrapped").InputType is Rounding


def test_the_annotations_of_a_class_are_those_of_its_parameters() -> None:
    """A class makes a pair too; its attributes may have other types."""

    class Parsed:
        text: int

        def __init__(self, text: "Rounding", digits: "int") -> None:
            """Keep neither."""

    assert dual(Parsed, name="parsed").get_input_jsonschema()["properties"]["text"] == {"$ref": "#/$defs/Rounding"}


class Session:
    """A class that pydantic knows nothing of."""


@dual
def load(key: str, session: Annotated[Session, InjectedToolArg], other: Session | None = None) -> str:
    """Load."""
    return f"{key} {type(session).__name__}"


async def test_a_parameter_may_be_of_any_class() -> None:
    """As with LangChain's own: in a schema, in a graph, and where a tool is told what the model is not."""
    model: Any = load.get_input_schema()

    assert model.model_fields["session"].annotation is Session
    assert "load_input --> load;" in load.get_graph().draw_mermaid()
    for made in (load.as_tool(), tool(load)):
        assert made.invoke({"key": "a", "session": Session()}) == "a Session"
        with pytest.raises(ValidationError, match="session"):
            await made.ainvoke({"key": "a", "session": 3})


def test_a_graph_shows_a_pair_by_name() -> None:
    """A drawing of a pipe names the pair, and its input."""
    drawn = (convert | RunnableLambda(str.upper)).get_graph().draw_mermaid()

    assert "convert(convert)" in drawn
    assert "convert_input" in drawn
    assert "convert_input --> convert;" in drawn


def times_rate(rate: float, amount: float, digits: int = 2) -> float:
    """Convert an amount."""
    return round(rate * amount, digits)


def test_the_tool_of_a_partial_has_the_types_and_the_docs_of_its_function() -> None:
    """What is given already is no argument of it."""
    made = dual(functools.partial(times_rate, 2.0), name="twice").as_tool()

    assert made.description == "Convert an amount."
    assert {name: field["type"] for name, field in made.args.items()} == {"amount": "number", "digits": "integer"}
    assert made.invoke({"amount": "1.5"}) == 3.0


async def test_the_tool_of_a_function_that_takes_its_argument_by_name_alone() -> None:
    """It is called as it wants to be, on both paths, and so is the pair."""

    @dual
    def shout(*, text: str) -> str:
        """Say it aloud."""
        return text.upper()

    for made in (shout.as_tool(), tool(shout)):
        assert made.invoke({"text": "a"}) == await made.ainvoke({"text": "a"}) == "A"
    assert shout.invoke("a") == await shout.ainvoke("a") == "A"
    assert shout.batch(["a", "b"]) == ["A", "B"]


@pytest.mark.parametrize("callbacks", [[], [BaseCallbackHandler()]], ids=["unobserved", "observed"])
async def test_a_default_of_a_function_that_takes_its_arguments_by_place_alone(callbacks: Any) -> None:
    """A tool, `bind` and a call give another value by its name."""

    @dual(name=f"cut_{len(callbacks)}")
    def cut(text: str, length: int = 3, /) -> str:
        """Cut a text."""
        return text[:length]

    config: RunnableConfig = {"callbacks": callbacks}

    for made in (cut.as_tool(), tool(cut)):
        assert made.invoke({"text": "abcd", "length": 2}, config) == "ab"
        assert await made.ainvoke({"text": "abcd"}, config) == "abc"
    assert cut.invoke("abcd", config, length=2) == await cut.bind(length=2).ainvoke("abcd", config) == "ab"


@pytest.mark.parametrize("fn", [lambda *words: words, lambda **words: words, lambda callbacks: callbacks, getattr])
@each_form
def test_a_function_without_a_parameter_that_a_model_can_name_is_no_tool(make: Any, fn: Any) -> None:
    """A model gives its arguments by name."""
    with pytest.raises(PairError, match="can't be a tool: it has no parameter that a model could give by its name"):
        make(dual(fn, name=f"nameless_{id(make)}_{id(fn)}"))


@each_form
def test_a_function_with_a_private_parameter_is_no_tool(make: Any) -> None:
    """Pydantic keeps such a name from the model, and so the function would go without; a default serves."""
    name = f"private_{id(make)}"
    for private in (lambda _query: _query, lambda query, _limit: query):
        with pytest.raises(PairError, match=r"can't be a tool: .* begins with an underscore; rename (_query|_limit)$"):
            make(dual(private, name=name))

    def tagged(query: str, _config: RunnableConfig) -> str:
        return f"{query} {_config['tags']}"

    assert make(dual(tagged, name=name)).invoke({"query": "a"}, {"tags": ["t"]}) == "a ['t']"
    assert make(dual(lambda query, _limit=3: query[:_limit], name=name)).invoke({"query": "abcd"}) == "abc"


async def test_a_tool_that_is_not_given_what_its_function_needs_says_so() -> None:
    """A schema of somebody else's may leave it out."""

    class Other(BaseModel):
        quote: str

    made = fetch.as_tool(args_schema=Other)
    for run in (made.ainvoke, lambda given: asyncio.to_thread(made.invoke, given)):
        with pytest.raises(
            TypeError, match=r"fetch .* takes query: the tool's arguments have no query; they have quote"
        ):
            await run({"quote": "EUR"})


class Described(BaseModel):
    """What a model is told instead."""

    query: str = Field(description="what to fetch")


@pytest.mark.parametrize("told", [{"args_schema": Described}, {"arg_types": {"query": str}}], ids=str)
async def test_a_tool_whose_arguments_are_described_otherwise_takes_them_as_before(told: Any) -> None:
    """The function still gets its arguments, not a mapping of them."""
    made = fetch.as_tool(**told)

    assert made.invoke({"query": "EUR"}) == "sync EUR"
    assert await made.ainvoke({"query": "EUR"}) == "async EUR"
    assert made.args["query"]["type"] == "string"


def test_what_is_described_otherwise_may_be_of_a_type_that_is_no_class() -> None:
    """Only a class can be a mapping."""

    def show(query: Optional[str]) -> str:  # noqa: UP045  (in Python 3.11 a `str | None` is of a class)
        return f"got {query}"

    assert dual(show).as_tool(Described, name="show", description="Show.").invoke({"query": "EUR"}) == "got EUR"


class _Amounts(BaseModel):
    """Numbers."""

    a: int = Field(description="of one")
    b: list[int] = Field(default=[1], description="of all")


class _AmountsDict(TypedDict):
    a: int
    b: list[int]


async def _areckon(x: dict[str, Any]) -> str:
    return f"async {_reckon(x)}"


def _reckon(x: dict[str, Any]) -> str:
    return str(x["a"] * max(x["b"]))


def _reckon_mapping(x: Mapping[str, Any], by: int = 1, conf: RunnableConfig | None = None) -> str:
    assert conf is not None
    return str(x["a"] * max(x["b"]) * by)


def _reckon_typed(_x: _AmountsDict) -> str:
    return str(_x["a"] * max(_x["b"]))


def _reckon_string(x: "dict[str, Any]") -> str:
    return _reckon(x)


class _Desk:
    @dual
    def reckon(self, x: dict[str, Any]) -> str:
        return _reckon(x)


_OF_MAPPINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "a drop-in": (lambda: Dual(_reckon), ""),
    "a dict": (lambda: dual(_reckon), ""),
    "two sides": (lambda: dual(sync=_reckon, async_=_areckon), "async "),
    "a mapping": (lambda: dual(_reckon_mapping), ""),
    "a typed dict": (lambda: dual(_reckon_typed), ""),
    "a string": (lambda: dual(_reckon_string), ""),
    "a method": (lambda: _Desk().reckon, ""),
}


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
@pytest.mark.parametrize("told", [{"args_schema": _Amounts}, {"arg_types": {"a": int, "b": list[int]}}], ids=str)
@pytest.mark.parametrize(("make", "colour"), _OF_MAPPINGS.values(), ids=_OF_MAPPINGS)
async def test_a_schema_of_keys_makes_a_mapping_of_them(make: Callable[[], Any], colour: str, told: Any) -> None:
    """A function that takes a mapping gets one, where the schema names none of its parameters."""
    made = make().as_tool(name="reckon", description="Reckon.", **told)

    assert sorted(made.args) == ["a", "b"]
    assert made.invoke({"a": 3, "b": [1, 2]}) == "6"
    assert await made.ainvoke({"a": 3, "b": [1, 2]}) == f"{colour}6"


@pytest.mark.parametrize(("described", "given"), [("a", {"a": "1"}), ("x", {"x": {"a": "1"}})])
def test_a_json_schema_describes_keys_too(described: str, given: dict[str, Any]) -> None:
    """LangChain takes one for a tool, though the types do not say so."""
    schema: Any = {"title": "reckon", "description": "Reckon.", "type": "object", "properties": {described: {}}}

    def show(x: dict[str, Any]) -> str:
        return str(x)

    assert dual(show).as_tool(schema).invoke(given) == "{'a': '1'}"


async def test_a_schema_that_names_the_mapping_itself_gives_it() -> None:
    """Then it describes the parameters, as that of any other function."""

    class Described(BaseModel):
        x: dict[str, Any] = Field(description="numbers")

    made = dual(sync=_reckon, async_=_areckon).as_tool(Described)

    assert made.invoke({"x": {"a": 3, "b": [1, 2]}}) == "6"
    assert await made.ainvoke({"x": {"a": 3, "b": [1, 2]}}) == "async 6"


class Touchy:
    """What stands in an annotation, and can't be compared, as an array can't."""

    def __eq__(self, other: object) -> bool:
        raise ValueError

    __hash__ = object.__hash__


def test_what_an_annotation_holds_is_not_compared() -> None:
    """Its `==` may do anything."""

    def weigh(amount: Annotated[int, Touchy()]) -> None: ...

    assert tool(dual(weigh)).args["amount"]["type"] == "integer"
