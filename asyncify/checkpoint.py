"""A file that remembers the inputs that a stream has finished, so that no call is paid for twice.

It is an SQLite file with one row for each call that has ended: the key of its input, and its output or its error.
A recorded row is safe at once if the process dies (by a write-ahead log); a power cut may lose the last rows, but
never the file.

Rows are only ever appended. A hash table in memory finds the row of a key; it is built from the file when the file is
opened. Most keys are random, so an index in the file would be rewritten, nearly all of it, with every few thousand
rows.
"""

from __future__ import annotations

import json
import pickle
import re
import sqlite3
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from functools import cache
from itertools import chain
from os import PathLike
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, Self, cast
from zlib import crc32

from langchain_core.messages.base import TextAccessor

from asyncify.errors import CheckpointError

__all__ = ["Checkpoint", "Codec", "Row"]

Codec = Literal["json", "pickle"]

Row = tuple[str, str | bytes | None, int | str]
"""The record of an input: its key, its encoded output and a checksum; or of a failure: its key, None and the error."""

_APPLICATION_ID = 0x61737966  # "asyf": tells this program's files from those of others
_VERSION = 5
_BUSY_SECONDS = 60.0
_RETRY_SECONDS = 0.01

_READ_AT_ONCE = 10_000
"""How many keys are in memory at once while a file is read."""

_INSERTED_AT_ONCE = 100
"""Rows in one INSERT: each statement must take the GIL back from the event loop, so one for each row would be slow."""

_LARGEST = 200_000_000
"""Most characters or bytes of an output: SQLite keeps 1,000,000,000 bytes in a row, and a character may take four."""

_WAL_PAGES = 16_000
"""Pages of the write-ahead log at which SQLite moves it into the file: with its default of 1,000 it would wait for the
disk 16 times as often."""

_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE outputs (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,        -- what key= has given, or else a short input itself, or a digest of it
    output NOT NULL,          -- as the codec has it
    checksum INTEGER NOT NULL -- CRC-32 of key and output: SQLite has none, and a flipped bit would be another output
);
CREATE TABLE failures (id INTEGER PRIMARY KEY, key TEXT NOT NULL, error TEXT NOT NULL);
CREATE VIEW items AS          -- one row for each input; an output counts for more than a later failure
SELECT key, output, error, attempts FROM (
    SELECT key, output, error, count(*) AS attempts, max((error IS NULL) << 62 | id) FROM (
        SELECT id, key, output, NULL AS error FROM outputs UNION ALL SELECT id, key, NULL, error FROM failures
    ) GROUP BY key
);
"""

_READ = "SELECT key, output, checksum FROM outputs WHERE id = ?"

_KEYS_BETWEEN = "SELECT key, id FROM outputs WHERE id > ? AND id < ?"

_INSERT_OUTPUTS = "INSERT INTO outputs (key, output, checksum) VALUES "

_INSERT_FAILURE = "INSERT INTO failures (key, error) VALUES (?, ?)"


class Checkpoint:
    """The file of one runnable's work. One thread looks inputs up, one other thread records them.

    Args:
        path: the file; made if it is not there.
        runnable: the name of the work; a file that was made for another name is refused.
        codec: how outputs are kept: `json` refuses an output that would not come back as it was; `pickle` runs code
            when the file is read, so the file must come from a trusted source.
        has_key: whether inputs are known by the keys that `key=` returns, and not by their fingerprints. Equal strings
            of the two kinds may mean different inputs, so a file of one kind is refused for the other.

    Raises:
        CheckpointError: the file is another runnable's, has another codec or other keys, is another program's, is
            damaged, or can't be opened.
    """

    def __init__(self, path: str | PathLike[str], runnable: str, codec: Codec, *, has_key: bool = False) -> None:
        self.path: Path = Path(path).absolute()  # the working directory may change, and SQLite take "file:x" for a URI
        self._encode, self._decode, self._instead = _CODECS[codec]
        self._ids = _Ids()
        with self._explained():
            self._reader = self._connect()
            self._writer = self._connect()
            try:
                self._set_up({"runnable": runnable, "codec": codec, "keys": _KEYS[has_key]})
                self._last_seen: int = _only(self._reader, "SELECT coalesce(max(id), 0) FROM outputs")
                self._learn(self._reader, 0, self._last_seen + 1)
            except BaseException:
                self.__exit__()
                raise

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        return db

    def _set_up(self, mine: dict[str, str]) -> None:
        db = self._reader
        self._refuse_foreign(db)
        _use_write_ahead_log(db)
        self._writer.execute("PRAGMA synchronous = NORMAL")
        with _transaction(db):
            if not _is_ours(db):  # if two processes find an empty file, one makes the tables
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.executemany("INSERT INTO about VALUES (?, ?)", mine.items())
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
        about = dict(db.execute("SELECT name, value FROM about"))
        for name, asked in mine.items():
            if about.get(name) != asked:
                raise CheckpointError(
                    f"checkpoint {self.path}: made for {name} {about.get(name)!r}, and this is {asked!r}; "
                    "give this work a file of its own"
                )
        if (found := _only(db, "PRAGMA quick_check(1)")) != "ok":
            raise CheckpointError(f"checkpoint {self.path}: damaged ({' '.join(found.split())}); {_WAY_OUT}")

    def _refuse_foreign(self, db: sqlite3.Connection) -> None:
        is_empty = not _only(db, "SELECT count(*) FROM sqlite_schema")
        if is_empty or (_is_ours(db) and _pragma(db, "user_version") == _VERSION):
            return
        what = "an SQLite file of another program"
        if _is_ours(db):
            what = f"of another version of asyncify (its format is {_pragma(db, 'user_version')}, ours {_VERSION})"
        raise CheckpointError(f"checkpoint {self.path}: {what}; name another path")

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: an error may quote a damaged file
            raise CheckpointError(f"checkpoint {self.path}: {error}; {_way_out(error, self.path)}") from error

    def __enter__(self) -> Self:
        """Return the checkpoint itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._writer.close()
        self._reader.close()

    def find(self, key: str) -> tuple[Any] | None:
        """Return the output of a finished input, in a tuple of one; None if the input is not there or has failed."""
        for id_ in self._ids.find(key):
            with self._explained():
                found, output, checksum = self._reader.execute(_READ, (id_,)).fetchone() or (key, None, 0)
            if (
                not isinstance(found, str)
                or not isinstance(output, (str, bytes))
                or _checksum(found, output) != checksum
            ):
                raise CheckpointError(f"checkpoint {self.path}: damaged (the output of {key!r}); {_WAY_OUT}")
            if found == key:
                return (self._decoded(key, output),)
        return None

    def _decoded(self, key: str, output: str | bytes) -> Any:
        try:
            return self._decode(output)
        except Exception as error:
            raise CheckpointError(f"checkpoint {self.path}: can't read back the output of {key!r}: {error}") from error

    def row(self, key: str, output: Any, error: BaseException | None) -> Row:
        """Return the row to record for an input that has ended.

        Raises:
            CheckpointError: the codec can't keep the output.
        """
        if error is not None:
            return key, None, _said(error)
        try:
            encoded = self._encode(output)
            checksum = _checksum(key, encoded)
        except Exception as refused:
            raise CheckpointError(
                f"checkpoint {self.path}: can't keep an output of type {type(output).__name__} as it is: {refused}; "
                f"{self._instead}"
            ) from refused
        if len(encoded) > _LARGEST:
            raise CheckpointError(
                f"checkpoint {self.path}: an output is too large to keep: {len(encoded):,} characters or bytes, and "
                f"{_LARGEST:,} is the most"
            )
        return key, encoded, checksum

    def record(self, rows: Sequence[Row]) -> None:
        """Record the rows of inputs that have ended, all or none; they are safe when this returns.

        Raises:
            CheckpointError: the rows can't be written, or would not be found, as the file is no longer at its path.
        """
        failures = [(key, said) for key, output, said in rows if output is None]
        outputs = [row for row in rows if row[1] is not None] if failures else rows
        last = self._last_seen
        with self._explained():
            with _transaction(self._writer):
                for start in range(0, len(outputs), _INSERTED_AT_ONCE):
                    part = outputs[start : start + _INSERTED_AT_ONCE]
                    values = [*chain.from_iterable(part)]
                    last = self._writer.execute(_insert_outputs(len(part)), values).lastrowid or last
                self._writer.executemany(_INSERT_FAILURE, failures)
            if outputs:
                self._take_in([row[0] for row in outputs], last)
        if not self.path.exists():
            raise CheckpointError(
                f"checkpoint {self.path}: the file was moved or deleted during the run; put it back, beside the -wal "
                "file that is a part of it, or begin anew"
            )

    def _take_in(self, keys: list[str], last: int) -> None:
        """Remember the ids of some keys' outputs, which have just been recorded one after the other, up to `last`."""
        first = last - len(keys) + 1
        if first > self._last_seen + 1:  # another process has recorded something too
            self._learn(self._writer, self._last_seen, first)
        self._ids.add(keys, range(first, last + 1))
        self._last_seen = last

    def _learn(self, db: sqlite3.Connection, after: int, before: int) -> None:
        """Remember the outputs in the file whose ids lie between these two."""
        with closing(db.execute(_KEYS_BETWEEN, (after, before))) as rows:  # an open cursor would keep the file open
            while part := rows.fetchmany(_READ_AT_ONCE):
                self._ids.add(*zip(*part, strict=True))


def _checksum(key: str, output: str | bytes) -> int:
    """Return the CRC-32 of the key and the output together."""
    return crc32((key + output).encode() if isinstance(output, str) else key.encode() + output)


def _said(error: BaseException) -> str:
    """Return an error's type and message, in characters that any file can hold."""
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  (the error's own `__str__` may raise anything)
        said = type(error).__name__
    return said.encode(errors="backslashreplace").decode()


@cache
def _insert_outputs(rows: int) -> str:
    return _INSERT_OUTPUTS + ", ".join(["(?, ?, ?)"] * rows)


def _only(db: sqlite3.Connection, query: str) -> Any:
    return db.execute(query).fetchone()[0]


@contextmanager
def _transaction(db: sqlite3.Connection) -> Generator[None]:
    try:
        db.execute("BEGIN IMMEDIATE")  # inside the `try`: it may wait, and an interrupt may come then
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # after a full disk, SQLite has rolled back by itself
            db.execute("ROLLBACK")
        raise


class _Ids:
    """A hash table from keys to the row ids that they may have: linear probing, 8 bytes a slot.

    (D. E. Knuth, The Art of Computer Programming, vol. 3, section 6.4, algorithm L.) A slot holds 32 bits of the key's
    hash and the id, but not the key, so once in four thousand million an id that is found is another key's. At least
    half of the slots are free: a key takes 16 to 32 bytes, a fifth of its size in a dict.
    """

    def __init__(self) -> None:
        self._slots = _free_slots(_FIRST_SLOTS)
        self._used = 0

    def add(self, keys: Sequence[str], ids: Iterable[int]) -> None:
        """Add keys, each with its id."""
        self._used += len(keys)
        needed = 1 << (2 * self._used - 1).bit_length()
        if needed > len(self._slots):
            larger = _free_slots(needed)
            _put(larger, filter(None, self._slots))
            self._slots = larger
        _put(self._slots, ((hash(key) & _LOW) << 32 | id_ for key, id_ in zip(keys, ids, strict=True)))

    def find(self, key: str) -> tuple[int, ...]:
        """Return the ids that the key may have: each must be checked, as another key may have the same hash bits."""
        slots = self._slots  # read once: another thread may replace the table by a larger one
        last = len(slots) - 1
        hashed = hash(key) & _LOW
        place = hashed & last
        found: tuple[int, ...] = ()
        while entry := slots[place]:
            if entry >> 32 == hashed:
                found += (entry & _LOW,)
            place = (place + 1) & last
        return found


_FIRST_SLOTS = 1024
_LOW = (1 << 32) - 1


def _free_slots(number: int) -> array[int]:
    return array("Q", bytes(8 * number))


def _put(slots: array[int], entries: Iterable[int]) -> None:
    """Put each entry into the first free slot, counted from the slot of its hash."""
    last = len(slots) - 1
    for entry in entries:
        place = entry >> 32 & last
        while slots[place]:
            place = (place + 1) & last
        slots[place] = entry


_KEYS = {True: "given by key=", False: "made of the inputs"}

_WAY_OUT = "name another path, or delete the file to begin anew"
_BUSY_WAY_OUT = "another process has it for itself: wait for that, or name another path"
_DISK_WAY_OUT = "see to the disk and its permissions, or name another path"
_WAYS_OUT = {
    sqlite3.SQLITE_BUSY: _BUSY_WAY_OUT,
    sqlite3.SQLITE_NOTADB: "name another path, or delete the file if it is a checkpoint that was damaged",
    **dict.fromkeys(
        (
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_PERM,
            sqlite3.SQLITE_READONLY,
        ),
        _DISK_WAY_OUT,
    ),
}
"""The advice for errors that do not mean that the file is damaged: it may hold costly outputs, so don't delete it."""


def _way_out(error: Exception, path: Path) -> str:
    code: int = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_CANTOPEN and _is_missing(path.parent):
        is_home = any(part.startswith("~") for part in path.parts)
        way_out = "expand the ~, by Path(...).expanduser()" if is_home else "make it, or name another path"
        return f"there is no directory {path.parent}: {way_out}"
    return _WAYS_OUT.get(code, _WAY_OUT)


def _is_missing(directory: Path) -> bool:
    """Tell whether a directory is certain not to exist."""
    try:
        directory.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switch to a write-ahead log; retry while another process does the same, as SQLite fails instead of waiting."""
    until = monotonic() + _BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() > until:
                raise
            sleep(_RETRY_SECONDS)
        else:
            return


def _pragma(db: sqlite3.Connection, name: str) -> object:
    return _only(db, f"PRAGMA {name}")


def _is_ours(db: sqlite3.Connection) -> bool:
    return _pragma(db, "application_id") == _APPLICATION_ID


_BOTH_HALVES = re.compile("[\ud800-\udbff][\udc00-\udfff]")

_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _to_json(output: object) -> str:
    if type(output) is int:  # a fast path: the encoder takes five times as long
        return repr(output)
    _require_plain(output)
    written = _encode_json(output)
    return written if written.isascii() else _writable(written)


def _writable(written: str) -> str:
    r"""Return JSON that UTF-8 can encode: half a surrogate pair, as in a truncated text, is escaped as `\ud83d`, say.

    Raises:
        ValueError: two halves stand in a row, which JSON would join into one character.
    """
    try:
        written.encode()
    except UnicodeEncodeError:
        if _BOTH_HALVES.search(written):
            raise ValueError("JSON makes one character of two surrogates in a row") from None
        return written.encode(errors="backslashreplace").decode()
    return written


def _require_plain(value: object) -> None:
    """Raise a TypeError if JSON would not give the value back: a tuple, a key that is no string, a subclass.

    The one exception is a message's text, a subclass of `str`, which comes back as a plain string.
    """
    kind = type(value)
    if kind is list:
        for item in cast("list[object]", value):
            _require_plain(item)
    elif kind is dict:
        for key, item in cast("dict[object, object]", value).items():
            if type(key) is not str:
                raise TypeError(f"JSON has no key {key!r}")
            _require_plain(item)
    elif value is not None and kind not in (str, int, float, bool, TextAccessor):
        raise TypeError(f"JSON has no {kind.__name__}")


def _to_pickle(output: object) -> bytes:
    """Pickle an output, and check that it can be unpickled: if not, it must fail now, or the call would be lost."""
    pickled = pickle.dumps(output)
    pickle.loads(pickled)  # noqa: S301  (made one line above)
    return pickled


_CODECS: dict[str, tuple[Callable[[Any], str | bytes], Callable[[Any], Any], str]] = {
    "json": (_to_json, json.loads, 'write codec="pickle" and name a new file, or return plain JSON'),
    "pickle": (_to_pickle, pickle.loads, "return what pickle gives back, such as plain data"),
}
"""For each codec: how it encodes an output, how it decodes it, and the advice for an output that it can't encode."""
