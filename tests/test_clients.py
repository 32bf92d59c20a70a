"""Pairs in the hands of real clients: graphs, agents, histories, routers, and a web server over a socket."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any, TypedDict, cast

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import (
    ConfigurableField,
    RouterRunnable,
    Runnable,
    RunnableBranch,
    RunnableConfig,
    RunnableWithMessageHistory,
)
from langchain_core.tools import BaseTool, tool
from langgraph.graph import END, START, StateGraph

from asyncify import Dual

# LangGraph


class State(TypedDict):
    """The state of a graph."""

    path: list[str]


def _visit(state: State, config: RunnableConfig) -> State:
    return {"path": [*state["path"], f"sync {config.get('configurable', {}).get('who')}"]}


async def _avisit(state: State, config: RunnableConfig) -> State:
    await asyncio.sleep(0)
    return {"path": [*state["path"], f"async {config.get('configurable', {}).get('who')}"]}


@pytest.fixture(params=["unobserved", "observed"])
def config(request: pytest.FixtureRequest) -> RunnableConfig:
    """Return a config with a configurable value, and with a handler or without."""
    callbacks = [BaseCallbackHandler()] if request.param == "observed" else []
    return {"configurable": {"who": "me"}, "callbacks": cast("Any", callbacks)}


@pytest.fixture
def graph() -> Any:
    """Return a graph of two nodes that are pairs."""
    pair: Any = Dual(_visit, _avisit)
    builder: Any = StateGraph(State)
    builder.add_node("first", pair)
    builder.add_node("second", pair | Dual(_stay, _astay))
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    return builder.compile()


def _stay(state: State) -> State:
    return state


async def _astay(state: State) -> State:
    return state


def test_a_graph_runs_pairs_as_nodes(graph: Any, config: RunnableConfig) -> None:
    """A node that is a pair, or a pipe of pairs, runs its sync side with the graph's config."""
    assert graph.invoke({"path": []}, config) == {"path": ["sync me", "sync me"]}


async def test_a_graph_runs_pairs_as_nodes_async(graph: Any, config: RunnableConfig) -> None:
    """The async twin."""
    assert await graph.ainvoke({"path": []}, config) == {"path": ["async me", "async me"]}


def _streamed(mode: str, who: str) -> list[Any]:
    first, second = {"path": [who]}, {"path": [who, who]}
    return [{"path": []}, first, second] if mode == "values" else [{"first": first}, {"second": second}]


@pytest.mark.parametrize("mode", ["values", "updates"])
def test_a_graph_streams_pairs(graph: Any, config: RunnableConfig, mode: str) -> None:
    """The streaming modes of a graph show the steps of its pairs."""
    assert list(graph.stream({"path": []}, config, stream_mode=mode)) == _streamed(mode, "sync me")


@pytest.mark.parametrize("mode", ["values", "updates"])
async def test_a_graph_streams_pairs_async(graph: Any, config: RunnableConfig, mode: str) -> None:
    """The async twin."""
    chunks = [chunk async for chunk in graph.astream({"path": []}, config, stream_mode=mode)]

    assert chunks == _streamed(mode, "async me")


async def test_the_events_of_a_graph_show_pairs(graph: Any) -> None:
    """`astream_events` tells of each pair in a node by its name."""
    names = [event["name"] async for event in graph.astream_events({"path": []}, version="v2")]

    assert names.count("_avisit") + names.count("_visit") >= 2


# An agent


def _weather(asked: Any) -> str:
    city = asked["city"]
    return f"sync sun in {city}"


async def _aweather(asked: Any) -> str:
    city = asked["city"]
    return f"async sun in {city}"


@pytest.fixture
def weather() -> BaseTool:
    """Return a pair as a tool."""
    pair: Any = Dual(_weather, _aweather)
    return tool("weather", pair, description="Tell the weather of a city.")


def _model() -> GenericFakeChatModel:
    call = {"name": "weather", "args": {"city": "Oslo"}, "id": "call-1", "type": "tool_call"}
    return GenericFakeChatModel(
        messages=iter([AIMessage("", tool_calls=[cast("Any", call)]), AIMessage("Take a hat.")])
    )


def test_an_agent_calls_a_pair_as_its_tool(weather: BaseTool) -> None:
    """The loop of a model and its tools gets the answer of the sync side."""
    model, messages = _model(), cast("list[BaseMessage]", [HumanMessage("Weather in Oslo?")])
    while (reply := model.invoke(messages)).tool_calls:
        messages += [reply, *(cast("ToolMessage", weather.invoke(call)) for call in reply.tool_calls)]

    assert [message.content for message in messages[1:]] == ["", "sync sun in Oslo"]
    assert reply.content == "Take a hat."


async def test_an_agent_calls_a_pair_as_its_tool_async(weather: BaseTool) -> None:
    """The async twin."""
    model, messages = _model(), cast("list[BaseMessage]", [HumanMessage("Weather in Oslo?")])
    while (reply := await model.ainvoke(messages)).tool_calls:
        messages += [reply, *[cast("ToolMessage", await weather.ainvoke(call)) for call in reply.tool_calls]]

    assert [message.content for message in messages[1:]] == ["", "async sun in Oslo"]
    assert reply.content == "Take a hat."


def _last_word(message: BaseMessage) -> str:
    return str(message.content).split()[-1]


async def _alast_word(message: BaseMessage) -> str:
    return _last_word(message)


async def test_a_pair_parses_what_a_model_says() -> None:
    """In a chain of prompt, model and pair the pair gets the message, whole or streamed."""
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])

    def chain() -> Any:
        model = GenericFakeChatModel(messages=iter([AIMessage("It is Oslo")] * 2))
        return prompt | model | Dual(_last_word, _alast_word)

    assert chain().invoke({"question": "?"}) == "Oslo"
    assert await chain().ainvoke({"question": "?"}) == "Oslo"
    assert list(chain().stream({"question": "?"})) == ["Oslo"]
    assert [chunk async for chunk in chain().astream({"question": "?"})] == ["Oslo"]


# A history

DEPRECATED = pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")


def _reply(given: Any) -> str:
    return f"{len(given['history'])} before {given['question']}"


async def _areply(given: Any) -> str:
    return _reply(given)


@pytest.fixture
def remembering() -> Any:
    """Return a pair that is given the history of its session."""
    sessions: dict[str, InMemoryChatMessageHistory] = {}
    pair: Any = Dual(_reply, _areply)
    return RunnableWithMessageHistory(
        pair,
        lambda session_id: sessions.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="question",
        history_messages_key="history",
    )


@DEPRECATED
def test_a_pair_has_a_history(remembering: Any) -> None:
    """The second call sees the two messages of the first, and another session none."""
    session = {"configurable": {"session_id": "a"}}

    assert remembering.invoke({"question": "one"}, session).startswith("0 before")
    assert remembering.invoke({"question": "two"}, session).startswith("2 before")
    assert remembering.invoke({"question": "two"}, {"configurable": {"session_id": "b"}}).startswith("0 before")


@DEPRECATED
async def test_a_pair_has_a_history_async(remembering: Any) -> None:
    """The async twin."""
    session = {"configurable": {"session_id": "a"}}

    assert (await remembering.ainvoke({"question": "one"}, session)).startswith("0 before")
    assert (await remembering.ainvoke({"question": "two"}, session)).startswith("2 before")


# Choices


def _is_even(x: int) -> bool:
    return x % 2 == 0


async def _ais_even(x: int) -> bool:
    return x % 2 == 0


def _halve(x: int) -> str:
    return f"sync {x // 2}"


async def _ahalve(x: int) -> str:
    return f"async {x // 2}"


def _keep(x: int) -> str:
    return f"sync {x}"


async def _akeep(x: int) -> str:
    return f"async {x}"


HALVE: Any = Dual(_halve, _ahalve)
KEEP: Any = Dual(_keep, _akeep)

CHOICES: list[Any] = [
    pytest.param(RunnableBranch((Dual(_is_even, _ais_even), HALVE), KEEP), 4, 5, id="RunnableBranch"),
    pytest.param(
        RouterRunnable({"halve": HALVE, "keep": KEEP}),
        {"key": "halve", "input": 4},
        {"key": "keep", "input": 5},
        id="RouterRunnable",
    ),
]


@pytest.mark.parametrize(("choice", "first", "second"), CHOICES)
def test_a_choice_runs_the_chosen_pair(choice: Runnable[Any, Any], first: Any, second: Any) -> None:
    """Condition and branches may be pairs."""
    assert choice.invoke(first) == "sync 2"
    assert choice.invoke(second) == "sync 5"


@pytest.mark.parametrize(("choice", "first", "second"), CHOICES)
async def test_a_choice_runs_the_chosen_pair_async(choice: Runnable[Any, Any], first: Any, second: Any) -> None:
    """The async twin."""
    assert await choice.ainvoke(first) == "async 2"
    assert await choice.ainvoke(second) == "async 5"


@pytest.fixture
def alternatives() -> Any:
    """Return a pipe of pairs that is one of two alternatives."""
    pipe: Any = HALVE | Dual(_shout, _ashout)
    return pipe.configurable_alternatives(ConfigurableField(id="how"), default_key="halve", keep=KEEP)


def _shout(text: str) -> str:
    return text.upper()


async def _ashout(text: str) -> str:
    return text.upper()


def test_alternatives_are_chosen_by_config(alternatives: Any) -> None:
    """The configured alternative runs, on the sync path its sync side."""
    assert alternatives.invoke(4) == "SYNC 2"
    assert alternatives.with_config(configurable={"how": "keep"}).invoke(4) == "sync 4"


async def test_alternatives_are_chosen_by_config_async(alternatives: Any) -> None:
    """The async twin."""
    assert await alternatives.ainvoke(4) == "ASYNC 2"
    assert await alternatives.with_config(configurable={"how": "keep"}).ainvoke(4) == "async 4"


# A web server


def _quote(name: str) -> dict[str, Any]:
    return {"name": name, "side": "sync", "thread": threading.current_thread().name}


async def _aquote(name: str) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"name": name, "side": "async", "thread": threading.current_thread().name}


quote: Any = Dual(_quote, _aquote)
app = FastAPI()


@app.get("/sync/{name}")
def sync_endpoint(name: str) -> Any:
    """Call the pair as a function, a runnable and a pipe, in a thread of the server."""
    return [quote(name), quote.invoke(name), (quote | Dual(_name_of, _aname_of)).invoke(name)]


@app.get("/async/{name}")
async def async_endpoint(name: str) -> Any:
    """Call the pair as a function, a runnable and a pipe, on the loop of the server."""
    pipe = quote | Dual(_name_of, _aname_of)
    return [await quote.acall(name), await quote.ainvoke(name), await pipe.ainvoke(name)]


def _name_of(given: dict[str, Any]) -> Any:
    return given["name"]


async def _aname_of(given: dict[str, Any]) -> Any:
    return given["name"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve the endpoints on a free port of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],), name="server")
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    listener.close()


def test_a_sync_endpoint_calls_a_pair(address: str) -> None:
    """A `def` endpoint runs the sync side in its own thread."""
    called, invoked, piped = httpx.get(f"{address}/sync/JPY", timeout=30).json()

    assert called == invoked
    assert called["side"] == "sync"
    assert called["thread"] != "server"
    assert piped == "JPY"


def test_an_async_endpoint_calls_a_pair(address: str) -> None:
    """An `async def` endpoint runs the async side on its own loop."""
    called, invoked, piped = httpx.get(f"{address}/async/JPY", timeout=30).json()

    assert called == invoked == {"name": "JPY", "side": "async", "thread": "server"}
    assert piped == "JPY"


async def test_an_async_endpoint_serves_many_at_once(address: str) -> None:
    """A hundred requests at once get their own answers."""
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        replies = await asyncio.gather(*(client.get(f"/async/{n}") for n in range(100)))

    assert [reply.json()[2] for reply in replies] == [str(n) for n in range(100)]
