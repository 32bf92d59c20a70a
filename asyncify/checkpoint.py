"""A file that remembers what a stream has finished, so that no call is paid for twice.

An SQLite file with one row for each input: its key, and its output or else its error. What is recorded is safe from
the death of the process at once (a write-ahead log); a power cut may lose the last rows, never the file.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal, Self

from asyncify.errors import CheckpointError

__all__ = ["Checkpoint", "Codec", "Row", "digest"]

Codec = Literal["json", "pickle"]

Row = tuple[str | bytes, bytes | str | None, str | None]
"""What is recorded of an input: its key, and its encoded output or else its error."""

_APPLICATION_ID = 0x61737966  # "asyf": how a file of another program is told
_VERSION = 1
_BUSY_SECONDS = 60.0

_LOG_ROWS = 20_000
"""Rows of the table `log` before they are sorted into `items`. Keys are random, so that a row put straight into
`items` costs a page of its own: a commit of 100 rows took 14 times as long as one to the end of `log`."""

_WAL_PAGES = 16_000
"""Pages of the write-ahead log before it is worked into the file: with SQLite's own 1,000 it waits for the disk
16 times as often."""

_FILTER_BITS = 1 << 25

_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    key PRIMARY KEY,         -- the text that key= has given, or a digest of the input
    output,                  -- as the codec has it; NULL for a failure
    error TEXT,              -- of a failure
    attempts INTEGER NOT NULL,
    ended REAL NOT NULL      -- seconds since the epoch
) WITHOUT ROWID;
CREATE TABLE log (id INTEGER PRIMARY KEY, key NOT NULL, output, error TEXT, ended REAL NOT NULL);
"""

# A failure never takes the place of an output, which another process may have recorded meanwhile.
_MERGE = """
INSERT INTO items SELECT key, output, error, 1, ended FROM log WHERE true ORDER BY key, id
ON CONFLICT (key) DO UPDATE
SET output = excluded.output, error = excluded.error, attempts = attempts + 1, ended = excluded.ended
WHERE error IS NOT NULL
"""


class Checkpoint:
    """The file of one kind of work. Looked up in one thread, recorded in one other.

    Args:
        path: the file; made if it is not there.
        runnable: what the work is called: a file made for another is refused.
        codec: how outputs are kept: `json` refuses what would not come back as it was; `pickle` runs code when it
            is read, so the file must be one's own.

    Raises:
        CheckpointError: the file is another runnable's, another program's, damaged, or can't be opened.
    """

    def __init__(self, path: str | PathLike[str], runnable: str, codec: Codec) -> None:
        self.path = path
        self._encode, self._decode = _CODECS[codec]
        self._writing = threading.Lock()
        # Rows of this process have ids of their own, next to each other, whatever another process appends.
        self._next_id = secrets.randbits(30) << 32
        self._recent: dict[str | bytes, int] = {}
        self._recorded: _Filter | None = None
        with self._explained():
            self._reader = self._connect()
            self._writer = self._connect()
            try:
                self._set_up(runnable, codec)
                self._merge()
                if self._reader.execute("SELECT NOT EXISTS (SELECT 1 FROM items)").fetchone()[0]:
                    self._recorded = _Filter()
            except BaseException:
                self._close()
                raise

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        return db

    def _set_up(self, runnable: str, codec: Codec) -> None:
        db = self._reader
        self._refuse_foreign(db)
        db.execute("PRAGMA journal_mode = WAL")
        self._writer.execute("PRAGMA synchronous = NORMAL")
        with _transaction(db):
            if not _is_ours(db):  # of two processes that find an empty file one makes the tables
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.executemany("INSERT INTO about VALUES (?, ?)", [("runnable", runnable), ("codec", codec)])
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
        about = dict(db.execute("SELECT name, value FROM about"))
        for name, mine in (("runnable", runnable), ("codec", codec)):
            if about.get(name) != mine:
                raise CheckpointError(
                    f"checkpoint {self.path}: made for {name} {about.get(name)!r}, and this is {mine!r}; "
                    "give this work a file of its own"
                )
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise CheckpointError(f"checkpoint {self.path}: damaged ({' '.join(found.split())}); {_WAY_OUT}")

    def _refuse_foreign(self, db: sqlite3.Connection) -> None:
        is_empty = not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if is_empty or (_is_ours(db) and _pragma(db, "user_version") == _VERSION):
            return
        raise CheckpointError(
            f"checkpoint {self.path}: not a checkpoint of this version of asyncify, but another SQLite file; "
            "name another path"
        )

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CheckpointError(f"checkpoint {self.path}: {error}; {_WAY_OUT}") from error

    def __enter__(self) -> Self:
        """Return the checkpoint itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, when what is just being recorded is."""
        with self._writing:
            try:
                with self._explained():
                    self._merge()
            finally:
                self._close()

    def _close(self) -> None:
        self._writer.close()
        self._reader.close()

    def find(self, key: str | bytes) -> tuple[Any] | None:
        """Return the output of a finished input, in a tuple of one; None if it is not there or has failed."""
        if self._recorded is not None and not self._recorded.may_have(key):
            return None
        with self._explained():
            found = (
                self._find_recent(key)
                or self._reader.execute("SELECT output FROM items WHERE key = ? AND error IS NULL", (key,)).fetchone()
            )
        if found is None:
            return None
        try:
            return (self._decode(found[0]),)
        except Exception as error:
            raise CheckpointError(f"checkpoint {self.path}: can't read back the output of {key!r}: {error}") from error

    def _find_recent(self, key: str | bytes) -> Any:
        row_id = self._recent.get(key)
        if row_id is None:
            return None
        return self._reader.execute("SELECT output FROM log WHERE id = ? AND error IS NULL", (row_id,)).fetchone()

    def row(self, key: str | bytes, output: Any, error: BaseException | None) -> Row:
        """Return what to record of an input that has ended.

        Raises:
            CheckpointError: the codec can't keep the output.
        """
        if error is not None:
            return key, None, f"{type(error).__name__}: {error}"
        try:
            return key, self._encode(output), None
        except Exception as refused:
            raise CheckpointError(
                f"checkpoint {self.path}: can't keep an output of type {type(output).__name__} as it is: {refused}; "
                'write codec="pickle", or return plain JSON'
            ) from refused

    def record(self, rows: Iterable[Row]) -> None:
        """Record inputs that have ended, all or none; they are safe when this returns."""
        now = time.time()
        with self._writing, self._explained():
            numbered = [(row_id, *row, now) for row_id, row in enumerate(rows, self._next_id)]
            with _transaction(self._writer):
                self._writer.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?)", numbered)
            self._next_id += len(numbered)
            for row in numbered:
                self._recent[row[1]] = row[0]
                if self._recorded is not None:
                    self._recorded.add(row[1])
            if len(self._recent) >= _LOG_ROWS:
                self._merge()

    def _merge(self) -> None:
        """Sort what was recorded into the table of all items."""
        with _transaction(self._writer):
            self._writer.execute(_MERGE)
            self._writer.execute("DELETE FROM log")
        self._recent = {}


@contextmanager
def _transaction(db: sqlite3.Connection) -> Generator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


class _Filter:
    """A Bloom filter with two probes: what it has not seen needs no look-up (B. H. Bloom, CACM 13:7, 1970).

    Of a million keys it takes one in 300 for another, of ten million one in five; then a look-up finds nothing.
    """

    def __init__(self) -> None:
        self._bits = bytearray(_FILTER_BITS // 8)

    # The two probes are the halves of one hash; written out, as both are called for every input.

    def add(self, key: str | bytes) -> None:
        number = hash(key)
        bits, one, two = self._bits, number % _FILTER_BITS, (number >> 32) % _FILTER_BITS
        bits[one >> 3] |= 1 << (one & 7)
        bits[two >> 3] |= 1 << (two & 7)

    def may_have(self, key: str | bytes) -> bool:
        number = hash(key)
        bits, one, two = self._bits, number % _FILTER_BITS, (number >> 32) % _FILTER_BITS
        return bool(bits[one >> 3] >> (one & 7) & 1 and bits[two >> 3] >> (two & 7) & 1)


_WAY_OUT = "name another path, or delete the file to begin anew"


def _pragma(db: sqlite3.Connection, name: str) -> object:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _is_ours(db: sqlite3.Connection) -> bool:
    return _pragma(db, "application_id") == _APPLICATION_ID


_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _to_json(output: object) -> str:
    if type(output) is int:  # without the machinery, which takes five times as long
        return repr(output)
    _require_plain(output)
    return _encode_json(output)


def _require_plain(value: object) -> None:
    """Raise a TypeError if JSON would give back something else: a tuple, a key that is no string, a subclass."""
    kind = type(value)
    if kind is list:
        for item in _as_list(value):
            _require_plain(item)
    elif kind is dict:
        for key, item in _as_dict(value).items():
            if type(key) is not str:
                raise TypeError(f"JSON has no key {key!r}")
            _require_plain(item)
    elif value is not None and kind not in (str, int, float, bool):
        raise TypeError(f"JSON has no {kind.__name__}")


def _as_list(value: Any) -> list[object]:
    return value  # type: ignore[no-any-return]


def _as_dict(value: Any) -> dict[object, object]:
    return value  # type: ignore[no-any-return]


_CODECS: dict[str, tuple[Callable[[Any], str | bytes], Callable[[Any], Any]]] = {
    "json": (_to_json, json.loads),
    "pickle": (pickle.dumps, pickle.loads),
}


def digest(value: object) -> bytes:
    """Return 16 bytes that are the same for equal inputs, in every process.

    Raises:
        TypeError: the input is not made of strings, numbers, bools, None, bytes, lists, tuples and dicts.
    """
    return hashlib.blake2b(_canonical(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _canonical(value: object) -> str:
    """Write a value so that two of different type or content never look alike."""
    kind = type(value)
    if kind in (str, int, float, bool, bytes) or value is None:
        return repr(value)
    if kind is list or kind is tuple:
        parts = ",".join(map(_canonical, _as_list(value)))
        return f"[{parts}]" if kind is list else f"({parts})"
    if kind is dict:
        parts = ",".join(sorted(f"{_canonical(key)}:{_canonical(item)}" for key, item in _as_dict(value).items()))
        return f"{{{parts}}}"
    raise TypeError(
        f"an input of type {kind.__name__} has no digest that is the same in every process; give key=, a function "
        "that returns a string for an input, as in key=lambda document: document.id"
    )
