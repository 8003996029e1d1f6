"""The call site of the writer: takes a record in a few microseconds, waits for nobody.

No lock stands in the way in. Threads that take turns at a lock hand each other the interpreter
with it, and a call that took microseconds then takes hundreds of them. Instead a record takes its
place and enters the queue in one call of C, in which neither another thread nor a signal handler
can come between. So the bounds are exact, and an exception that a signal handler raises finds a
record either queued, with its place, or not at all.

A record waits as one MessagePack string beside its two texts. Packing it is one call in C, which
copies what the caller could still change and says how many bytes it holds.
"""

import gc
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from itertools import repeat
from mmap import mmap
from operator import call, length_hint
from os import SEEK_CUR
from sys import getsizeof
from types import FunctionType, ModuleType, NoneType
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from ormsgpack import packb

from lynkr_store.ingest.codec import AS_IT_IS, STAMP, Packed, packable, unpacked
from lynkr_store.schemas import RoutingEvent, datetime_of, plain

_RECORD_BYTES: Final = 256  # what a queued record costs, about, beside its fields
_UNIT_BYTES: Final = 2_048  # bytes are counted in units
_MOST_UNITS: Final = 2**20  # larger queues have larger units

_MAX_DEPTH: Final = 50  # of containers in a record that is not packed
_MAX_PARTS: Final = 64  # of a number or name of a class that is not Python's own

_bytes_of_text: Final = str.__sizeof__

_LARGE_BYTES: Final = 65_536  # few records of that size fill a queue before a batch is full
_NEVER: Final = 2**62

_CAUSES: Final = ("queue_full", "closed", "deadline")

_NOW: Final = (SEEK_CUR,)
_END: Final = (2**62,)
_second: Final[Any] = {}.get  # of its two arguments


class Queued(msgspec.Struct, gc=False):
    """A record that waits. It is nothing that Python's collector follows."""

    units: int
    """Its size."""
    fields: Any
    """Packed; or, where they cannot be, an `_Unpacked`."""
    request: Any
    response: Any


class _Unpacked(NamedTuple):
    record: Any
    stamp_ms: int


class _Never:
    """Stands for a value that no field takes: a container of another kind, say."""


_NEVER_VALID: Final = _Never()


class _TooLargeError(Exception):
    """A record is larger than the queue."""


class Taken(NamedTuple):
    """What was taken from the queue together."""

    records: list[Queued]
    units: int


class RecordQueue:
    """A queue, bounded in rows and bytes, that many threads fill and one empties.

    Args:
        clock: The present in epoch milliseconds, for records that name no instant.
        max_rows: Records that may wait.
        max_bytes: Bytes of records that may wait, or that the writer has in hand.
        ring: Called when as many records wait as `wake_at` says, or a large one came. It may be
            called again for the same record.
        after_close: Called when a record came in while the writer was closing; returns whether
            it will still be written.

    Attributes:
        closed: Set by the writer: take no more.
        wake_at: Set by the writer: how many records must wait for `ring` to be called.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        max_rows: int,
        max_bytes: int,
        *,
        ring: Callable[[], None],
        after_close: Callable[[], bool],
    ) -> None:
        self.closed = False
        self.wake_at = 1
        self._clock = clock
        self._ring = ring
        self._after_close = after_close
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._unit = max(_UNIT_BYTES, -(-max_bytes // _MOST_UNITS))
        self._max_units = max(1, max_bytes // self._unit)
        self._large = max(1, _LARGE_BYTES // self._unit)
        self._queue: deque[Queued] = deque(maxlen=max_rows)  # insert() raises when it is full
        # The position of this file counts the units in use. It is never read, and memory that is
        # not written costs nothing. What counts is that one call of C takes any number of units or
        # none (ValueError): no number of Python's can be changed so.
        self._units = mmap(-1, self._max_units)
        # Likewise these count: one call of C for each refusal.
        self._refusals = {cause: repeat(None, _NEVER) for cause in _CAUSES}
        # what submit() calls each time, found once
        self._put = self._queue.insert
        self._take_units: Any = self._units.seek

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, record: Any) -> bool:  # noqa: C901, PLR0912 - a call more is 2 % of the time
        """Queue a record. Never raises, never waits.

        A dict becomes the writer's: the caller must not keep it. Containers in it are copied.

        Returns:
            True when it was queued; False when it was dropped, and counted.
        """
        if self.closed:
            return self._refuse("closed")
        request = response = None
        try:
            if record.get("timestamp") is None:
                record[STAMP] = self._clock()
            # not by pop(): an interruption after it would lose a text
            request, response = record.get("request_text"), record.get("response_text")
            record["request_text"] = record["response_text"] = None
            packed: Any = packb(record, packable, AS_IT_IS)
            size = len(packed)
            if type(request) is str:
                size += _bytes_of_text(request)
            elif request is not None:
                raise TypeError  # noqa: TRY301 - a jump; a subclass may hold more than its text
            if type(response) is str:
                size += _bytes_of_text(response)
            elif response is not None:
                raise TypeError  # noqa: TRY301
        except Exception:  # noqa: BLE001 - an event, a part of another type, or its own methods
            packed, size = self._unpackable(record, request, response)
            request = response = None
        units = (_RECORD_BYTES + size) // self._unit + 1
        queued = Queued(units, packed, request, response)
        if len(self._queue) >= self._max_rows:
            return self._refuse("queue_full")
        try:
            # one call of C: take the units, then put the record at the end
            place = map(_second, map(self._take_units, (units,), _NOW), _END)
            next(map(self._put, place, (queued,)))
            if len(self._queue) >= self.wake_at or units > self._large:
                self.wake_at = _NEVER
                self._ring()
        except ValueError:  # no room for so many units
            return self._refuse("queue_full")
        except (IndexError, MemoryError):  # other threads took the last row, or there is no memory
            self.release(units)
            return self._refuse("queue_full")
        except BaseException:  # from a signal handler: perhaps the record is queued
            self._ring()
            raise
        if self.closed:  # since it was asked above
            return self._after_close()  # type: ignore[unreachable]
        return True

    def take(self, max_rows: int, max_bytes: int) -> Taken:
        """Take the oldest records, up to both limits, but one at least if there is any."""
        most = max_bytes // self._unit
        records: list[Queued] = []
        units = 0
        while self._queue and len(records) < max_rows:
            if records and units + self._queue[0].units > most:
                break
            records.append(self._queue.popleft())
            units += records[-1].units
        return Taken(records, units)

    def release(self, units: int) -> None:
        """Give back the place of records that need no memory any more."""
        try:
            self._units.seek(-units, SEEK_CUR)
        except ValueError:  # after memory ran out a few units may have been given back twice
            self._units.seek(0)

    def is_half_full(self) -> bool:
        """Whether half of the rows or of the bytes are in use."""
        return 2 * len(self) >= self._max_rows or 2 * self._units.tell() >= self._max_units

    def refused(self) -> Counter[str]:
        """Cause to number of records that were not taken, or that `refuse_queued` dropped."""
        counts = {cause: _NEVER - length_hint(left) for cause, left in self._refusals.items()}
        return +Counter(counts)

    def refuse_queued(self, cause: str) -> int:
        """Drop what waits; returns how many records that were.

        Each is dropped and counted in one call of C, so a signal handler that raises in the middle
        leaves none uncounted; who calls again goes on.
        """
        dropped = 0
        one, count = (self._queue.popleft,), (self._refusals[cause],)
        while self._queue:
            queued, _ = next(zip(map(call, one), map(next, count), strict=True))
            self.release(queued.units)
            dropped += 1
        return dropped

    def _unpackable(self, record: Any, request: Any, response: Any) -> tuple[_Unpacked, int]:
        """A record out of its owner's reach, or None for one that cannot be read, and its size.

        It is tried twice: another thread may change a container meanwhile, and a signal handler may
        raise an exception that is not the record's.
        """
        for _ in range(2):
            with suppress(Exception):
                stamp_ms = self._clock()
                copy = _Copy(self._max_bytes)
                try:
                    if type(record) is dict:
                        record.pop(STAMP, None)
                        if request is not None:
                            record["request_text"] = request
                        if response is not None:
                            record["response_text"] = response
                        copied = copy.of(record)
                    else:
                        copied = _of_event(record, copy)
                except _TooLargeError:
                    return _Unpacked(None, 0), self._max_bytes
                return _Unpacked(copied, stamp_ms), copy.size
        return _Unpacked(None, 0), 0

    def _refuse(self, cause: str) -> bool:
        next(self._refusals[cause])
        return False


def as_packed(queued: Queued) -> Packed:
    """What was queued, but for its size; what stands for the fields may be no bytes."""
    return queued.fields, queued.request, queued.response


def as_submitted(queued: Queued) -> tuple[Any, int]:
    """What was submitted, and if it names no instant, that of the call in epoch milliseconds.

    Its containers are copies that no caller can reach. None is a record that cannot be read.
    """
    if type(queued.fields) is _Unpacked:
        return queued.fields
    record = unpacked(queued.fields)
    stamp_ms = record.pop(STAMP, 0)
    if queued.request is not None:
        record["request_text"] = queued.request
    if queued.response is not None:
        record["response_text"] = queued.response
    return record, stamp_ms


def _of_event(event: Any, copy: "_Copy") -> Any:
    """What is queued of an event.

    An event that was checked holds values of Python's own types; one that was not is copied.
    """
    values = vars(event)
    if all(type(value) in _PLAIN for value in values.values()):
        copy.add(sum(map(getsizeof, values.values())))
        return event
    return copy.of({name: values[name] for name in RoutingEvent.model_fields if name in values})


class _Copy:
    """Copies nested containers, so that later changes do not reach them, and counts their bytes.

    Values of a type that no field takes are replaced by one that holds no memory, and is rejected
    later; so is what is nested too deep, in itself perhaps.

    Args:
        max_bytes: A record of more is too large.
    """

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self._max_bytes = max_bytes

    def of(self, value: Any, depth: int = 0) -> Any:
        """The copy.

        Raises:
            _TooLargeError: It has more bytes than are allowed.
            Exception: A value's own methods fail.
        """
        kind = type(value)
        if kind in _PLAIN:
            self.add(getsizeof(value))
            return value
        if not isinstance(value, Mapping | list | tuple):
            return self._single(value)
        if depth > _MAX_DEPTH:
            return _NEVER_VALID
        if isinstance(value, Mapping):
            copy: Any = {
                self.of(key, _MAX_DEPTH + 1): self.of(item, depth + 1)
                for key, item in value.items()
            }
        else:
            copy = [self.of(item, depth + 1) for item in value]
        self.add(getsizeof(copy))
        return copy

    def add(self, size: int) -> None:
        """Count bytes."""
        self.size += size
        if self.size > self._max_bytes:
            raise _TooLargeError

    def _single(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Enum):  # the class holds it
            return value
        instant = datetime_of(value)  # the value may hold a zone of any class
        if instant is not None:
            self.add(getsizeof(instant))
            return instant
        number = hasattr(kind, "__index__") or hasattr(kind, "__float__")
        if isinstance(value, _KEPT) or (number and not hasattr(kind, "__setitem__")):
            parts, seen = [value], {id(value)}
            for part in parts:
                self.add(getsizeof(part))
                for other in gc.get_referents(part):
                    if not isinstance(other, _SHARED) and id(other) not in seen:
                        seen.add(id(other))
                        parts.append(other)
                if len(parts) > _MAX_PARTS:
                    break
            else:
                return value
        found = plain(value)  # what can be changed, as an array of one number, or holds much
        if type(found) not in _PLAIN:
            return _NEVER_VALID
        self.add(getsizeof(found))
        return found


_PLAIN: Final = frozenset({str, int, float, bool, NoneType, bytes})
_KEPT: Final = (str, int, float, date, timedelta, UUID, Decimal)
_SHARED: Final = (type, FunctionType, ModuleType)
