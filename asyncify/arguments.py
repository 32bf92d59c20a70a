"""Checks of arguments that are numbers: each returns what it was given, as the plain `int` or `float` to count in.

Beside them, the error of one that comes without its name.
"""

from __future__ import annotations

import math
from numbers import Real
from operator import index
from typing import SupportsIndex

__all__ = ["check_bound", "check_count", "check_not_negative", "check_positive", "shown", "unnamed"]


def check_count(name: str, count: object, example: str) -> int:
    """Return `count` if it is a whole number of at least 1, numpy's too."""
    if isinstance(count, bool) or not isinstance(count, SupportsIndex):
        raise TypeError(f"{name}={count!r}: must be a whole number, as in {example}")
    if (whole := index(count)) < 1:
        raise ValueError(f"{name}={whole}: must be at least 1, as in {example}")
    return whole


def check_bound(name: str, bound: object) -> int | None:
    """Return a number of calls that may be in flight, None for no bound."""
    return None if bound is None else check_count(name, bound, f"{name}=10")


def check_positive(name: str, value: object, example: str) -> float:
    """Return `value` if it is a number above 0 and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}={value!r}: must be a number, as in {example}")
    if not 0 < _finite(value) < math.inf:
        raise ValueError(f"{name}={shown(value)}: must be above 0 and finite, as in {example}")
    return value if isinstance(value, (int, float)) else float(value)


def check_not_negative(name: str, value: object, example: str) -> float:
    """Return `value` if it is a number, not negative and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):  # the last is numpy's, and slow to ask
        raise TypeError(f"{name}={value!r}: must be a number, as in {example}")
    if not 0 <= _finite(value) < math.inf:
        raise ValueError(f"{name}={shown(value)}: must be finite and not negative, as in {example}")
    return value if isinstance(value, (int, float)) else float(value)


def unnamed(what: str, value: object) -> TypeError:
    """Return the error of an argument that was given without its name, where limits are given."""
    limit = value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 10
    return TypeError(f"{what}: {value!r} was given without a name; write {what}(limit={limit}), say")


def shown(number: float | Real) -> str:
    """Return a number as it is read: 1000001 and not 1e+06."""
    return f"{_finite(number):.12g}"


def _finite(number: float | Real) -> float:
    """Return a number as a float; one that is too large for that is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf
