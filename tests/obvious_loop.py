"""A function that sometimes fails, and what a plain loop makes of it: the oracle for batches and streams."""

import asyncio
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

numbers = st.lists(st.integers(0, 9), max_size=30)


class OddError(Exception):
    """Equal to another with the same arguments, so that lists of outputs can be compared."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.args == self.args

    __hash__ = Exception.__hash__


def steps(value: int) -> int:
    """Return ten times the value; the odd ones fail."""
    if value % 2:
        raise OddError(value)
    return value * 10


async def steps_async(value: int) -> int:
    """Do the same after as many turns of the loop as the value says."""
    for _ in range(value % 5):
        await asyncio.sleep(0)
    return steps(value)


def obvious(inputs: Iterable[int]) -> list[Any]:
    """Return what a loop would collect, errors included."""
    outputs: list[Any] = []
    for value in inputs:
        try:
            outputs.append(steps(value))
        except OddError as error:
            outputs.append(error)
    return outputs


class Document:
    """An input that can be seen to be let go."""


def refuse(document: object) -> object:
    """Fail."""
    raise OddError(0)


async def refuse_async(document: object) -> object:
    """Fail a turn of the loop later."""
    await asyncio.sleep(0)
    raise OddError(0)
