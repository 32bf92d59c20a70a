"""What a stream knows of its inputs: those that a checkpoint has, those in flight, those that wait for an equal one."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, MutableSequence, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any, Self

from asyncify.checkpoint import Checkpoint, Row
from asyncify.errors import CheckpointError
from asyncify.fanout import Ended, until_ended
from asyncify.fingerprints import fingerprint
from asyncify.pools import ThreadPool

__all__ = ["Journal", "Key"]

Key = Callable[[Any], str]


class Journal:
    """Which inputs a checkpoint has, which are in flight, and which wait for an equal one that is.

    Args:
        checkpoint: the file, or None to remember nothing.
        key: what to know an input by, or None for its fingerprint.
        on_known: called with an input that has ended without a call, as the checkpoint has it.
        return_exceptions: an output that the checkpoint can't keep is a failure of its input; otherwise it is raised.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        key: Key | None,
        on_known: Callable[[Ended], None],
        *,
        return_exceptions: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._return_exceptions = return_exceptions
        self._key = key
        self._on_known = on_known
        self._keys: dict[int, str] = {}
        self._in_flight: set[str] = set()
        self._waiting: dict[str, list[int]] = {}
        self._rows: list[Row] = []
        self._recording = threading.Lock()
        self._pool = ThreadPool(1, "asyncify-checkpoint")
        self._process = os.getpid()

    def __enter__(self) -> Self:
        """Return the journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Record the rest and close the file, unless this is a fork of the process that does."""
        if self._checkpoint is not None and os.getpid() == self._process:
            with self._checkpoint:
                self.flush()

    async def __aenter__(self) -> Self:
        """Return the journal itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Record the rest and close the file, without holding the loop up: SQLite may have a long log to work in."""
        if self._checkpoint is None:
            return
        closing = asyncio.wrap_future(self._pool.submit(self.__exit__))
        interrupted = await until_ended([closing])
        if interrupted is not None:
            raise interrupted
        closing.result()

    def must_run(self, index: int, value: Any) -> bool:
        """Tell whether an input has to be run: nobody has its output, and nobody is about to."""
        if self._checkpoint is None:
            return True
        key = fingerprint(value) if self._key is None else _checked_key(self._key(value))
        if key in self._in_flight:
            self._waiting.setdefault(key, []).append(index)
            return False
        found = self._checkpoint.find(key)
        if found is not None:
            self._on_known((index, found[0], None))
            return False
        self._in_flight.add(key)
        self._keys[index] = key
        return True

    def settle(self, group: MutableSequence[Ended]) -> Sequence[Ended]:
        """Record those that were run, and return all, with those that waited for an equal one."""
        keys = self.note(group)
        self.flush()
        return self._with_equals(group, keys)

    async def asettle(self, group: MutableSequence[Ended]) -> Sequence[Ended]:
        """Record and return as `settle` does, without holding the event loop up."""
        keys = self.note(group)
        if self._rows:
            await self._pool.call(self.flush, lambda _: None, Context())
        return self._with_equals(group, keys)

    def note(self, group: MutableSequence[Ended]) -> list[str | None]:
        """Take down those that were run, to be recorded by the next `flush`; return the key of each.

        Where exceptions are returned, one whose output can't be kept is replaced by a failure.

        Raises:
            CheckpointError: an output can't be kept; when all others have been taken down.
        """
        if self._checkpoint is None:
            return []
        refused: CheckpointError | None = None
        keys = [self._keys.pop(index, None) for index, _, _ in group]  # none for one that was not run
        for place, (key, (index, output, error)) in enumerate(zip(keys, tuple(group), strict=True)):
            if key is not None and (error is None or isinstance(error, Exception)):  # not a cancelled one
                try:
                    self._rows.append(self._checkpoint.row(key, output, error))
                except CheckpointError as refusal:  # the others have been paid for as well
                    if self._return_exceptions:
                        failure = CheckpointError(*refusal.args)  # without a traceback, which would hold this frame
                        self._rows.append(self._checkpoint.row(key, None, failure))
                        group[place] = index, None, failure
                    else:
                        refused = refusal
        try:
            if refused is not None:
                raise refused
        finally:
            del refused  # its traceback holds this frame
        return keys

    def note_last(self, group: MutableSequence[Ended]) -> None:
        """Take down those that have ended by the time that the stream is left, whatever it is left for.

        What can't be kept is lost with it: to say so would hide the reason.
        """
        with suppress(CheckpointError):
            self.note(group)

    def _with_equals(self, group: Sequence[Ended], keys: list[str | None]) -> Sequence[Ended]:
        # Only now that they are recorded: until then an equal input has to wait, or it would be run as well.
        self._in_flight.difference_update(keys)
        if not self._waiting:
            return group
        settled = list(group)
        for key, (_, output, error) in zip(keys, group, strict=True):
            if key is not None:
                settled.extend((index, self._again(key, output, error), error) for index in self._waiting.pop(key, ()))
        return settled

    def _again(self, key: str, output: Any, error: BaseException | None) -> Any:
        """Return an output as the file has it: an object of its own, as it would be in a later run."""
        found = None if error is not None or self._checkpoint is None else self._checkpoint.find(key)
        return output if found is None else found[0]

    def flush(self) -> None:
        """Record what was taken down, and wait for what another thread is just recording."""
        with self._recording:
            rows = self._rows[:]
            if rows and self._checkpoint is not None:
                self._checkpoint.record(rows)  # if it fails, leaving the stream tries again: they are paid for
            del self._rows[: len(rows)]  # more may have been taken down meanwhile, by a stream that is left


def _checked_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key= must return a string for each input, and it returned {key!r}")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"key= must return a string that UTF-8 can write, and it returned {key!r}") from error
    return str.__str__(key)  # of a subclass, which may do something else when it is added to
