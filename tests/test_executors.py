"""A sync side that leaves the process: process pools, loky and Dask, all by `bridge=Executor`."""

import asyncio
import errno
import functools
import gc
import inspect
import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import loky  # type: ignore[import-untyped]  # it has no types
import pytest
from distributed import Client, LocalCluster
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.base import Runnable
from pydantic import BaseModel, ValidationError

from asyncify import BridgeError, DeadlockError, Dual, Limiter, PairError, concurrency, dual

SECONDS = 100  # a safety net, never the measure of anything

colour = ContextVar("colour", default="none")


class Late(Executor):
    """An executor whose engine is set by the test, after the functions below have been decorated with it."""

    def __init__(self) -> None:
        self.engine: Executor | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert self.engine is not None
        return self.engine.submit(fn, *args, **kwargs)


class LateProcesses(Late, ProcessPoolExecutor):
    """The same, known as a `ProcessPoolExecutor`, for functions of this module that go by name."""


engine = LateProcesses()


class Refused(Exception):  # noqa: N818  (as users name theirs)
    """An error whose constructor wants more than its `args`, which breaks a process pool that has to pickle it."""

    def __init__(self, message: str, *, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.response = threading.Lock()  # stands for the connection that a real one holds


class Halt(BaseException):
    """The same, of an error that ends a program."""

    def __init__(self, *, status_code: int) -> None:
        super().__init__(f"halt {status_code}")


class HttpError(Exception):
    """An error whose constructor makes a text of its argument."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code


class Several(ExceptionGroup[Exception]):
    """A group with a constructor of its own."""

    def __new__(cls, *codes: int) -> Self:
        return super().__new__(cls, "several", list(map(HttpError, codes)))

    def __init__(self, *codes: int) -> None:
        self.codes = codes


class Price(BaseModel):
    """What refuses a text with an error of pydantic's."""

    value: float


class DiskError(OSError):
    """An error of the system with a constructor of its own."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.EIO, "disk", path)


class UnmadeError(Exception):
    """An error that can't be made again, with a text of two lines."""

    def __new__(cls, _one: str, _two: str) -> Self:
        return super().__new__(cls)

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one}\n{two}")


@dual(bridge=engine)
def score(text: str, key: int = 1, retries: int = 0) -> tuple[int, int]:
    """Return a number and the process that it was made in; Dask would take `key` and `retries` for its own."""
    return len(text) * key + retries, os.getpid()


@dual(bridge=engine)
def fail(kind: str) -> None:
    """Raise."""
    if kind == "plain":
        raise KeyError("no such text")
    if kind == "stop":
        raise StopIteration
    if kind == "exit":
        sys.exit(3)
    if kind == "halt":
        raise Halt(status_code=4)
    if kind == "text":
        raise HttpError(404)
    if kind == "model":
        Price.model_validate({"value": "dear"})
    if kind == "disk":
        raise DiskError("prices.csv")
    if kind == "unmade":
        raise UnmadeError("first line", "second line")
    if kind == "group":
        raise ExceptionGroup("of two", [HttpError(404), Several(500, 503)])
    raise Refused("too many requests", status_code=429)


@dual(bridge=engine)
def see_config(text: str, config: RunnableConfig) -> dict[str, Any]:
    """Return the config that reaches the process."""
    return dict(config)


@dual(bridge=engine)
def give_lock(text: str) -> Any:
    """Return something that can't be pickled."""
    return threading.Lock()


class Odd(Exception):  # noqa: N818  (it is returned)
    """An error that its own `args` do not make again."""

    def __init__(self, *, text: str) -> None:
        super().__init__(text)


@dual(bridge=engine)
def give_odd(text: str) -> Exception:
    """Return what can be pickled, and not unpickled."""
    return Odd(text=text)


@dual(bridge=engine)
def die(text: str) -> None:
    """Take the process with it."""
    os._exit(1)


@dual(bridge=engine)
def count_calls(directory: str) -> None:
    """Leave a mark for each time that this really runs."""
    descriptor, _ = tempfile.mkstemp(dir=directory)
    os.close(descriptor)


class Scores:
    """Static and class methods that leave the process."""

    @staticmethod
    @dual(bridge=engine)
    def static(text: str) -> tuple[str, int]:
        """Return the text and the process."""
        return text, os.getpid()

    @classmethod
    @dual(bridge=engine)
    def of_class(cls, text: str) -> tuple[str, int]:
        """Return the class's name with the text, and the process."""
        return f"{cls.__name__} {text}", os.getpid()

    @staticmethod
    @dual(bridge=engine)
    def __private(text: str) -> tuple[str, int]:
        """Return the text and the process."""
        return text, os.getpid()

    def private(self) -> Dual[Any, tuple[str, int]]:
        """Return the private one."""
        return self.__private


def processes() -> Iterator[Executor]:
    """Start the processes of the standard library."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def loky_processes() -> Iterator[Executor]:
    """Start loky's processes."""
    pool = loky.ProcessPoolExecutor(1)
    yield pool
    pool.shutdown(wait=True, kill_workers=True)


def dask_processes() -> Iterator[Executor]:
    """Start a Dask cluster on this machine."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor(pure=False)


@pytest.fixture(scope="module", params=[processes, loky_processes, dask_processes], ids=["processes", "loky", "dask"])
def remote(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Set the engine of the functions above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these packages say among themselves is not what is tested
        started = request.param()
        engine.engine = next(started)
        yield engine.engine
        list(started)
        engine.engine = None
        gc.collect()


async def test_static_and_class_methods_run_in_another_process(remote):
    """They are found by the name of the class, under what wraps them."""
    static, its_process = await Scores.static.ainvoke("abc")
    of_class, other_process = await Scores.of_class.ainvoke("abc")

    assert (static, of_class) == ("abc", "Scores abc")
    assert os.getpid() not in (its_process, other_process)


async def test_a_private_method_runs_in_another_process(remote):
    """It is found by the name under which its class keeps it, which Python makes of the one that was written."""
    result, its_process = await Scores().private().ainvoke("abc")

    assert result == "abc"
    assert its_process != os.getpid()


async def test_a_call_runs_in_another_process(remote):
    """The decorated function finds its way by name, although that name means the pair now."""
    result, process = await score.ainvoke("abc")

    assert result == 3
    assert process != os.getpid()


async def test_arguments_reach_the_function_and_nobody_else(remote):
    """Keyword arguments that an executor knows itself are still the function's own."""
    result, _ = await score.acall("abc", key=2, retries=5)

    assert result == 11


async def test_an_error_comes_back_with_the_traceback_it_had(remote):
    """The error is the function's own, and what it was caused by shows the line in the other process."""
    with pytest.raises(KeyError, match="no such text") as caught:
        await fail.acall("plain")

    assert 'raise KeyError("no such text")' in str(caught.value.__cause__)


async def test_an_error_that_pickle_refuses_comes_back(remote):
    """An error with a keyword-only argument and a lock inside keeps its class, text and number; the pool lives on."""
    with pytest.raises(Refused, match="too many requests") as caught:
        await fail.acall("refused")

    assert caught.value.status_code == 429
    assert "lock" in str(caught.value.response)
    assert (await score.acall("abc"))[0] == 3


async def test_an_error_of_pydantics_comes_back(remote):
    """It can be pickled, though what it has for `args` then is not what it had."""
    with pytest.raises(ValidationError, match="valid number"):
        await fail.ainvoke("model")


async def test_an_error_of_the_system_keeps_its_number(remote):
    """It stands in no attribute that `vars` knows."""
    with pytest.raises(DiskError, match=r"disk: 'prices\.csv'") as caught:
        await fail.ainvoke("disk")

    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "prices.csv")


async def test_of_an_error_that_can_not_be_made_again_the_text_is_told(remote):
    """All of it, and its class."""
    with pytest.raises(BridgeError, match=r"UnmadeError: first line\nsecond line"):
        await fail.ainvoke("unmade")


async def test_an_error_comes_back_with_the_text_it_had(remote):
    """Its constructor does not make another text of its text."""
    with pytest.raises(HttpError) as caught:
        await fail.acall("text")

    assert (str(caught.value), caught.value.status_code) == ("HTTP 404", 404)


async def test_the_errors_of_a_group_come_back_as_they_were(remote):
    """Groups within the group too, whatever their constructors want."""
    with pytest.raises(ExceptionGroup, match="of two") as caught:
        await fail.acall("group")

    one, several = caught.value.exceptions
    assert isinstance(one, HttpError)
    assert str(one) == "HTTP 404"
    assert isinstance(several, Several)
    assert several.codes == (500, 503)
    assert list(map(str, several.exceptions)) == ["HTTP 500", "HTTP 503"]


async def test_stop_iteration_comes_back_as_a_runtime_error(remote):
    """As through a thread, `StopIteration` arrives as the cause of another error."""
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        await fail.acall("stop")


@pytest.mark.parametrize(("kind", "error", "text"), [("exit", SystemExit, "3"), ("halt", Halt, "halt 4")])
async def test_an_error_that_ends_a_program_ends_the_call_alone(remote, kind, error, text):
    """`sys.exit` raises where the call is awaited, as it would in this process; the pool lives on."""
    with pytest.raises(error) as caught:
        await fail.acall(kind)

    assert str(caught.value) == text
    assert (await score.acall("abc"))[0] == 3


async def test_of_a_config_what_can_travel_does(remote):
    """Tags, metadata and configurable reach the function; callbacks and a framework's own entries do not."""
    config: RunnableConfig = {
        "tags": ["t"],
        "metadata": {"m": 1},
        "configurable": {"user": "u", "__internal": threading.Lock()},
    }
    seen = await see_config.ainvoke("text", config)

    assert seen["tags"] == ["t"]
    assert seen["metadata"]["m"] == 1
    assert seen["configurable"] == {"user": "u"}
    assert "callbacks" not in seen


async def test_an_argument_that_can_not_be_pickled_is_told(remote):
    """An argument that can't travel gets an error that names the function and says what to do."""
    with pytest.raises(BridgeError, match=r"test_executors\.score .* can't be pickled: .* bridge=\"thread\""):
        await score.acall(threading.Lock())  # type: ignore[arg-type]  # that is the point


class Closed:
    """What raises an error of its own when it is to be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("the database is closed")


async def test_an_argument_that_raises_when_it_is_pickled_is_told(remote):
    """Whatever it raises, it is the argument that can't be pickled."""
    with pytest.raises(BridgeError, match=r"score .*the database is closed.* can't be pickled: .* bridge=\"thread\""):
        await score.acall(Closed())  # type: ignore[arg-type]  # that is the point


async def test_an_argument_that_can_not_be_read_is_told(remote):
    """Only this call fails: the pool lives on."""
    with pytest.raises(BridgeError, match=r"score .*: its arguments can't be read in its process \(TypeError: "):
        await score.acall([Odd(text="text")])  # type: ignore[arg-type]  # that is the point

    assert (await score.acall("abc"))[0] == 3


async def test_a_result_that_can_not_be_pickled_is_told(remote):
    """A result that can't travel gets an error that names its type."""
    with pytest.raises(BridgeError, match=r"give_lock \(.*\): its result, of type lock, can't be pickled"):
        await give_lock.acall("text")


async def test_a_result_that_can_not_be_read_is_told(remote):
    """What is packed there may not be what can be unpacked here."""
    with pytest.raises(BridgeError, match=r"give_odd .*: what it returned in its process can't be read here \(TypeErr"):
        await give_odd.acall("text")


async def test_equal_calls_all_run(remote, tmp_path):
    """Three equal calls are three calls, also where an executor takes functions for pure."""
    await asyncio.gather(*(count_calls.acall(str(tmp_path)) for _ in range(3)))

    assert len(list(tmp_path.iterdir())) == 3


async def test_the_middle_step_of_a_pipe_leaves_the_process(remote):
    """In a pipe the steps around it stay here."""

    async def here(value: Any) -> Any:
        return value, os.getpid()

    pipe: Runnable[Any, Any] = Dual(str.upper, here) | (lambda pair: pair[0]) | score | Dual(str, here)
    (_, process), after = await pipe.ainvoke("abc")

    assert process != os.getpid()
    assert after == os.getpid()


@pytest.fixture
def dask_as_it_comes() -> Iterator[None]:
    """Set Dask's own default as the engine of the functions above: an executor for pure functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = dask_processes()
        impure: Any = next(started)
        engine.engine = impure._client.get_executor()
        yield
        list(started)
        engine.engine = None


async def test_dasks_own_executor_does_not_make_one_call_of_equal_ones(dask_as_it_comes, tmp_path):
    """A Dask executor that was made without `pure=False` runs equal calls all the same."""
    await asyncio.gather(*(count_calls.acall(str(tmp_path)) for _ in range(3)))

    assert len(list(tmp_path.iterdir())) == 3


def test_a_function_without_a_name_is_refused_when_it_is_decorated():
    """The processes of the standard library import a function by name, so a lambda is told at once, with the cure."""
    with pytest.raises(PairError, match=r"is a lambda or is defined inside a function.* loky\.get_reusable_executor"):
        dual(lambda text: text, bridge=engine)


async def test_a_function_without_a_name_goes_where_code_is_sent():
    """A closure over local values is sent as it is by loky, which pickles code."""
    suffix = "!"
    pool = loky.ProcessPoolExecutor(1)
    try:
        pair = dual(lambda text: text + suffix, bridge=pool)

        assert await pair.acall("abc") == "abc!"
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def test_a_generator_is_refused():
    """An executor gives one result for a call, so a generator is refused when it is decorated."""

    def chunks(text: str) -> Iterator[str]:
        yield from text

    for executor in (engine, ThreadPoolExecutor(1)):
        with pytest.raises(PairError, match=r"is a generator, and .* can't hand on its chunks"):
            dual(chunks, bridge=executor)


def test_a_run_manager_is_refused():
    """The handlers of a run live in this process, so a function that wants them is refused when it is decorated."""

    def report(text: str, run_manager: Any) -> str:
        return text

    with pytest.raises(PairError, match="takes run_manager, whose handlers can't leave the process"):
        dual(report, bridge=engine)


def test_what_was_refused_is_not_registered():
    """A refused decoration leaves its name free."""
    with pytest.raises(PairError):
        dual(lambda text: text, bridge=engine, name="refused")

    dual(lambda text: text, name="refused")


async def test_threads_of_somebody_else_get_the_context():
    """A `ThreadPoolExecutor` runs the function with the caller's context variables, and none leaks out."""

    def paint(text: str) -> str:
        before = colour.get()
        colour.set("red")
        return before

    colour.set("blue")
    with ThreadPoolExecutor(1) as threads:
        pair = dual(paint, bridge=threads)

        assert await pair.acall("abc") == "blue"
        assert colour.get() == "blue"


async def test_a_coroutine_from_threads_of_somebody_else_is_awaited():
    """`lambda q: fetch(q)` over an async function gives the result, by whichever threads it runs."""

    async def fetch(text: str) -> str:
        return text.upper()

    with ThreadPoolExecutor(1) as threads:
        assert await dual(lambda text: fetch(text), bridge=threads).acall("abc") == "ABC"  # noqa: PLW0108


class Awaited:
    """An async function that notes how many are inside, at most; and whether all got out."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0

    async def __call__(self, text: str) -> str:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(0.001)
        finally:
            self.inside -= 1
        return text[3].upper()


async def test_a_coroutine_from_threads_of_somebody_else_is_awaited_within_the_limit():
    """The call has not ended when the thread has; an error of the coroutine gives the slot back, too."""
    awaited, limiter = Awaited(), Limiter(limit=2)
    with ThreadPoolExecutor(8) as threads:
        pair = concurrency(limiter=limiter)(dual(lambda text: awaited(text), name="awaited", bridge=threads))  # noqa: PLW0108
        results = await asyncio.gather(*(pair.acall(text) for text in ["abcd", "abc"] * 10), return_exceptions=True)

    assert [result if result == "D" else type(result) for result in results] == ["D", IndexError] * 10
    assert (awaited.most, limiter.stats().in_flight) == (2, 0)


async def test_a_coroutine_from_threads_of_somebody_else_is_cancelled_with_its_call():
    """And its slot is free."""
    inside, limiter = asyncio.Event(), Limiter(limit=1)

    async def stuck(text: str) -> None:
        inside.set()
        await asyncio.sleep(SECONDS)

    with ThreadPoolExecutor(1) as threads:
        pair = concurrency(limiter=limiter)(dual(lambda text: stuck(text), name="stuck", bridge=threads))  # noqa: PLW0108
        call = asyncio.create_task(pair.acall("abc"))
        await inside.wait()
        held = limiter.stats().in_flight
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    assert (held, limiter.stats().in_flight) == (1, 0)


async def leave(pair: Any, started: threading.Event) -> None:
    """Call a pair, and give the call up when its thread has begun."""
    call = asyncio.create_task(pair.acall("abcd"))
    await asyncio.to_thread(started.wait, SECONDS)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize("limited", [False, True])
async def test_a_coroutine_that_threads_of_somebody_else_make_too_late_is_closed(*, limited):
    """The call was given up while the thread ran: its slot is taken until then, and nobody is told of the coroutine."""
    started, go, limiter = threading.Event(), threading.Event(), Limiter(limit=1)
    made: list[Any] = []
    awaited = Awaited()

    def late(text: str) -> Any:
        started.set()
        assert go.wait(SECONDS)
        made.append(awaited(text))
        return made[0]

    with ThreadPoolExecutor(1) as threads:
        pair = dual(late, bridge=threads)
        await leave(concurrency(limiter=limiter)(pair) if limited else pair, started)
        held = limiter.stats().in_flight
        go.set()

    assert (held, limiter.stats().in_flight, awaited.most) == (int(limited), 0, 0)
    assert inspect.getcoroutinestate(made[0]) == inspect.CORO_CLOSED


async def test_a_cancelled_call_holds_its_slot_until_the_executor_is_done():
    """What an executor has begun runs on, so it counts against the limit for as long."""
    started, go = threading.Event(), threading.Event()

    def stuck(text: str) -> None:
        started.set()
        assert go.wait(SECONDS)

    limiter = Limiter(limit=1)
    with ThreadPoolExecutor(1) as threads:
        await leave(concurrency(limiter=limiter)(dual(stuck, bridge=threads)), started)
        held = limiter.stats().in_flight
        go.set()

    assert (held, limiter.stats().in_flight) == (1, 0)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("limited", [False, True])
async def test_a_cancelled_call_keeps_nothing_alive_when_the_executor_is_done(*, limited):
    """What it was called with goes at once, and not with the next garbage collection."""

    class Text(str):
        __slots__ = ("__weakref__",)

    started, go = threading.Event(), threading.Event()

    def stuck(text: str) -> None:
        started.set()
        assert go.wait(SECONDS)

    async def leave_with(pair: Any) -> weakref.ref[Text]:
        text = Text("abcd")
        call = asyncio.create_task(pair.acall(text))
        await asyncio.to_thread(started.wait, SECONDS)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        return weakref.ref(text)

    with ThreadPoolExecutor(1) as threads:
        pair = dual(stuck, bridge=threads)
        text = await leave_with(concurrency(limit=1)(pair) if limited else pair)
        go.set()
    await asyncio.sleep(0)  # the loop hears of the end

    assert text() is None


async def test_what_the_limiter_says_is_not_blamed_on_the_executor():
    """A call that could only wait for itself gets the limiter's own error."""
    limiter = Limiter(limit=1)
    pair = concurrency(limiter=limiter)(Dual(score.func))
    pair._furnish(bridge=engine)
    with limiter, pytest.raises(DeadlockError):
        await pair.acall("abc")


class Dropping(ThreadPoolExecutor):
    """An executor that is shut down, with all that waits in it, as soon as it has got a call."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        dropped: Future[Any] = Future()
        dropped.cancel()
        dropped.set_running_or_notify_cancel()
        return dropped


@pytest.mark.parametrize("by_name", [False, True], ids=["threads", "processes"])
async def test_a_call_that_the_executor_drops_is_told(by_name):
    """A call that is dropped when its executor is shut down is a failure: nobody has cancelled who awaits it."""
    executor = Dropping()
    limiter = Limiter(limit=1)
    pair = concurrency(limiter=limiter)(Dual(score.func))
    engine.engine = executor
    pair._furnish(bridge=engine if by_name else executor)
    with pytest.raises(BridgeError, match=r"score .* could not run it \(CancelledError: it was dropped\)"):
        await pair.acall("abc")
    engine.engine = None

    assert limiter.stats().in_flight == 0


async def test_an_executor_that_was_shut_down_is_told():
    """The error names the function and the executor, and the call's slot is free again."""
    pool = ProcessPoolExecutor(1)
    pool.shutdown()
    engine.engine = pool
    limiter = Limiter(limit=1)
    pair = concurrency(limiter=limiter)(Dual(score.func))
    pair._furnish(bridge=engine)
    with pytest.raises(BridgeError, match=r"score .*LateProcesses could not run it \(RuntimeError: .*shutdown"):
        await pair.acall("abc")
    engine.engine = None

    assert limiter.stats().in_flight == 0


async def test_a_pool_of_threads_that_was_shut_down_is_told():
    """As one of processes is."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    pair = concurrency(limit=1)(dual(lambda text: text, bridge=pool))
    with pytest.raises(BridgeError, match=r"ThreadPoolExecutor could not run it \(RuntimeError: .*shutdown"):
        await pair.acall("abc")

    assert isinstance(pair.limiter, Limiter)
    assert pair.limiter.stats().in_flight == 0


async def test_a_process_that_died_is_told():
    """A pool whose process has died is broken for good, and the error says so."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        engine.engine = pool
        with pytest.raises(BridgeError, match=r"a process of it has died, .* make a new one"):
            await die.acall("abc")
        engine.engine = None


MAIN = """
import asyncio, os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import loky  # type: ignore[import-untyped]  # it has no types
from asyncify import dual

processes = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
pool = loky.get_reusable_executor(max_workers=1)

@dual(bridge=processes)
def shout(text):
    return text.upper(), os.getpid()

@dual(bridge=pool)
def whisper(text):
    return text.lower(), os.getpid()

async def main():
    for pair in (shout, whisper):
        text, process = await pair.ainvoke("Abc")
        print(text, process != os.getpid())

if __name__ == "__main__":
    asyncio.run(main())
    processes.shutdown()
    pool.shutdown()
"""


def test_a_function_of_the_main_program_leaves_the_process(tmp_path):
    """What stands in the program itself is found by processes that start it again, and sent to those that do not."""
    done = run_program(tmp_path / "program.py", MAIN)

    assert (done.stdout, done.stderr) == ("ABC True\nabc True\n", "")


def run_program(path: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, to its end."""
    path.write_text(source)
    return subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=SECONDS, check=False, env=with_package()
    )


AT_EXIT = """
import asyncio, atexit
from concurrent.futures import Executor, Future
from asyncify import dual

class Here(Executor):
    def submit(self, fn, /, *args):
        done = Future()
        done.set_result(fn(*args))
        return done

def double(number):
    return 2 * number

@atexit.register
def last():
    print(asyncio.run(dual(double, bridge=Here()).ainvoke(21)))
"""


def test_a_pair_can_be_made_for_an_executor_as_the_program_ends(tmp_path: Path) -> None:
    """The module of process pools can't be imported any more by then."""
    done = run_program(tmp_path / "program.py", AT_EXIT)

    assert (done.stdout, done.stderr) == ("42\n", "")


OF_MAIN = """
import asyncio, functools, operator

import loky  # type: ignore[import-untyped]  # it has no types
from asyncify import concurrency, dual

pool = loky.get_reusable_executor(max_workers=1)

@dual
def add(number, by=1):
    return number + by

@dual(bridge=pool)
def names_another(number):
    return add(number) + add.invoke(number)

@dual(bridge=pool)
def names_itself(number, *, least=0):
    return number if number <= least else 1 + names_itself(number - 1)

@dual(bridge=pool)
def ping(number):
    return pong(number - 1) if number else "ping"

@dual
def pong(number):
    return ping(number - 1) if number else "pong"

@concurrency(limit=1)
@dual(bridge=pool)
def limited(number):
    return 2 * number

def factorial(number, *, least=0):
    return 1 if number <= least else number * both.invoke(number - 1)

async def afactorial(number, *, least=0):
    return 1

both = dual(sync=factorial, async_=afactorial)
floor = dual(functools.partial(operator.add, 1))  # whose module holds no pair

@dual(bridge=pool)
def names_a_function_of_a_pair(number):
    return factorial(number) + floor.invoke(number)

@dual(bridge=pool)
def names_limited(number):
    return limited(number)

class Unreadable:
    def __reduce__(self):
        return int, ("no number",)

unreadable = Unreadable()

@dual(bridge=pool)
def names_unreadable(number):
    return unreadable

async def main():
    refused = (names_unreadable, names_limited)
    for pair in (*refused, names_another, names_itself, ping, limited, names_a_function_of_a_pair):
        try:
            print(pair.name, await pair.ainvoke(3))
        except Exception as error:
            print(type(error).__name__, error)

if __name__ == "__main__":
    asyncio.run(main())
    pool.shutdown()
"""


def test_what_a_function_of_the_main_program_names_goes_with_it(tmp_path):
    """Where `__main__` is another program its pairs go as their functions; what can't be read costs one call alone."""
    done = run_program(tmp_path / "program.py", OF_MAIN)
    first, second, *others = done.stdout.splitlines()

    assert re.match(
        r"BridgeError names_unreadable: its code or its arguments can't be read in its .* \(ValueErr", first
    )
    assert re.match(r"BridgeError __main__\.names_limited .*: __main__\.limited .* has a limit, which holds in", second)
    assert others == ["names_another 8", "names_itself 3", "ping pong", "limited 6", "names_a_function_of_a_pair 10"]
    assert done.stderr == ""


LOCK = threading.Lock()


def scale(number: int, by: int) -> int:
    """Multiply under a lock, which no code can take with it."""
    with LOCK:
        return number * by


def logged(fn: Any) -> Any:
    """Decorate a pair, as a function that is not the pair."""

    @functools.wraps(fn)
    async def run(*args: Any) -> Any:
        return await fn.acall(*args)

    return run


@logged
@dual(bridge=engine)
def decorated_twice(number: int) -> int:
    """Have a name that is not the pair's."""
    return number + 1


async def test_processes_of_python_get_a_function_by_its_name_whoever_is_imported():
    """What loky and Dask send is the code: a partial of a function of a module goes by that one's name."""
    assert "cloudpickle" in sys.modules  # loky has imported it
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        engine.engine = pool
        by_name = dual(functools.partial(scale, by=2), name="by_name", bridge=engine)

        assert await by_name.ainvoke(3) == 6
        assert await decorated_twice(3) == 4


async def test_an_executor_of_this_process_runs_the_function_itself():
    """And not a copy of its code, with copies of what it is about."""
    numbers: list[int] = []
    here = Late()
    with ThreadPoolExecutor(1) as threads:
        here.engine = threads
        note = dual(lambda number: numbers.append(number), name="note_here", bridge=here)  # noqa: PLW0108
        await note.ainvoke(3)

    assert numbers == [3]


def with_package() -> dict[str, str]:
    """Return an environment in which a program anywhere finds this package."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_the_example_scores_the_same_by_each_engine():
    """The example's pipe, with its middle step in threads, processes and on Dask, gets the same scores."""
    example = Path(__file__).parents[1] / "examples" / "cpu_bound.py"
    done = subprocess.run(
        [sys.executable, example, "--texts", "4", "--words", "100"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=with_package(),
    )

    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["threads", "processes", "dask", "all"]
    assert "scored in this process" in done.stdout.splitlines()[0]
    assert "scored in this" not in "".join(done.stdout.splitlines()[1:])
