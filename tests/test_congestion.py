"""What an error says of the server: recognised by its shape, whoever raised it."""

import http.client
import time
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from typing import Any
from urllib.error import HTTPError

import httpx
import pytest

from asyncify.congestion import Congestion, congestion_of
from asyncify.errors import LimitTimeout


class Response:
    def __init__(self, status_code: int, headers: Any) -> None:
        self.status_code = status_code
        self.headers = headers

    def __bool__(self) -> bool:
        return self.status_code < 400  # as that of requests


class ApiError(Exception):
    """An error as openai and anthropic raise it: the status on itself and on its response."""

    def __init__(self, status_code: int, headers: Any = None) -> None:
        super().__init__(status_code)
        self.status_code = status_code
        self.response = Response(status_code, headers)


class ResponseOnlyError(Exception):
    """An error as httpx and requests raise it: the status on its response alone."""

    def __init__(self, status_code: int, headers: Any = None) -> None:
        super().__init__(status_code)
        self.response = Response(status_code, headers)


class HeadersOnErrorError(Exception):
    """An error that carries status and headers itself and has no response."""

    def __init__(self, status_code: int, headers: Any = None) -> None:
        super().__init__(status_code)
        self.status_code = status_code
        self.headers = headers


class ConnectTimeout(Exception):  # noqa: N818  (named as in requests)
    pass


class APITimeoutError(Exception):
    """As openai and anthropic name theirs."""


class QuotesAreLate(httpx.ReadTimeout):
    """Somebody's own kind of a timeout."""


class ReadTimeoutException(Exception):  # noqa: N818  (named as some clients do)
    pass


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("shape", [ApiError, ResponseOnlyError, HeadersOnErrorError])
def test_a_refusal_is_recognised_by_shape(shape: type[Exception], status: int) -> None:
    """A 429 and a 503 count, wherever the error keeps status and headers."""
    error = shape(status, {"Retry-After": "7"})

    assert congestion_of(error) == Congestion(7.0)


@pytest.mark.parametrize("status", [400, 404, 428, 430, 500, 502, 504])
def test_another_status_is_no_congestion(status: int) -> None:
    """Other refusals say nothing of the load, whatever their headers."""
    assert congestion_of(ApiError(status, {"Retry-After": "7"})) is None


def test_an_error_of_httpx_counts() -> None:
    """The real class, with its case-insensitive headers."""
    request = httpx.Request("GET", "http://quotes.example")
    response = httpx.Response(429, headers={"RETRY-AFTER": "2.5"}, request=request)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        response.raise_for_status()

    assert congestion_of(caught.value) == Congestion(2.5)


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        httpx.ReadTimeout("late"),
        httpx.PoolTimeout("late"),
        ConnectTimeout(),
        ReadTimeoutException(),
        APITimeoutError(),
        QuotesAreLate("late"),
    ],
    ids=repr,
)
def test_a_timeout_is_a_congestion_of_unknown_length(error: Exception) -> None:
    """A server that does not answer in time has had too much, and has not said for how long."""
    assert congestion_of(error) == Congestion(None)


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y", "%a, %d %b %Y %H:%M:%S -0000"])
def test_a_date_is_in_gmt_in_all_its_forms(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever this process thinks it is; RFC 9110 has dates without a zone too."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        date = time.strftime(form, time.gmtime(time.time() + 60))
        found = congestion_of(ApiError(429, {"Retry-After": date}))
    finally:
        monkeypatch.undo()
        time.tzset()

    assert found is not None
    assert 30 < (found.retry_after or 0) <= 60


@pytest.mark.parametrize(
    "error",
    [ValueError("429"), LimitTimeout("ours"), KeyError(429), http.client.HTTPException(), httpx.ConnectError("no")],
    ids=repr,
)
def test_other_errors_say_nothing(error: Exception) -> None:
    """Neither a programming error, nor a limit of our own, nor a broken connection is a sign of load."""
    assert congestion_of(error) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("3", 3.0),
        ("1.5", 1.5),
        (4, 4.0),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 -2359", None),
        ("Fri, 32 Dec 2026 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_read_or_left(value: object, seconds: float | None) -> None:
    """Seconds are read, a date that has passed is no wait, and what is garbled is as if it were not there."""
    assert congestion_of(ApiError(429, {"Retry-After": value})) == Congestion(seconds)


@pytest.mark.parametrize("headers", [None, {}, {"X-Other": "3"}, "Retry-After: 3", [("Retry-After", "3")]], ids=repr)
def test_headers_that_say_nothing(headers: object) -> None:
    """Without a readable header the refusal still counts."""
    assert congestion_of(ApiError(429, headers)) == Congestion(None)


def test_retry_after_as_a_date() -> None:
    """A date counts from now; to the second, as such dates are."""
    date = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    congestion = congestion_of(ApiError(503, {"retry-after": date}))

    assert congestion is not None
    assert congestion.retry_after is not None
    assert 7000 < congestion.retry_after <= 7200


def test_in_a_group_the_longest_wait_counts() -> None:
    """Whatever else went wrong, and however deep it stands in groups of groups."""
    group = ExceptionGroup(
        "in tasks",
        [
            ValueError("of another kind"),
            ApiError(429, {"retry-after": "2"}),
            ExceptionGroup("further in", [ApiError(503, {"retry-after": "7"}), TimeoutError()]),
        ],
    )

    assert congestion_of(group) == Congestion(7)
    assert congestion_of(ExceptionGroup("in tasks", [TimeoutError(), ValueError()])) == Congestion(None)
    assert congestion_of(ExceptionGroup("in tasks", [ValueError(), LimitTimeout()])) is None


def test_an_error_of_urllib_has_its_status_and_headers_itself() -> None:
    """So have those of aiohttp: the status is called `status` there."""
    headers = Message()
    headers["Retry-After"] = "3"

    assert congestion_of(HTTPError("http://quotes", 429, "Too Many Requests", headers, None)) == Congestion(3.0)
