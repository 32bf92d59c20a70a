"""A currency market on a loopback port: slow like a real service, and strict about its quota.

Run it by hand with `python examples/market_server.py`, or let `forex.py` start it. It prints one line of
JSON, such as `{"url": "http://127.0.0.1:40321"}`, once it accepts connections, and exits when its standard
input closes: a parent that holds the other end of that pipe leaves no server behind, however it ends.

| request | answer |
|---|---|
| `GET /pairs` | the pairs it quotes |
| `GET /rate/USD-JPY`, also `/news/` and `/analysis/` | the data, after the latency; 404 or 429 at once |
| `GET /stats` | what it saw since the last reset |
| `POST /reset` | forget what was seen and start with a fresh quota |
| `POST /at-once/12` | from now on serve 12 at once, whatever runs already |
"""

import argparse
import asyncio
import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from zlib import crc32

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Json = dict[str, Any]
T = TypeVar("T")

LIFETIME = 600  # seconds after which the process ends, whatever happens

# ----------------------------------------------------------------------------------------------------------
# The quota and the books: pure, time is an argument


class Window:
    """Count the events of the last second."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def add(self, now: float) -> None:
        self._times.append(now)

    def count(self, now: float) -> int:
        while self._times and self._times[0] <= now - 1:
            self._times.popleft()
        return len(self._times)

    def seconds_until_next_leaves(self, now: float) -> float:
        return self._times[0] + 1 - now


class Quota:
    """Admit at most `per_second` requests in any sliding second, and at most `at_once` at a time."""

    def __init__(self, per_second: int = 60, at_once: int = 25) -> None:
        self.per_second = per_second
        self.at_once = at_once
        self.in_flight = 0
        self._admitted = Window()

    def admit(self, now: float) -> int:
        """Let a request in and return 0, or return the whole seconds it should wait (`Retry-After`)."""
        if self._admitted.count(now) >= self.per_second:
            return math.ceil(self._admitted.seconds_until_next_leaves(now))
        if self.in_flight >= self.at_once:
            return 1
        self._admitted.add(now)
        self.in_flight += 1
        return 0

    def release(self) -> None:
        """Give back the place of an admitted request."""
        self.in_flight -= 1


@dataclass(slots=True)
class Books:
    """A quota, and what came of it since `opened`."""

    opened: float
    quota: Quota = field(default_factory=Quota)
    served: int = 0
    refused: int = 0
    peak_concurrency: int = 0
    peak_per_second: int = 0
    timeline: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    _arrivals: Window = field(default_factory=Window)

    def arrive(self, now: float) -> int:
        """Note a request that came; return what `Quota.admit` says about it."""
        self._arrivals.add(now)
        self.peak_per_second = max(self.peak_per_second, self._arrivals.count(now))
        retry_after = self.quota.admit(now)
        if retry_after:
            self.refused += 1
        else:
            self._note_in_flight(now)
        return retry_after

    def leave(self, now: float) -> None:
        """Note that an admitted request has its answer."""
        self.quota.release()
        self.served += 1
        self._note_in_flight(now)

    def _note_in_flight(self, now: float) -> None:
        in_flight = self.quota.in_flight
        self.peak_concurrency = max(self.peak_concurrency, in_flight)
        self.timeline.append((round(now - self.opened, 4), in_flight))

    def stats(self) -> Json:
        """Return the figures; the timeline is a list of [seconds since `opened`, requests in flight]."""
        return {
            "served": self.served,
            "refused": self.refused,
            "peak_concurrency": self.peak_concurrency,
            "peak_per_second": self.peak_per_second,
            "timeline": self.timeline,
        }


# ----------------------------------------------------------------------------------------------------------
# The data: made up, believable, and the same in every run

PER_DOLLAR = {
    "USD": 1.0, "EUR": 0.9217, "GBP": 0.7868, "JPY": 151.4, "CHF": 0.8847, "CAD": 1.3562, "AUD": 1.5221,
    "NZD": 1.6447, "SEK": 10.452, "NOK": 10.617, "SGD": 1.3448, "MXN": 16.751, "ZAR": 18.853,
}  # fmt: skip
PAIRS = (
    "EUR-USD", "GBP-USD", "AUD-USD", "NZD-USD", "USD-JPY", "USD-CHF", "USD-CAD", "USD-SEK", "USD-NOK",
    "USD-SGD", "USD-MXN", "USD-ZAR", "EUR-GBP", "EUR-JPY", "EUR-CHF", "EUR-CAD", "EUR-AUD", "EUR-NZD",
    "EUR-SEK", "EUR-NOK", "GBP-JPY", "GBP-CHF", "GBP-CAD", "GBP-AUD", "AUD-JPY", "AUD-NZD", "AUD-CAD",
    "CAD-JPY", "CHF-JPY", "NZD-JPY",
)  # fmt: skip
HEADLINES = (
    "{base} steady as traders wait for inflation figures",
    "{quote} slips after central bank keeps its rate",
    "{base} firms on strong retail sales",
    "{quote} bid as investors seek safety",
    "{pair} stays in its range in thin trading",
    "{base} eases as bond yields fall",
    "Exporters sell {base} at the month's end",
)
SOURCES = ("Morning wire", "Desk notes", "Market close", "Rates brief")


def rate(pair: str) -> Json:
    mid = _mid(pair)
    digits = _digits(pair)
    half_spread = mid * _between(0.00004, 0.00025, "spread", pair)
    return {
        "pair": pair,
        "mid": round(mid, digits),
        "bid": round(mid - half_spread, digits),
        "ask": round(mid + half_spread, digits),
    }


def news(pair: str) -> Json:
    base, quote = pair.split("-")
    first = crc32(pair.encode())
    stories = [
        {
            "headline": HEADLINES[(first + 2 * n) % len(HEADLINES)].format(base=base, quote=quote, pair=pair),
            "source": _pick(SOURCES, f"source {n}", pair),
            "minutes_ago": int(_between(2, 90, f"age {n}", pair)),
        }
        for n in range(3)
    ]
    return {"pair": pair, "stories": stories}


def analysis(pair: str) -> Json:
    mid, digits = _mid(pair), _digits(pair)
    volatility = _between(0.05, 0.16, "volatility", pair)
    momentum = _between(-1, 1, "momentum", pair)
    week = mid * volatility / math.sqrt(52)
    return {
        "pair": pair,
        "trend": "up" if momentum > 0.25 else "down" if momentum < -0.25 else "sideways",
        "momentum": round(momentum, 2),
        "volatility_percent": round(100 * volatility, 1),
        "support": round(mid - week, digits),
        "resistance": round(mid + week, digits),
        "recommendation": "buy" if momentum > 0.5 else "sell" if momentum < -0.5 else "hold",
    }


def _mid(pair: str) -> float:
    base, quote = pair.split("-")
    return PER_DOLLAR[quote] / PER_DOLLAR[base]


def _digits(pair: str) -> int:
    return 3 if pair.endswith("JPY") else 5


def _between(low: float, high: float, about: str, pair: str) -> float:
    return low + (high - low) * crc32(f"{about} {pair}".encode()) / 0xFFFFFFFF


def _pick(choices: Sequence[T], about: str, pair: str) -> T:
    return choices[crc32(f"{about} {pair}".encode()) % len(choices)]


# ----------------------------------------------------------------------------------------------------------
# The service


class Market:
    """The handlers, and the books they write."""

    def __init__(self, latency: float, per_second: int, at_once: int, *, retry_after: bool) -> None:
        self.latency = latency
        self.retry_after = retry_after
        self.per_second = per_second
        self.at_once = at_once
        self.open_books()

    def open_books(self) -> None:
        self.books = Books(opened=time.monotonic(), quota=Quota(self.per_second, self.at_once))

    def routes(self) -> list[Route]:
        return [
            Route("/pairs", self.pairs),
            Route("/rate/{pair}", self.slowly(rate)),
            Route("/news/{pair}", self.slowly(news)),
            Route("/analysis/{pair}", self.slowly(analysis)),
            Route("/stats", self.stats),
            Route("/reset", self.reset, methods=["POST"]),
            Route("/at-once/{count:int}", self.set_at_once, methods=["POST"]),
        ]

    def slowly(self, describe: Callable[[str], Json]) -> Callable[[Request], Awaitable[Response]]:
        """Make a handler that answers with `describe(pair)` after the latency, quota permitting."""

        async def handler(request: Request) -> Response:
            pair = request.path_params["pair"]
            if pair not in PAIRS:
                raise HTTPException(404, f"unknown pair {pair!r}, see /pairs")
            books = self.books  # a reset may put others in their place before this request leaves
            if retry_after := books.arrive(time.monotonic()):
                headers = {"Retry-After": str(retry_after)} if self.retry_after else None
                return JSONResponse({"error": "above the quota"}, 429, headers)
            try:
                await asyncio.sleep(self.latency)
            finally:
                books.leave(time.monotonic())
            return JSONResponse(describe(pair))

        return handler

    async def pairs(self, request: Request) -> Response:
        return JSONResponse(PAIRS)

    async def stats(self, request: Request) -> Response:
        return JSONResponse(self.books.stats())

    async def reset(self, request: Request) -> Response:
        self.open_books()
        return Response(status_code=204)

    async def set_at_once(self, request: Request) -> Response:
        self.at_once = self.books.quota.at_once = request.path_params["count"]
        return Response(status_code=204)


def stop_with_parent(server: uvicorn.Server) -> None:
    """Wait until standard input closes, then stop the server."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    server.should_exit = True


def serve(market: Market) -> None:
    """Serve on a free loopback port until standard input closes."""
    faulthandler.dump_traceback_later(LIFETIME, exit=True)
    app = Starlette(routes=market.routes())
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    # With the protocol named, asyncio turns off Nagle's algorithm, which would add 40 ms to each answer.
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener,
        contextlib.suppress(KeyboardInterrupt),
    ):
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
        threading.Thread(target=stop_with_parent, args=[server], daemon=True).start()
        server.run(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description="A currency market on a loopback port.")
    parser.add_argument("--latency", type=float, default=0.33, metavar="S", help="seconds to answer (0.33)")
    parser.add_argument("--per-second", type=int, default=60, metavar="N", help="requests served in any second (60)")
    parser.add_argument("--at-once", type=int, default=25, metavar="N", help="requests served at once (25)")
    parser.add_argument("--no-retry-after", action="store_true", help="refuse without saying how long to wait")
    chosen = parser.parse_args()
    serve(Market(chosen.latency, chosen.per_second, chosen.at_once, retry_after=not chosen.no_retry_after))


if __name__ == "__main__":
    main()
