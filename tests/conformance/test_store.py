"""What every store does, on every backend, sync and async."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from lynkr_store import (
    BadArgument,
    Cursor,
    RoutingEvent,
    RoutingFilter,
    RoutingRowBrief,
    StoreClosed,
    Window,
)
from lynkr_store.migrate import revisions
from lynkr_store.testing import EventFactory, RecordFactory
from tests.support.stores import adds_up, looked

NOW = 1_750_000_000_000
ALL = Window(since=0)


def filled(open_store, *records, **options):
    store = open_store(clock=lambda: NOW, cache_ttl_s=0, **options)
    for record in records:
        assert store.record(record)
    assert store.flush(30)
    return store


def test_a_recorded_request_comes_back_as_it_was(open_store):
    record = RecordFactory(
        timestamp=NOW,
        was_fallback=True,
        stream=False,
        ttft_ms=12.5,
        candidates=[{"provider": "a"}],
        attributes={"é": [1, None, True]},
        trace_id="t",
        attempt_index=0,
    )
    [row] = filled(open_store, record).query()
    stored = {name: getattr(row, name) for name in record}
    assert stored == record | {
        "timestamp": datetime.fromtimestamp(NOW / 1000, UTC),
        "candidates": '[{"provider":"a"}]',
        "attributes": '{"é":[1,null,true]}',
    }
    assert row.pinned is False
    assert row.retry_count == 0
    assert row.cost_efficiency is None


def test_defaults_are_the_moment_and_a_new_id(open_store):
    store = filled(open_store, {"provider": "p"}, {"provider": "p"})
    rows = store.query()
    assert {row.cursor.timestamp for row in rows} == {NOW}
    assert len({row.request_id for row in rows}) == 2


def test_a_record_may_be_keywords_an_event_or_a_mapping(open_store):
    store = open_store(cache_ttl_s=0)
    mapping = {"provider": "mapping", "attributes": {"list": [1]}}
    store.record(provider="keywords")
    store.record(EventFactory(provider="event"))
    store.record(EventFactory(provider="event"), provider="both")
    store.record(mapping)
    mapping["attributes"]["list"].append(2)
    mapping["provider"] = "changed later"
    assert store.flush(30)
    rows = store.query()
    assert [row.provider for row in sorted(rows, key=lambda r: r.id)] == [
        "keywords",
        "event",
        "both",
        "mapping",
    ]
    assert [r.attributes for r in rows if r.provider == "mapping"] == ['{"list":[1]}']


def test_to_gateway_has_the_gateways_37_columns(open_store):
    [row] = filled(open_store, RecordFactory(timestamp=NOW, pinned=True)).query()
    answer = row.to_gateway()
    assert len(answer) == 37
    assert answer["timestamp"] == NOW
    assert answer["was_fallback"] == 0
    assert answer["pinned"] == 1
    assert type(answer["pinned"]) is int
    assert "trace_id" not in answer


def test_rows_without_texts_are_a_type_of_their_own(open_store):
    store = filled(open_store, RecordFactory())
    [row] = store.query(include_text=False)
    assert type(row) is RoutingRowBrief
    assert not hasattr(row, "request_text")
    assert len(row.to_gateway()) == 35


def test_lists_are_newest_first_and_ties_by_id(open_store):
    store = filled(open_store, *(RecordFactory(timestamp=NOW + n % 3) for n in range(9)))
    places = [(row.cursor.timestamp, row.id) for row in store.query()]
    assert places == sorted(places, reverse=True)
    assert len(places) == 9


def test_pages_by_cursor_give_every_row_once(open_store):
    store = filled(open_store, *(RecordFactory(timestamp=NOW + n % 4) for n in range(23)))
    pages, before = [], None
    while page := store.query(limit=5, before=before):
        pages.append(page)
        before = page[-1].cursor
    assert [len(page) for page in pages] == [5, 5, 5, 5, 3]
    assert [row for page in pages for row in page] == store.query()
    assert Cursor.parse(str(before)) == before


def test_iter_records_gives_what_query_gives(open_store):
    store = filled(open_store, *RecordFactory.build_batch(25))
    assert list(store.iter_records(page_rows=10)) == store.query()
    assert list(store.iter_records(RoutingFilter(provider="ollama"), page_rows=3)) == store.query(
        RoutingFilter(provider="ollama")
    )


def test_windows_are_half_open(open_store):
    store = filled(open_store, *(RecordFactory(timestamp=NOW + n) for n in range(4)))
    within = store.query(window=Window(since=NOW + 1, until=NOW + 3))
    assert [row.cursor.timestamp - NOW for row in within] == [2, 1]
    aware = Window(since=datetime.fromtimestamp((NOW + 1) / 1000, UTC), until=NOW + 3)
    assert store.query(window=aware) == within
    assert store.get_stats(Window(since=NOW + 1, until=NOW + 3)).total_requests == 2


@pytest.mark.parametrize("window", [Window(since=5, until=5), Window(since=9, until=1)])
def test_an_empty_or_inverted_window_is_empty(open_store, window):
    store = filled(open_store, {"provider": "p"})
    assert store.query(window=window) == []
    assert store.get_stats(window) is None
    assert store.get_provider_stats("p", window) is None
    assert store.get_routing_accuracy(window) is None


def test_the_default_window_is_24_hours_with_now_inside(open_store):
    day = 86_400_000
    at = [NOW, NOW - day, NOW - day - 1, NOW + 1]
    store = filled(open_store, *({"provider": "p", "timestamp": t} for t in at))
    assert store.get_stats().total_requests == 2
    assert store.get_provider_stats("p").total == 2
    assert store.get_routing_accuracy().total_requests == 2
    assert store.get_stats(ALL).total_requests == 3


FILTERS = [
    ({"provider": "a"}, {0, 1, 2}),
    ({"provider": ["a", "b"]}, {0, 1, 2, 3}),
    ({"provider": ""}, {4}),
    ({"tier": "SIMPLE"}, {0, 3}),
    ({"tier": ""}, {1}),
    ({"model": "m/1"}, {0}),
    ({"session_id": ("s1", "s2")}, {0, 1}),
    ({"request_id": "r3"}, {3}),
    ({"request_type": "code"}, {2}),
    ({"routing_method": "risk"}, {1}),
    ({"status_code": 503}, {1}),
    ({"status_code": [200, 503]}, {0, 1, 2}),
    ({"has_error": True}, {1, 4}),
    ({"has_error": False}, {0, 2, 3}),
    ({"was_fallback": True}, {2}),
    ({"was_fallback": False}, {0, 1, 3, 4}),
    ({"min_latency_ms": 100}, {0, 1}),
    ({"max_latency_ms": 100}, {0, 2}),
    ({"min_latency_ms": 100, "max_latency_ms": 100}, {0}),
    ({"min_cost_usd": 0.5}, {1}),
    ({"max_cost_usd": 0}, {0}),
    ({"min_quality_score": 80.5}, {0}),
    ({"max_quality_score": 10}, {2}),
    ({"min_input_tokens": 5}, {0}),
    ({"max_input_tokens": 4}, {1}),
    ({"min_output_tokens": 0}, {2, 3}),
    ({"max_output_tokens": 0}, {2}),
    ({"provider": "a", "tier": "SIMPLE", "has_error": False}, {0}),
    ({"provider": "größe-模型"}, set()),
    ({}, {0, 1, 2, 3, 4}),
]


@pytest.fixture
def five(open_store):
    records = [
        {"provider": "a", "tier": "SIMPLE", "model": "m/1", "session_id": "s1", "status_code": 200},
        {"provider": "a", "tier": "", "session_id": "s2", "status_code": 503, "error_type": "E"},
        {"provider": "a", "request_type": "code", "was_fallback": True, "status_code": 200},
        {"provider": "b", "tier": "SIMPLE", "request_id": "r3"},
        {"provider": "", "error_type": ""},
    ]
    records[0] |= {"latency_ms": 100, "cost_usd": 0.0, "quality_score": 80.5, "input_tokens": 5}
    records[1] |= {"latency_ms": 100.5, "cost_usd": 0.5, "input_tokens": 4}
    records[1] |= {"routing_method": "risk"}
    records[2] |= {"latency_ms": 0, "quality_score": 10, "output_tokens": 0}
    records[3] |= {"output_tokens": 7}
    return filled(open_store, *(r | {"timestamp": NOW + n} for n, r in enumerate(records)))


def test_each_dimension_filters(five):
    for dimensions, wanted in FILTERS:
        rows = five.query(RoutingFilter(**dimensions))
        assert {row.cursor.timestamp - NOW for row in rows} == wanted, dimensions


def test_true_zeros_stay_zeros_and_unknown_is_none(open_store):
    zero = {"latency_ms": 0, "quality_score": 0, "output_tokens": 0, "cost_usd": 0}
    zero |= {"tokens_per_second": 0}
    store = filled(open_store, {"provider": "zero", **zero}, {"provider": "none"})
    stats = store.get_provider_stats("zero")
    assert (stats.avg_latency, stats.avg_quality, stats.avg_output_tokens) == (0, 0, 0)
    assert (stats.avg_tokens_per_second, stats.total_cost, stats.unpriced_requests) == (0, 0, 0)
    stats = store.get_provider_stats("none")
    assert (stats.avg_latency, stats.avg_quality, stats.avg_output_tokens) == (None,) * 3
    assert (stats.total_cost, stats.unpriced_requests) == (None, 1)
    assert store.get_stats().unpriced_requests == 1
    assert store.get_stats().total_cost == 0
    assert store.get_provider_stats("nobody") is None


def test_statistics_count_what_the_gateway_counts(open_store):
    store = filled(
        open_store,
        {"provider": "p", "tier": "COMPLEX", "quality_score": 80.1, "output_tokens": 49},
        {"provider": "p", "tier": "COMPLEX", "quality_score": 80, "output_tokens": 49},
        {"provider": "p", "tier": "REASONING", "quality_score": 99, "output_tokens": 50},
        {"provider": "p", "tier": "SIMPLE", "quality_score": 44.9, "was_fallback": True},
        {"provider": "q", "tier": "SIMPLE", "quality_score": 45, "error_type": ""},
        {"provider": "q", "latency_ms": 1.5},
        {"provider": "q", "latency_ms": 2.5},
    )
    accuracy = store.get_routing_accuracy()
    assert (accuracy.over_provisioned, accuracy.under_provisioned) == (1, 1)
    assert accuracy.over_provisioned_pct == 14.3
    stats = store.get_stats()
    assert stats.error_rate == 14.3
    assert stats.avg_latency_by_provider == {"q": 2}
    assert stats.avg_quality_by_tier == {"COMPLEX": 80.1, "REASONING": 99.0, "SIMPLE": 45.0}
    assert stats.requests_by_provider == {"p": 4, "q": 3}
    assert store.get_provider_stats("p").fallback_rate == 25.0
    assert list(stats.to_gateway()) == [
        "totalRequests",
        "avgLatencyByProvider",
        "avgQualityByTier",
        "errorRate",
        "overProvisionedPct",
        "underProvisionedPct",
    ]


def test_sums_beyond_64_bits_are_exact(open_store):
    # 10,000 times a million dollars is 10**19 nano-dollars
    store = open_store(clock=lambda: NOW, cache_ttl_s=0)
    assert store.add_many([{"provider": "p", "cost_usd": 1e6, "latency_ms": -1e9}] * 10_000)
    stats = store.get_provider_stats("p")
    assert stats.total_cost == 1e10
    assert stats.avg_latency == -(10**9)


def test_bad_records_cost_only_themselves_and_are_counted(open_store):
    bad = {
        "no_provider": {"tier": "SIMPLE"},
        "unknown_name": {"provider": "p", "modell": "m"},
        "naive_datetime": {"provider": "p", "timestamp": datetime(2026, 1, 1)},  # noqa: DTZ001
        "out_of_domain": {"provider": "p", "latency_ms": 1e10},
        "wrong_type": {"provider": "p", "tool_count": "5"},
    }
    store = open_store(cache_ttl_s=0)
    for record in bad.values():
        assert store.record(RecordFactory())
        assert store.record(record)
    assert store.flush(30)
    health = store.health()
    assert dict(health.rejected_by) == dict.fromkeys(bad, 1)
    assert (health.written, health.rejected, health.pending) == (5, 5, 0)
    assert adds_up(health)
    assert len(store.query()) == 5


@pytest.mark.parametrize("argument", [5, "text", None, [1], object()])
def test_record_never_raises(open_store, argument):
    store = open_store()
    store.record(argument)
    assert store.flush(30)
    health = store.health()
    assert (health.submitted, health.rejected, health.written) == (1, 1, 0)


def test_values_that_a_database_cannot_store_are_sanitized_alike(open_store):
    store = filled(
        open_store,
        {
            "provider": "a\0b",
            "model": "x\ud800y",
            "latency_ms": float("nan"),
            "cost_usd": float("inf"),
            "request_text": "long" * 5,
            "session_id": "s" * 600,
        },
        text_max_chars=10,
    )
    [row] = store.query()
    assert (row.provider, row.model, row.latency_ms) == ("a\ufffdb", "x\ufffdy", None)
    assert (row.cost_usd, row.request_text, len(row.session_id)) == (None, "longlonglo", 512)
    assert dict(store.health().mended_by) == {"nul": 1, "surrogate": 1, "not_finite": 2, "cut": 2}
    assert store.query(RoutingFilter(provider="a\0b", session_id="s" * 600)) == [row]
    assert store.get_provider_stats("a\0b").total == 1


def test_the_longest_names_fit_the_indexes(open_store):
    # 512 characters of four bytes that do not compress
    name = "".join(chr(0x20000 + n * 7919 % 40_000) for n in range(512))
    store = filled(open_store, {"provider": name, "tier": name, "session_id": name, "model": name})
    [row] = store.query(RoutingFilter(provider=name, tier=name, session_id=name))
    assert row.model == name


def test_texts_are_not_kept_when_capture_is_off(open_store):
    [row] = filled(open_store, RecordFactory(), capture_text=False).query()
    assert (row.request_text, row.response_text) == (None, None)


def test_negative_numbers_are_stored_as_given(open_store):
    [row] = filled(open_store, {"provider": "p", "latency_ms": -5, "cost_usd": -0.25}).query()
    assert (row.latency_ms, row.cost_usd) == (-5, -0.25)


def test_add_many_is_all_or_none(open_store):
    store = open_store(cache_ttl_s=0)
    assert store.add_many(RecordFactory.build_batch(3)) == 3
    assert store.add_many([]) == 0
    with pytest.raises(BadArgument, match="record 1: provider"):
        store.add_many([RecordFactory(), {"tier": "SIMPLE"}])
    assert len(store.query()) == 3
    assert store.health().submitted == 0, "what is written at once is no record in the queue"


def test_cleanup_deletes_what_is_older_and_no_more(open_store):
    records = [RecordFactory(timestamp=NOW - age) for age in (0, 999, 1000, 1001, 5000)]
    store = filled(open_store, *records)
    assert store.cleanup(timedelta(seconds=1)) == 2
    assert [NOW - row.cursor.timestamp for row in store.query()] == [0, 999, 1000]
    assert store.cleanup() == 0
    assert store.cleanup(timedelta(0)) == 2


def test_cleanup_continues_through_its_batches(open_store):
    store = open_store(clock=lambda: NOW, cache_ttl_s=0)
    store.add_many([{"provider": "p", "timestamp": NOW - 10}] * 2_500)
    assert store.cleanup(timedelta(0)) == 2_500


def test_maintain_deletes_only_when_configured(open_store):
    old = RecordFactory(timestamp=NOW - 10 * 86_400_000)
    store = filled(open_store, old)
    assert store.maintain().rows_deleted == 0
    assert len(store.query()) == 1
    if open_store.backend != "sqlite-memory":
        strict = open_store(clock=lambda: NOW, retention_days=9)
        assert strict.maintain().rows_deleted == 1
        assert store.query() == []


def test_statistics_are_cached_by_the_question_asked(open_store):
    store = open_store(clock=lambda: NOW, cache_ttl_s=60)
    store.add_many([{"provider": "p"}])
    first = store.get_stats()
    store.add_many([{"provider": "p"}])
    assert store.get_stats() is first
    assert store.get_stats(Window()) is first
    assert store.get_stats(ALL).total_requests == 2, "another question has its own answer"
    assert store.get_provider_stats("p").total == 2
    assert store.get_provider_stats("q") is None
    store.cleanup(timedelta(days=1))
    assert store.get_stats().total_requests == 2, "deleting forgets the answers"


def test_cached_answers_age_by_the_clock_that_was_given(open_store):
    now = [NOW]
    store = open_store(clock=lambda: now[0], cache_ttl_s=5)
    for direction in (1, -1):  # a clock that is set back keeps no answer longer
        store.add_many([{"provider": "p"}])
        first = store.get_stats(ALL)
        now[0] += direction * 4_900
        assert store.get_stats(ALL) is first
        now[0] += direction * 100
        assert store.get_stats(ALL) is not first


def test_answers_cannot_be_changed(open_store):
    store = filled(open_store, RecordFactory(timestamp=NOW))
    stats = store.get_stats()
    with pytest.raises(ValidationError):
        stats.total_requests = 0
    with pytest.raises(TypeError):
        stats.avg_latency_by_provider["x"] = 1
    [row] = store.query()
    with pytest.raises(ValidationError):
        row.tier = "x"


def test_rows_of_one_thread_keep_their_order(open_store):
    store = open_store(cache_ttl_s=0, batch_max_rows=7)
    for n in range(100):
        store.record(provider="p", timestamp=NOW, attempt_index=n)
    assert store.flush(30)
    rows = sorted(store.query(limit=100), key=lambda row: row.id)
    assert [row.attempt_index for row in rows] == list(range(100))


def test_many_threads_record_at_once(open_store):
    store = open_store(cache_ttl_s=0)

    def work():
        for _ in range(200):
            store.record(provider="p")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert adds_up(store.health())
    assert store.flush(30)
    assert store.health().written == 800
    assert len(store.query(limit=1000)) == 800


def test_a_flush_without_time_says_no_and_a_later_one_yes(open_store):
    store = open_store()
    store.record(provider="p")
    store.flush(0)
    assert store.flush(30) is True
    assert store.health().written == 1


def test_a_closed_store_drops_and_counts_and_refuses_reads(open_store):
    store = open_store()
    store.record(provider="p")
    store.close()
    store.close()
    assert store.record(provider="p") is False
    health = store.health()
    assert (health.written, health.pending, dict(health.dropped_by)) == (1, 0, {"closed": 1})
    assert adds_up(health)
    with pytest.raises(StoreClosed, match="open a new one"):
        store.query()
    with pytest.raises(StoreClosed):
        store.add_many([])


def test_health_says_where_the_database_stands(open_store):
    store = filled(open_store, RecordFactory(timestamp=NOW), RecordFactory(timestamp=NOW - 5))
    health = looked(store)
    assert health.reachable
    assert health.revision == health.head == revisions.head()
    assert health.oldest_timestamp == datetime.fromtimestamp((NOW - 5) / 1000, UTC)
    assert health.database_bytes > 0
    assert (health.reclaimable_bytes is None) == (not open_store.backend.startswith("sqlite"))
    assert health.last_error is None


def test_each_attempt_to_write_a_batch_is_told(open_store):
    store, told = open_store(batch_max_rows=3, flush_interval_s=3600), []

    def fail(_):
        raise SystemExit

    store.on_batch(fail)
    store.on_batch(told.append)
    for _ in range(7):
        store.record(provider="p")
    assert store.health().queue_bytes > 0
    assert store.flush(30)
    assert sum(attempt.rows for attempt in told if attempt.error is None) == 7
    assert all(attempt.rows <= 3 and 0 < attempt.duration_s < 30 for attempt in told)
    health = store.health()
    assert (health.written, health.queue_bytes) == (7, 0)
    assert health.faults_by["SystemExit"] == len(told)
    with pytest.raises(BadArgument, match="listener: give a function"):
        store.on_batch(None)


BAD = [
    (lambda s: s.query(limit=-1), "limit"),
    (lambda s: s.query(limit=1.5), "limit"),
    (lambda s: s.query(limit=float("nan")), "limit"),
    (lambda s: s.query(limit=True), "limit"),
    (lambda s: s.query("ollama"), "criteria"),
    (lambda s: s.query(Window()), "criteria"),
    (lambda s: s.query(window=5), "window"),
    (lambda s: s.query(before=(1, 2)), "before"),
    (lambda s: s.get_stats({"since": 0}), "window"),
    (lambda s: s.get_provider_stats(None), "provider"),
    (lambda s: s.get_provider_stats(["a"]), "provider"),
    (lambda s: s.get_provider_stats("a", 5), "window"),
    (lambda s: s.get_routing_accuracy(5), "window"),
    (lambda s: s.cleanup(timedelta(seconds=-1)), "older_than"),
    (lambda s: s.cleanup(5), "older_than"),
    (lambda s: s.flush(-1), "timeout_s"),
    (lambda s: s.flush(float("nan")), "timeout_s"),
    (lambda s: list(s.iter_records(page_rows=0)), "page_rows"),
]


def test_bad_arguments_are_named(open_store):
    store = open_store()
    for call, name in BAD:
        with pytest.raises(BadArgument, match=name):
            call(store)
    assert store.query(limit=0) == []


def test_an_event_is_the_same_as_its_keywords(open_store):
    record = RecordFactory(timestamp=NOW, request_id="same")
    store = filled(open_store, record, RoutingEvent(**record))
    one, other = (row.to_gateway() | {"id": 0} for row in store.query())
    assert one == other
