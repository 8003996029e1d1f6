"""The call site of the writer: takes a record in a few microseconds, waits for nobody.

No lock stands in the way in. Threads that take turns at a lock hand each other the interpreter
with it, and a call that took microseconds then takes hundreds of them. Each step here is instead
one operation of a `collections.deque`, which is atomic: a place in the queue is a token taken from
a deque of them, so rows and bytes have exact bounds without a shared counter.

A record waits as one MessagePack string beside its two texts. Packing it is one call in C, which
copies what the caller could still change and says how many bytes it holds. Its parts stand in the
queue one after the other: whatever held them together would be an object for Python's collector to
follow, which took a fifth of a call.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import repeat
from operator import call, length_hint
from sys import getsizeof
from typing import Any, Final, NamedTuple

from ormsgpack import packb

from lynkr_store.packing import AS_IT_IS, STAMP, Packed, packable, unpacked
from lynkr_store.schemas import LONG_FIELDS

_RECORD_BYTES: Final = 256  # what a queued record costs, about, beside its fields
_UNIT_BYTES: Final = 2_048  # bytes are counted in units, each a token
_MOST_UNITS: Final = 2**20  # tokens cost 8 bytes each; larger queues have larger units

_MAX_DEPTH: Final = 50  # of containers in a record that is not packed
_TOO_DEEP: Final = object()

_bytes_of_text: Final = str.__sizeof__  # of a text alone: else a TypeError

_COUNT_WAIT_S: Final = 0.1
_REFUSED_UNCOUNTED: Final = 1_000
_LARGE_BYTES: Final = 65_536  # few records of that size fill a queue before a batch is full
_NEVER: Final = 2**62

Queued = tuple[int, Any, Any, Any]
"""A record that waits: its size in units, its fields packed (or, where they cannot be, an
`_Unpacked`), its request and response text. Only the first is an int."""
_PARTS: Final = 4


class _Unpacked(NamedTuple):
    record: Any
    stamp_ms: int


class Taken(NamedTuple):
    """What was taken from the queue together."""

    records: list[Queued]
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
        self._queue: deque[Any] = deque()  # the parts of a Queued, of the next one, …
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
        return len(self._queue) // _PARTS

    def submit(self, record: Any) -> bool:  # noqa: C901 - a call more is a fiftieth of the time
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
            request = record.pop("request_text", None)
            response = record.pop("response_text", None)
            packed: Any = packb(record, packable, AS_IT_IS)
            size = len(packed)
            if request is not None:
                size += _bytes_of_text(request)
            if response is not None:
                size += _bytes_of_text(response)
        except Exception:  # noqa: BLE001 - an event, a part of another type, or its own methods
            packed, size = self._unpackable(record, request, response)
            request = response = None
        units = (_RECORD_BYTES + size) // self._unit + 1
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
            self._queue.extend((units, packed, request, response))
        except (IndexError, MemoryError) as error:
            self.release(units - length_hint(wanted) - isinstance(error, IndexError))
            self._free_rows.append(None)
            return self._refuse("queue_full")
        if len(self._queue) >= self.wake_at * _PARTS or units > self._large:
            self.wake_at = _NEVER
            self._ring()
        if self.closed:  # since it was asked above
            return self._after_close()  # type: ignore[unreachable]
        return True

    def take(self, max_rows: int, max_bytes: int) -> Taken:
        """Take the oldest records, up to both limits, but one at least if there is any."""
        most = max_bytes // self._unit
        records: list[Queued] = []
        units = 0
        while self._queue and len(records) < max_rows:
            if records and units + self._queue[0] > most:
                break
            try:
                records.append(self._oldest())
            except IndexError:
                break  # there was only a torn one
            units += records[-1][0]
        self._free_rows.extend(repeat(None, len(records)))
        return Taken(records, units)

    def release(self, units: int) -> None:
        """Give back the place of records that need no memory any more."""
        self._free_units.extend(repeat(None, units))

    def is_half_full(self) -> bool:
        """Whether half of the rows or of the bytes are in use."""
        rows, units = len(self), len(self._free_units)
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

    def _oldest(self) -> Queued:
        # in C from end to end: a signal handler that empties the queue comes before or after
        parts = tuple(map(call, repeat(self._queue.popleft, _PARTS)))
        while type(parts[1]) is int or type(parts[2]) is int or type(parts[3]) is int:
            # memory ran out in the middle of a record
            torn = next(at for at in range(1, _PARTS) if type(parts[at]) is int)
            parts = parts[torn:] + tuple(map(call, repeat(self._queue.popleft, torn)))
        return parts

    def _unpackable(self, record: Any, request: Any, response: Any) -> tuple[_Unpacked, int]:
        """A record out of its owner's reach, or None for one that cannot be read, and its size."""
        try:
            stamp_ms = self._clock()
            if type(record) is dict:
                record.pop(STAMP, None)
                record |= {"request_text": request, "response_text": response}
                record, size = _copied(record)
            else:
                record, size = _of_event(record)
        except Exception:  # noqa: BLE001 - the record's own methods, or a clock that failed
            return _Unpacked(None, 0), 0
        return _Unpacked(record, stamp_ms), size

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


def as_packed(queued: Queued) -> Packed:
    """What was queued, but for its size; what stands for the fields may be no bytes."""
    return queued[1:]


def as_submitted(queued: Queued) -> tuple[Any, int]:
    """What was submitted, and if it names no instant, that of the call in epoch milliseconds.

    Its containers are copies that no caller can reach. None is a record that cannot be read.
    """
    _, packed, request, response = queued
    if type(packed) is _Unpacked:
        return packed
    record = unpacked(packed)
    stamp_ms = record.pop(STAMP, 0)
    if request is not None:
        record["request_text"] = request
    if response is not None:
        record["response_text"] = response
    return record, stamp_ms


def _of_event(event: Any) -> tuple[Any, int]:
    """What is queued of an event, and its size in bytes.

    An event that was checked holds no container; one that was not is the caller's all the same.
    """
    values = vars(event)
    if all(isinstance(values.get(name), str | None) for name in LONG_FIELDS):
        return event, sum(map(getsizeof, values.values()))
    return _copied({name: v for name, v in values.items() if name in type(event).model_fields})


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
