"""The files and streams that a copy reads and writes, with the same names."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Final, Protocol, TextIO, runtime_checkable

from lynkr_store.db.sqlite import require_regular_file
from lynkr_store.exceptions import BadArgument, StoreUnavailable
from lynkr_store.ingest.batch import Columns
from lynkr_store.process.files import alone, make_private
from lynkr_store.transfer import json_lines, parquet

Write = Callable[[Columns], None]
"""Writes portable rows."""


@runtime_checkable
class FileRows(Protocol):
    """Rows of a file in the order of their ids."""

    name: str
    read_again: bool
    """Whether the rows can be read more than once."""

    def pages(self) -> Iterator[Columns]:
        """All rows as they are, page by page."""

    def total(self, done: int) -> int | None:
        """About how many rows there are, when so many are read; None if that is not known."""

    def newest(self) -> Columns:
        """What identifies the last rows that earlier copies wrote; empty without rows."""

    def appending(self, newest: Columns) -> AbstractContextManager[Write]:
        """Write rows after those that are there, unless others than these are the newest now."""


class JsonLinesFile:
    """A file of JSON Lines. An interrupted copy continues after its last whole line."""

    read_again = True

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = _followed(path)
        self._read = 0

    def pages(self) -> Iterator[Columns]:
        """All rows as they are, page by page."""
        with _explained(self._path), self._path.open("rb") as file:
            for page in json_lines.read_lines(file, self.name):
                self._read = file.tell() if file.seekable() else 0
                yield page

    def total(self, done: int) -> int | None:
        """Estimated from the bytes that the rows so far took."""
        return int(done * self._path.stat().st_size / self._read) if self._read else None

    def newest(self) -> Columns:
        """The last whole rows."""
        with _explained(self._path):
            return json_lines.newest(self._path) if self._path.exists() else {}

    @contextmanager
    def appending(self, newest: Columns) -> Iterator[Write]:
        """Write lines after those that are there."""
        with _explained(self._path):
            make_private(self._path)
            with self._path.open("r+b") as file, alone(file, self._path):
                _require_unchanged(self, newest)
                json_lines.cut_incomplete(file)
                yield lambda columns: _write(file, json_lines.lines_of(columns))
                file.flush()
                os.fsync(file.fileno())


class ParquetFile:
    """A file of Parquet. It is written next to its place and put there when it is complete."""

    read_again = True

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = _followed(path)

    def pages(self) -> Iterator[Columns]:
        """All rows as they are, page by page."""
        with _explained(self._path):
            yield from parquet.read(self._path)

    def total(self, done: int) -> int | None:  # noqa: ARG002 - it is exact
        """The number of rows."""
        return self._count

    @cached_property
    def _count(self) -> int:
        return parquet.count(self._path)

    def newest(self) -> Columns:
        """The last rows."""
        with _explained(self._path):
            return parquet.newest(self._path) if self._path.exists() else {}

    @contextmanager
    def appending(self, newest: Columns) -> Iterator[Write]:
        """Write the file anew, with these rows after those that are there."""
        with _explained(self._path), parquet.written(self._path) as write:
            _require_unchanged(self, newest)
            yield write


class StandardStreams:
    """Standard input or output, as JSON Lines."""

    name = "-"
    read_again = False

    def pages(self) -> Iterator[Columns]:
        """All rows as they are, page by page."""
        lines = _opened(sys.stdin, "standard input").buffer
        yield from json_lines.read_lines(lines, "standard input")

    def total(self, done: int) -> int | None:  # noqa: ARG002
        """Not known."""
        return None

    def newest(self) -> Columns:
        """Empty: every row is written."""
        return {}

    @contextmanager
    def appending(self, newest: Columns) -> Iterator[Write]:  # noqa: ARG002
        """Write lines to standard output."""
        file = _opened(sys.stdout, "standard output").buffer
        with _told("standard output", "then run the copy again"):
            yield lambda columns: _write(file, json_lines.lines_of(columns))
            file.flush()


_BY_SUFFIX: Final[dict[str, Callable[[Path], FileRows]]] = {
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".parquet": ParquetFile,
}
SUFFIXES: Final = tuple(_BY_SUFFIX)
"""How the names of files end."""


def file_named(name: str) -> FileRows | None:
    """The file or stream that a place's name means; None for the name of a database."""
    if name == "-":
        return StandardStreams()
    path = Path(name)
    made = None if "://" in name else _BY_SUFFIX.get(path.suffix.lower())
    return made and made(path)


def _followed(path: Path) -> Path:
    """The path; of a symbolic link, what it points to, so that the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _write(file: IO[bytes], lines: bytes) -> None:
    file.write(lines)


def _opened(stream: TextIO | None, name: str) -> TextIO:
    """A standard stream; Python has None where the process was started without it."""
    if stream is None:
        raise BadArgument(f"{name} is closed: give a file's path, or connect it to a pipe")
    return stream


def _require_unchanged(file: FileRows, newest: Columns) -> None:
    """Refuse a file that another copy wrote since its newest rows were read."""
    if file.newest() != newest:
        raise OSError(errno.EBUSY, "another process has written it meanwhile")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Have an error of the operating system name the file and the remedy."""
    require_regular_file(path)
    with _told(str(path), "then run the copy again: it continues"):
        try:
            yield
        except FileNotFoundError:
            if not path.parent.exists():
                raise StoreUnavailable(
                    f"{path.parent} does not exist: create this directory, or give another path"
                ) from None
            raise StoreUnavailable(f"{path} does not exist: give a file's path") from None


@contextmanager
def _told(name: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"{name}: {error.strerror or error}; mend that, {remedy}") from None
