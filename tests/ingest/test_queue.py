"""The call site of the writer: exact bounds, exact counts, and records that fight back."""

import array
import enum
import gc
import threading
import tracemalloc
import uuid
from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynkr_store import RoutingEvent
from lynkr_store.ingest.batch import BatchBuilder
from lynkr_store.ingest.conversion import prepare
from lynkr_store.ingest.queue import RecordQueue, as_submitted
from lynkr_store.ingest.validation import TextPolicy

UNIT = 2_048
"""Bytes that one place of a small queue stands for."""

NOW = 1_750_000_000_000


class Bell:
    """Counts its strokes."""

    def __init__(self):
        self.strokes = 0

    def __call__(self):
        self.strokes += 1


def intake_of(rows=1_000, units=1_000, *, bell=None, clock=lambda: NOW, after_close=lambda: False):
    return RecordQueue(clock, rows, units * UNIT, ring=bell or Bell(), after_close=after_close)


def in_threads(count, body):
    start = threading.Barrier(count)
    failures = []

    def run(number):
        start.wait()
        try:
            body(number)
        except BaseException as error:  # noqa: BLE001 - told in the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def providers(taken):
    return [as_submitted(queued)[0]["provider"] for queued in taken.records]


def everything(intake):
    return intake.take(10**9, 2**62)


def test_rows_are_bounded_exactly_with_eight_threads():
    intake, accepted = intake_of(rows=1_000, units=10_000), []

    def submit(_):
        accepted.append(sum(intake.submit({"provider": "p"}) for _ in range(1_000)))

    in_threads(8, submit)
    assert sum(accepted) == len(intake) == 1_000
    assert intake.refused() == {"queue_full": 7_000}
    assert len(everything(intake).records) == 1_000
    assert sum(intake.submit({"provider": "p"}) for _ in range(1_500)) == 1_000


def test_bytes_are_bounded_exactly_with_eight_threads():
    intake, accepted = intake_of(rows=10_000, units=500), []

    def submit(_):
        accepted.append(sum(intake.submit({"provider": "p"}) for _ in range(1_000)))

    in_threads(8, submit)
    assert sum(accepted) == len(intake) == 500, "one place each"
    assert intake.refused() == {"queue_full": 7_500}


def test_no_place_is_lost_where_large_and_small_records_compete():
    intake = intake_of(rows=300, units=400)
    counts = Counter()
    lock = threading.Lock()
    stop = threading.Event()

    def submit(number):
        size = (0, 1, 3, 30, 90, 200, 399, 1_000)[number] * UNIT
        accepted = sum(
            intake.submit({"provider": "p", "request_text": "x" * size}) for _ in range(2_000)
        )
        with lock:
            counts.update(submitted=2_000, accepted=accepted)

    def take():
        while not stop.is_set() or len(intake):
            taken = intake.take(7, 50 * UNIT)
            assert taken.units <= 400
            counts["taken"] += len(taken.records)
            intake.release(taken.units)

    taker = threading.Thread(target=take)
    taker.start()
    in_threads(8, submit)
    stop.set()
    taker.join(60)
    assert counts["taken"] == counts["accepted"]
    assert intake.refused().total() == counts["submitted"] - counts["accepted"]
    assert sum(intake.submit({"provider": "p"}) for _ in range(1_000)) == 300, "every row's place"
    everything(intake)
    intake = intake_of(rows=10_000, units=400)
    assert not intake.submit({"provider": "p", "request_text": "x" * 400 * UNIT})
    assert sum(intake.submit({"provider": "p"}) for _ in range(1_000)) == 400, "every byte's place"


def test_a_record_that_finds_half_of_its_place_gives_it_back():
    intake = intake_of(units=100)
    assert intake.submit({"provider": "p", "request_text": "x" * 60 * UNIT})
    for _ in range(50):
        assert not intake.submit({"provider": "p", "request_text": "x" * 60 * UNIT})
    assert sum(intake.submit({"provider": "p"}) for _ in range(100)) == 100 - 61


def test_bytes_stay_in_use_until_they_are_released():
    intake = intake_of(units=10)
    assert sum(intake.submit({"provider": "p"}) for _ in range(20)) == 10
    taken = everything(intake)
    assert (len(taken.records), taken.units) == (10, 10)
    assert not intake.submit({"provider": "p"}), "what is in hand needs its memory"
    intake.release(taken.units)
    assert sum(intake.submit({"provider": "p"}) for _ in range(20)) == 10


def test_a_record_larger_than_the_queue_is_dropped():
    intake = intake_of(units=10)
    assert not intake.submit({"provider": "p", "request_text": "x" * 10 * UNIT})
    assert not intake.submit(RoutingEvent(provider="p", response_text="x" * 10 * UNIT))
    assert intake.refused() == {"queue_full": 2}


def test_texts_of_many_bytes_a_character_count_what_they_hold():
    intake = intake_of(units=100)
    assert not intake.submit({"provider": "p", "request_text": "\U0001f642" * 30 * UNIT})
    assert intake.submit({"provider": "p", "request_text": "x" * 30 * UNIT})


@pytest.mark.parametrize("name", ["candidates", "attributes", "cache_decision"])
@pytest.mark.parametrize("wrap", [list, tuple, lambda items: {"a": {"b": list(items)}}])
def test_containers_count_what_they_hold(name, wrap):
    intake = intake_of(units=100)
    big = wrap(f"{n}" + "x" * 10 * UNIT for n in range(20))
    assert not intake.submit({"provider": "p", name: big})
    assert intake.submit({"provider": "p", name: wrap("x" * 10 * UNIT for _ in range(1))})


def test_refusals_cost_no_memory_and_are_counted_exactly():
    intake = intake_of(rows=1)
    intake.submit({"provider": "p"})
    tracemalloc.start()
    for _ in range(10_000):
        assert not intake.submit({"provider": "p"})
    assert tracemalloc.get_traced_memory()[0] < 4_096, "a refusal costs no memory"
    tracemalloc.stop()
    intake.closed = True
    for _ in range(10):
        assert not intake.submit({"provider": "p"})
    assert intake.refused() == {"queue_full": 10_000, "closed": 10}


def test_refusals_are_counted_exactly_with_eight_threads_and_a_reader():
    intake = intake_of(rows=1)
    intake.submit({"provider": "p"})
    stop, seen = threading.Event(), []

    def ask():
        while not stop.is_set():
            seen.append(intake.refused()["queue_full"])

    asker = threading.Thread(target=ask)
    asker.start()
    in_threads(8, lambda _: [intake.submit({"provider": "p"}) for _ in range(5_000)])
    stop.set()
    asker.join(60)
    assert seen == sorted(seen), "a count never goes back"
    assert intake.refused() == {"queue_full": 40_000}


def test_an_answer_about_refusals_is_the_callers_own():
    intake = intake_of()
    intake.closed = True
    intake.submit({"provider": "p"})
    intake.refused().clear()
    assert intake.refused() == {"closed": 1}


class Loud(Exception):
    pass


class NoLength(str):
    __slots__ = ()

    def __len__(self):
        raise Loud

    def __length_hint__(self):
        raise Loud

    def isascii(self):
        raise Loud


class NoItems(Mapping):
    def __getitem__(self, key):
        raise Loud

    def __iter__(self):
        raise Loud

    def __len__(self):
        return 1

    def items(self):
        raise Loud


class NoVars:
    __slots__ = ()


@pytest.mark.parametrize(
    "record",
    [
        None,
        5,
        "text",
        NoVars(),
        {"provider": NoLength("p")},
        {"provider": "p", "request_text": NoLength("p")},
        {"provider": "p", "attributes": NoItems()},
        {"provider": "p", "attributes": [NoItems()]},
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_hostile_record_is_queued_to_be_rejected(record):
    intake = intake_of()
    assert intake.submit(record) is True
    [queued] = everything(intake).records
    what, _ = as_submitted(queued)
    assert what is None or type(what) in (dict, int, str)
    assert intake.refused() == {}


def test_a_clock_that_fails_costs_one_record():
    def clock():
        raise Loud

    intake = intake_of(clock=clock)
    assert intake.submit({"provider": "p"}) is True
    [queued] = everything(intake).records
    assert as_submitted(queued)[0] is None


def test_endless_containers_end():
    endless = {}
    endless["self"] = [endless]
    chain = []
    for _ in range(10_000):
        chain = [chain]
    intake = intake_of()
    for value in (endless, [endless], chain, {"a": chain, "b": uuid.uuid4()}):
        assert intake.submit({"provider": "p", "attributes": value}) in (True, False)


@pytest.mark.parametrize("other", [None, uuid.UUID(int=7)], ids=["plain", "other"])
def test_containers_are_copied_at_the_call(other):
    inner = [1, {"deep": ["kept"]}, other]
    value = {"inner": inner, "tuple": (1, inner)}
    intake = intake_of()
    intake.submit({"provider": "p", "attributes": value, "candidates": inner})
    inner[1]["deep"].append("late")
    inner.append("late")
    value["late"] = True
    [queued] = everything(intake).records
    record, _ = as_submitted(queued)
    assert record["candidates"] == [1, {"deep": ["kept"]}, other]
    assert set(record["attributes"]) == {"inner", "tuple"}
    assert record["attributes"]["inner"] == [1, {"deep": ["kept"]}, other]
    assert list(record["attributes"]["tuple"]) == [1, [1, {"deep": ["kept"]}, other]]


def test_a_number_that_can_be_changed_is_copied_at_the_call():
    number = np.array(5)
    intake = intake_of()
    intake.submit({"provider": "p", "input_tokens": number, "attributes": (number,)})
    number[()] = 6
    [queued] = everything(intake).records
    record, _ = as_submitted(queued)
    assert (record["input_tokens"], record["attributes"]) == (5, [5])


@pytest.mark.parametrize("name", ["attributes", "candidates", "cache_decision"])
def test_an_event_is_never_altered(name):
    event = RoutingEvent(provider="p").model_copy(update={name: {"k": [1]}})
    assert intake_of().submit(event)
    assert getattr(event, name) == {"k": [1]}


def test_bytes_where_a_container_may_stand_are_not_taken_for_one():
    intake = intake_of()
    for value in (bytearray(b"x"), b"x", memoryview(b"x")):
        intake.submit({"provider": "p", "attributes": value})
    for queued in everything(intake).records:
        record, _ = as_submitted(queued)
        assert not isinstance(record["attributes"], str | dict | list)


def test_the_instant_of_the_call_goes_with_the_record():
    stamps = iter([NOW, NOW + 1])
    intake = intake_of(clock=stamps.__next__)
    intake.submit({"provider": "p"})
    intake.submit(RoutingEvent(provider="p"))
    records = everything(intake).records
    assert [as_submitted(queued)[1] for queued in records] == [NOW, NOW + 1]


def test_after_the_close_everything_is_refused():
    intake = intake_of()
    intake.closed = True
    assert intake.submit({"provider": "p"}) is False
    assert intake.submit(None) is False
    assert intake.refused() == {"closed": 2}
    assert len(intake) == 0


@pytest.mark.parametrize("written", [True, False])
def test_a_record_that_comes_while_the_writer_closes_asks_whether_it_will_be_written(written):
    asked = []

    def clock():
        intake.closed = True  # another thread, between the first look and the queue
        return NOW

    def after_close():
        asked.append(len(intake))
        return written

    intake = intake_of(clock=clock, after_close=after_close)
    assert intake.submit({"provider": "p"}) is written
    assert asked == [1], "it is in the queue when it asks"
    assert intake.submit({"provider": "p"}) is False
    assert asked == [1]


def test_the_bell_rings_once_when_as_many_wait_as_were_asked_for():
    bell = Bell()
    intake = intake_of(bell=bell)
    intake.submit({"provider": "p"})
    assert bell.strokes == 1, "the first one"
    intake.wake_at = 5
    for _ in range(3):
        intake.submit({"provider": "p"})
    assert bell.strokes == 1
    for _ in range(3):
        intake.submit({"provider": "p"})
    assert bell.strokes == 2, "not for the sixth again"


def test_every_large_record_rings():
    bell = Bell()
    intake = intake_of(bell=bell)
    intake.submit({"provider": "p"})
    for _ in range(3):
        intake.submit({"provider": "p", "request_text": "x" * 100_000})
    assert bell.strokes == 4
    intake.submit({"provider": "p", "request_text": "x" * 10_000})
    assert bell.strokes == 4


def test_what_is_taken_is_the_oldest_and_within_both_limits():
    intake = intake_of()
    for n in range(10):
        intake.submit({"provider": str(n), "request_text": "x" * UNIT if n >= 5 else ""})
    taken = intake.take(3, 2**62)
    assert providers(taken) == ["0", "1", "2"]
    taken = intake.take(100, 4 * UNIT)
    assert providers(taken) == ["3", "4", "5"]
    assert taken.units == 4
    taken = intake.take(100, 0)
    assert providers(taken) == ["6"], "one at least"
    assert intake.take(0, 2**62) == ([], 0)
    assert len(everything(intake).records) == 3
    assert everything(intake) == ([], 0)


def test_half_full_is_half_of_the_rows_or_of_the_bytes():
    rows = intake_of(rows=10, units=100)
    for n in range(5):
        assert rows.is_half_full() is False, n
        rows.submit({"provider": "p"})
    assert rows.is_half_full() is True
    units = intake_of(rows=100, units=10)
    units.submit({"provider": "p", "request_text": "x" * 3 * UNIT})
    assert units.is_half_full() is False
    units.submit({"provider": "p"})
    assert units.is_half_full() is True
    taken = everything(units)
    assert units.is_half_full() is True, "in hand"
    units.release(taken.units)
    assert units.is_half_full() is False


def test_a_huge_bound_costs_nothing_until_records_come():
    tracemalloc.start()
    intake = RecordQueue(lambda: NOW, 10**9, 2**40, ring=Bell(), after_close=lambda: False)
    assert tracemalloc.get_traced_memory()[0] < 16_384
    tracemalloc.stop()
    assert intake._max_units <= 2**20
    assert intake.submit({"provider": "p", "request_text": "x" * 10**6})
    assert intake.refused() == {}


class Short:
    """What queues a record, while memory runs out."""

    def __init__(self, intake):
        self._intake = intake
        self._put = intake._put

    def __enter__(self):
        self._intake._put = self.fail

    def __exit__(self, *_):
        self._intake._put = self._put

    def fail(self, _at, _record):
        raise MemoryError


@pytest.mark.parametrize("where", ["first", "between", "last", "alone"])
def test_memory_that_runs_out_costs_the_record_alone(where):
    intake = intake_of(rows=10, units=10)

    def run_out():
        with Short(intake):
            assert intake.submit({"provider": "torn", "request_text": "torn"}) is False

    def submit(provider):
        assert intake.submit({"provider": provider, "response_text": f"of {provider}"}) is True

    for step in {
        "first": (run_out, "a", "b"),
        "between": ("a", run_out, run_out, "b"),
        "last": ("a", "b", run_out),
        "alone": (run_out,),
    }[where]:
        submit(step) if isinstance(step, str) else step()
    taken = everything(intake)
    kept = [as_submitted(queued)[0] for queued in taken.records]
    assert [record["provider"] for record in kept] == ([] if where == "alone" else ["a", "b"])
    assert all(record["response_text"] == f"of {record['provider']}" for record in kept)
    assert not any(record.get("request_text") for record in kept)
    assert intake.refused()["queue_full"] == (2 if where == "between" else 1)
    assert len(intake) == 0
    intake.release(taken.units)
    assert sum(intake.submit({"provider": "p"}) for _ in range(20)) == 10, "every place is free"


def test_a_container_that_another_thread_changes_is_copied_once_more():
    class Changing(dict):
        changes = 1

        def items(self):
            for item in super().items():
                if self.changes:
                    self.changes -= 1
                    raise RuntimeError("dictionary changed size during iteration")
                yield item

    intake = intake_of()
    intake.submit({"provider": "p", "request_text": "kept", "attributes": Changing(a=1)})
    [queued] = everything(intake).records
    record, _ = as_submitted(queued)
    assert record == {
        "provider": "p",
        "request_text": "kept",
        "response_text": None,
        "attributes": {"a": 1},
    }


def test_places_given_back_twice_are_free_once():
    intake = intake_of(rows=20, units=10)
    intake.submit({"provider": "p"})
    intake.release(5)
    assert sum(intake.submit({"provider": "p"}) for _ in range(20)) == 10


def test_waiting_records_can_be_dropped_and_are_counted():
    intake = intake_of()
    for n in range(5):
        intake.submit({"provider": str(n)})
    assert intake.refuse_queued("deadline") == 5
    assert intake.refuse_queued("deadline") == 0
    assert intake.refused() == {"deadline": 5}
    assert len(intake) == intake._units.tell() == 0


MIB = 2**20


class Holder:
    """An object that holds much."""

    def __init__(self, size=MIB):
        self.held = "x" * size

    def __float__(self):
        return 1.0


class LongName(str):  # noqa: SLOT000 - it must have room for more
    """A text that holds more than its characters."""

    def __new__(cls, text, size=MIB):
        made = super().__new__(cls, text)
        made.held = "x" * size
        return made


class Slotted:
    __slots__ = ("held",)

    def __init__(self):
        self.held = [bytes(MIB)]

    def __index__(self):
        return 1


class Zone(tzinfo):
    def __init__(self):
        self.held = bytes(MIB)

    def utcoffset(self, _):
        return timedelta(0)


HELD = {
    "set": lambda: {f"{n}" + "x" * 1_000 for n in range(1_000)},
    "frozenset": lambda: frozenset(f"{n}" + "x" * 1_000 for n in range(1_000)),
    "deque": lambda: deque(["x" * MIB]),
    "object": Holder,
    "slots": Slotted,
    "text": lambda: LongName("p"),
    "bytearray": lambda: bytearray(MIB),
    "memoryview": lambda: memoryview(bytes(MIB)),
    "array": lambda: array.array("b", bytes(MIB)),
    "function": lambda: Holder().__float__,
    "generator": lambda: (c for c in ["x" * MIB]),
    "mapping": lambda: {"k": LongName("v")},
    "keys": lambda: {LongName(str(n)): n for n in range(2)},
    "zone": lambda: datetime(2026, 1, 1, tzinfo=Zone()),
    "event": lambda: RoutingEvent.model_construct(provider="p", tier={"x" * MIB}),
}


@pytest.mark.sample(11)
@pytest.mark.parametrize("name", ["provider", "attributes", "request_text", "nonsense"])
@pytest.mark.parametrize("kind", HELD)
def test_a_queue_holds_no_more_than_its_bytes_whatever_the_type(kind, name):
    intake = intake_of(rows=10_000, units=2 * MIB // UNIT)
    tracemalloc.start()
    for _ in range(40):
        intake.submit({"provider": "p"} | {name: HELD[kind]()})
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3 * MIB
    assert len(intake) + intake.refused().total() == 40


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["provider", "attributes", "request_text"])
def test_events_that_were_not_checked_hold_no_more_than_they_count(name):
    intake = intake_of(rows=10_000, units=2 * MIB // UNIT)
    tracemalloc.start()
    for make in HELD.values():
        for _ in range(10):
            intake.submit(RoutingEvent(provider="p").model_copy(update={name: make()}))
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3 * MIB


def test_what_may_be_a_value_stays_one():
    kept = [
        *("t", 1, 1.5, True, None, b"b", uuid.UUID(int=1), Tier.SIMPLE, Name("n")),
        *(Decimal("1.5"), Fraction(1, 2), datetime(2026, 1, 1, tzinfo=UTC)),
    ]
    intake = intake_of()
    intake.submit({"provider": "p", "attributes": tuple(kept)})
    intake.submit({"provider": "p", "attributes": ({1}, deque(), object(), len)})
    values, replaced = (as_submitted(q)[0]["attributes"] for q in everything(intake).records)
    assert alike(values, kept)
    names = [type(value).__name__ for value in replaced]  # of empty classes
    assert names == ["set", "deque", "object", "builtin_function_or_method"]
    assert all(type(value).__bases__ == (object,) and not vars(value) for value in replaced)


@pytest.mark.slow
def test_unknown_names_cost_what_they_take_in_the_queue():
    names = {f"name {n}": n for n in range(400_000)}
    for record in (names | {"provider": "p"}, names, names | {"provider": (1, 2)}):
        intake = intake_of(units=100_000)
        intake.submit(dict(record))
        queued = everything(intake).records
        tracemalloc.start()
        rejected, _ = prepare(queued, BatchBuilder(), TextPolicy(), "id".upper)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        cause = {"p": "unknown_name", None: "no_provider"}.get(record.get("provider"), "wrong_type")
        assert [(why.cause, count) for why, count in rejected.items()] == [(cause, 1)]
        assert most < 8 * MIB


class Tier(enum.StrEnum):
    SIMPLE = "SIMPLE"


class Name(str):
    __slots__ = ()


_PARTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs", "L"]))
    | st.binary()
    | st.uuids()
    | st.datetimes()
    | st.datetimes(timezones=st.timezones() | st.just(timezone(timedelta(seconds=-12_345))))
    | st.dates()
    | st.decimals()
    | st.sampled_from([Tier.SIMPLE, Name("n")]),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part) | st.tuples(part, part),
    max_leaves=12,
)


def alike(one, other):
    """Equal, of the same types throughout; a tuple may have become a list."""
    if isinstance(one, list | tuple):
        return type(other) is list and len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(alike, one.values(), other.values()))
    if isinstance(one, datetime):  # an instant: the zone is an offset now
        same_day = one.replace(tzinfo=None) == other.replace(tzinfo=None)
        return same_day and one.utcoffset() == other.utcoffset()
    return type(one) is type(other) and repr(one) == repr(other)


@given(
    fields=st.dictionaries(
        st.sampled_from(["provider", "tier", "latency_ms", "timestamp", "attributes", "nonsense"]),
        _PARTS,
    ),
    texts=st.lists(_PARTS, min_size=2, max_size=2),
)
def test_a_record_comes_out_as_it_went_in(fields, texts):
    intake = intake_of(units=100_000)
    record = {**fields, "request_text": texts[0], "response_text": texts[1]}
    assert intake.submit(dict(record))
    [queued] = everything(intake).records
    unpacked_record, stamp_ms = as_submitted(queued)
    assert stamp_ms == NOW or record.get("timestamp") is not None
    wanted = {name: value for name, value in record.items() if value is not None}
    assert alike(
        dict(sorted(wanted.items())),
        dict(sorted((k, v) for k, v in unpacked_record.items() if v is not None)),
    )


def test_an_instant_of_another_zone_stays_that_instant():
    intake = intake_of()
    instant = datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=timezone(timedelta(hours=1)))
    intake.submit({"provider": "p", "timestamp": instant})
    intake.submit({"provider": "p", "timestamp": instant.astimezone(UTC).replace(tzinfo=None)})
    [aware], [naive] = ([as_submitted(q)[0]["timestamp"]] for q in everything(intake).records)
    assert aware == instant
    assert naive.tzinfo is None, "it will be rejected as naive, not taken for UTC"


@pytest.mark.parametrize("name", ["request_text", "response_text", "provider", "nonsense"])
def test_a_container_where_none_may_stand_counts_what_it_holds(name):
    intake = intake_of(units=100)
    messages = [{"role": "user", "content": "x" * 10 * UNIT} for _ in range(20)]
    assert not intake.submit({"provider": "p", name: messages})
    assert not intake.submit({"provider": "p", name: tuple(messages)})
    assert intake.submit({"provider": "p", name: messages[:1]})
