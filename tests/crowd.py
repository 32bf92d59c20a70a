"""A crowd of calls that come to one limiter, from threads or from tasks, under a clock that moves only when told."""

import asyncio
import contextvars
import threading
from typing import Any

import httpx

from asyncify.limiter import Limiter
from asyncify.testing import FakeClock
from tests.waiting import SAFETY_NET, until


class Call:
    """One call through a limiter, on a thread or in a task."""

    def __init__(self, crowd: "Crowd", name: str, end: threading.Event | asyncio.Event, how: dict[str, Any]) -> None:
        self.name = name
        self.admitted = self.over = False
        self.error: BaseException | None = None
        self._crowd, self._how, self._end = crowd, how, end
        self._raises: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """End the call, with the error that it raises."""
        self._raises = error
        self._end.set()


class ThreadCall(Call):
    def __init__(self, crowd: "Crowd", name: str, **how: Any) -> None:
        self._ends = threading.Event()
        super().__init__(crowd, name, self._ends, how)
        self._thread = threading.Thread(target=contextvars.Context().run, args=(self._run,), daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            permit = self._crowd.limiter.enter(**self._how)
            self._crowd.admitted(self)
            self._ends.wait(SAFETY_NET)
            permit.leave(self._raises)
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            self.error = error
        self.over = True


class TaskCall(Call):
    def __init__(self, crowd: "Crowd", name: str, **how: Any) -> None:
        self._ends = asyncio.Event()
        super().__init__(crowd, name, self._ends, how)
        self.task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    async def _run(self) -> None:
        try:
            permit = await self._crowd.limiter.aenter(**self._how)
            self._crowd.admitted(self)
            await self._ends.wait()
            permit.leave(self._raises)
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            self.error = error
        self.over = True


class Crowd:
    """Calls that come to one limiter, each from a thread or a task of its own."""

    def __init__(self, kind: type[ThreadCall] | type[TaskCall]) -> None:
        self.kind = kind
        self.clock = FakeClock()
        self.order: list[str] = []
        self.calls: list[Call] = []

    def limiter_of(self, **limits: Any) -> Limiter:
        self.limiter = Limiter(clock=self.clock, **limits)
        return self.limiter

    def admitted(self, call: Call) -> None:
        self.order.append(call.name)
        call.admitted = True

    async def come(self, name: str = "", **how: Any) -> Call:
        """Let a call come, and wait until it is in, in the queue, or turned away."""
        before = self.limiter.stats()
        call = self.kind(self, name, **how)
        self.calls.append(call)
        await until(lambda: call.admitted or call.over or self.limiter.stats().waiting > before.waiting)
        return call

    async def come_all(self, names: str, **how: Any) -> list[Call]:
        return [await self.come(name, **how) for name in names]

    async def finish(self, call: Call, error: BaseException | None = None) -> None:
        call.finish(error)
        await until(lambda: call.over)
        await self.all_woken()

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.all_woken()

    async def all_woken(self) -> None:
        """Wait until everybody who was admitted knows it."""
        await until(lambda: len(self.order) == self.limiter.stats().admitted)

    async def disperse(self) -> None:
        """Let everybody go, and see that nothing is left behind."""

        def are_gone() -> bool:
            for call in self.calls:
                call.finish()
            self.clock.advance(100)  # each time: a thread may be slow to end, and the next call waits for the pace
            return all(call.over for call in self.calls)

        await until(are_gone)
        stats = self.limiter.stats()
        assert (stats.in_flight, stats.waiting) == (0, 0)


async def start_times(crowd: Crowd, count: int, step: float = 0.01) -> list[float]:
    """Return when so many calls that came together were admitted, ending each as soon as it is."""
    calls = await crowd.come_all("x" * count)
    times = [0.0] * crowd.limiter.stats().admitted
    while len(times) < count:
        for call in [call for call in calls if call.admitted and not call.over]:
            await crowd.finish(call)
        await crowd.advance(step)
        times += [crowd.clock.now()] * (crowd.limiter.stats().admitted - len(times))
    return times


class ServerError(Exception):
    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status_code = status
        self.response = httpx.Response(status, headers=headers)
