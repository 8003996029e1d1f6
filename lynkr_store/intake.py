"""The call site of the writer: takes a record in a few microseconds, waits for nobody.

No lock stands in the way in. Threads that take turns at a lock hand each other the interpreter
with it, and a call that took microseconds then takes hundreds of them. Each step here is instead
one operation of a `collections.deque`, which is atomic: a place in the queue is a token taken from
a deque of them, so rows and bytes have exact bounds without a shared counter.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import repeat
from marshal import dumps, loads
from operator import length_hint
from sys import getsizeof
from typing import Any, Final, NamedTuple

from lynkr_store.schemas import LONG_FIELDS, RoutingEvent

_RECORD_BYTES: Final = 512  # what a queued record costs, about: itself,
_FIELD_BYTES: Final = 40  # its fields, each, and the length of its texts
_UNIT_BYTES: Final = 2_048  # bytes are counted in units, each a token
_MOST_UNITS: Final = 2**20  # tokens cost 8 bytes each; larger queues have larger units

_MAX_DEPTH: Final = 50  # of containers in a record's JSON fields
_TOO_DEEP: Final = object()
_UNREADABLE: Final = object()  # a record whose own methods fail; it is rejected like a wrong type

_NO_REFERENCES: Final = 2  # marshal's format without them: half the time, and no endless ones

_COUNT_WAIT_S: Final = 0.1
_REFUSED_UNCOUNTED: Final = 1_000
_LARGE_BYTES: Final = 65_536  # few records of that size fill a queue before a batch is full
_NEVER: Final = 2**62

# What a queued record carries beside its fields, under names that no field can have: a tuple
# around each record would be one more object for Python's collector to count and follow.
_STAMP: Final = "at the call"  # epoch milliseconds
_UNITS: Final = "units"
_EVENT: Final = "event"  # a whole RoutingEvent instead of fields


class Taken(NamedTuple):
    """What was taken from the queue together."""

    records: list[dict[str, Any]]
    units: int


class Intake:
    """A queue, bounded in rows and bytes, that many threads fill and one empties.

    Args:
        clock: The present in epoch milliseconds, for records that name no instant.
        max_rows: Records that may wait.
        max_bytes: Bytes of records that may wait, or that the writer has in hand.
        ring: Called when as many records wait as `wake_at` says, or a large one came.
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
        self._queue: deque[dict[str, Any]] = deque()
        self._max_rows = max_rows
        self._free_rows = deque(repeat(None, max_rows))
        self._unit = max(_UNIT_BYTES, -(-max_bytes // _MOST_UNITS))
        self._max_units = max_bytes // self._unit
        self._large = _LARGE_BYTES // self._unit
        self._free_units = deque(repeat(None, self._max_units))
        self._refused: deque[str] = deque()
        self._refused_by: Counter[str] = Counter()
        self._count_lock = threading.RLock()  # a signal handler may come back to it
        self._counting = False

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, record: dict[str, Any] | RoutingEvent | None) -> bool:
        """Queue a record. Never raises, never waits.

        A dict becomes the writer's: the caller must not keep it. Containers in it are copied.

        Returns:
            True when it was queued; False when it was dropped, and counted.
        """
        if self.closed:
            return self._refuse("closed")
        try:
            if type(record) is not dict:
                record, values = _of_event(record)
            else:
                values = record
            units = _sized(values) // self._unit + 1
            record[_STAMP] = self._clock()
        except Exception:  # noqa: BLE001 - the record's own methods; it will be rejected
            record, units = {_EVENT: None, _STAMP: 0}, 1
        record[_UNITS] = units
        if units > self._max_units:
            return self._refuse("queue_full")
        try:
            self._free_rows.pop()
        except IndexError:
            return self._refuse("queue_full")
        wanted, take = repeat(None, units), self._free_units.pop
        try:
            for _ in wanted:
                take()
        except IndexError:
            self.release(units - length_hint(wanted) - 1)
            self._free_rows.append(None)
            return self._refuse("queue_full")
        self._queue.append(record)
        if len(self._queue) >= self.wake_at or units > self._large:
            self.wake_at = _NEVER
            self._ring()
        if self.closed:  # since it was asked above
            return self._after_close()  # type: ignore[unreachable]
        return True

    def take(self, max_rows: int, max_bytes: int) -> Taken:
        """Take the oldest records, up to both limits, but one at least if there is any."""
        most = max_bytes // self._unit
        records: list[dict[str, Any]] = []
        units = 0
        while self._queue and len(records) < max_rows:
            if records and units + self._queue[0][_UNITS] > most:
                break
            records.append(self._queue.popleft())
            units += records[-1][_UNITS]
        self._free_rows.extend(repeat(None, len(records)))
        return Taken(records, units)

    def release(self, units: int) -> None:
        """Give back the place of records that need no memory any more."""
        self._free_units.extend(repeat(None, units))

    def is_half_full(self) -> bool:
        """Whether half of the rows or of the bytes are in use."""
        rows, units = len(self._queue), len(self._free_units)
        return 2 * rows >= self._max_rows or 2 * units <= self._max_units

    def refused(self) -> Counter[str]:
        """Cause to number of records that were not taken, but for some that come next time."""
        # whom a signal handler interrupted may hold the lock, and wait for the caller
        if self._count_lock.acquire(timeout=_COUNT_WAIT_S):
            try:
                self._count()
            finally:
                self._count_lock.release()
        return Counter(self._refused_by)

    def _refuse(self, cause: str) -> bool:
        self._refused.append(cause)
        if len(self._refused) > _REFUSED_UNCOUNTED and self._count_lock.acquire(blocking=False):
            try:  # who finds the lock free counts for all; nobody waits
                self._count()
            finally:
                self._count_lock.release()
        return False

    def _count(self) -> None:
        if self._counting:
            return  # a signal handler came back in the middle
        self._counting = True
        try:
            while self._refused:
                self._refused_by[self._refused.popleft()] += 1
        finally:
            self._counting = False


def unpacked(queued: dict[str, Any]) -> tuple[Any, int]:
    """What was submitted, and the instant of the call in epoch milliseconds.

    Its containers are copies that no caller can reach.
    """
    stamp_ms: int = queued.pop(_STAMP)
    if _EVENT in queued:
        return queued[_EVENT], stamp_ms
    del queued[_UNITS]
    for name in LONG_FIELDS:
        value = queued.get(name)
        if type(value) is bytearray:
            queued[name] = loads(value)  # noqa: S302 - this process put it there
    return queued, stamp_ms


def _of_event(event: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is queued of an event, and its fields.

    An event that was checked holds no container; one that was not is the caller's all the same.
    """
    values = vars(event)
    if all(isinstance(values.get(name), str | None) for name in LONG_FIELDS):
        return {_EVENT: event}, values
    copy = {name: value for name, value in values.items() if name in type(event).model_fields}
    return copy, copy


def _sized(values: dict[str, Any]) -> int:
    """About how many bytes a record holds. Containers where they may stand are put away.

    The lengths of all values are added up by one C function, numbers counting 0: a loop over two
    dozen fields would take longer than all the rest of a call. So a value that no field may hold
    counts by its length alone; it is not copied, and its record will be rejected.
    """
    size = _RECORD_BYTES + _FIELD_BYTES * len(values) + sum(map(length_hint, values.values()))
    for name in LONG_FIELDS:
        value = values.get(name)
        if value is None:
            continue
        if type(value) is not str:
            values[name], extra = _packed(value)
            size += extra
        elif not value.isascii():  # more than a byte a character matters where they are many
            size += getsizeof(value)
    return size


def _packed(value: Any) -> tuple[Any, int]:
    """What stands for a container in the queue, out of its owner's reach, and its size in bytes.

    Plain containers become a bytearray, which no field may hold otherwise: one call in C, and
    nothing for the collector to follow. Others, a Mapping of another type say, are copied part by
    part.
    """
    try:
        packed = bytearray(dumps(value, _NO_REFERENCES))
    except ValueError:
        return _copied(value)
    return packed, len(packed)


def _copied(value: Any, depth: int = 0) -> tuple[Any, int]:
    """A copy of nested containers that later changes do not reach, and its size in bytes.

    What is nested too deep, in itself perhaps, becomes a value that is rejected later.
    """
    if depth > _MAX_DEPTH:
        return _TOO_DEEP, 0
    size = getsizeof(value)
    if isinstance(value, Mapping):
        copy: Any = {}
        for key, item in value.items():
            copy[key], extra = _copied(item, depth + 1)
            size += extra
        return copy, size
    if isinstance(value, list | tuple):
        items = [_copied(item, depth + 1) for item in value]
        return [item for item, _ in items], size + sum(extra for _, extra in items)
    return value, size
