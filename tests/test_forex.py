"""The main job: the market server's quota, the server on a real socket, and the example as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.market_server import PAIRS, Books, Quota, analysis, rate

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "examples" / "market_server.py"
FOREX = ROOT / "examples" / "forex.py"


class TestQuota:
    def test_admits_sixty_in_a_second(self) -> None:
        """The 61st request of one second is told to wait for the rest of it."""
        quota = Quota(at_once=1000)
        answers = [quota.admit(now=n / 100) for n in range(61)]

        assert answers == [0] * 60 + [1]

    def test_window_slides(self) -> None:
        """A place comes free exactly one second after its admission, wherever the second began."""
        quota = Quota(per_second=2, at_once=1000)
        for now in (10.0, 10.9):
            quota.admit(now)

        assert quota.admit(10.99) == 1
        assert quota.admit(11.0) == 0
        assert quota.admit(11.5) == 1
        assert quota.admit(11.9) == 0

    def test_a_refusal_costs_nothing(self) -> None:
        """Refused requests do not count against the quota of the next second."""
        quota = Quota(per_second=1, at_once=1000)
        quota.admit(0.0)
        for tenth in range(1, 10):
            quota.admit(tenth / 10)

        assert quota.admit(1.0) == 0

    def test_serves_25_at_once(self) -> None:
        """The 26th request waits until one of the 25 has its answer."""
        quota = Quota()
        answers = [quota.admit(0.0) for _ in range(26)]
        quota.release()

        assert answers == [0] * 25 + [1]
        assert quota.admit(0.0) == 0


class TestBooks:
    def test_count_what_happened(self) -> None:
        """Served, refused, peaks and timeline follow from the arrivals and departures."""
        books = Books(opened=100.0, quota=Quota(at_once=2))
        for now in (100.0, 100.25, 100.5):
            books.arrive(now)
        books.leave(101.0)
        books.leave(101.5)

        assert books.stats() == {
            "served": 2,
            "refused": 1,
            "peak_concurrency": 2,
            "peak_per_second": 3,
            "timeline": [(0.0, 1), (0.25, 2), (1.0, 1), (1.5, 0)],
        }


class TestData:
    def test_thirty_different_pairs(self) -> None:
        """The market quotes thirty pairs of two different currencies."""
        assert len(set(PAIRS)) == 30
        assert all(base != quote for base, _, quote in (pair.partition("-") for pair in PAIRS))

    @pytest.mark.parametrize("pair", PAIRS)
    def test_is_believable(self, pair: str) -> None:
        """The mid lies between bid and ask, and these between support and resistance."""
        quoted, analysed = rate(pair), analysis(pair)

        assert quoted["bid"] < quoted["mid"] < quoted["ask"]
        assert analysed["support"] < quoted["bid"]
        assert quoted["ask"] < analysed["resistance"]


def start_server(latency: float, *options: str) -> subprocess.Popen[str]:
    """Start the market server, which runs until its standard input closes."""
    command = [sys.executable, str(SERVER), "--latency", str(latency), *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def url_of(server: subprocess.Popen[str]) -> str:
    """Read the line by which a server says where it listens."""
    assert server.stdout
    url: str = json.loads(server.stdout.readline())["url"]
    return url


@pytest.fixture(scope="module")
def market() -> Iterator[httpx.Client]:
    """A server whose answers take 2 s, so that requests meet there on a slow machine too."""
    with start_server(latency=2) as server, httpx.Client(base_url=url_of(server), trust_env=False) as client:
        yield client


class TestServer:
    def test_unknown_pair(self, market: httpx.Client) -> None:
        """A pair that the market does not quote is a 404 that names it, and costs no quota."""
        market.post("/reset")
        response = market.get("/rate/USD-XXX")

        assert response.status_code == 404
        assert "USD-XXX" in response.text
        assert market.get("/stats").json()["served"] == 0

    def test_refuses_the_26th_at_once(self, market: httpx.Client) -> None:
        """Of 26 requests at once one is refused, at once and with a Retry-After, and the books say so."""
        market.post("/reset")
        with ThreadPoolExecutor(26) as pool:
            responses = list(pool.map(market.get, [f"/news/{pair}" for pair in PAIRS[:26]]))
        [refused] = [response for response in responses if response.status_code != 200]
        stats = market.get("/stats").json()

        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.elapsed.total_seconds() < 2
        assert (stats["served"], stats["refused"], stats["peak_concurrency"]) == (25, 1, 25)
        assert max(in_flight for _, in_flight in stats["timeline"]) == 25
        assert stats["timeline"][-1][1] == 0

    def test_reset_forgets(self) -> None:
        """After a reset the books are empty."""
        with start_server(latency=0) as server, httpx.Client(base_url=url_of(server), trust_env=False) as client:
            client.get("/analysis/EUR-USD").raise_for_status()
            client.post("/reset")
            stats = client.get("/stats").json()

        assert stats == {
            "served": 0,
            "refused": 0,
            "peak_concurrency": 0,
            "peak_per_second": 0,
            "timeline": [],
        }

    def test_capacity_changes_while_it_runs(self) -> None:
        """What may be served at once can be set, and a refusal can come without a Retry-After."""
        options = ["--at-once", "5", "--per-second", "1", "--no-retry-after"]
        with start_server(0, *options) as server, httpx.Client(base_url=url_of(server), trust_env=False) as client:
            answered = client.get("/rate/EUR-USD")
            over_its_rate = client.get("/rate/EUR-USD")
            client.post("/reset")
            client.post("/at-once/0")
            over_its_slots = client.get("/rate/EUR-USD")

        assert [response.status_code for response in (answered, over_its_rate, over_its_slots)] == [200, 429, 429]
        assert "Retry-After" not in over_its_rate.headers
        assert "Retry-After" not in over_its_slots.headers

    def test_leaves_with_its_parent(self) -> None:
        """The server exits cleanly when its standard input closes, which the end of a parent does."""
        with start_server(latency=0) as server:
            url = url_of(server)
            httpx.get(f"{url}/pairs", trust_env=False).raise_for_status()
            assert server.stdin
            server.stdin.close()

            assert server.wait(timeout=20) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example writes."""
    return tmp_path_factory.mktemp("forex")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the example prints about 10 pairs: 30 calls, more than the server takes at once."""
    files = [f"--json={folder / 'figures.json'}", f"--plot={folder / 'plots' / 'forex.svg'}"]
    finished = run_forex("--pairs=10", "--latency=0.08", "--min-gain=0", *files)
    assert finished.stderr == ""
    assert finished.returncode == 0
    return finished.stdout


@pytest.fixture(scope="module")
def figures(folder: Path, printed: str) -> dict[str, Any]:
    """The file of figures that the same run wrote."""
    content: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return content


def run_forex(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the program with warnings shown, and this checkout's package found."""
    return subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", str(FOREX), *options],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        text=True,
        timeout=60,
    )


class TestForex:
    def test_runs_four_ways(self, figures: dict[str, Any]) -> None:
        """The file of figures has the four ways, and each made all calls."""
        ways = figures["ways"]

        assert len(ways) == 4
        assert [way["served"] + way["refused"] for way in ways] == [30, 30, 30, 30]
        assert ways[0]["peak_concurrency"] == 1

    def test_limited_way_meets_no_429(self, figures: dict[str, Any]) -> None:
        """Under the limit the server refuses nothing, to the async caller and to the sync one."""
        for limited in (figures["ways"][-1], figures["sync"]):
            assert limited["refused"] == 0
            assert limited["briefings"] == 10
            assert limited["peak_concurrency"] <= 20
        assert figures["failures"] == []

    def test_prints_the_table(self, printed: str) -> None:
        """The terminal shows the ways, their figures and what a sync caller gets."""
        for words in (
            "one after the other",
            "pairs under @concurrency",
            "wall time",
            "429s",
            "gave the same 10 briefings",
        ):
            assert words in printed

    @pytest.mark.usefixtures("printed")
    def test_draws_the_plot(self, folder: Path) -> None:
        """The plot is an SVG, in a folder that was made for it."""
        assert "<svg" in (folder / "plots" / "forex.svg").read_text()

    def test_leaves_no_server_behind(self, figures: dict[str, Any]) -> None:
        """Nothing listens any more where the server did."""
        with pytest.raises(httpx.ConnectError):
            httpx.get(figures["market"], trust_env=False)

    def test_exits_with_1_on_too_little_gain(self, tmp_path: Path) -> None:
        """A gain below the demanded one is named and fails the program."""
        finished = run_forex("--pairs=1", "--latency=0", "--min-gain=1e9", f"--plot={tmp_path / 'forex.svg'}")

        assert finished.returncode == 1
        assert "expected 1e+09x" in finished.stdout
