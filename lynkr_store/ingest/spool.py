"""A local file where batches wait while the database cannot be reached.

It is an SQLite file with JSON, and one process at a time holds it with SQLite's exclusive lock,
which the system releases when the process dies. A second process with the same path uses a sibling,
``spool.db.2``. The next process that opens a file that no process holds takes it over, with its
batches. So two processes never replay the same batch, and no batch waits for a process that ended.

A spool holds prompts, and its batches are stored as this store's records. So each file must belong
to this user, be readable by this user only, and not be a link (`lynkr_store.process.files`). The
same applies to its journals, which SQLite would play back into the file. Another user's file is
never opened.
"""

import errno
import glob
import json
import os
import re
import sqlite3
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lynkr_store.exceptions import SpoolError
from lynkr_store.ingest.batch import Row, RowBatch
from lynkr_store.process.files import (
    Identity,
    identity_of,
    make_directory,
    make_private,
    private,
    refuse_open_directory,
)

_APPLICATION_ID: Final = 0x6C796E6B  # "lynk": distinguishes a spool from another database
_PAGE_BYTES: Final = 4_096
_DAMAGE_CODES: Final = (
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_ERROR,  # the schema is not the one that this module creates
    0,  # the driver's own error: a text cannot be decoded
)
_MOST_FILES: Final = 1_000  # processes that share a path
_JOURNAL: Final = "-journal"
_SUFFIXES: Final = (_JOURNAL, "-wal", "-shm")
"""Suffixes of files that SQLite reads as part of a database, whichever program created them."""
_MOST_ID_CHARS: Final = 64
_SCALARS: Final = (str, int, float, bool, type(None))
_OVERHEAD: Final = 1.05  # the approximate size of pages relative to their content

_PRAGMAS: Final = (
    f"page_size = {_PAGE_BYTES}",
    "auto_vacuum = INCREMENTAL",  # the space is returned when an outage is over
    "journal_mode = TRUNCATE",  # one file; in WAL mode a second file would grow
    "synchronous = FULL",  # these batches are nowhere else
    "secure_delete = ON",  # removed texts do not stay in the file
)
_TABLE: Final = """
    CREATE TABLE IF NOT EXISTS batches (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        batch_id TEXT NOT NULL UNIQUE,
        row_count INTEGER NOT NULL,
        attempted_at INTEGER,
        checksum INTEGER NOT NULL,
        payload BLOB NOT NULL
    )
"""


class SpoolDamaged(SpoolError):
    """A batch, or a whole file, cannot be read."""


class SpoolForeign(SpoolError):
    """The file belongs to another user or another program, and is not touched."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A batch in a spool.

    Attributes:
        rows: The number of rows.
        attempted_at: When the database was first asked to store it without an answer, in epoch
            milliseconds; None if it was never asked, or always answered.
        found: Another `Spool` wrote it, usually in an earlier process.
        sound: The file's values about it are possible.
    """

    file: "_File"
    seq: int
    batch_id: str
    rows: int
    attempted_at: int | None
    found: bool = False
    sound: bool = True


class Spool:
    """The spool of one store. Threads may share it.

    Args:
        path: The file; siblings are in the same directory.
        max_bytes: The size up to which this process fills its own file.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._own: _File | None = None
        self._left: list[_File] = []
        self._entries: deque[Entry] = deque()
        self.set_aside: list[Path] = []
        """Damaged files, under their new names."""
        self.passed_over: list[SpoolForeign] = []
        """Why a sibling was not used, once for each."""
        self.found_rows = 0
        """Rows found so far in files that other processes left."""
        self.lost_rows = 0
        """Rows lost so far with damaged or removed files."""
        self._unusable: set[Path] = set()
        self._closed = False

    def open(self) -> None:
        """Take a file, and all files left by processes that ended. May be called again.

        Raises:
            SpoolError: No file can be opened; a later call tries again.
        """
        with self._lock:
            self._take_own()
            held = {self._own, *self._left}
            for path in self._siblings():
                if all(file is None or file.path != path for file in held):
                    file = self._claim_sibling(path)
                    if file and not file.found:  # empty: another process may be about to take it
                        file.close()
                    elif file:
                        self._left.append(file)
                        self._find(file)

    def first(self) -> Entry | None:
        """The batch to replay next, beginning with the oldest in this process's own file."""
        try:
            return self._entries[0]
        except IndexError:
            return None

    def enter(self, batch_id: str, rows: Sequence[Row], attempted_at: int | None) -> Entry:
        """Append a batch, durably.

        Raises:
            SpoolError: It does not fit, or the file cannot be written.
        """
        return self._enter(batch_id, rows, attempted_at, found=False)

    def _enter(
        self, batch_id: str, rows: Sequence[Row], attempted_at: int | None, *, found: bool
    ) -> Entry:
        payload = _encoded(rows)
        with self._lock, _explained(self._path):
            own = self._take_own()
            if own.is_gone:
                self._replace(own)
                own = self._take_own()
            try:
                seq = self._inserted(own, batch_id, len(rows), attempted_at, payload)
            except (sqlite3.Error, UnicodeError) as error:
                if not _is_damage(error):
                    raise
                self._replace(own, aside=True)
                own = self._take_own()
                seq = self._inserted(own, batch_id, len(rows), attempted_at, payload)
            entry = Entry(own, seq, batch_id, len(rows), attempted_at, found)
            self._entries.append(entry)
            return entry

    def _inserted(
        self, own: "_File", batch_id: str, rows: int, attempted_at: int | None, payload: bytes
    ) -> int:
        if own.used_bytes() + len(payload) * _OVERHEAD > self._max_bytes:
            raise SpoolError("the spool is full: set spool_max_bytes higher")
        return own.insert(batch_id, rows, attempted_at, payload)

    def load(self, entry: Entry) -> list[Row]:
        """The rows of a batch, as many as the file says.

        Raises:
            SpoolDamaged: The rows cannot be read, for any reason: later batches must not wait.
            MemoryError: There is not enough memory now. The rows may be sound, and a later call may
                succeed, because the writer makes no large batches.
        """
        with self._lock:
            try:
                rows = _decoded(*entry.file.payload(entry.seq))
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001 - of any type, such as RecursionError
                rows = []
        if not entry.sound or len(rows) != entry.rows:
            raise SpoolDamaged(f"{entry.file.path}: a batch cannot be read")
        return rows

    def mark_attempt(self, entry: Entry, now_ms: int) -> None:
        """Record, before the database is asked, that its answer may be lost.

        Raises:
            SpoolError: The file cannot be written.
        """
        if entry.attempted_at is None:
            with self._lock, _explained(self._path):
                entry.file.mark(entry.seq, now_ms)

    def remove(self, entry: Entry) -> None:
        """Remove a batch; with the last one, the file's space is returned.

        Raises:
            SpoolError: The file cannot be written. This process does not replay the batch, and
                another process will find it in the ledger.
        """
        with self._lock:
            # it may have been moved to another file since it was loaded
            entry = next((e for e in self._entries if e.batch_id == entry.batch_id), entry)
            with suppress(ValueError):
                self._entries.remove(entry)
            with _explained(self._path):
                entry.file.delete(entry.seq)
                if not any(other.file is entry.file for other in self._entries):
                    entry.file.shrink()
                    if entry.file is not self._own:
                        self._left.remove(entry.file)
                        entry.file.close()

    def abandon(self, entry: Entry) -> None:
        """Set the file of a damaged batch aside, and move its readable batches to another file."""
        with self._lock:
            self._replace(entry.file, aside=True, but=entry)

    def _replace(self, old: "_File", *, aside: bool = False, but: Entry | None = None) -> None:
        """Move the readable batches of a file, except one, and count the others as lost."""
        entries = [entry for entry in self._entries if entry.file is old]
        self._entries = deque(entry for entry in self._entries if entry.file is not old)
        if aside:
            self._set_aside(old.path)
        if old is self._own:
            self._own = None
        else:
            self._left.remove(old)
        try:
            for entry in entries:  # one at a time, because memory may not suffice for all
                if entry is but or not self._moved(entry):
                    self.lost_rows += entry.rows
        finally:
            old.close()

    def _moved(self, entry: Entry) -> bool:
        try:
            rows = self.load(entry)
            self._enter(entry.batch_id, rows, entry.attempted_at, found=entry.found)
        except (SpoolError, MemoryError):
            return False
        return True

    def _set_aside(self, path: Path) -> None:
        """Rename a damaged file; if that fails, do not use it any more."""
        try:
            self.set_aside.append(_renamed(path))
        except OSError:
            self.set_aside.append(path)
            self._unusable.add(path)

    def close(self) -> None:
        """Release the files; their batches stay for the next process."""
        with self._lock:
            for file in (self._own, *self._left):
                if file:
                    file.close()
            self._entries.clear()
            self._own, self._left = None, []
            self._closed = True

    def hold(self, timeout_s: float) -> bool:
        """Prevent transactions until `release`, because the process is about to fork.

        Returns:
            False if a transaction did not end in time; then nothing is prevented.
        """
        return self._lock.acquire(timeout=timeout_s)

    def release(self) -> None:
        """Allow transactions again after `hold`."""
        self._lock.release()

    def _take_own(self) -> "_File":
        if self._closed:
            raise SpoolError("the spool was closed")
        if self._own is None:
            self._own = self._claim(self._path) or next(
                (file for path in self._names() if (file := self._claim_sibling(path))), None
            )
            if self._own is None:
                raise SpoolError(
                    f"spool_path: too many processes share {self._path}; give each service a path "
                    "of its own"
                )
            self._find(self._own)
        return self._own

    def _find(self, file: "_File") -> None:
        found = [_entry(file, *values) for values in file.found]
        self.found_rows += sum(entry.rows for entry in found)  # counted before they can be taken
        self._entries.extend(found)

    def _names(self) -> Iterator[Path]:
        for number in range(2, _MOST_FILES):
            yield self._path.with_name(f"{self._path.name}.{number}")

    def _siblings(self) -> list[Path]:
        found = self._path.parent.glob(f"{glob.escape(self._path.name)}.*")
        return [self._path, *sorted(path for path in found if path.suffix[1:].isdigit())]

    def _claim_sibling(self, path: Path) -> "_File | None":
        """As `_claim`, but a foreign file is skipped: the user did not name a sibling's path."""
        try:
            return self._claim(path)
        except SpoolForeign as error:
            if str(error) not in map(str, self.passed_over):
                self.passed_over.append(error)
            return None

    def _claim(self, path: Path) -> "_File | None":
        """Hold a file, and create it if necessary; None if another process holds it.

        Raises:
            SpoolForeign: It belongs to another user or another program.
            SpoolError: It cannot be opened.
        """
        if path in self._unusable:
            return None
        with _explained(path):
            try:
                return _File.held(path)
            except (sqlite3.Error, UnicodeError) as error:
                if not _is_damage(error):
                    raise
                self._set_aside(path)
                return None if path in self._unusable else _File.held(path)


class _File:
    """One SQLite file, locked."""

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: Identity) -> None:
        self.path = path
        self._connection = connection
        self._identity = identity
        self.found: list[tuple[Any, ...]] = connection.execute(
            "SELECT seq, batch_id, row_count, attempted_at, length(payload)"
            " FROM batches ORDER BY seq"
        ).fetchall()

    @classmethod
    def held(cls, path: Path) -> "_File | None":
        make_directory(path.parent)
        with _of_ours(path):
            refuse_open_directory(path.parent)
            _make(path)
            identity = private(path)
            for end in _SUFFIXES:
                with suppress(FileNotFoundError):
                    private(_with_suffix(path, end))
        connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            objects = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if objects and _pragma(connection, "application_id") != _APPLICATION_ID:
                raise SpoolForeign(  # noqa: TRY301
                    f"spool_path: {path} is another program's database; give another path"
                )
            _take(path, identity)
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}").fetchall()
            connection.execute("BEGIN EXCLUSIVE")
            if not objects:
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(_TABLE)
            connection.execute("COMMIT")
            _take(path, identity)
            return cls(path, connection, identity)
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.OperationalError) and _code(error) == sqlite3.SQLITE_BUSY:
                return None
            raise

    @property
    def is_gone(self) -> bool:
        """Whether the file was removed, for example by a cleaner of temporary files."""
        return identity_of(self.path) != self._identity

    def insert(self, batch_id: str, rows: int, attempted_at: int | None, payload: bytes) -> int:
        cursor = self._connection.execute(
            "INSERT INTO batches (batch_id, row_count, attempted_at, checksum, payload)"
            " VALUES (?, ?, ?, ?, ?)",
            (batch_id, rows, attempted_at, zlib.crc32(payload), payload),
        )
        assert cursor.lastrowid is not None  # noqa: S101 - an INSERT sets it
        return cursor.lastrowid

    def payload(self, seq: int) -> tuple[int, bytes]:
        checksum, payload = self._connection.execute(
            "SELECT checksum, payload FROM batches WHERE seq = ?", (seq,)
        ).fetchone()
        return checksum, payload

    def mark(self, seq: int, now_ms: int) -> None:
        self._connection.execute("UPDATE batches SET attempted_at = ? WHERE seq = ?", (now_ms, seq))

    def delete(self, seq: int) -> None:
        self._connection.execute("DELETE FROM batches WHERE seq = ?", (seq,))

    def shrink(self) -> None:
        # execute() takes one step only, which returns one page
        self._connection.executescript("PRAGMA incremental_vacuum")

    def used_bytes(self) -> int:
        pages, free = (_pragma(self._connection, n) for n in ("page_count", "freelist_count"))
        return (pages - free) * _PAGE_BYTES

    def close(self) -> None:
        self._connection.close()


def clashes(path: Path, database: Path) -> bool:
    """Whether a spool with this path would use an SQLite database's files, also through links.

    Args:
        path: The spool's path; its siblings and their journals are considered too.
        database: The database's file, which need not exist; its WAL and journals are considered.
    """
    spools, files = ([of, *(_with_suffix(of, end) for end in _SUFFIXES)] for of in (path, database))
    if any(_is_same(spool, file) for spool in spools for file in files):
        return True
    sibling = re.compile(rf"{re.escape(_real(path))}\.\d+({'|'.join(_SUFFIXES)})?")
    return any(sibling.fullmatch(_real(file)) for file in files)


def _is_same(one: Path, other: Path) -> bool:
    identity = identity_of(one)
    return _real(one) == _real(other) or (identity is not None and identity == identity_of(other))


def _real(path: Path) -> str:
    return os.path.realpath(path)  # Path.resolve() raises where links lead in a circle


def _make(path: Path) -> None:
    """Create the file, if it does not exist, readable by its owner only."""
    try:
        make_private(path)
    except OSError:  # needs a descriptor; closing it is harmless before SQLite opens the file
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _take(path: Path, identity: Identity) -> None:
    """Make this user's file private, and create its journal before another user can.

    Raises:
        SpoolForeign: The file was replaced while SQLite opened it.
    """
    journal = _with_suffix(path, _JOURNAL)
    with _of_ours(path):
        if private(path) != identity:
            raise SpoolForeign(f"spool_path: {path} was replaced while it was opened")
        private(path, shut=True)
        while True:
            _make(journal)
            try:
                private(journal, shut=True)
            except FileNotFoundError:  # another process, which holds the file, ended a transaction
                continue
            break


@contextmanager
def _of_ours(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        raise SpoolForeign(f"spool_path: {path}: {error.strerror}") from None


def _with_suffix(path: Path, end: str) -> Path:
    return path.with_name(f"{path.name}{end}")


def _entry(file: _File, seq: Any, batch_id: Any, rows: Any, attempted_at: Any, size: Any) -> Entry:
    """A batch with the file's values; if its number of rows is impossible, it counts as one row.

    Each row takes at least one byte of the payload, so a greater number of rows is impossible.
    """
    counted = type(rows) is int and type(size) is int and 0 < rows <= size
    sound = (
        counted
        and type(seq) is int
        and type(batch_id) is str
        and 0 < len(batch_id) <= _MOST_ID_CHARS
        and batch_id.isascii()
        and batch_id.isprintable()
        and (attempted_at is None or (type(attempted_at) is int and attempted_at >= 0))
    )
    return Entry(file, seq, batch_id, rows if counted else 1, attempted_at, found=True, sound=sound)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _code(error: sqlite3.Error) -> int:
    """The primary part of SQLite's result code; 0 for the driver's own errors."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_damage(error: Exception) -> bool:
    """Whether the file is damaged: SQLite cannot make sense of it, or a text cannot be decoded."""
    if isinstance(error, UnicodeError):
        return True
    if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, sqlite3.ProgrammingError):
        return False  # for example a closed connection
    return _code(error) in _DAMAGE_CODES


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeError) as error:  # SQLite's message repeats no value
        kind = SpoolDamaged if _is_damage(error) else SpoolError
        raise kind(f"spool_path: {path}: {error}") from None
    except OSError as error:
        raise SpoolError(f"spool_path: {path}: {error.strerror}") from None


def _renamed(path: Path) -> Path:
    """Give a damaged file, and its journal, a name that no process opens; return the name."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    for number in range(_MOST_FILES):
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
        if not aside.exists():
            break
    path.rename(aside)
    with suppress(FileNotFoundError):
        _with_suffix(path, _JOURNAL).rename(_with_suffix(aside, _JOURNAL))
    return aside


def _encoded(rows: Sequence[Row]) -> bytes:
    rows = RowBatch.of(rows)
    table = {"columns": rows.columns, "rows": list(rows.tuples())}
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()


def _decoded(checksum: int, payload: bytes) -> list[Row]:
    """The rows that were given to `_encoded`.

    Raises:
        Exception: The payload has another structure, or is not the one that was written.
    """
    if zlib.crc32(payload) != checksum:
        raise ValueError("the checksum is wrong")
    table = json.loads(payload)
    columns, rows = table["columns"], table["rows"]
    if type(columns) is not list or not columns or not all(type(name) is str for name in columns):
        raise ValueError("columns without names")
    if len(set(columns)) != len(columns):
        raise ValueError("two columns with the same name")
    if not all(type(row) is list and all(type(v) in _SCALARS for v in row) for row in rows):
        raise ValueError("rows that are not lists of values")
    return [dict(zip(columns, row, strict=True)) for row in rows]
