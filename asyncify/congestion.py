"""What a failed call says about the server: that it has had too much, and how long to wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, cast

from asyncify.errors import AsyncifyError

__all__ = ["Congestion", "congestion_of"]

_TOO_MUCH = (429, 503)
_TIMEOUTS = ("Timeout", "TimeoutError", "TimeoutException")


@dataclass(frozen=True, slots=True)
class Congestion:
    """A server refused a call, or did not answer in time; `retry_after` is in seconds, if it said so."""

    retry_after: float | None


def congestion_of(error: BaseException) -> Congestion | None:
    """Recognise an HTTP 429 or 503, or a timeout, by shape; None for any other error.

    The status is `error.status_code`, `error.response.status_code` or `error.status`, the headers are those of the
    response or of the error: so the errors of httpx, httpx2, requests, openai, anthropic, aiohttp and urllib all count,
    and none of them is imported. Of a group, as a task group raises it, the one counts that says to wait the longest.
    """
    if isinstance(error, BaseExceptionGroup):
        errors = cast("BaseExceptionGroup[BaseException]", error).exceptions
        found = [each for each in map(congestion_of, errors) if each is not None]
        return max(found, key=lambda each: each.retry_after or 0, default=None)
    if isinstance(error, AsyncifyError):
        return None  # a limit of ours, not a server's
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    if (status or getattr(error, "status", None)) in _TOO_MUCH:
        return Congestion(_retry_after(getattr(response, "headers", None) or getattr(error, "headers", None)))
    return Congestion(None) if _is_timeout(error) else None


def _is_timeout(error: BaseException) -> bool:
    """Tell by the names of its classes, as libraries have timeouts of their own: openai's `APITimeoutError`, say."""
    return any(cls.__name__.endswith(_TIMEOUTS) for cls in type(error).__mro__)


def _retry_after(headers: Any) -> float | None:
    """Read `Retry-After`, in seconds or as a date (RFC 9110, section 10.2.3); None if it is not there or is garbled."""
    if not isinstance(headers, (Mapping, Message)):  # the latter is that of urllib
        return None
    pairs = cast("Mapping[object, object]", headers).items()
    value = next((str(text) for name, text in pairs if str(name).lower() == "retry-after"), "")
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = _seconds_until(value)
    return seconds if 0 <= seconds < float("inf") else None


def _seconds_until(date: str) -> float:
    try:
        moment = parsedate_to_datetime(date)
        if moment.tzinfo is None:  # as in the form of asctime, which is in GMT
            moment = moment.replace(tzinfo=UTC)
        moment = moment.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return -1.0
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)
