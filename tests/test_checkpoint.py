"""The checkpoint: no call is paid for twice, whatever ends a run."""

import asyncio
import itertools
import json
import multiprocessing
import os
import random
import re
import sqlite3
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField, Runnable, RunnableBranch, RunnableLambda, RunnablePassthrough
from pydantic import BaseModel, ConfigDict

from asyncify import CheckpointError, Dual, aeach, dual, each, flow
from asyncify import checkpoint as checkpoint_module
from asyncify.checkpoint import Checkpoint
from asyncify.fingerprints import fingerprint, work_of
from asyncify.journal import Journal
from asyncify.pools import ThreadPool
from tests.obvious_loop import Document
from tests.waiting import until, wait_until

Pair = Dual[Any, Any]
SAFETY_NET = 60  # seconds, for what must never be waited for

WAYS = ["each", "each via async", "aeach"]


def collect(way: str, runnable: Any, inputs: Any, **options: Any) -> list[Any]:
    """Return all that a stream yields."""

    async def acollect() -> list[Any]:
        return [result async for result in aeach(runnable, inputs, **options)]

    if way == "aeach":
        return asyncio.run(acollect())
    return list(each(runnable, inputs, via="async" if way == "each via async" else "threads", **options))


class Counted:
    """A function of both colours that counts its calls by input; those in `failing` fail."""

    def __init__(self, output: Callable[[Any], Any] = lambda value: value * 10) -> None:
        self._output = output
        self.calls: Counter[Any] = Counter()
        self.failing: set[Any] = set()

    def __call__(self, value: Any) -> Any:
        name = json.dumps(value) if isinstance(value, dict) else value
        self.calls[name] += 1
        if name in self.failing:
            raise LookupError(f"no {value}")
        return self._output(value)

    async def twin(self, value: Any) -> Any:
        await asyncio.sleep(0)
        return self(value)

    def pair(self, name: str = "counted") -> Pair:
        async def twin(value: Any) -> Any:
            return await self.twin(value)

        return Dual(self, twin, name=name)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Return where the checkpoint goes, and see that nothing else is left beside it."""
    file = tmp_path / "run.sqlite"
    yield file
    assert sorted(tmp_path.iterdir()) in ([], [file]), "a log or a lock was left behind: the file was not closed"


@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_takes_what_is_finished_from_the_file(way: str, path: Path) -> None:
    """The outputs are the same and nothing is called."""
    counted = Counted()

    first = collect(way, counted.pair(), range(50), checkpoint=path)
    second = collect(way, counted.pair(), range(50), checkpoint=path)

    assert first == second == [value * 10 for value in range(50)]
    assert set(counted.calls.values()) == {1}


@pytest.mark.parametrize("way", WAYS)
def test_unordered_results_come_from_the_file_with_their_index(way: str, path: Path) -> None:
    """The index is that of this run's input, not of the run that recorded it."""
    counted = Counted()

    collect(way, counted.pair(), [3, 2, 1], checkpoint=path)
    found = collect(way, counted.pair(), [1, 2, 3, 4], checkpoint=path, ordered=False)

    assert sorted(found) == [(0, 10), (1, 20), (2, 30), (3, 40)]
    assert set(counted.calls.values()) == {1}


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None)
@given(values=st.lists(st.integers(0, 5), max_size=20), window=st.integers(1, 6))
def test_equal_inputs_are_called_once(
    way: str, tmp_path_factory: pytest.TempPathFactory, values: list[int], window: int
) -> None:
    """Of equal inputs, in flight together or not, one is called, and all have its output."""
    counted = Counted()
    file = tmp_path_factory.mktemp("equal") / "run.sqlite"

    assert collect(way, counted.pair(), values, checkpoint=file, window=window) == [value * 10 for value in values]
    assert set(counted.calls.values()) <= {1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("window", "calls"), [(1, 4), (2, 2), (4, 1)])
def test_equal_inputs_in_flight_share_a_failure(way: str, window: int, calls: int, path: Path) -> None:
    """One that is read after the failure is called again."""
    counted = Counted()
    counted.failing = {"a"}
    may_fail = threading.Event()

    def source() -> Iterator[str]:
        for number in range(4):
            if number % window == window - 1:
                may_fail.set()
            yield "a"

    def wait(value: Any) -> Any:
        may_fail.wait(SAFETY_NET)
        may_fail.clear()
        return counted(value)

    async def wait_async(value: Any) -> Any:
        await asyncio.to_thread(may_fail.wait, SAFETY_NET)
        may_fail.clear()
        return counted(value)

    pair: Pair = Dual(wait, wait_async, name="wait")
    found = collect(way, pair, source(), checkpoint=path, window=window, return_exceptions=True)

    assert [type(error) for error in found] == [LookupError] * 4
    assert counted.calls == {"a": calls}


@pytest.mark.parametrize("way", WAYS)
def test_failures_are_recorded_and_tried_again(way: str, path: Path) -> None:
    """The file says what went wrong and how often it was tried; the next run calls those alone."""
    counted = Counted()
    counted.failing = {2, 3}

    found = collect(way, counted.pair(), range(5), checkpoint=path, return_exceptions=True)
    with closing(sqlite3.connect(path)) as db:
        recorded = db.execute("SELECT error, attempts FROM items WHERE error IS NOT NULL ORDER BY error").fetchall()
    counted.failing = {3}
    again = collect(way, counted.pair(), range(5), checkpoint=path, return_exceptions=True)

    assert [isinstance(output, LookupError) for output in found] == [False, False, True, True, False]
    assert recorded == [("LookupError: no 2", 1), ("LookupError: no 3", 1)]
    assert again[:3] == [0, 10, 20]
    assert counted.calls == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1}
    counted.failing = set()
    assert collect(way, counted.pair(), range(5), checkpoint=path) == [0, 10, 20, 30, 40]
    assert counted.calls == {0: 1, 1: 1, 2: 2, 3: 3, 4: 1}


@pytest.mark.parametrize("way", WAYS)
def test_what_has_ended_is_recorded_when_an_error_ends_the_run(way: str, path: Path) -> None:
    """The calls that had ended before the error are not made again."""
    counted = Counted()
    counted.failing = {7}

    with pytest.raises(LookupError):
        collect(way, counted.pair(), range(20), checkpoint=path, window=4)
    before = Counter(counted.calls)
    counted.failing = set()
    found = collect(way, counted.pair(), range(20), checkpoint=path, window=4)

    assert found == [value * 10 for value in range(20)]
    assert all(counted.calls[value] == 1 for value in range(7))
    assert sum(counted.calls.values()) <= 20 + 4
    assert before[7] == 1


def test_a_call_that_ends_while_the_stream_is_left_is_recorded(path: Path) -> None:
    """A thread can't be cancelled, so what it has paid for is kept."""
    runs = threading.Event()
    left = threading.Event()
    calls: list[int] = []

    def call(value: int) -> int:
        calls.append(value)
        if value:
            runs.set()
            assert left.wait(SAFETY_NET)
        assert runs.wait(SAFETY_NET)
        return value

    results = each(Pair(call, name="call"), range(2), checkpoint=path)
    assert next(results) == 0
    closing_thread = threading.Thread(target=results.close)
    closing_thread.start()
    left.set()
    closing_thread.join(SAFETY_NET)

    assert list(each(Pair(call, name="call"), range(2), checkpoint=path)) == [0, 1]
    assert calls == [0, 1]


def test_an_input_that_was_cancelled_is_no_failure(path: Path) -> None:
    """Leaving a stream cancels its calls; the file says nothing of them."""

    async def call(value: int) -> int:
        if value:
            await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
        return value

    async def leave() -> None:
        results = aeach(Pair(lambda value: value, call, name="call"), range(5), checkpoint=path)
        await anext(results)
        await results.aclose()

    asyncio.run(leave())
    with closing(sqlite3.connect(path)) as db:
        recorded = db.execute("SELECT count(*), count(error) FROM items").fetchone()

    assert recorded == (1, 0)


def test_a_failure_never_takes_the_place_of_an_output(path: Path) -> None:
    """Of two processes that ran the same input, one may have failed after the other had it."""
    with Checkpoint(path, "work", "json") as checkpoint:
        checkpoint.record([checkpoint.row("key", 1, None)])
    with Checkpoint(path, "work", "json") as checkpoint:
        checkpoint.record([checkpoint.row("key", None, LookupError("late"))])
    with Checkpoint(path, "work", "json") as checkpoint:
        found = checkpoint.find("key")

    assert found == (1,)


def test_an_output_is_found_while_the_file_grows_and_when_it_is_opened_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds the rows is made larger again and again, and made anew when a file is opened, a part at a time."""
    monkeypatch.setattr(checkpoint_module, "_FIRST_SLOTS", 2)
    monkeypatch.setattr(checkpoint_module, "_READ_AT_ONCE", 3)
    with Checkpoint(path, "work", "json") as checkpoint:
        for number in range(20):
            checkpoint.record([checkpoint.row(str(number), number, None)])

            assert [checkpoint.find(str(key)) for key in range(number + 2)] == [
                *((key,) for key in range(number + 1)),
                None,
            ]
    with Checkpoint(path, "work", "json") as checkpoint:
        assert [checkpoint.find(str(key)) for key in range(21)] == [*((key,) for key in range(20)), None]


@settings(deadline=None)
@given(hashes=st.lists(st.integers(0, 40), max_size=30), bits=st.sampled_from([1, 3, 32, 61]))
def test_keys_whose_hashes_are_alike_are_told_apart(
    tmp_path_factory: pytest.TempPathFactory, hashes: list[int], bits: int
) -> None:
    """However many keys share a hash, or the part of it that is kept, each finds its own output alone."""
    hash_of = {f"key {number}": hashed << bits | hashed for number, hashed in enumerate(hashes)}
    with (
        pytest.MonkeyPatch.context() as patch,
        Checkpoint(tmp_path_factory.mktemp("alike") / "run.sqlite", "work", "json") as checkpoint,
    ):
        patch.setattr(checkpoint_module, "hash", lambda key: hash_of.get(key, 1), raising=False)
        for key in hash_of:
            assert checkpoint.find(key) is None
            checkpoint.record([checkpoint.row(key, key, None)])

        assert [checkpoint.find(key) for key in hash_of] == [(key,) for key in hash_of]
        assert checkpoint.find("none of them") is None


def test_many_outputs_are_recorded_at_once(path: Path) -> None:
    """More than one statement takes are found by their own keys, failures among them left out."""
    numbers = range(250)
    with Checkpoint(path, "work", "json") as checkpoint:
        errors = [LookupError() if number % 7 == 0 else None for number in numbers]
        checkpoint.record(
            [checkpoint.row(str(number), number, error) for number, error in zip(numbers, errors, strict=True)]
        )

        found = [checkpoint.find(str(number)) for number in numbers]

    assert found == [(number,) if number % 7 else None for number in numbers]


def test_one_process_learns_what_another_has_recorded(path: Path) -> None:
    """It looks for news when it records something itself, and takes nobody's output for another's."""
    with Checkpoint(path, "work", "json") as one, Checkpoint(path, "work", "json") as other:
        for number in range(0, 10, 2):
            one.record([one.row(f"{number}", number, None), one.row(f"{number} failed", None, LookupError())])
            other.record([other.row(f"{number + 1}", number + 1, None)])

        assert [other.find(f"{number}") for number in range(10)] == [(number,) for number in range(10)]
        assert [one.find(f"{number}") for number in range(9)] == [(number,) for number in range(9)]
        assert other.find("2 failed") is None


def test_what_ends_while_others_are_being_recorded_is_recorded_too() -> None:
    """A stream that is left takes down its last calls while a thread still writes."""
    is_recording = threading.Event()
    may_go_on = threading.Event()
    recorded: list[str] = []

    class Slow:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            recorded.append("closed")

        def find(self, key: str) -> None:
            pass

        def row(self, key: str, *_: object) -> str:
            return key

        def record(self, rows: list[str]) -> None:
            is_recording.set()
            assert may_go_on.wait(SAFETY_NET)
            recorded.extend(rows)

    slow: Any = Slow()
    with Journal(slow, None, lambda _: None) as journal:
        for index in range(3):
            journal.must_run(index, index)
        journal.note([(0, 0, None)])
        writing = threading.Thread(target=journal.flush)
        writing.start()
        assert is_recording.wait(SAFETY_NET)
        journal.note([(1, 1, None), (2, 2, None)])
        may_go_on.set()
    writing.join(SAFETY_NET)

    assert recorded == ["0", "1", "2", "closed"]


async def test_the_event_loop_does_not_wait_for_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`aeach` records in a thread, while the loop goes on."""
    record = Checkpoint.record
    recorded_in: list[int] = []

    def note_thread(self: Checkpoint, rows: Any) -> None:
        recorded_in.append(threading.get_ident())
        record(self, rows)

    monkeypatch.setattr(Checkpoint, "record", note_thread)
    async for _ in aeach(Counted().pair(), range(20), checkpoint=path, window=3):
        pass

    assert recorded_in
    assert threading.get_ident() not in recorded_in


async def test_the_event_loop_does_not_wait_for_the_file_to_be_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite works a long log into the file then; who is cancelled meanwhile, twice even, waits for its end."""
    close = Checkpoint.__exit__
    closed_in: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow_close(self: Checkpoint, *_: object) -> None:
        begun.set()
        assert go_on.wait(SAFETY_NET)
        close(self)
        closed_in.append(threading.get_ident())

    monkeypatch.setattr(Checkpoint, "__exit__", slow_close)

    async def read() -> None:
        async for _ in aeach(Counted().pair(), range(3), checkpoint=path):
            pass

    reading = asyncio.create_task(read())
    await until(begun.is_set)
    for _ in range(2):
        reading.cancel()
        await asyncio.sleep(0.01)
    assert not reading.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading

    assert len(closed_in) == 1
    assert threading.get_ident() not in closed_in
    monkeypatch.undo()
    counted = Counted()
    assert [result async for result in aeach(counted.pair(), range(3), checkpoint=path)] == [0, 10, 20]
    assert not counted.calls


def test_a_fork_leaves_the_file_to_its_parent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is closed in a forked process records nothing there and closes nothing."""
    checkpoint = Checkpoint(path, "work", "json")
    journal = Journal(checkpoint, None, lambda _: None)
    journal.must_run(0, 0)
    journal.note([(0, 0, None)])

    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        journal.__exit__()
    assert checkpoint.find("0") is None

    journal.__exit__()
    with Checkpoint(path, "work", "json") as again:
        assert again.find("0") == (0,)


def read_all(results: Any) -> None:
    """Read a stream to its end."""
    for _ in results:
        pass


def read_one_and_leave(results: Any) -> None:
    """Read one result and leave."""
    with closing(results):
        next(results)


async def aread_all(results: Any) -> None:
    """Do the same, on the other path."""
    async for _ in results:
        pass


async def aread_one_and_leave(results: Any) -> None:
    """Do the same, on the other path."""
    async with aclosing(results):
        await anext(results)


async def aread_one_and_be_cancelled(results: Any) -> None:
    """Be cancelled while waiting for more than there is."""
    await anext(results)
    reading = asyncio.create_task(aread_all(results))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


READERS = [
    *itertools.product(["each", "each via async"], [read_all, read_one_and_leave]),
    *itertools.product(["aeach"], [aread_all, aread_one_and_leave, aread_one_and_be_cancelled]),
]


@pytest.mark.parametrize(("way", "read"), READERS)
@pytest.mark.parametrize("failing", [set(), {17}])
def test_no_thread_and_no_file_is_left(way: str, read: Any, failing: set[int], path: Path) -> None:
    """However a stream ends, its threads are idle, its task and its files are closed."""
    left_tasks = 0

    async def on_a_loop() -> None:
        nonlocal left_tasks
        try:
            await read(aeach(counted.pair(), range(50), checkpoint=path, window=4))
        finally:
            left_tasks = len(asyncio.all_tasks()) - 1

    def run() -> None:
        with suppress(LookupError):
            if way == "aeach":
                asyncio.run(on_a_loop())
            else:
                via: Any = "async" if way == "each via async" else "threads"
                read(each(counted.pair(), range(50), via=via, checkpoint=path, window=4))

    def busy_threads() -> list[str]:
        return sorted(
            thread.name for thread in threading.enumerate() if thread.name in ("counted", "asyncify-checkpoint")
        )

    counted = Counted()
    run()  # the background loop lives on, with files of its own
    path.unlink()
    counted.failing = failing
    files = sorted(Path("/dev/fd").iterdir())
    run()
    wait_until(lambda: not busy_threads())  # a thread is let go a moment after its last call

    assert left_tasks == 0
    assert sorted(Path("/dev/fd").iterdir()) == files


# --- keys and codecs ---


@pytest.mark.parametrize("way", WAYS)
def test_a_key_names_the_inputs(way: str, path: Path) -> None:
    """With `key=` two inputs of one key are one, and the file can be read by it."""
    counted = Counted(lambda message: message["id"])
    inputs = [{"id": "a", "at": 1}, {"id": "b", "at": 2}, {"id": "a", "at": 3}]

    found = collect(way, counted.pair(), inputs, checkpoint=path, key=lambda message: message["id"])
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT key, output FROM items ORDER BY key").fetchall()

    assert found == ["a", "b", "a"]
    assert sum(counted.calls.values()) == 2
    assert rows == [("a", '"a"'), ("b", '"b"')]


def test_a_key_that_is_no_string_is_refused(path: Path) -> None:
    """The message says what `key=` returned."""
    with pytest.raises(TypeError, match="returned 1"):
        list(each(Counted().pair(), [1], checkpoint=path, key=lambda value: value))


def test_an_input_without_a_fingerprint_needs_a_key(path: Path) -> None:
    """An object is not the same in the next process; the message says what to write."""
    with pytest.raises(TypeError, match="key=lambda"):
        list(each(Counted().pair(), [AIMessage("hi")], checkpoint=path))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(value=plain, other=plain)
def test_fingerprints_are_equal_for_equal_inputs_alone(value: Any, other: Any) -> None:
    """The order of a dict's keys plays no part; the type of a number does."""
    reordered = dict(reversed(value.items())) if isinstance(value, dict) else value

    assert fingerprint(value) == fingerprint(reordered)
    assert (fingerprint(value) == fingerprint(other)) == (
        json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
    )


def test_a_short_input_is_its_own_key() -> None:
    """The file can be read by it; a longer one has a digest, which no short one can look like."""
    assert fingerprint("tide") == "'tide'"
    assert fingerprint([1, None]) == "[1,None]"
    assert fingerprint("x" * 29) == f"'{'x' * 29}'"
    assert [len(fingerprint("x" * length)) for length in (28, 29, 30, 1000)] == [30, 31, 32, 32]
    assert fingerprint("x" * 30) != f"'{'x' * 30}'"


def test_a_fingerprint_is_the_same_in_every_version_of_python() -> None:
    """The characters that Python writes as they are become more with each; so none but the oldest is."""
    assert fingerprint("Zürich") == r"'Z\xfcrich'"
    assert fingerprint({"\U0001fae8": 1}) == r"{'\U0001fae8':1}"


def test_fingerprints_tell_types_apart() -> None:
    """What is equal to `==` and not the same to a function has another fingerprint."""
    values = [1, True, 1.0, "1", b"1", [1], (1,), {1: 1}, {"1": 1}, None, "None"]

    assert len({fingerprint(value) for value in values}) == len(values)


@settings(deadline=None)
@given(output=plain)
def test_json_gives_back_what_it_was_given(tmp_path_factory: pytest.TempPathFactory, output: Any) -> None:
    """An output from the file is that of the call."""
    with Checkpoint(tmp_path_factory.mktemp("json") / "run.sqlite", "work", "json") as checkpoint:
        checkpoint.record([checkpoint.row("key", output, None)])

        assert checkpoint.find("key") == (output,)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("output", [(1, 2), {1: 2}, AIMessage("hi"), [{"a": {1}}]])
def test_an_output_that_json_would_change_is_refused(way: str, path: Path, output: Any) -> None:
    """A tuple would come back as a list: the message says what to write instead."""
    with pytest.raises(CheckpointError, match='codec="pickle"'):
        collect(way, Counted(lambda _: output).pair(), [1], checkpoint=path)


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_output_takes_no_other_with_it(way: str, path: Path) -> None:
    """What ended beside it has been paid for, and is recorded."""
    counted = Counted(lambda value: (value,) if value == 1 else value)

    with pytest.raises(CheckpointError):
        collect(way, counted.pair(), range(4), checkpoint=path, window=4)
    with closing(sqlite3.connect(path)) as db:
        recorded = db.execute("SELECT count(*) FROM items").fetchone()[0]

    assert recorded == sum(counted.calls.values()) - 1


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_refused_output_is_a_failure_of_its_input_where_exceptions_are_returned(
    way: str, path: Path, *, ordered: bool
) -> None:
    """The error takes its place, beside the others; the file says why, and the next run calls that input alone."""
    counted = Counted(lambda value: (value,) if value == 1 else value)
    options: Any = {"checkpoint": path, "window": 4, "return_exceptions": True, "ordered": ordered}
    outputs: list[Any] = []
    for _ in range(2):
        found = collect(way, counted.pair(), [0, 1, 1, *range(2, 9)], **options)
        outputs = found if ordered else [output for _, output in sorted(found, key=lambda result: result[0])]

        assert [type(output) for output in outputs[1:3]] == [CheckpointError] * 2
        assert "can't keep an output of type tuple as it is" in str(outputs[1])
        assert [*outputs[:1], *outputs[3:]] == [0, *range(2, 9)]
    with closing(sqlite3.connect(path)) as db:
        (said, attempts), *others = db.execute("SELECT error, attempts FROM items WHERE error IS NOT NULL").fetchall()

    assert counted.calls == {value: attempts if value == 1 else 1 for value in range(9)}
    assert attempts > 1
    assert str(outputs[1]) in said
    assert not others


HALF = "\ud83d"
"""Half of a surrogate pair, as a text that was cut off has it, which UTF-8 can't write."""


class MuteError(Exception):
    """An error that can't say what it is."""

    def __str__(self) -> str:
        raise RuntimeError


@settings(deadline=None)
@given(text=st.text(st.sampled_from('a"\\\n\ud83d\ud83e\ude00\udcffü😀')))
@pytest.mark.parametrize("wrap", [str, lambda text: {text: [text]}], ids=["text", "key and item"])
def test_half_a_surrogate_pair_comes_back_as_it_was(
    wrap: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """JSON has an escape for it; for two halves in a row it has none, and they are refused."""
    output = wrap(text)
    with Checkpoint(tmp_path_factory.mktemp("half") / "run.sqlite", "work", "json") as checkpoint:
        if re.search("[\ud83d\ud83e][\ude00\udcff]", text):
            with pytest.raises(CheckpointError, match="two surrogates in a row"):
                checkpoint.row("key", output, None)
            return
        checkpoint.record([checkpoint.row("key", output, None)])

        assert checkpoint.find("key") == (output,)


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_can_not_be_written_takes_no_other_with_it(way: str, path: Path) -> None:
    """An output is refused with the way out; what ended beside it is recorded."""
    counted = Counted(lambda value: "\ud83d" + "\ude00" if value == 1 else value)

    with pytest.raises(CheckpointError, match='in a row; write codec="pickle" and name a new file, or return plain'):
        collect(way, counted.pair(), range(4), checkpoint=path, window=4)
    with closing(sqlite3.connect(path)) as db:
        recorded = db.execute("SELECT count(*) FROM items").fetchone()[0]

    assert recorded == sum(counted.calls.values()) - 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("error", "says"), [(LookupError(HALF), r"LookupError: \ud83d"), (MuteError(), "MuteError")], ids=["half", "mute"]
)
def test_any_error_can_be_recorded(way: str, path: Path, error: Exception, says: str) -> None:
    """Whatever an error says, or fails to say, it is a failure like others."""

    def call(value: int) -> int:
        if value == 1:
            raise error
        return value

    found = collect(way, Dual(call, name="call"), range(4), checkpoint=path, return_exceptions=True)
    with closing(sqlite3.connect(path)) as db:
        recorded = db.execute("SELECT error FROM items ORDER BY error").fetchall()

    assert found == [0, error, 2, 3]
    assert recorded == [(None,), (None,), (None,), (says,)]


@pytest.mark.parametrize("way", WAYS)
def test_equal_inputs_have_outputs_of_their_own(way: str, path: Path) -> None:
    """What one is changed to is not seen in the other, as it is not in a later run either."""

    def slow(value: str) -> dict[str, Any]:
        time.sleep(0.02)  # so that the second comes while the first is in flight, in threads as well
        return {"value": value}

    outputs = collect(way, Counted(slow).pair(), ["a", "a", "b"], checkpoint=path)
    outputs[0]["row"] = 0

    assert outputs == [{"value": "a", "row": 0}, {"value": "a"}, {"value": "b"}]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_key_is_raised_in_its_place(way: str, path: Path) -> None:
    """The results of all inputs before it are yielded first."""

    def key(value: int) -> str:
        if value == 3:
            raise LookupError("no id")
        return str(value)

    def call(value: int) -> int:
        time.sleep(0.01)
        return value

    async def call_async(value: int) -> int:
        await asyncio.sleep(0.01)
        return value

    done: list[int] = []
    pair: Pair = Dual(call, call_async, name="call")
    with pytest.raises(LookupError, match="no id"):
        collect(way, pair, range(5), checkpoint=path, key=key, progress=lambda told: done.append(told.done))

    assert done == [1, 2, 3]


def no_id(document: Document) -> str:
    """Fail to name an input."""
    raise LookupError(document)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize(("key", "output"), [(no_id, 1), (lambda _: "one", (1,))], ids=["key", "output"])
def test_an_error_of_key_or_of_the_codec_lets_the_inputs_go(
    way: str, path: Path, key: Callable[[Document], str], output: object, *, returned: bool
) -> None:
    """They are not left to a garbage collection."""
    pair: Pair = Dual(lambda _: output, name="constant")

    async def arun(inputs: list[Document]) -> None:
        with suppress(LookupError, CheckpointError):  # here, for `asyncio.run` itself keeps what it raises
            [_ async for _ in aeach(pair, inputs, checkpoint=path, key=key, return_exceptions=returned)]

    def run(inputs: list[Document]) -> None:
        if way == "aeach":
            asyncio.run(arun(inputs))
            return
        with suppress(LookupError, CheckpointError):
            collect(way, pair, inputs, checkpoint=path, key=key, return_exceptions=returned)

    gone = threading.Event()
    inputs = [Document()]
    weakref.finalize(inputs[0], gone.set)
    run(inputs)
    del inputs

    assert gone.wait(SAFETY_NET)  # a thread may still be on its way out


async def test_what_can_not_be_kept_does_not_hide_why_a_stream_was_left(path: Path) -> None:
    """A call that answers its cancellation with what JSON can't keep is lost, not the error that ended the stream."""

    async def call(value: int) -> Any:
        if value == 0:
            raise LookupError("first")
        try:
            await asyncio.sleep(SAFETY_NET)
        except asyncio.CancelledError:
            return (value,)

    with pytest.raises(LookupError, match="first"):
        async for _ in aeach(Pair(lambda value: value, call, name="call"), [0, 1], checkpoint=path):
            pass


def test_an_output_that_no_row_can_hold_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no other with it, and nobody is told to delete the file."""
    monkeypatch.setattr(checkpoint_module, "_LARGEST", 10)
    counted = Counted(lambda value: "x" * value)

    with pytest.raises(CheckpointError, match=r"too large to keep: 22 characters or bytes, and 10 is the most$"):
        list(each(counted.pair(), [1, 20, 2], checkpoint=path, ordered=False))
    with closing(sqlite3.connect(path)) as db:
        recorded = db.execute("SELECT output FROM outputs").fetchall()

    assert ('"x"',) in recorded


class Escaping(str):
    """A text that escapes what is added to it, as templates have it."""

    __slots__ = ()

    def __add__(self, other: str) -> "Escaping":
        return Escaping(str.__add__(self, other.replace('"', "&quot;")))


def test_a_key_of_a_subclass_is_the_text_that_it_is(path: Path) -> None:
    """What the subclass does when it is added to changes nothing."""
    counted = Counted()
    for _ in range(2):
        assert list(each(counted.pair(), ["a"], checkpoint=path, key=Escaping)) == ["a" * 10]

    assert counted.calls == {"a": 1}


def test_a_very_long_number_is_known_again(path: Path) -> None:
    """Python writes no more than 4,300 digits."""
    counted = Counted(lambda _: 1)
    numbers = [10**5000, 10**5000 + 1, -(10**5000), [10**5000]]
    for _ in range(2):
        assert list(each(Pair(counted.__call__, name="long"), numbers[:3], checkpoint=path)) == [1, 1, 1]

    assert set(counted.calls.values()) == {1}
    assert len({fingerprint(number) for number in numbers}) == 4


def test_a_key_that_can_not_be_written_is_refused(path: Path) -> None:
    """The message says what `key=` returned."""
    with pytest.raises(ValueError, match=r"UTF-8 can write, and it returned '.ud83d'"):
        list(each(Counted().pair(), [1], checkpoint=path, key=lambda _: HALF))


async def test_a_stream_that_is_cancelled_while_it_opens_the_file_closes_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the cancellation comes, no connection is left."""
    openings: list[Future[Any]] = []

    class Recording(ThreadPool):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            openings.append(super().submit(fn, *args, **kwargs))
            return openings[-1]

    monkeypatch.setattr(flow, "ThreadPool", Recording)
    for turns in range(4):
        results = aeach(Counted().pair(), [1], checkpoint=path)
        opening = asyncio.create_task(anext(results))
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        async with asyncio.timeout(SAFETY_NET):
            # The file is opened and then closed in a thread: only when it has been opened does its log tell.
            while not all(future.done() for future in openings) or len(list(path.parent.iterdir())) > 1:  # noqa: ASYNC110  (a thread does it)
                await asyncio.sleep(0.01)

    assert openings


class _OneWay:
    """What pickle takes and does not give back."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


@pytest.mark.parametrize("way", WAYS)
def test_what_pickle_does_not_give_back_is_told_at_once(way: str, path: Path) -> None:
    """And not by the next run, which would find a call that has been paid for and is lost."""
    counted = Counted(lambda _: _OneWay())
    with pytest.raises(CheckpointError, match=r"an output of type _OneWay as it is: .*; return what pickle gives back"):
        collect(way, counted.pair(), [1], checkpoint=path, codec="pickle")

    assert collect(way, Counted().pair(), [1], checkpoint=path, codec="pickle") == [10]


@pytest.mark.parametrize("way", WAYS)
def test_what_can_not_be_read_back_any_more_is_told(way: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of an output may be gone by the next run: that is no reason to pay for the call again."""
    module = ModuleType("of_an_output")
    exec("class Output: pass", vars(module))  # noqa: S102  (as it would be imported)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, module.__name__, module)
        collect(way, Counted(lambda _: module.Output()).pair(), [1], checkpoint=path, codec="pickle")
    counted = Counted(lambda _: None)

    with pytest.raises(CheckpointError, match=r"can't read back the output of '1': No module named 'of_an_output'"):
        collect(way, counted.pair(), [1], checkpoint=path, codec="pickle")
    assert counted.calls == {}


@pytest.mark.parametrize("way", WAYS)
def test_pickle_keeps_any_output(way: str, path: Path) -> None:
    """A message comes back as it was."""
    counted = Counted(lambda _: (AIMessage("hi"), {1}))

    first = collect(way, counted.pair(), [1], checkpoint=path, codec="pickle")

    assert collect(way, counted.pair(), [1], checkpoint=path, codec="pickle") == first == [(AIMessage("hi"), {1})]
    assert counted.calls == {1: 1}


# --- files that are refused ---


def test_a_file_of_another_runnable_is_refused(path: Path) -> None:
    """Both are named."""
    list(each(Counted().pair("one"), [1], checkpoint=path))

    with pytest.raises(CheckpointError, match=r"runnable '\w+\.Counted\.one', and this is '\w+\.Counted\.two'"):
        list(each(Counted().pair("two"), [1], checkpoint=path))


def test_a_file_of_another_pipe_is_refused(path: Path) -> None:
    """A pipe is told by its steps."""
    one, two = Counted().pair("one"), Counted().pair("two")
    list(each(one | two, [1], checkpoint=path))

    with pytest.raises(CheckpointError, match=r"'\S+\.one \| \S+\.two', and this is '\S+\.two \| \S+\.one'"):
        list(each(two | one, [1], checkpoint=path))


def test_a_file_of_other_bound_arguments_is_refused(path: Path) -> None:
    """What `bind` gives to every call makes other outputs of the same inputs, so both are told."""

    def price(value: int, currency: str = "EUR", rate: object = None) -> str:
        return f"{value} {currency}"

    pair, other = Dual(price, name="price"), Counted().pair("other")
    list(each(pair.bind(currency="USD", rate=object()) | other, [1], checkpoint=path))
    list(each(pair.bind(currency="USD", rate=object()) | other, [1], checkpoint=path))

    said = r"'[\w.<>]+\.price\(currency=(\w{16}), rate=object\) \| \w+\.Counted\.other'"
    with pytest.raises(CheckpointError, match=f"{said}, and this is {said}") as refused:
        list(each(pair.bind(currency="JPY", rate=object()) | other, [1], checkpoint=path))
    assert len(set(re.findall(said, str(refused.value)))) == 2


def test_a_bound_secret_stands_neither_in_the_file_nor_in_an_error(path: Path) -> None:
    """What `bind` and `configurable` give may be a key to something."""
    pair = Dual(suffixed, name="suffixed")
    list(each(pair.bind(suffix="sk-1").with_config(configurable={"key": "sk-2"}), ["a"], checkpoint=path, key=str))

    with pytest.raises(CheckpointError) as refused:
        list(each(pair.bind(suffix="sk-3").with_config(configurable={"key": "sk-4"}), ["a"], checkpoint=path, key=str))
    with closing(sqlite3.connect(path)) as db:
        (about,) = db.execute("SELECT group_concat(value) FROM about").fetchone()

    assert "sk-" not in str(refused.value)
    assert "sk-" not in about


def suffixed(value: str, suffix: str = "") -> str:
    """Return a text with something behind it."""
    return value + suffix


def upper(value: str) -> str:
    """Return a text in capitals."""
    return value.upper()


async def aupper(value: str) -> str:
    """Return a text in capitals."""
    return value.upper()


def failing(value: str) -> str:
    """Raise."""
    raise LookupError(value)


def branched(then: Pair) -> RunnableBranch[Any, Any]:
    """Return a branch."""
    return RunnableBranch((bool, then), same)


def chosen(other: Pair) -> Any:
    """Return what is configured to be another runnable."""
    alternatives = theirs.configurable_alternatives(ConfigurableField(id="which"), other=other)
    return alternatives.with_config(configurable={"which": "other"})


@dataclass
class Desk:
    """Something that is known by its fields."""

    rate: float

    @dual
    def price(self, amount: float) -> float:
        """Return the price of an amount."""
        return self.rate * amount

    def plain(self, fee: float, amount: float) -> float:
        """Return the price of an amount and a fee."""
        return self.rate * amount + fee


class Shop:
    """Something that is known by nothing but its class."""

    @dual
    def price(self, amount: float) -> float:
        """Return the price of an amount."""
        return amount


class Stall:
    """The same of another class."""

    @dual
    def price(self, amount: float) -> float:
        """Return the price of an amount."""
        return 0.9 * amount


def parse_of(module: str) -> Callable[[str], str]:
    """Return a function that is written in a module of this name."""
    names: dict[str, Any] = {"__name__": module}
    exec("def parse(value): ...", names)  # noqa: S102
    return cast("Callable[[str], str]", names["parse"])


class Model(BaseModel):
    """The same of pydantic."""

    model_config = ConfigDict(ignored_types=(Dual,))
    rate: float

    @dual
    def price(self, amount: float) -> float:
        """Return the price of an amount."""
        return self.rate * amount


ends, raises, same = Dual(suffixed), Dual(failing), Dual(str, name="same")
theirs = RunnableLambda(suffixed) | RunnableLambda(upper)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((ends | same).bind(suffix="1"), (ends | same).bind(suffix="2")),
        (theirs.bind(suffix="1"), theirs.bind(suffix="2")),
        (same, same.map()),
        (raises.with_fallbacks([same]), raises.with_fallbacks([Dual(upper)])),
        (branched(same), branched(Dual(upper))),
        (RunnablePassthrough.assign(a=same), RunnablePassthrough.assign(a=Dual(upper))),
        (chosen(same), chosen(Dual(upper))),
        (same.with_config(configurable={"to": "EUR"}), same.with_config(configurable={"to": "USD"})),
        (Dual(partial(suffixed, suffix="1")), Dual(partial(suffixed, suffix="2"))),
        (same | Dual(partial(max, 1)), same | Dual(partial(max, 2))),
        (RunnableLambda(partial(suffixed, suffix="1")), RunnableLambda(partial(suffixed, suffix="2"))),
        (Desk(1).price, Desk(2).price),
        (Dual(partial(Desk(1).plain, 1)), Dual(partial(Desk(2).plain, 1))),
        (Model(rate=1).price, Model(rate=2).price),
        (Dual(parse_of("one")), Dual(parse_of("other"))),
        (Dual(parse_of("one"), name="parse_all"), Dual(parse_of("other"), name="parse_all")),
        (RunnableLambda(parse_of("one")).bind() | str, RunnableLambda(parse_of("other")).bind() | str),
        (Dual(partial(parse_of("one")), name="parse"), Dual(partial(parse_of("other")), name="parse")),
        (Shop().price, Stall().price),
    ],
    ids=[
        *("pipe.bind", "theirs.bind", "map", "fallbacks", "branch", "assign", "alternatives", "configurable"),
        *("partial", "partial by place", "partial of theirs", "dataclass", "partial of a method", "pydantic"),
        *("module", "module and name", "module in a pipe of theirs", "module of a partial", "class"),
    ],
)
def test_a_file_of_work_with_other_parts_is_refused(path: Path, one: Any, other: Any) -> None:
    """Whatever a runnable is made of, its parts tell it from another of the same kind."""
    Checkpoint(path, work_of(one), "json").__exit__()
    Checkpoint(path, work_of(one), "json").__exit__()

    with pytest.raises(CheckpointError, match="this is"):
        Checkpoint(path, work_of(other), "json")


def test_a_function_of_the_program_itself_is_known_in_other_processes() -> None:
    """Its module has one name when it is run, another in a process that was spawned, and neither says which it is."""
    program, spawned = (work_of(Dual(parse_of(module))) for module in ("__main__", "__mp_main__"))

    assert program == spawned == "parse"


def test_a_stub_tells_more_than_the_functions_behind_it() -> None:
    """Two pairs of the functions of one module may be written in two."""
    pairs: list[Any] = [dual(sync=upper, async_=aupper)(cast("Any", parse_of(module))) for module in ("one", "other")]

    assert [work_of(pair) for pair in pairs] == ["one.parse", "other.parse"]


class Upper:
    """An object that is called."""

    def __call__(self, text: str) -> str:
        return text.upper()


class Lower(Upper):
    """Another one."""

    def __call__(self, text: str) -> str:
        return text.lower()


def each_upper(chunks: Iterator[str]) -> Iterator[str]:
    """Stream in upper case."""
    yield from map(str.upper, chunks)


def test_what_has_no_name_of_its_own_is_told_by_what_it_is_made_of() -> None:
    """A partial by its function, an object by its class, and a generator in a pipe by where it is written."""
    runnables: list[Runnable[Any, Any]] = [
        Dual(partial(str.replace, "a")),
        Dual(partial(str.split, "a")),
        Dual(Upper()),
        Dual(Lower()),
        RunnableLambda(Upper()),
        RunnableLambda(str.upper) | each_upper,
    ]
    names = [work_of(runnable) for runnable in runnables]

    assert len(set(names)) == len(names)
    assert names[2:] == [
        f"{__name__}.Upper.Dual",
        f"{__name__}.Lower.Dual",
        f"{__name__}.Upper.RunnableLambda",
        f"str.upper | {__name__}.each_upper",
    ]


def test_a_file_of_another_version_is_refused_and_named(path: Path) -> None:
    """It is one of ours, and what is in it may have been dear."""
    list(each(Counted().pair(), [1], checkpoint=path))
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 4")

    with pytest.raises(CheckpointError, match=r"of another version of asyncify \(its format is 4, ours \d+\)"):
        list(each(Counted().pair(), [1], checkpoint=path))


def test_a_file_of_another_codec_is_refused(path: Path) -> None:
    """Both are named."""
    list(each(Counted().pair(), [1], checkpoint=path))

    with pytest.raises(CheckpointError, match="codec 'json', and this is 'pickle'"):
        list(each(Counted().pair(), [1], checkpoint=path, codec="pickle"))


@pytest.mark.parametrize("first", [None, str], ids=["by-input", "by-key"])
def test_a_file_of_other_keys_is_refused(path: Path, first: Callable[[Any], str] | None) -> None:
    """The `"1"` that `key=` gives for an input may be another than the 1 that is written so."""
    list(each(Counted().pair(), [1], checkpoint=path, key=first))

    with pytest.raises(CheckpointError, match=r"keys '.*', and this is '.*'; give this work a file of its own"):
        list(each(Counted().pair(), [1], checkpoint=path, key=str if first is None else None))


def test_a_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    """Another program's tables are as they were."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()

    with pytest.raises(CheckpointError, match="an SQLite file of another program"):
        list(each(Counted().pair(), [1], checkpoint=path))

    assert path.read_bytes() == before


def damage_header(path: Path) -> None:
    """Write over the first bytes."""
    path.write_bytes(b"no database" + path.read_bytes()[11:])


def damage_pages(path: Path) -> None:
    """Write over all pages but the first."""
    data = path.read_bytes()
    path.write_bytes(data[:4096] + random.Random(0).randbytes(len(data) - 4096))


def cut_off(path: Path) -> None:
    """Drop the second half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_a_name(path: Path) -> None:
    """Write over a letter of the schema, so that sqlite's own message is no text."""
    path.write_bytes(path.read_bytes().replace(b"CREATE VIEW items", b"CREATE\xd0VIEW items"))


@pytest.mark.parametrize("damage", [damage_header, damage_pages, damage_a_name, cut_off])
def test_a_damaged_file_is_refused(path: Path, damage: Callable[[Path], None]) -> None:
    """The message names the file and says what to do; nothing is called."""
    counted = Counted()
    list(each(counted.pair(), range(500), checkpoint=path))
    damage(path)
    before = sum(counted.calls.values())

    with pytest.raises(CheckpointError, match=r"run\.sqlite.*delete the file"):
        list(each(counted.pair(), range(500), checkpoint=path))

    assert sum(counted.calls.values()) == before


@pytest.mark.parametrize(
    "damage",
    [
        """UPDATE outputs SET output = '{}' WHERE key = 'damaged'""",
        """UPDATE outputs SET output = x'7b7d' WHERE key = 'damaged'""",
        """UPDATE outputs SET output = 7 WHERE key = 'damaged'""",
        """UPDATE outputs SET checksum = 7 WHERE key = 'damaged'""",
        """UPDATE outputs SET key = x'7b7d' WHERE key = 'damaged'""",
        """UPDATE outputs SET key = 'damagee' WHERE key = 'damaged'""",
        """DELETE FROM outputs WHERE key = 'damaged'""",
    ],
)
def test_an_output_that_is_not_what_was_recorded_is_refused(path: Path, damage: str) -> None:
    """A flipped bit that leaves the file an SQLite file makes no other output of it."""
    with Checkpoint(path, "work", "json") as checkpoint:
        checkpoint.record([checkpoint.row(key, [], None) for key in ("whole", "damaged")])
        checkpoint._writer.execute(damage)

        assert checkpoint.find("whole") == ([],)
        with pytest.raises(CheckpointError, match=r"damaged \(the output of 'damaged'\); .*delete the file"):
            checkpoint.find("damaged")


def test_a_flipped_bit_never_makes_another_output(path: Path) -> None:
    """Wherever it is, the file is refused, or gives what was recorded, or at worst has an input called again."""
    outputs = {f"question {number}": f"answer {number}" for number in range(40)}
    with Checkpoint(path, "work", "json") as checkpoint:
        checkpoint.record([checkpoint.row(key, output, None) for key, output in outputs.items()])
    whole = path.read_bytes()
    ends: Counter[str] = Counter()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            with Checkpoint(path, "work", "json") as checkpoint:
                found = {key: checkpoint.find(key) for key in outputs}
        except CheckpointError:
            ends["refused"] += 1
        else:
            assert all(output in (None, (outputs[key],)) for key, output in found.items())
            ends["opened"] += 1
    path.unlink()

    assert ends["refused"]
    assert ends["opened"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere/run.sqlite", "there is no directory {}/nowhere: make it, or name another path"),
        ("~/run.sqlite", "there is no directory {}/~: expand the ~, by Path(...).expanduser()"),
        ("notes.md/run.sqlite", "see to the disk and its permissions, or name another path"),
        ("notes.md/nowhere/run.sqlite", "see to the disk and its permissions, or name another path"),
        ("", "see to the disk and its permissions, or name another path"),
    ],
)
def test_a_path_that_can_not_be_opened_is_refused(tmp_path: Path, name: str, says: str) -> None:
    """A directory that is not there is named."""
    (tmp_path / "notes.md").touch()

    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name}: unable to open database file; ")) as told:
        list(each(Counted().pair(), [1], checkpoint=tmp_path / name))
    assert str(told.value).endswith(says.format(tmp_path))


def other_program(path: Path, begin: str) -> sqlite3.Connection:
    """Return a connection of somebody else's, in the midst of something."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA user_version = 0")  # so that there is a file
    db.execute(begin)
    return db


def test_a_file_that_another_process_is_just_making_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes that begin at the same moment none is refused: SQLite itself does not wait in this one place."""
    with closing(other_program(path, "BEGIN IMMEDIATE")) as other:
        monkeypatch.setattr(checkpoint_module, "sleep", lambda _: other.execute("COMMIT"))
        with Checkpoint(path, "work", "json") as checkpoint:
            assert not other.in_transaction
            assert checkpoint.find("key") is None


def test_a_file_that_stays_locked_is_not_called_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to delete what another process holds."""
    monkeypatch.setattr(checkpoint_module, "_BUSY_SECONDS", 0.001)
    with (
        closing(other_program(path, "BEGIN EXCLUSIVE")),
        pytest.raises(CheckpointError, match="database is locked; another process has it for itself"),
    ):
        Checkpoint(path, "work", "json")


def test_a_full_disk_is_not_called_damage(path: Path) -> None:
    """What is in the file is still there, and the message does not say to delete it."""
    with Checkpoint(path, "work", "json") as checkpoint:
        checkpoint.record([checkpoint.row("small", 1, None)])
        checkpoint._writer.execute("PRAGMA max_page_count = 10")
        with pytest.raises(CheckpointError, match="full; see to the disk"):
            checkpoint.record([checkpoint.row("large", "x" * 100_000, None)])
    with Checkpoint(path, "work", "json") as checkpoint:
        assert (checkpoint.find("small"), checkpoint.find("large")) == ((1,), None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("failures", [1, 2])
def test_a_result_outlives_a_failure_to_record_it(
    way: str, failures: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream ends with the error and yields no more; as it is left it tries once more, and closes the file."""
    counted = Counted()
    record = Checkpoint.record
    failed = itertools.count(1)

    def fail_first(self: Checkpoint, rows: Any) -> None:
        if next(failed) <= failures:
            raise CheckpointError("database is locked")
        record(self, rows)

    monkeypatch.setattr(Checkpoint, "record", fail_first)
    told: list[Any] = []
    with pytest.raises(CheckpointError, match="database is locked"):
        collect(way, counted.pair(), range(3), checkpoint=path, progress=told.append)
    paid = set(counted.calls)
    with Checkpoint(path, work_of(counted.pair()), "json") as checkpoint:
        kept = {value for value in range(3) if checkpoint.find(fingerprint(value)) is not None}

    assert not told
    assert paid
    assert kept == (paid if failures == 1 else set())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fate", ["moved", "deleted"])
def test_a_file_that_is_taken_away_during_a_run_is_told(way: str, fate: str, tmp_path: Path) -> None:
    """What is recorded after that nobody would find; a file that is put back has it."""
    file, elsewhere = tmp_path / "run.sqlite", tmp_path / "elsewhere.sqlite"

    def take_away(_: object) -> None:
        if file.exists():
            file.rename(elsewhere)
            if fate == "deleted":
                elsewhere.unlink()

    pair = Counted().pair()
    with pytest.raises(CheckpointError, match=r"run.sqlite: the file was moved or deleted during the run"):
        collect(way, pair, range(9), checkpoint=file, window=1, progress=take_away)

    if fate == "moved":
        elsewhere.rename(file)
        with Checkpoint(file, work_of(pair), "json") as checkpoint:
            assert [checkpoint.find(str(value)) for value in (0, 1)] == [(0,), (10,)]


@pytest.mark.parametrize("way", WAYS)
def test_a_relative_path_is_of_the_directory_of_the_call(way: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program may be elsewhere by the time that the first result is asked for."""
    monkeypatch.chdir(path.parent)
    if way == "aeach":
        aresults = aeach(Counted().pair(), range(3), checkpoint=path.name)
        monkeypatch.chdir("/")
        asyncio.run(aread_all(aresults))
    else:
        results = each(Counted().pair(), range(3), checkpoint=path.name, via="threads" if way == "each" else "async")
        monkeypatch.chdir("/")
        read_all(results)

    assert path.exists()


def test_a_path_that_looks_like_a_uri_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some builds of SQLite take file:x for the file x."""
    monkeypatch.chdir(tmp_path)
    opened: list[Any] = []
    connect = sqlite3.connect

    def note(path: Any, **options: Any) -> sqlite3.Connection:
        opened.append(path)
        connection: sqlite3.Connection = connect(path, **options)
        return connection

    monkeypatch.setattr(sqlite3, "connect", note)
    read_all(each(Counted().pair(), range(3), checkpoint="file:run.sqlite"))

    assert set(opened) == {tmp_path / "file:run.sqlite"}
    assert opened[0].exists()


def test_a_program_may_go_to_another_directory_during_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked for where it was opened."""
    monkeypatch.chdir(path.parent)

    def leave(_: object) -> None:
        monkeypatch.chdir("/")

    assert list(each(Counted().pair(), range(3), checkpoint=path.name, window=1, progress=leave)) == [0, 10, 20]


# --- the death of a process, and two at once ---

WINDOW = 8


def work(way: str, directory: str, inputs: int, last_call: int | None = None) -> None:
    """Stream over a checkpoint in a process of its own; write down each call, and each result when it is there.

    After `last_call` calls none returns any more, so that a process that is to be killed is never too fast for that.
    """
    calls = os.open(f"{directory}/calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    results = os.open(f"{directory}/results", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def begin(value: int) -> float:
        os.write(calls, b"%d\n" % value)
        return 0.001 if last_call is None or next(number) < last_call else SAFETY_NET

    def call(value: int) -> int:
        time.sleep(begin(value))
        return value * 10

    async def call_async(value: int) -> int:
        await asyncio.sleep(begin(value))
        return value * 10

    def got(index: int, output: int) -> None:
        assert output == index * 10
        os.write(results, b"%d\n" % index)

    async def stream() -> None:
        async for index, output in aeach(pair, range(inputs), **options):
            got(index, output)

    number = itertools.count()
    pair: Pair = Dual(call, call_async, name="work")
    options: Any = {"checkpoint": f"{directory}/run.sqlite", "window": WINDOW, "ordered": False}
    if way == "aeach":
        asyncio.run(stream())
    else:
        via: Any = "async" if way == "each via async" else "threads"
        for index, output in each(pair, range(inputs), via=via, **options):
            got(index, output)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Return a context whose processes start quickly: they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["asyncify.flow", "hypothesis", "langchain_core.messages", "pytest"])
    return context


def lines(file: Path) -> list[int]:
    """Return the numbers that a process has written down."""
    return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.mark.parametrize("way", WAYS)
def test_kill_9_loses_at_most_the_calls_in_flight(way: str, tmp_path: Path, processes: ForkServerContext) -> None:
    """Killed at 20 random moments, a run ends with every input called, and few of them more than once."""
    inputs, kills = 400, 20
    moments = random.Random(way)

    for _ in range(kills):
        calls_before = len(lines(tmp_path / "calls"))
        results_before = set(lines(tmp_path / "results"))
        moment = calls_before + moments.randrange(16)
        child = processes.Process(target=work, args=(way, str(tmp_path), inputs, 18))
        child.start()
        while len(lines(tmp_path / "calls")) <= moment and child.is_alive():
            time.sleep(moments.random() / 500)
        child.kill()
        child.join(SAFETY_NET)
        called_now = lines(tmp_path / "calls")[calls_before:]

        assert child.exitcode == -9
        assert not results_before.intersection(called_now), "a call was paid for twice"

    child = processes.Process(target=work, args=(way, str(tmp_path), inputs))
    child.start()
    child.join(SAFETY_NET)
    calls = Counter(lines(tmp_path / "calls"))

    assert child.exitcode == 0
    assert set(calls) == set(range(inputs))
    assert sum(calls.values()) <= inputs + kills * WINDOW


def test_two_processes_on_one_file_do_not_corrupt_it(tmp_path: Path, processes: ForkServerContext) -> None:
    """Both finish at the same time over the same inputs; a third run finds all there and calls nothing."""
    children = [processes.Process(target=work, args=(way, str(tmp_path), 300)) for way in ("each", "aeach")]
    for child in children:
        child.start()
    for child in children:
        child.join(SAFETY_NET)
    calls_before = len(lines(tmp_path / "calls"))

    third = processes.Process(target=work, args=("each", str(tmp_path), 300))
    third.start()
    third.join(SAFETY_NET)

    assert [child.exitcode for child in (*children, third)] == [0, 0, 0]
    assert len(lines(tmp_path / "calls")) == calls_before
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@dataclass
class _Loader:
    data: list[Any]
    connection: object = field(init=False)

    @dual
    def load(self, index: int) -> object:
        return self.data[index]


def test_the_work_is_named_for_a_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked what a method's instance holds, which may be much; or not be there yet; or hold itself."""
    data: list[Any] = [1]
    data.append(data)
    load = _Loader(data).load

    assert list(each(load, [0], checkpoint=tmp_path / "run.sqlite")) == [1]
    monkeypatch.setattr(flow, "work_of", None)
    assert list(each(load, [0])) == [1]


def test_the_parts_of_a_field_that_holds_itself_are_named_once(tmp_path: Path) -> None:
    """A model's metadata may; and a list may be so long that each of its items may be looked at once only."""
    model = FakeListChatModel(responses=["x"] * 300_000, metadata={})
    metadata: dict[str, Any] = cast("dict[str, Any]", model.metadata)
    metadata["self"] = metadata
    chain = RunnableLambda(str, name="ask") | model | StrOutputParser()

    assert list(each(chain, [1], checkpoint=tmp_path / "run.sqlite")) == ["x"]


class _Empty:
    def __len__(self) -> int:
        return 0

    def __call__(self, value: int) -> int:
        return value


def test_a_callable_that_is_empty_is_named_as_well(tmp_path: Path) -> None:
    """What has a length of 0 is false, and there all the same."""
    assert list(each(RunnableLambda(_Empty(), name="empty"), [3], checkpoint=tmp_path / "run.sqlite")) == [3]


def test_nobody_is_told_to_delete_what_may_be_no_checkpoint(tmp_path: Path) -> None:
    """It may be a text that was named by mistake."""
    text = tmp_path / "notes.md"
    text.write_text("notes " * 1000)

    with pytest.raises(CheckpointError, match=r"not a database; name another path, or .* if it is a checkpoint"):
        list(each(Dual(str), [1], checkpoint=text))
    assert text.read_text() == "notes " * 1000


def test_the_text_of_a_model_is_kept_as_a_string(tmp_path: Path) -> None:
    """`prompt | model | StrOutputParser()` gives a string of a class of LangChain's own, which may be an input too."""
    calls: list[str] = []

    def ask(question: str) -> AIMessage:
        calls.append(question)
        return AIMessage(f"about {question}")

    chain = RunnableLambda(ask) | StrOutputParser() | {"answer": StrOutputParser()}
    texts = [AIMessage("tides").text, AIMessage("moons").text]
    for _ in range(2):
        outputs = list(each(chain, texts, checkpoint=tmp_path / "run.sqlite"))
        assert outputs == [{"answer": "about tides"}, {"answer": "about moons"}]
    assert list(each(chain, ["tides"], checkpoint=tmp_path / "run.sqlite")) == [{"answer": "about tides"}]
    assert sorted(calls) == ["moons", "tides"]


class _Interrupted(sqlite3.Connection):
    """A connection on which an interrupt comes as a statement has been executed."""

    at = ""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        done = super().execute(sql, *arguments)
        if self.at and sql.startswith(self.at):
            self.at = ""
            raise KeyboardInterrupt
        return done


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT", "COMMIT"])
def test_an_interrupt_of_a_transaction_leaves_none_open(statement: str) -> None:
    """To begin one takes as long as another process writes; and what is tried again then begins one anew."""
    with closing(sqlite3.connect(":memory:", isolation_level=None, factory=_Interrupted)) as db:
        db.execute("CREATE TABLE items (key)")
        db.at = statement
        with pytest.raises(KeyboardInterrupt), checkpoint_module._transaction(db):
            db.execute("INSERT INTO items VALUES (1)")

        assert not db.in_transaction
        with checkpoint_module._transaction(db):
            db.execute("INSERT INTO items VALUES (2)")
        assert db.execute("SELECT max(key) FROM items").fetchone() == (2,)
