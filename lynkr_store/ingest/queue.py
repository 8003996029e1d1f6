"""The queue of records: it takes a record in a few microseconds and never waits.

There is no lock. Threads that compete for a lock also pass the interpreter lock, and a call of a
few microseconds then takes hundreds. Instead, one call of a C function reserves the record's bytes
and appends it; neither another thread nor a signal handler can run in between. So the limits are
exact, and if a signal handler raises an exception, the record is either queued with its bytes or
not at all.

A queued record is one MessagePack string and its two texts. Packing is one call of a C function,
which copies everything that the caller could still change, and gives the size.
"""

import gc
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
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
from lynkr_store.schemas import RoutingEvent, datetime_of, plain, type_name

_RECORD_BYTES: Final = 256  # the approximate memory of a queued record in addition to its fields
_UNIT_BYTES: Final = 2_048  # bytes are counted in units
_MOST_UNITS: Final = 2**20  # larger queues have larger units

_MAX_DEPTH: Final = 50  # of nested containers in a record that is not packed
_MAX_PARTS: Final = 64  # objects in a number or name whose class is not Python's own

_bytes_of_text: Final = str.__sizeof__

_LARGE_BYTES: Final = 65_536  # a few records of this size fill a queue before a batch is full
_NEVER: Final = 2**62

_CAUSES: Final = ("queue_full", "closed", "deadline")

_NOW: Final = (SEEK_CUR,)
_END: Final = (2**62,)
_second: Final[Any] = {}.get  # returns the second of its two arguments


class Queued(msgspec.Struct, gc=False):
    """A queued record, which Python's garbage collector does not track."""

    units: int
    """Its size."""
    fields: Any
    """The packed fields; an `_Unpacked` if they cannot be packed."""
    request: Any
    response: Any


class _Unpacked(NamedTuple):
    record: Any
    stamp_ms: int


@lru_cache(64)  # a record may have a million such keys
def _never_valid(class_name: str) -> object:
    """Replaces a value that no field accepts: of an empty class with the same name."""
    return type(class_name, (), {})()


class _TooLargeError(Exception):
    """A record is larger than the queue."""


class Taken(NamedTuple):
    """Records that were taken from the queue together, and their size."""

    records: list[Queued]
    units: int


class RecordQueue:
    """A queue, limited in rows and bytes, that many threads fill and one thread empties.

    Args:
        clock: Returns the present in epoch milliseconds, for records without an instant.
        max_rows: The most records in the queue.
        max_bytes: The most bytes of records in the queue or in the writer's memory.
        ring: Called when the number of queued records reaches `wake_at`, or when a large one came.
            It may be called twice for the same record.
        after_close: Called when a record came in while the writer was closing; returns whether the
            record will still be written.

    Attributes:
        closed: The writer sets it so that no more records are taken.
        wake_at: The writer sets the number of queued records at which `ring` is called.
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
        # This file's position counts the units in use. Its content is never used, so it takes no
        # memory. One call of a C function takes any number of units, or none if they are not left
        # (ValueError); no Python number can be changed in this way.
        self._units = mmap(-1, self._max_units)
        # These count refusals in the same way, by one call of a C function each.
        self._refusals = {cause: repeat(None, _NEVER) for cause in _CAUSES}
        # looked up once, because submit() calls them each time
        self._put = self._queue.insert
        self._take_units: Any = self._units.seek

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, record: Any) -> bool:  # noqa: C901, PLR0912 - each more call takes 2 % longer
        """Queue a record. Never raises an exception, never waits.

        The queue changes a dict that it gets: the caller must not use it again. Containers in it
        are copied.

        Returns:
            True if the record was queued; False if it was dropped and counted.
        """
        if self.closed:
            return self._refuse("closed")
        request = response = None
        try:
            if record.get("timestamp") is None:
                record[STAMP] = self._clock()
            # not with pop(): an exception right after it would lose a text
            request, response = record.get("request_text"), record.get("response_text")
            record["request_text"] = record["response_text"] = None
            packed: Any = packb(record, packable, AS_IT_IS)
            size = len(packed)
            if type(request) is str:
                size += _bytes_of_text(request)
            elif request is not None:
                raise TypeError  # noqa: TRY301 - a jump; a subclass may hold more than the text
            if type(response) is str:
                size += _bytes_of_text(response)
            elif response is not None:
                raise TypeError  # noqa: TRY301
        except Exception:  # noqa: BLE001 - an event, a value of another type, or its own methods
            packed, size = self._unpackable(record, request, response)
            request = response = None
        units = (_RECORD_BYTES + size) // self._unit + 1
        queued = Queued(units, packed, request, response)
        if len(self._queue) >= self._max_rows:
            return self._refuse("queue_full")
        try:
            # one call of a C function: take the units, then append the record
            place = map(_second, map(self._take_units, (units,), _NOW), _END)
            next(map(self._put, place, (queued,)))
            if len(self._queue) >= self.wake_at or units > self._large:
                self.wake_at = _NEVER
                self._ring()
        except ValueError:  # not so many units are left
            return self._refuse("queue_full")
        except (IndexError, MemoryError):  # other threads filled the queue, or memory ran out
            self.release(units)
            return self._refuse("queue_full")
        except BaseException:  # a signal handler raised it; the record may be queued
            self._ring()
            raise
        if self.closed:  # it may have been closed since the check above
            return self._after_close()  # type: ignore[unreachable]
        return True

    def take(self, max_rows: int, max_bytes: int) -> Taken:
        """Take the oldest records up to both limits, but at least one if there is any."""
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
        """Give back the units of records that use no memory any more."""
        try:
            self._units.seek(-units, SEEK_CUR)
        except ValueError:  # if memory ran out, a few units may have been given back twice
            self._units.seek(0)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of records in the queue or in the writer's memory, counted in units."""
        return self._units.tell() * self._unit

    def is_half_full(self) -> bool:
        """Whether half of the rows or of the bytes are in use."""
        return 2 * len(self) >= self._max_rows or 2 * self._units.tell() >= self._max_units

    def refused(self) -> Counter[str]:
        """The number, by cause, of records that were not taken or that `refuse_queued` dropped."""
        counts = {cause: _NEVER - length_hint(left) for cause, left in self._refusals.items()}
        return +Counter(counts)

    def refuse_queued(self, cause: str) -> int:
        """Drop the queued records and return their number.

        One call of a C function drops and counts each, so an exception from a signal handler leaves
        none uncounted; another call continues.
        """
        dropped = 0
        one, count = (self._queue.popleft,), (self._refusals[cause],)
        while self._queue:
            queued, _ = next(zip(map(call, one), map(next, count), strict=True))
            self.release(queued.units)
            dropped += 1
        return dropped

    def _unpackable(self, record: Any, request: Any, response: Any) -> tuple[_Unpacked, int]:
        """A copy that the caller cannot change, or None if the record cannot be read, and its size.

        Copying is tried twice: another thread may change a container meanwhile, and a signal
        handler may raise an exception that has nothing to do with the record.
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
                    elif type(record) in _PLAIN:  # no record; it is rejected by its type
                        copied = record
                        copy.add(getsizeof(record))
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
    """The fields and the two texts; the fields may be an `_Unpacked` instead of bytes."""
    return queued.fields, queued.request, queued.response


def as_submitted(queued: Queued) -> tuple[Any, int]:
    """The record, and the call's instant in epoch milliseconds if the record has no instant.

    Its containers are copies that the caller cannot change. None is a record that cannot be read.
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
    """The event itself, or a copy.

    The values of a checked event have Python's own types and cannot change; other events are
    copied.
    """
    values = vars(event)
    if all(type(value) in _PLAIN for value in values.values()):
        copy.add(sum(map(getsizeof, values.values())))
        return event
    return copy.of({name: values[name] for name in RoutingEvent.model_fields if name in values})


class _Copy:
    """Copies nested containers, so that later changes do not affect them, and counts their bytes.

    A value of a type that no field accepts is replaced by one that holds no memory and is rejected
    later. So is a container that is nested too deeply, for example in itself.

    Args:
        max_bytes: A larger record is refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self._max_bytes = max_bytes

    def of(self, value: Any, depth: int = 0) -> Any:
        """The copy.

        Raises:
            _TooLargeError: The record has more bytes than are allowed.
            Exception: A value's own methods failed.
        """
        kind = type(value)
        if kind in _PLAIN:
            self.add(getsizeof(value))
            return value
        if not isinstance(value, Mapping | list | tuple):
            return self._single(value)
        if depth > _MAX_DEPTH:
            return _never_valid(type_name(value))
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
        if isinstance(value, Enum):  # its class keeps it in memory anyway
            return value
        instant = datetime_of(value)  # the value's time zone may be of any class
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
        found = plain(value)  # a value that can change, such as an array of one number, or is large
        if type(found) not in _PLAIN:
            return _never_valid(type_name(value))
        self.add(getsizeof(found))
        return found


_PLAIN: Final = frozenset({str, int, float, bool, NoneType, bytes})
_KEPT: Final = (str, int, float, date, timedelta, UUID, Decimal)
_SHARED: Final = (type, FunctionType, ModuleType)
