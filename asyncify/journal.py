"""What a stream knows of its inputs: those that a checkpoint has, those in flight, those that wait for an equal one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self

from asyncify.bridge import ThreadPool
from asyncify.checkpoint import Checkpoint, Row, digest
from asyncify.errors import CheckpointError
from asyncify.fanout import Ended

__all__ = ["Journal", "Key"]

Key = Callable[[Any], str]


class Journal:
    """Which inputs a checkpoint has, which are in flight, and which wait for an equal one that is.

    Args:
        checkpoint: the file, or None to remember nothing.
        key: what to know an input by, or None for a digest of it.
        known: told of an input that has ended without a call.
    """

    def __init__(self, checkpoint: Checkpoint | None, key: Key | None, known: Callable[[Ended], None]) -> None:
        self._checkpoint = checkpoint
        self._key = key
        self._known = known
        self._keys: dict[int, str | bytes] = {}
        self._equal: dict[str | bytes, list[int]] = {}
        self._rows: list[Row] = []
        self._pool = ThreadPool(1, "asyncify-checkpoint")

    def __enter__(self) -> Self:
        """Return the journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Record the rest and close the file."""
        if self._checkpoint is not None:
            with self._checkpoint:
                self.flush()

    def must_run(self, index: int, value: Any) -> bool:
        """Tell whether an input has to be run: nobody has its output, and nobody is about to."""
        if self._checkpoint is None:
            return True
        key = digest(value) if self._key is None else _checked_key(self._key(value))
        if key in self._equal:
            self._equal[key].append(index)
            return False
        found = self._checkpoint.find(key)
        if found is not None:
            self._known((index, found[0], None))
            return False
        self._equal[key] = []
        self._keys[index] = key
        return True

    def settle(self, group: list[Ended]) -> list[Ended]:
        """Record those that were run, and return all, with those that waited for an equal one."""
        self.note(group)
        self.flush()
        return self._with_equals(group)

    async def asettle(self, group: list[Ended]) -> list[Ended]:
        """Do the same, without holding the event loop up."""
        self.note(group)
        if self._rows:
            await asyncio.wrap_future(self._pool.submit(self.flush))
        return self._with_equals(group)

    def note(self, group: list[Ended]) -> None:
        """Take down those that were run, to be recorded by the next `flush`."""
        refused: CheckpointError | None = None
        for index, output, error in group:
            if self._checkpoint is not None and index in self._keys and not _is_cancelled(error):
                try:
                    self._rows.append(self._checkpoint.row(self._keys[index], output, error))
                except CheckpointError as refusal:  # the others have been paid for as well
                    refused = refusal
        if refused is not None:
            raise refused

    def _with_equals(self, group: list[Ended]) -> list[Ended]:
        # Only now that they are recorded: until then an equal input has to wait, or it would be run as well.
        settled = list(group)
        for index, output, error in group:
            if (key := self._keys.pop(index, None)) is not None:
                settled.extend((equal, output, error) for equal in self._equal.pop(key))
        return settled

    def flush(self) -> None:
        """Record what was taken down."""
        rows, self._rows = self._rows, []
        if rows and self._checkpoint is not None:
            self._checkpoint.record(rows)


def _is_cancelled(error: BaseException | None) -> bool:
    return error is not None and not isinstance(error, Exception)


def _checked_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key= must return a string for each input, and it returned {key!r}")
    return key
