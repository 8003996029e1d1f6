"""The call site of the writer: exact bounds, exact counts, and records that fight back."""

import enum
import threading
import uuid
from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynkr_store import RoutingEvent
from lynkr_store.intake import Intake, as_submitted

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
    return Intake(clock, rows, units * UNIT, ring=bell or Bell(), after_close=after_close)


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


def test_refusals_are_flattened_and_counted_exactly():
    intake = intake_of(rows=1)
    intake.submit({"provider": "p"})
    for _ in range(10_000):
        assert not intake.submit({"provider": "p"})
        assert len(intake._refused) <= 1_001, "a refusal costs no memory"
    intake.closed = True
    for _ in range(10):
        assert not intake.submit({"provider": "p"})
    assert intake.refused() == {"queue_full": 10_000, "closed": 10}


def test_refusals_are_counted_exactly_with_eight_threads_and_somebody_who_asks():
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
    assert len(intake._refused) == 0


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
    assert what is None or isinstance(what, dict)
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


def test_a_huge_bound_costs_little_memory():
    intake = Intake(lambda: NOW, 10, 2**40, ring=Bell(), after_close=lambda: False)
    assert len(intake._free_units) <= 2**20
    assert intake.submit({"provider": "p", "request_text": "x" * 10**6})
    assert intake.refused() == {}


def test_a_signal_handler_may_ask_in_the_middle_of_a_count():
    class Interrupted(type(intake_of()._refused)):
        def popleft(self):
            cause = super().popleft()
            if len(self) == 5:
                intake.refused()  # what a handler that closes the store does
            return cause

    intake = intake_of()
    intake._refused = Interrupted(["closed"] * 10)
    assert intake.refused() == {"closed": 10}
    intake._refused = Interrupted(["closed"] * 1_005)
    intake.closed = True
    assert intake.submit({"provider": "p"}) is False
    assert intake.refused() == {"closed": 1_016}


class Short(deque):
    """A queue for which memory runs out after some parts of a record."""

    parts = 0

    def extend(self, items):
        super().extend(tuple(items)[: self.parts])
        raise MemoryError


@pytest.mark.parametrize("parts", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["first", "between", "last", "alone"])
def test_memory_that_runs_out_costs_the_record_alone(parts, where):
    intake = intake_of(rows=10, units=10)
    whole = deque()

    def run_out():
        intake._queue = Short(whole)
        intake._queue.parts = parts
        assert intake.submit({"provider": "torn", "request_text": "torn"}) is False
        whole.clear()
        whole.extend(intake._queue)

    def submit(provider):
        intake._queue = whole
        assert intake.submit({"provider": provider, "response_text": f"of {provider}"}) is True

    for step in {
        "first": (run_out, "a", "b"),
        "between": ("a", run_out, run_out, "b"),
        "last": ("a", "b", run_out),
        "alone": (run_out,),
    }[where]:
        submit(step) if isinstance(step, str) else step()
    intake._queue = whole
    taken = everything(intake)
    kept = [as_submitted(queued)[0] for queued in taken.records]
    assert [record["provider"] for record in kept] == ([] if where == "alone" else ["a", "b"])
    assert all(record["response_text"] == f"of {record['provider']}" for record in kept)
    assert all("request_text" not in record for record in kept)
    assert intake.refused()["queue_full"] == (2 if where == "between" else 1)
    assert len(intake) == 0
    intake.release(taken.units)
    assert sum(intake.submit({"provider": "p"}) for _ in range(20)) == 10, "every place is free"


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
