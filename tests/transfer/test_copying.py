"""Copies between databases: the same rows, sums and answers, however often they are interrupted."""

import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, select, text, update

from lynkr_store import (
    BadArgument,
    CopyDiffers,
    SchemaAhead,
    SchemaBehind,
    Store,
    StoreSettings,
    StoreUnavailable,
    copy,
    create_store_engine,
    upgrade,
)
from lynkr_store.db.dialect import disposing
from lynkr_store.db.models import DIMENSIONS, LEDGER, ROLLUPS, SAVINGS, TELEMETRY
from lynkr_store.rollups import fold as folding
from lynkr_store.storage.write_lock import PAUSE_S
from lynkr_store.transfer import run
from lynkr_store.transfer.tables import TableRows
from tests.conftest import ON_DISK, POSTGRES
from tests.support.children import MortalServer
from tests.support.copies import DAY_MS, START, all_rows, answers, change, filled, records
from tests.support.postgres import available_servers
from tests.support.recorded import DATA, needs_data

PAIRS = [(one, other) for one in ON_DISK for other in ON_DISK]


@pytest.fixture(params=PAIRS, ids="-to-".join)
def places(request, new_url):
    """A source and a target, both at head."""
    one, other = request.param
    return new_url(one, at_head=True), new_url(other, at_head=True)


def rows_of(url, table, *, without=()):
    engine = create_store_engine(url)
    columns = [column for column in table.c if column.name not in without]
    with engine.connect() as connection:
        found = connection.execute(select(*columns).order_by(*columns)).all()
    engine.dispose()
    return [tuple(row) for row in found]


def test_a_copy_has_the_same_rows_and_answers(places):
    source, target = places
    filled(source, 2_345, savings=3)
    report = copy(source, target)
    assert (report.rows_copied, report.savings_copied) == (2_345, 3)
    assert (report.rows_verified, report.days_verified) == (2_345, 3)
    assert not report.coerced
    assert not report.left_out
    assert all_rows(target) == all_rows(source)
    assert rows_of(target, SAVINGS) == rows_of(source, SAVINGS)
    assert answers(target) == answers(source)


def test_a_second_copy_brings_only_what_is_new(places):
    source, target = places
    filled(source, 1_200, savings=1)
    copy(source, target)
    filled(source, 300, first=1_200, savings=2)
    report = copy(source, target)
    assert (report.rows_copied, report.savings_copied) == (300, 2)
    assert report.rows_verified == 1_500
    assert copy(source, target).rows_copied == 0
    assert all_rows(target) == all_rows(source)
    assert answers(target) == answers(source)


def test_the_target_assigns_the_next_id_after_a_copy(places):
    source, target = places
    filled(source, 10, savings=2)
    copy(source, target)
    filled(target, 1, first=99, savings=1)
    assert [row.id for row in all_rows(target)] == list(range(1, 12))
    assert [row[0] for row in rows_of(target, SAVINGS)] == [1, 2, 3]


def test_pages_end_with_the_last_id_that_was_asked_for(url):
    filled(url, 1_500)
    with Store(url) as store:
        rows = TableRows(store._database, TELEMETRY)
        for after, upto in ((0, 1_499), (7, 1_000), (1_499, 5_000), (1_500, 5_000), (4, 4)):
            ids = [row_id for page in rows.pages(after, upto) for row_id in page["id"]]
            assert ids == list(range(after + 1, min(upto, 1_500) + 1))


def rows_known(url):
    engine = create_store_engine(url)
    known = "SELECT reltuples FROM pg_class WHERE relname = 'routing_telemetry'"
    with disposing(engine), engine.connect() as connection:
        return connection.scalar(text(known))


@pytest.mark.parametrize("backend", POSTGRES)
def test_postgresql_has_statistics_of_what_was_copied(new_url, backend, monkeypatch):
    source, target = new_url("sqlite-file", at_head=True), new_url(backend, at_head=True)
    for first, rows, known in ((0, 20, 20), (20, 20, 20), (40, 50, 90)):
        filled(source, rows, first=first)
        monkeypatch.setattr(run, "_MANY_ROWS", 50)
        copy(source, target)
        assert rows_known(target) == known


@pytest.mark.parametrize("backend", POSTGRES)
def test_statistics_that_cannot_be_gathered_fail_no_copy(new_url, backend, monkeypatch):
    source, target = new_url("sqlite-file", at_head=True), new_url(backend, at_head=True)
    filled(source, 20)
    monkeypatch.setattr(run, "_GATHER", text("SELECT pg_sleep(60)"))
    monkeypatch.setenv("LYNKR_STORE_STATEMENT_TIMEOUT_S", "1")
    assert copy(source, target).rows_verified == 20
    assert rows_known(target) == -1
    monkeypatch.undo()
    copy(source, target)
    assert rows_known(target) == 20


@pytest.mark.parametrize("backend", ON_DISK)
def test_only_on_sqlite_a_fold_lets_others_write_between_its_steps(new_url, backend, monkeypatch):
    source, target = new_url("sqlite-file", at_head=True), new_url(backend, at_head=True)
    filled(source, 20)
    pauses = []
    monkeypatch.setattr(folding, "STEP_ROWS", 5)
    monkeypatch.setattr(folding.time, "sleep", pauses.append)
    paused = [PAUSE_S if backend == "sqlite-file" else 0.0] * 3
    copy(source, target)
    assert [pause for pause in pauses if pause in (0.0, PAUSE_S)] == paused
    filled(target, 20, first=20)
    pauses.clear()
    with Store(target) as store:
        store.maintain()
    assert [pause for pause in pauses if pause in (0.0, PAUSE_S)] == paused


def test_a_copy_brings_the_sums_of_rows_that_retention_removed(places):
    source, target = places
    filled(source, 3_000)
    now = START + 3 * DAY_MS
    with Store(settings=StoreSettings(url=source), clock=lambda: now) as store:
        assert store.cleanup(timedelta(days=1), trust_clock=True) > 1_000
    filled(source, 50, first=3_000)  # not folded yet
    report = copy(source, target)
    assert report.rollups_copied > 100
    assert report.rows_copied < 2_000
    got = answers(target)
    assert got == answers(source)
    assert got[0].total_requests == 3_050
    assert got[0].source == "buckets"
    assert all_rows(target) == all_rows(source)


def test_sums_stay_when_every_row_was_removed(places):
    source, target = places
    filled(source, 500)
    with Store(settings=StoreSettings(url=source), clock=lambda: START + 90 * DAY_MS) as store:
        store.cleanup(timedelta(days=1), trust_clock=True)
    copy(source, target)
    assert answers(target) == answers(source)
    with Store(target, clock=lambda: START + 90 * DAY_MS) as store:
        store.add_many([{"provider": "ollama", "timestamp": START + 89 * DAY_MS}])
        store.maintain()
    assert answers(target)[0].total_requests == 501


def test_a_batch_of_the_source_is_not_stored_again_in_the_target(places):
    """A spool that moves with its store may hold a batch whose commit was never confirmed."""
    source, target = places
    with Store(source) as store:
        for record in records(20):
            store.record(record)
        assert store.flush(60)
    copy(source, target)
    assert rows_of(target, LEDGER) == rows_of(source, LEDGER)
    assert rows_of(target, LEDGER)


@pytest.mark.sample(2)
@pytest.mark.parametrize("side", ["source", "target"])
def test_texts_that_retention_removed_on_one_side_are_no_difference(places, side):
    url = places[side == "target"]
    filled(places[0], 100)
    copy(*places)
    settings = StoreSettings(url=url, text_retention_days=1)
    with Store(settings=settings, clock=lambda: START + DAY_MS + 50 * DAY_MS // 1_000) as store:
        assert store.maintain(trust_clock=True).texts_removed == 50
    filled(places[0], 100, first=100)
    report = copy(*places)
    assert (report.rows_copied, report.rows_without_texts) == (100, 50)
    texts = [[row.request_text is not None for row in all_rows(place)] for place in places]
    assert [sum(kept) for kept in texts] == ([150, 200] if side == "source" else [200, 150])


def test_rows_that_the_source_removed_stay_in_the_target(places):
    source, target = places
    filled(source, 100)
    copy(source, target)
    change(source, delete(TELEMETRY).where(TELEMETRY.c.id.in_([1, 50])))
    report = copy(source, target)
    assert report.rows_only_in_target == 2
    assert report.rows_verified == 98
    assert len(all_rows(target)) == 100


def test_a_row_that_was_committed_late_is_brought_by_the_next_copy(places):
    source, target = places
    filled(source, 30)
    late = rows_of(source, TELEMETRY)[10]
    change(source, delete(TELEMETRY).where(TELEMETRY.c.id == late[0]))
    copy(source, target)
    names = [column.name for column in TELEMETRY.c]
    change(source, insert(TELEMETRY), dict(zip(names, late, strict=True)))
    assert copy(source, target).rows_verified == 30
    assert all_rows(target) == all_rows(source)


@pytest.mark.parametrize("file", [None, "rows.jsonl", "rows.parquet"])
def test_each_copy_counts_every_row_that_the_target_lacks(new_url, tmp_path, file):
    """An interrupted copy told nobody what it left out, so the next one must."""
    source, target = (new_url("sqlite-file", at_head=True) for _ in range(2))
    filled(source, 30)
    change(source, text("UPDATE routing_telemetry SET timestamp = 'soon' WHERE id IN (3, 4)"))
    change(
        target,
        text(
            "CREATE TRIGGER refusing BEFORE INSERT ON routing_telemetry WHEN new.id IN (7, 8) "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        ),
    )
    if file:
        for _ in range(2):
            assert copy(source, tmp_path / file).left_out == {"timestamp": 2}
        for _ in range(2):
            report = copy(tmp_path / file, target)
            assert (report.rows_verified, report.left_out) == (26, {"constraint": 2})
    else:
        for _ in range(2):
            report = copy(source, target)
            assert report.rows_verified == 26
            assert report.left_out == {"timestamp": 2, "constraint": 2}


@pytest.mark.sample(2)
@pytest.mark.parametrize("now", ["other", None])
def test_a_changed_row_is_named_and_nothing_is_overwritten(places, now):
    source, target = places
    filled(source, 30)
    copy(source, target)
    change(target, update(TELEMETRY).where(TELEMETRY.c.id == 7).values(request_text=now))
    with pytest.raises(CopyDiffers, match=r"1 rows of the target .*\(id 7: request_text\)"):
        copy(source, target)
    assert all_rows(target)[6].request_text == now


@pytest.mark.sample(3)
@pytest.mark.parametrize("column", ["cost_usd", "latency_ms", "tier", "was_fallback", "ttft_ms"])
def test_every_kind_of_difference_is_found(places, column):
    source, target = places
    filled(source, 30)
    copy(source, target)
    value = "x" if column == "tier" else True if column == "was_fallback" else 3.25
    row = update(TELEMETRY).where(TELEMETRY.c.id == 7)
    change(source, row.values({column: None}))
    change(target, row.values({column: value}))
    with pytest.raises(CopyDiffers, match=f"id 7: {column}"):
        copy(source, target)


def test_a_target_with_rows_of_its_own_is_refused(places):
    source, target = places
    filled(source, 5)
    filled(target, 1, first=90)
    before = all_rows(target)
    with pytest.raises(BadArgument, match="has rows that no copy wrote"):
        copy(source, target)
    assert all_rows(target) == before


def test_a_target_that_was_written_after_the_copy_is_refused(places):
    source, target = places
    filled(source, 5)
    copy(source, target)
    filled(target, 1, first=90)
    filled(source, 1, first=91)
    with pytest.raises(BadArgument, match="stop it, copy once more"):
        copy(source, target)


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_target_of_another_source_is_refused(places, new_url, backend):
    source, target = places
    other = filled(new_url(backend, at_head=True), 9, first=500)
    filled(source, 5)
    copy(source, target)
    with pytest.raises(BadArgument, match="not this source's"):
        copy(other, target)
    assert len(all_rows(target)) == 5


def test_a_source_that_has_no_copied_row_any_more_is_refused(places):
    source, target = places
    filled(source, 5)
    copy(source, target)
    change(source, delete(TELEMETRY))
    filled(source, 5, first=20)
    with pytest.raises(BadArgument, match="may be another source"):
        copy(source, target)


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_database_is_not_copied_into_itself(new_url, backend, tmp_path):
    url = filled(new_url(backend, at_head=True), 3)
    with pytest.raises(BadArgument, match="it is the source"):
        copy(url, url)
    if backend == "sqlite-file":
        link = tmp_path / "link.db"
        link.symlink_to(url.removeprefix("sqlite:///"))
        with pytest.raises(BadArgument, match="it is the source"):
            copy(url, link)


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_target_that_is_not_at_head_is_refused_with_the_command(new_url, backend):
    source = filled(new_url("sqlite-file", at_head=True), 3)
    target = new_url(backend)
    if backend == "sqlite-file":
        with pytest.raises(StoreUnavailable, match="create it by lynkr-store upgrade --url sqlite"):
            copy(source, target)
        assert not Path(target.removeprefix("sqlite:///")).exists()
        with pytest.raises(StoreUnavailable, match=r"one of \.jsonl, \.ndjson, \.parquet"):
            copy(source, "rows.csv")
    engine = create_store_engine(target)
    upgrade(engine, "0005")
    with pytest.raises(SchemaBehind, match="run lynkr-store upgrade"):
        copy(source, target)
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE lynkr_store_alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(SchemaAhead):
        copy(source, target)


@pytest.mark.parametrize("backend", POSTGRES)
def test_a_source_in_postgresql_that_is_behind_is_refused(new_url, backend):
    source = new_url(backend)
    upgrade(source, "0005")
    with pytest.raises(SchemaBehind):
        copy(source, new_url("sqlite-file", at_head=True))


@pytest.mark.parametrize("backend", POSTGRES)
def test_schemas_are_those_of_the_arguments(new_url, backend, monkeypatch):
    source, target = new_url(backend), new_url(backend)
    for url, schema in ((source, "here"), (target, "there")):
        engine = create_store_engine(url, schema=schema)
        upgrade(engine)
        engine.dispose()
    with Store(settings=StoreSettings(url=source, schema_name="here")) as store:
        store.add_many(records(5))
    assert copy(source, target, source_schema="here", target_schema="there").rows_verified == 5
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", "there")
    assert len(all_rows(target)) == 5


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("sqlite://", "x.jsonl", "source: .*not a database in memory"),
        ("x.jsonl", "y.parquet", "one of the two must be a database"),
        ("", "x.db", "source: give a URL or a path"),
        (None, "x.db", "source: give a URL or a path"),
        ("postgresql:/me:secret@host/db", "x.db", "source: a URL needs :// after its first word"),
        ("x.db", "postgresql:me:secret@host", "target: a URL needs :// after its first word"),
        ("mysql://u@h/d", "x.jsonl", "not supported|not a supported"),
    ],
)
def test_places_that_cannot_be_used_are_named(source, target, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadArgument, match=words):
        copy(source, target)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_database_is_named(tmp_path, new_url):
    target = new_url("sqlite-file", at_head=True)
    (tmp_path / "notes.db").write_text("no database")
    with pytest.raises(StoreUnavailable, match=r"notes\.db .*not a database"):
        copy(tmp_path / "notes.db", target)
    with pytest.raises(StoreUnavailable, match=r"source: .*none\.db does not exist"):
        copy(tmp_path / "none.db", target)
    assert not (tmp_path / "none.db").exists()


MOMENTS = [
    ("commit", 1),  # before the first page is committed
    ("rows", 1),
    ("rows", 3),
    ("commit", 4),
    ("savings", 1),
    ("commit", 5),  # while roll-ups are brought
    ("folding", 1),
    ("verifying", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "-".join(map(str, moment)))
def test_a_killed_copy_is_continued_without_duplicates(places, moment):
    source, target = places
    filled(source, 3_000, savings=2)
    with Store(settings=StoreSettings(url=source), clock=lambda: START + 3 * DAY_MS) as store:
        store.cleanup(timedelta(days=2.5), trust_clock=True)
    command = [sys.executable, "-m", "tests.support.copies", source, target]
    ended = subprocess.run([*command, *map(str, moment)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    report = copy(source, target)
    there = all_rows(source)
    assert report.rows_verified == len(there)
    assert all_rows(target) == there
    assert answers(target) == answers(source)
    for table in (SAVINGS, ROLLUPS, DIMENSIONS, LEDGER):
        assert rows_of(target, table) == rows_of(source, table)


@pytest.mark.slow
def test_two_copies_at_once_into_one_target_lose_and_double_nothing(places):
    source, target = places
    filled(source, 3_000)
    command = [sys.executable, "-m", "tests.support.copies", source, target, "none", "1"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    for process, words in zip(both, said, strict=True):
        assert process.returncode == 0 or "another copy" in words, words
    assert copy(source, target).rows_verified == 3_000
    assert all_rows(target) == all_rows(source)


def test_a_copy_that_writes_while_another_one_looks_is_no_other_program(places, monkeypatch):
    source, target = places
    filled(source, 10)
    looked = False

    def between(look):
        def looking(rows):
            nonlocal looked
            found = look(rows)
            if not looked:
                looked = True
                copy(source, target)
            return found

        return looking

    for name in ("ends", "copied_upto"):
        monkeypatch.setattr(TableRows, name, between(getattr(TableRows, name)))
    assert copy(source, target).rows_copied == 0
    assert looked
    assert all_rows(target) == all_rows(source)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("backend", POSTGRES)
def test_the_gateways_real_file_goes_to_postgresql_and_back(new_url, backend, tmp_path):
    source = tmp_path / "telemetry.db"
    shutil.copy(DATA / "gateway-28185.db", source)
    before = source.read_bytes()
    middle, back = new_url(backend, at_head=True), new_url("sqlite-file", at_head=True)
    for one, other in ((source, middle), (middle, back)):
        report = copy(one, other)
        assert (report.rows_copied, report.rows_verified) == (28_185, 28_185)
        assert not report.coerced
    assert source.read_bytes() == before
    assert all_rows(back) == all_rows(middle) == all_rows(f"sqlite:///{source}")
    upgrade(f"sqlite:///{source}")
    assert answers(back) == answers(middle) == answers(f"sqlite:///{source}")


@needs_data
@pytest.mark.parametrize("version", ["4779c17", "9c8fe01", "f0bd703"])
def test_files_of_each_of_the_gateways_versions_are_copied(places, version):
    _, target = places
    source = DATA / "gateway-versions" / f"{version}.db"
    assert copy(source, target).rows_verified == 40
    assert all_rows(target) == all_rows(f"sqlite:///{source}")


@pytest.mark.slow
@pytest.mark.parametrize("installation", available_servers(), ids=lambda each: each.name)
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("stage", ["rows", "folding", "verifying"])
def test_a_server_that_ends_on_the_way_is_named_and_the_copy_is_continued(
    installation, side, stage, new_url
):
    with MortalServer(installation) as server:
        other, there = new_url("sqlite-file", at_head=True), server.create_database("moved")
        upgrade(there)
        places = (there, other) if side == "source" else (other, there)
        filled(places[0], 3_000, savings=2)
        ended = []

        def end_once(step):
            if step.stage == stage and not ended:
                ended.append(step)
                server.kill()

        if side == "target" or stage != "folding":  # only the target folds
            with pytest.raises(StoreUnavailable):
                copy(*places, on_progress=end_once)
            server.start_again()
        assert copy(*places).rows_verified == 3_000
        assert answers(places[1]) == answers(places[0])
        assert all_rows(places[1]) == all_rows(places[0])


INTERRUPTED = """
import sys
from lynkr_store import copy
copy(*sys.argv[1:], on_progress=lambda step: print(step.stage, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rows", "verifying"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_ctrl_c_ends_a_copy_whose_server_is_frozen(side, stage, new_url):
    """Though the thread that reads ahead waits for the server, as long as it is frozen."""
    with MortalServer(available_servers()[-1]) as server:
        other, there = new_url("sqlite-file", at_head=True), server.create_database("moved")
        upgrade(there)
        places = (there, other) if side == "source" else (other, there)
        filled(places[0], 60_000)
        command = [sys.executable, "-c", INTERRUPTED, *places]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as copying:
            assert any(line == f"{stage}\n" for line in copying.stdout)
            server.freeze()
            try:
                time.sleep(1)
                copying.send_signal(signal.SIGINT)
                assert copying.wait(30) == -signal.SIGINT, copying.stderr.read()
            finally:
                copying.kill()
                server.thaw()
        assert copy(*places).rows_verified == 60_000
