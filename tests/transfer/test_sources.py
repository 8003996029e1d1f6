"""Sources as the world has them: with odd values, in use, behind a role with few rights."""

import sqlite3
import threading
from collections import Counter

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from sqlalchemy import delete, make_url

from lynkr_store import Store, StoreUnavailable, copy, create_store_engine, writing
from lynkr_store.db.models import SAVINGS, TELEMETRY
from lynkr_store.schemas import RoutingEvent
from lynkr_store.transfer import run as transfer_run
from lynkr_store.transfer.portable import Converter, Kind, kinds_of
from lynkr_store.transfer.sums import sums_in, sums_of
from lynkr_store.transfer.tables import _insert
from lynkr_store.transfer.verification import compare
from tests.conftest import ON_DISK, POSTGRES
from tests.support.copies import ALL, DAY_MS, START, all_rows, answers, filled, records
from tests.support.gateway import RELEASES, Gateway, open_as
from tests.support.recorded import gateway_file, insert_rows
from tests.support.stores import eventually

ODD = ["", "abc", b"12", b"\xff\xfe", 12.3, 1e300, 9e999, -9e999, "nan", "0x10", 2**62, -0.0, " 7 "]
"""What SQLite keeps in a column of any declared type."""


def odd_rows():
    numbers = [
        name for name, kind in kinds_of(TELEMETRY).items() if kind in (Kind.WHOLE, Kind.REAL)
    ]
    given = {"request_id": "r", "timestamp": START, "provider": "p"}
    columns = [name for name in numbers if name in RoutingEvent.model_fields][:12]
    columns += ["was_fallback", "pinned"]
    for number, value in enumerate(ODD):
        for name in columns:
            yield {**given, "timestamp": START + number * DAY_MS, name: value}
        yield {**given, "tier": value, "request_text": value, "session_id": value}
        yield {**given, "timestamp": value}
        yield {**given, "provider": value}
    yield {**given, "request_text": "a\0b", "model": "m" * 700}
    yield {**given, "timestamp": START + 0.75}


@pytest.fixture(params=ON_DISK)
def target(request, new_url):
    return new_url(request.param, at_head=True)


def test_a_gateways_file_with_odd_values_is_copied_row_by_row(tmp_path, target):
    source = gateway_file(tmp_path / "telemetry.db", 11, rows=list(odd_rows()))
    report = copy(source, target)
    changes = {what.partition(": ")[2] for what in report.coerced}
    assert changes == {"rounded", "parsed", "unreadable", "cut", "nul"}
    assert dict(report.left_out) == {"timestamp": 9}
    stored = len(list(odd_rows())) - 9
    assert (report.rows_copied, report.rows_verified) == (stored, stored)
    assert copy(source, target).rows_copied == 0
    with Store(source, read_only=True, clock=lambda: START) as store:
        assert store.get_stats(ALL) == answers(target)[0]


def test_an_instant_that_was_stored_as_text_becomes_one(tmp_path, target):
    row = {"request_id": "r", "timestamp": "2026-01-01T00:00:00Z", "provider": "p"}
    report = copy(gateway_file(tmp_path / "telemetry.db", 11, rows=[row]), target)
    assert dict(report.coerced) == {"timestamp: parsed": 1}
    assert answers(target)[0].total_requests == 1


def test_savings_of_a_gateways_file_are_copied(tmp_path, target):
    path = tmp_path / "telemetry.db"
    connection = open_as(RELEASES["9.14.1"], path)
    values = [(START, "compression", 12.0), (START, "cache", "x"), (START, b"c", 1)]
    connection.executemany(
        "INSERT INTO savings_events (timestamp, category, tokens_saved) VALUES (?, ?, ?)", values
    )
    connection.close()
    report = copy(path, target)
    assert report.savings_copied == 2
    assert dict(report.left_out) == {"tokens_saved": 1}
    engine = create_store_engine(target)
    with engine.connect() as connection:
        assert sorted(connection.execute(SAVINGS.select()).scalars()) == [1, 3]
    engine.dispose()


@pytest.mark.slow
def test_a_gateway_that_writes_its_file_meanwhile_goes_on(tmp_path, target):
    path = tmp_path / "telemetry.db"
    connection = open_as(RELEASES["9.14.1"], path)
    insert_rows(connection, [RELEASES["9.14.1"].record(f"before-{n}") for n in range(500)])
    with Gateway(path, "9.14.1") as gateway:
        copied = 0
        while copied < 520:
            copied += copy(path, target).rows_copied
        tries = gateway.end()
    assert not [each for each in tries if each.error]
    copy(path, target)
    connection.close()
    assert all_rows(target) == all_rows(f"sqlite:///{path}")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ON_DISK)
def test_a_store_that_records_into_the_source_meanwhile_loses_nothing(new_url, target, backend):
    source = new_url(backend, at_head=True)
    stop = threading.Event()

    def record():
        with Store(source) as store:
            number = 0
            while not stop.is_set():
                for record in records(50, first=number):
                    store.record(record)
                number += 50
                stop.wait(0.02)
            assert store.flush(60)

    writer = threading.Thread(target=record)
    writer.start()
    try:
        copied = 0
        while copied < 1_000:
            copied += copy(source, target).rows_copied
    finally:
        stop.set()
        writer.join()
    copy(source, target)
    assert all_rows(target) == all_rows(source)
    assert answers(target) == answers(source)


@pytest.mark.parametrize("backend", POSTGRES)
def test_rows_that_commit_late_are_waited_for(new_url, target, backend, monkeypatch):
    source = filled(new_url(backend, at_head=True), 10)
    row = "INSERT INTO routing_telemetry (request_id, timestamp, provider) VALUES ('late', 1, 'p')"
    with psycopg.connect(source) as late:
        late.execute(row)
        filled(source, 10, first=10)
        monkeypatch.setattr(transfer_run, "_PATIENCE_S", 0)
        with pytest.raises(StoreUnavailable, match="source: transactions that may write rows"):
            copy(source, target)
        monkeypatch.undo()
        threading.Timer(1, late.commit).start()
        assert copy(source, target).rows_verified == 21
        eventually(lambda: late.info.transaction_status == psycopg.pq.TransactionStatus.IDLE)
    assert all_rows(target)[10].request_id == "late"


@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("right", ["SELECT", "INSERT"])
def test_a_role_without_the_rights_is_told_which(new_url, backend, right):
    url, other = new_url(backend, at_head=True), new_url("sqlite-file", at_head=True)
    role = f"few_{right.lower()}_{make_url(url).database}"
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        if right == "INSERT":
            grant = "GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}"
            owner.execute(sql.SQL(grant).format(sql.Identifier(role)))
            grant = "GRANT INSERT, UPDATE ON lynkr_store_progress TO {}"
            owner.execute(sql.SQL(grant).format(sql.Identifier(role)))
    try:
        theirs = make_url(url).set(username=role).render_as_string(hide_password=False)
        filled(url if right == "SELECT" else other, 3)
        places = (theirs, other) if right == "SELECT" else (other, theirs)
        with pytest.raises(StoreUnavailable, match=f"GRANT|permission denied|{right}"):
            copy(*places)
        assert all_rows(other if right == "SELECT" else url) == []
    finally:
        with psycopg.connect(url, autocommit=True) as owner:
            for statement in ("DROP OWNED BY {}", "DROP ROLE {}"):
                owner.execute(sql.SQL(statement).format(sql.Identifier(role)))


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_row_that_the_target_refuses_costs_one_row(new_url, backend):
    source, target = (
        filled(new_url("sqlite-file", at_head=True), 1_500),
        new_url(backend, at_head=True),
    )
    if backend == "sqlite-file":
        with sqlite3.connect(target.removeprefix("sqlite:///")) as connection:
            connection.execute(
                "CREATE TRIGGER no_seven BEFORE INSERT ON routing_telemetry WHEN new.id = 7 "
                "BEGIN SELECT RAISE(ABORT, 'no'); END"
            )
        connection.close()
    else:
        with psycopg.connect(target) as connection:
            connection.execute("ALTER TABLE routing_telemetry ADD CONSTRAINT no CHECK (id <> 7)")
    report = copy(source, target)
    assert report.left_out["constraint"] >= 1
    assert report.rows_verified == 1_499
    assert [row.id for row in all_rows(target)] == [n for n in range(1, 1_501) if n != 7]


def test_missing_rows_are_added_page_by_page():
    """All rows of a file can be missing, and their texts need more memory than there may be."""
    added = []

    def add(columns):
        added.append(len(columns["id"]))
        return Counter(refused=1)

    pages = ({"id": list(range(n, n + 700))} for n in range(0, 3_500, 700))
    assert compare(pages, iter([]), add).refused == {"refused": 4}
    assert added == [1_000, 1_000, 1_000, 500]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_that_the_target_lost_are_brought_from_a_file_and_verified(target, tmp_path, name):
    path = tmp_path / name
    copy(filled(f"sqlite:///{tmp_path / 'source.db'}", 2_500), path)
    copy(path, target)
    there = all_rows(target)
    engine = create_store_engine(target)
    with writing(engine).begin() as connection:
        connection.execute(delete(TELEMETRY).where(TELEMETRY.c.id > 1, TELEMETRY.c.id < 2_300))
    engine.dispose()
    report = copy(path, target)
    assert (report.rows_copied, report.rows_verified) == (0, 2_500)
    assert all_rows(target) == there


# -- sums -----------------------------------------------------------------------------------------

_NUMBER = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.none())
_TEXT = st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_characters="\0")))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(st.integers(-(10**14), 10**14), _NUMBER, _NUMBER, _TEXT), max_size=8)
)
def test_sums_by_the_database_are_those_of_the_values(target, rows):
    names = ("timestamp", "input_tokens", "cost_usd", "request_text")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=False)) if rows else {}
    count = len(rows)
    fixed = {
        "id": list(range(1, count + 1)),
        "request_id": ["r"] * count,
        "provider": ["é"] * count,
    }
    portable = Converter(TELEMETRY).convert({**fixed, **columns}) if rows else {}
    engine = create_store_engine(target)
    with engine.connect() as connection:
        _insert(connection, TELEMETRY, portable)
        assert sums_in(connection, TELEMETRY, 0, count) == sums_of(portable, TELEMETRY)
        connection.rollback()
    engine.dispose()


def test_each_column_has_its_kind():
    kinds = kinds_of(TELEMETRY)
    assert {kinds[name] for name in ("latency_ms", "cost_usd", "ttft_ms")} == {Kind.REAL}
    assert {kinds[name] for name in ("input_tokens", "status_code", "id")} == {Kind.WHOLE}
    assert {kinds[name] for name in ("was_fallback", "stream")} == {Kind.FLAG}
    assert {kinds[name] for name in ("request_text", "attributes")} == {Kind.LONG_TEXT}
    assert (kinds["timestamp"], kinds["tier"]) == (Kind.INSTANT, Kind.NAME)
