"""Texts are fetched, scored and stored; the scoring is work for the CPU, so it leaves the process.

Run it with `python examples/cpu_bound.py`, or with `--engines processes` alone if Dask is not installed. The pipe is
the same each time, fetch | score | store, and so are the two I/O pairs at its ends. What changes is one line: the
executor that the middle step is given. The exit status is 1 if two engines did not get the same scores.
"""

import argparse
import asyncio
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from typing import Any

import httpx

from asyncify import concurrency, dual
from asyncify.entries import Bridge

WORDS = ["market", "rate", "bond.", "yield", "central", "bank", "inflation.", "currency", "forecast", "growth", "risk"]
WORKERS = os.cpu_count() or 2

# ----------------------------------------------------------------------------------------------------------
# The work for the CPU: an ordinary function at the top of a module, where another process finds it


def score_text(document: dict[str, Any]) -> dict[str, Any]:
    """Count words and syllables and work out the Flesch reading ease (R. Flesch, 1948)."""
    words = re.findall(r"[a-z]+", document["text"].lower())
    sentences = max(len(re.findall(r"[.!?]+", document["text"])), 1)
    syllables = sum(max(len(re.findall(r"[aeiouy]+", word)), 1) for word in words)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    top = Counter(words).most_common(1)[0][0]
    return {"id": document["id"], "ease": round(ease, 2), "top": top, "process": os.getpid()}


# ----------------------------------------------------------------------------------------------------------
# The I/O at both ends: pairs with two real sides, one limit each


def fetch_sync(url: str) -> dict[str, Any]:
    """Fetch a text in this thread."""
    return dict(httpx.get(url).raise_for_status().json())


@concurrency(limit=20)
@dual(sync=fetch_sync)
async def fetch(url: str) -> dict[str, Any]:
    """Fetch a text."""
    async with httpx.AsyncClient() as client:
        return dict((await client.get(url)).raise_for_status().json())


stored: dict[int, dict[str, Any]] = {}


def store_sync(score: dict[str, Any]) -> int:
    """Store a score in this thread."""
    stored[score["id"]] = score
    return int(score["id"])


@dual(sync=store_sync)
async def store(score: dict[str, Any]) -> int:
    """Store a score."""
    await asyncio.sleep(0)  # stands for the round trip to a database
    return store_sync(score)


# ----------------------------------------------------------------------------------------------------------
# The engines, and the one line that differs


@contextmanager
def threads() -> Iterator[Bridge]:
    """Score in threads of this process, which share one interpreter lock."""
    yield "thread"


@contextmanager
def processes() -> Iterator[Bridge]:
    """Score in processes of this machine."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        yield pool


@contextmanager
def dask() -> Iterator[Bridge]:
    """Score on a Dask cluster, here one on this machine."""
    from distributed import Client, LocalCluster  # noqa: PLC0415  (the other engines do without it)

    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as cluster,  # type: ignore[no-untyped-call]
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        yield client.get_executor(pure=False)


ENGINES = {"threads": threads, "processes": processes, "dask": dask}


def run(name: str, urls: Sequence[str]) -> dict[int, float]:
    """Send all texts through the pipe, print how it went, and return the scores."""
    stored.clear()
    with ENGINES[name]() as engine:
        score = dual(score_text, bridge=engine, name=f"score_by_{name}", warn=False)  # the one line
        pipe = fetch | score | store
        asyncio.run(pipe.abatch(list(urls[:WORKERS])))  # starts the workers, which is no part of the figure
        start = time.perf_counter()
        asyncio.run(pipe.abatch(list(urls)))
        seconds = time.perf_counter() - start
    used = len({score["process"] for score in stored.values()} - {os.getpid()})
    print(f"{name:10} {len(urls)} texts in {seconds:5.2f} s, scored in {used or 'this'} process{'es' * (used > 1)}")
    return {number: stored[number]["ease"] for number in sorted(stored)}


# ----------------------------------------------------------------------------------------------------------
# A library of texts on this machine


class Library(BaseHTTPRequestHandler):
    """Serves made-up texts, the same for the same number, and long enough to keep a CPU busy."""

    length = 20_000

    def do_GET(self) -> None:
        """Answer `/7` with text 7."""
        number = int(self.path.strip("/"))
        made_up = random.Random(number)
        words = " ".join(made_up.choices(WORDS, k=self.length))
        body = httpx.Response(200, json={"id": number, "text": words}).content
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def library() -> Iterator[str]:
    """Open the library in a thread and give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Library)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main(arguments: Sequence[str]) -> int:
    """Run the pipe once for each engine and compare the scores."""
    parser = argparse.ArgumentParser(description="Score texts by several engines.")
    parser.add_argument("--texts", type=int, default=60, metavar="N")
    parser.add_argument("--words", type=int, default=Library.length, metavar="N", help="in each text")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    chosen = parser.parse_args(arguments)
    Library.length = chosen.words
    with library() as address:
        urls = [f"{address}/{number}" for number in range(chosen.texts)]
        scores = [run(engine, urls) for engine in chosen.engines]
    same = all(score == scores[0] for score in scores)
    print("all engines got the same scores" if same else "the engines disagree")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
