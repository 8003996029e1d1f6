"""The benchmarks measure what they say: the same rows on both sides, and the same answers."""

import inspect
import json
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ormsgpack import packb

from benchmarks import __main__ as command
from benchmarks import databases, harness
from benchmarks.neighbour import neighbour
from benchmarks.original import Original
from benchmarks.sample import COLUMNS, END_MS, REQUEST_CHARS, RESPONSE_CHARS, Sample
from lynkr_store import RoutingFilter, Store, StoreSettings, Window
from lynkr_store.db.models import TELEMETRY
from lynkr_store.ingest.codec import plain_columns
from lynkr_store.schemas import TEXT_FIELDS
from tests.conftest import ON_DISK

DAY = timedelta(days=1)
DAY_MS = DAY // timedelta(milliseconds=1)
SAMPLE = Sample(3_000, DAY)
AT = {name: number for number, name in enumerate(COLUMNS)}


def test_the_sample_is_the_same_each_time_and_holds_no_rows() -> None:
    assert inspect.isgenerator(SAMPLE.rows())
    assert list(SAMPLE.rows()) == list(SAMPLE.rows())


def test_the_sample_has_the_gateways_columns_in_their_order() -> None:
    names = [column.name for column in TELEMETRY.c]
    assert ["id", *COLUMNS] == names[:37]
    assert {len(row) for row in SAMPLE.rows()} == {len(COLUMNS)}


def test_the_samples_rows_are_spread_evenly_and_end_at_its_end() -> None:
    stamps = [row[AT["timestamp"]] for row in SAMPLE.rows()]
    assert stamps[-1] == END_MS
    assert {later - earlier for earlier, later in pairwise(stamps)} == {DAY_MS // 3_000}
    assert stamps[0] > END_MS - DAY_MS


def test_the_sample_is_what_it_says() -> None:
    rows = list(Sample(40_000, DAY).rows())
    column = {name: [row[number] for row in rows] for name, number in AT.items()}
    assert {len(text) for text in column["request_text"]} == {REQUEST_CHARS}
    assert {len(text) for text in column["response_text"] if text} == {RESPONSE_CHARS}
    assert 0.01 < sum(map(bool, column["error_type"])) / len(rows) < 0.02
    assert 0.02 < sum(column["was_fallback"]) / len(rows) < 0.04
    assert 10 < len(rows) / len(set(column["session_id"])) < 14
    assert len(set(column["request_type"])) == 3
    for rare, value in (("provider", "vertex"), ("tier", "EXPERT"), ("model", "gemini-2.5-pro")):
        assert column[rare].count(value) == 2, rare
    former = [number for number, name in enumerate(column["provider"]) if name == "together"]
    assert 60 < len(former) < 180 and former[-1] < len(rows) / 3
    for row in rows:
        if row[AT["error_type"]]:
            assert row[AT["latency_ms"]] is row[AT["quality_score"]] is row[AT["cost_usd"]] is None


def test_the_samples_records_are_taken_as_they_are() -> None:
    records = [dict(record) for record in SAMPLE.records()]
    texts = [[record.pop(name, None) for name in TEXT_FIELDS] for record in records]
    columns, others = plain_columns(
        [(packb(record), *two) for record, two in zip(records, texts, strict=True)]
    )
    assert not others, "a value is wrong, or would be mended"
    assert all(map(json.loads, columns["attributes"]))
    rows = zip(*(columns[name] for name in COLUMNS), strict=True)
    assert list(rows) == [tuple(row) for row in SAMPLE.rows()]


@pytest.fixture(params=ON_DISK)
def both(request: pytest.FixtureRequest, new_url: Any, tmp_path: Path) -> Any:
    """The original and a store with the sample's rows, at the end of the sample."""
    url = new_url(request.param, at_head=True)
    sqlite = request.param == "sqlite-file"
    original_url = f"sqlite:///{tmp_path}/original.db" if sqlite else new_url(request.param)
    with closing(databases.connect(url)) as connection:
        databases.insert(connection, SAMPLE.rows())
    settings = StoreSettings(url=url, cache_ttl_s=0)
    with (
        Original(original_url) as original,
        Store(settings=settings, clock=lambda: END_MS + 1) as store,
    ):
        original.create()
        with databases.without_indexes(original.connection):
            databases.insert(original.connection, SAMPLE.rows(), batch=1_000)
        databases.settle(original.connection)
        yield original, store


def row_of(values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("id", *COLUMNS), values, strict=True))


def test_the_originals_sql_gives_the_stores_answers(both: Any) -> None:
    original, store = both
    for hours in (24, 5):
        since = END_MS + 1 - hours * 3_600_000
        span, window = (since, END_MS + 1), Window(since=since)
        stats = original.get_stats(*span)
        assert stats["totalRequests"] == SAMPLE.count * hours // 24
        assert stats == store.get_stats(window).to_gateway()
        assert original.get_routing_accuracy(*span) == (
            store.get_routing_accuracy(window).to_gateway()
        )
        assert original.get_provider_stats("openrouter", *span) == (
            store.get_provider_stats("openrouter", window).to_gateway()
        )
    nothing = (END_MS + 1, END_MS + 2)
    assert original.get_stats(*nothing) is original.get_routing_accuracy(*nothing) is None
    assert original.get_provider_stats("openrouter", *nothing) is None

    session = next(SAMPLE.rows())[AT["session_id"]]
    for named in (
        {},
        {"provider": "bedrock"},
        {"provider": ["bedrock", "azure-openai"], "has_error": True},
        {"tier": "SIMPLE"},
        {"session_id": session},
    ):
        mine = store.query(RoutingFilter(**named), limit=50)
        rows = [row_of(row) for row in original.query(**named, limit=50)]
        assert rows == [row.to_gateway() for row in mine]
    assert len(original.query(since=END_MS - DAY_MS // 3_000, limit=50)) == 2

    assert original.cleanup(END_MS + 1 - DAY_MS // 2) == store.cleanup(timedelta(hours=12))

    for name in ("provider", "tier", "timestamp", "session_id"):  # there again after filling
        original._execute(f"DROP INDEX idx_telemetry_{name}", ())


def test_a_database_is_gone_when_it_was_measured() -> None:
    with databases.sqlite_files() as files:
        with files.database() as url, Original(url) as original:
            original.create()
            folder = Path(url.removeprefix("sqlite:///")).parent
            assert list(folder.iterdir())
        assert list(folder.iterdir()) == []


def test_pairs_are_timed_in_turn() -> None:
    said: list[str] = []
    questions = [(lambda: said.append("ours"), lambda: said.append("baseline"))] * 2
    pairs = harness.paired(questions, burst=2)
    assert said == ["baseline", "ours", "ours"] * 2
    assert 0 < pairs.ours.least <= pairs.ours.median
    assert pairs.times_faster > 0


def test_the_neighbour_reports_how_long_it_waited_and_what_failed(new_url: Any) -> None:
    url = new_url("sqlite-file", at_head=True)
    with closing(databases.connect(url)) as connection:
        with neighbour(url) as told:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(0.3)
            connection.execute("COMMIT")
        [[longest_s, failures]] = told
        assert 0.2 < longest_s < 3 and failures == 0
        count, rest = divmod(
            connection.execute("SELECT count(*) FROM routing_telemetry").fetchone()[0], 3
        )
        assert count >= 1 and rest == 0


LINES = {
    "ingest": [
        "record, flush, fold",
        "record, flush, fold",
        "record(), mean",
        "record(), p50",
        "record(), p99",
    ],
    "stats": [
        "get_stats, 24 h, 20 not folded",
        "get_stats, 24 h",
        "get_provider_stats, 24 h",
        "get_routing_accuracy, 24 h",
        "get_stats, 24 h, 100 not folded",
        "get_stats, 30 d, 100 not folded",
        "get_stats, 24 h",
        "get_stats, 30 d",
        "get_provider_stats, 30 d",
        "get_routing_accuracy, 30 d",
        "get_stats, 24 h, more rows",
    ],
    "size": ["file size"],
    "lists": [
        "list: all",
        "list: provider",
        "list: provider, rare",
        "list: provider, former",
        "list: provider, absent",
        "list: 3 providers",
        "list: tier",
        "list: tier, rare",
        "list: model",
        "list: model, rare",
        "list: errors",
        "list: errors of a provider",
        "list: session",
    ],
    "retention": [
        "retention: longest stall",
        "retention: failed inserts",
        "retention: memory growth",
        "retention: total time",
    ],
    "changes": [
        "changes: INSERT",
        "changes: UPDATE of a cost",
        "changes: UPDATE of a text",
        "changes: DELETE",
        "maintenance: counts",
        "maintenance: scrub",
    ],
    "copying": ["copy, fold, compare"],
    "following": ["follow: rows that are there", "follow: record() to given, poll_s=0.05"],
    "capacity": [
        "table, without texts",
        "idx_telemetry_provider",
        "idx_telemetry_session_id",
        "idx_telemetry_tier",
        "idx_telemetry_timestamp",
        "ix_routing_telemetry_model_timestamp",
        "ix_routing_telemetry_provider_failed_timestamp",
        "ix_routing_telemetry_tier_timestamp",
        "routing_telemetry",
        "roll-up, with its index",
        "roll-ups",
        "fold",
        "cleanup of half",
    ],
    "cache": [
        "get_stats, cached",
        "get_stats of a window, cached",
        "get_provider_stats, cached",
        "await get_stats, cached",
        "await get_stats of a window, cached",
        "await get_provider_stats, cached",
    ],
    "importing": ["import lynkr_store"],
}


LONG = {
    "capacity",
    "changes",
    "copying",
    "following",
    "importing",
    "ingest",
    "lists",
    "retention",
    "stats",
}


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[pytest.mark.slow] if part in LONG else []) for part in LINES],
)
def test_each_part_gives_its_lines(part: str) -> None:
    results = command.run([part], 0.001)
    assert all(isinstance(result, harness.Result) for result in results)
    needs_database = part != "importing"
    backend = "sqlite" if needs_database else "none"
    assert [result.name for result in results if result.backend == backend] == LINES[part]
    for result in results:
        assert bool(result.rows) == needs_database, result.name
        assert result.sessions and result.method and result.unit, result.name
        spreads = [result.ours, *([result.baseline] if result.baseline else [])]
        assert all(0 <= spread.least <= spread.median for spread in spreads), result.name
        assert bool(result.baseline) == bool(result.against), result.name
        if result.ratio:
            assert result.baseline and result.ratio.means and result.ratio.value > 0, result.name


def test_each_part_of_the_command_has_its_lines_here() -> None:
    assert tuple(sorted(LINES)) == tuple(sorted(command.PARTS))


@pytest.mark.parametrize(
    ("ratio", "target"),
    [
        (harness.Ratio(300, "× faster", at_least=300), "≥ 300"),
        (harness.Ratio(299, "× faster", at_least=300), "≥ 300 missed"),
        (harness.Ratio(0.72, "× the size", at_most=0.72), "≤ 0.72"),
        (harness.Ratio(0.73, "× the size", at_most=0.72), "≤ 0.72 missed"),
        (harness.Ratio(2, "× faster"), ""),
    ],
)
def test_a_target_that_was_missed_says_so(ratio: harness.Ratio, target: str) -> None:
    assert ratio.target == target


def test_a_target_of_the_figure_itself_takes_the_ratios_place() -> None:
    ratio = harness.Ratio(0.5, "× faster", at_least=300)
    for at_most, target in ((None, "≥ 300 missed"), (5, "≤ 5"), (4, "≤ 4 missed")):
        result = harness.Result(
            name="list",
            backend="sqlite",
            rows=1,
            sessions="12 each",
            method="once",
            unit="ms",
            ours=harness.Spread(3, 5),
            ratio=ratio,
            at_most=at_most,
        )
        assert result.target == target
        assert replace(result, ratio=None).target == (target if at_most else "")


def test_the_command_prints_one_table_and_writes_the_same_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    command.main(["--only", "size", "--quick", "--json", str(path)])
    said = capsys.readouterr()
    assert "file size" in said.out and "≤ 0.72" in said.out and "processors" in said.out
    assert "file size, sqlite" in said.err
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["machine"]["processors"] and written["machine"]["sqlite"]
    [line] = written["results"]
    assert line["rows"] == 4_000 and line["ratio"]["value"] < 1
