"""A limiter as the `rate_limiter=` of LangChain's chat models."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import RunnableLambda
from pydantic import PrivateAttr

from asyncify import concurrency, dual
from asyncify.limiter import Limiter, LimiterStats
from asyncify.testing import FakeClock
from tests.waiting import SAFETY_NET, until


def replies() -> Iterator[AIMessage]:
    """Yield what the model is to answer, for ever."""
    while True:
        yield AIMessage("ok")


class Counting(FakeListChatModel):
    """A model that streams letter by letter, and notes how many streams are open at once."""

    _open: int = PrivateAttr(default=0)
    _peak: int = PrivateAttr(default=0)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count one stream more."""
        self._open += 1
        self._peak = max(self._peak, self._open)
        yield
        self._open -= 1

    def _stream(self, *given: Any, **options: Any) -> Iterator[ChatGenerationChunk]:
        with self.counted():
            yield from super()._stream(*given, **options)

    async def _astream(self, *given: Any, **options: Any) -> AsyncIterator[ChatGenerationChunk]:
        with self.counted():
            async for chunk in super()._astream(*given, **options):
                await asyncio.sleep(0)
                yield chunk


class TestLimitedModels:
    """A chat model, or a pipe that begins with one, under a limit on calls: what errors and docs/limiter.md tell."""

    @pytest.mark.parametrize("piped", [False, True])
    async def test_a_model_streams_under_a_limit(self, *, piped: bool) -> None:
        """Its tokens come one by one, behind other steps too, on both paths; no more calls than the limit are open."""
        model = Counting(responses=["abc"])
        whole: Any = RunnableLambda(str.upper) | model if piped else model
        llm = concurrency(limit=2)(dual(sync=whole.stream, async_=whole.astream, name=f"llm_{piped}"))
        pipe = RunnableLambda(str.strip) | llm | StrOutputParser()

        assert [chunk for chunk in pipe.stream("hi") if chunk] == ["a", "b", "c"]
        assert [chunk async for chunk in pipe.astream("hi") if chunk] == ["a", "b", "c"]
        assert (pipe.invoke("hi"), await pipe.ainvoke("hi")) == ("abc", "abc")
        assert await pipe.abatch(["hi"] * 6) == ["abc"] * 6
        assert (model._peak, llm.limiter.stats().admitted) == (2, 10)

    async def test_a_limited_model_is_observed_as_a_model(self) -> None:
        """The events of its tokens reach whoever watches."""
        model = Counting(responses=["abc"])
        llm = concurrency(limit=2)(dual(sync=model.stream, async_=model.astream, name="llm_observed"))
        events = [event async for event in llm.astream_events("hi", version="v2")]

        streamed = [event["data"] for event in events if event["event"] == "on_chat_model_stream"]
        assert [data["chunk"].content for data in streamed if data["chunk"].content] == ["a", "b", "c"]


class TestChatModels:
    def test_a_chat_model_takes_it_as_its_rate_limiter(self, clock: FakeClock) -> None:
        """A model and the functions beside it draw from one budget."""
        limiter = Limiter(limit=1, per_minute=2, burst=2, clock=clock)
        model = GenericFakeChatModel(messages=replies(), rate_limiter=limiter)
        with limiter:
            assert model.invoke("hi").content == "ok"

        assert not limiter.acquire(blocking=False)
        assert limiter.stats().in_flight == 0

    async def test_a_chat_model_takes_it_as_its_rate_limiter_async(self, clock: FakeClock) -> None:
        """A model and the functions beside it draw from one budget."""
        limiter = Limiter(limit=1, per_minute=2, burst=2, clock=clock)
        model = GenericFakeChatModel(messages=replies(), rate_limiter=limiter)
        async with limiter:
            assert (await model.ainvoke("hi")).content == "ok"

        assert not await limiter.aacquire(blocking=False)
        assert limiter.stats().in_flight == 0

    async def test_a_chat_model_waits_for_the_rate(self, clock: FakeClock) -> None:
        """Two calls of the model start as far apart as the limiter says."""
        limiter = Limiter(per_second=10, clock=clock)
        model = GenericFakeChatModel(messages=replies(), rate_limiter=limiter)
        await model.ainvoke("hi")
        second = asyncio.create_task(model.ainvoke("hi"))
        await until(lambda: limiter.stats().waiting == 1)
        clock.advance(0.1)

        assert (await second).content == "ok"

    def test_by_default_it_waits(self, clock: FakeClock) -> None:
        """`acquire` comes back when the rate is there, and takes no slot."""
        limiter = Limiter(limit=1, per_second=1, clock=clock)
        assert limiter.acquire(blocking=False)
        assert limiter.stats().in_flight == 0
        came: list[bool] = []
        thread = threading.Thread(target=lambda: came.append(limiter.acquire()))
        thread.start()
        while not limiter.stats().waiting and thread.is_alive():
            thread.join(0.001)
        clock.advance(1)
        thread.join(SAFETY_NET)

        assert came == [True]
        assert limiter.stats() == LimiterStats(0, 0, 2, 0, 1, 1.0, 1.0, 1.0)

    async def test_by_default_it_waits_async(self, clock: FakeClock) -> None:
        """`aacquire` comes back when the rate is there, and takes no slot."""
        limiter = Limiter(limit=1, per_second=1, clock=clock)
        assert await limiter.aacquire(blocking=False)
        assert limiter.stats().in_flight == 0
        task = asyncio.create_task(limiter.aacquire())
        await until(lambda: limiter.stats().waiting == 1 or task.done())
        clock.advance(1)

        assert await task
        assert limiter.stats() == LimiterStats(0, 0, 2, 0, 1, 1.0, 1.0, 1.0)

    def test_without_blocking_it_says_whether_it_was_there(self, clock: FakeClock) -> None:
        """A refused try is counted, costs nothing and is not queued."""
        limiter = Limiter(per_second=1, clock=clock)

        assert [limiter.acquire(blocking=False) for _ in range(4)] == [True, False, False, False]
        assert limiter.stats().rejected == 3
        assert limiter.stats().waiting == 0
        clock.advance(1)
        assert limiter.acquire(blocking=True)
