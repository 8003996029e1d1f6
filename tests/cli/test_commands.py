"""The lynkr-store command."""

import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import warnings
from contextlib import closing, redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest
import typer.main
from sqlalchemy import delete

from lynkr_store import (
    ProviderStats,
    RoutingAccuracy,
    RoutingStats,
    Store,
    StoreSettings,
    Window,
    __version__,
    create_store_engine,
    writing,
)
from lynkr_store.cli import commands, progress
from lynkr_store.db.models import TELEMETRY
from lynkr_store.migrate import revisions
from lynkr_store.testing import RecordFactory
from tests.conftest import CITUS, ON_DISK
from tests.support.recorded import DATA, gateway_file, insert_rows, needs_data

NOW = 1_750_000_000_000


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments, **environment):
    """Run the command as a user does, with 100 columns and no colours, but in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        for name, value in {"COLUMNS": "100", "NO_COLOR": "1", **environment}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["lynkr-store", *map(str, arguments)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command sets
        with pytest.raises(SystemExit) as ended:
            commands.main()
    return Finished(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def done(*arguments, **environment):
    finished = run(*arguments, **environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(params=ON_DISK)
def url(request, new_url):
    """A database with a few requests."""
    url = new_url(request.param, at_head=True)
    with Store(url) as store:
        for n in range(6):
            store.record(RecordFactory(timestamp=NOW + n, failed=n == 5, unmeasured=n == 4))
        assert store.flush(30)
    return url


WHOLE = ("--since", "0", "--until", str(NOW + 100))


def test_stats_say_what_a_person_reads_first(url):
    said = done("stats", "--url", url, *WHOLE)
    for words in ("requests", "error rate", "16.7 %", "Providers", "bedrock", "unpriced", "Tiers"):
        assert words in said
    assert "over-provisioned" in said
    assert "under-provisioned" in said


def test_stats_say_when_rows_were_removed(url):
    assert "quarter-hours" not in done("stats", "--url", url, *WHOLE)
    assert json.loads(done("cleanup", "--url", url, "--older-than", "1d", "--json")) is not None
    for options in ([], ["--provider", "ollama"]):
        assert "whole quarter-hours before" in done("stats", "--url", url, *options, *WHOLE)
    shown = json.loads(done("stats", "--url", url, *WHOLE, "--gateway"))
    assert shown["totalRequests"] == 6
    assert "source" not in shown


def test_stats_of_one_provider(url):
    said = done("stats", "--url", url, "--provider", "ollama", *WHOLE)
    assert "fallback rate" in said
    assert "bedrock" not in said


def test_a_provider_without_requests_is_said(url):
    for window in ([], WHOLE):
        said = done("stats", "--url", url, "--provider", "nobody", *window)
        assert said == "no requests of nobody in this window\n"


def test_the_sparkline_has_the_ends_of_the_window_that_was_asked_for(url):
    said = done("stats", "--url", url, "--since", "2025-06-15T00:00Z", "--until", str(NOW + 100))
    [below] = [line for line in said.splitlines() if "UTC" in line]
    assert below.split()[:4] == ["2025-06-15", "00:00", "2025-06-15", "15:06"]
    [spark] = [line for line in said.splitlines() if line.startswith(" over the window")]
    assert len(spark.split("window")[1].strip()) == 1, "all of them are at the window's end"


@pytest.mark.sample(3)
@pytest.mark.parametrize("columns", ["60", "80", "99", "100", "120"])
def test_names_are_whole_on_a_narrow_terminal(columns, tmp_path):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    names = {"provider": "azure-openai", "tier": "REASONING", "model": "claude-sonnet-4-5"}
    with Store(url, clock=lambda: NOW) as store:
        store.record(names, latency_ms=123456.789, cost_usd=0.5, error_type="overloaded")
    listed = done("query", "--url", url, COLUMNS=columns)
    figures = done("stats", "--url", url, "--last", "30y", COLUMNS=columns)
    for word in (*names.values(), "overloaded", "123,457 ms", "$0.5000"):
        assert word in listed
    for word in ("azure-openai", "REASONING", "123,457 ms", "$0.5000"):
        assert word in figures
    assert max(map(len, (listed + figures).splitlines())) <= int(columns)


def test_json_has_every_field(url):
    whole = json.loads(done("stats", "--url", url, "--json", *WHOLE))
    with Store(url, read_only=True) as store:
        window = Window(since=0, until=NOW + 100)
        assert RoutingStats(**whole["stats"]) == store.get_stats(window)
        assert RoutingAccuracy(**whole["accuracy"]) == store.get_routing_accuracy(window)
        one = ProviderStats(**whole["providers"]["ollama"])
        assert one == store.get_provider_stats("ollama", window)
    assert whole["stats"]["unpriced_requests"] is not None
    alone = json.loads(done("stats", "--url", url, "--json", "--provider", "ollama", *WHOLE))
    assert alone == {"providers": {"ollama": whole["providers"]["ollama"]}}
    empty = {"stats": None, "accuracy": None, "providers": {}}
    assert json.loads(done("stats", "--url", url, "--json")) == empty


def test_the_json_of_a_page_has_the_next_ones_cursor(url):
    pages, more = [], []
    while True:
        page = json.loads(done("query", "--url", url, "--limit", 4, *more, "--json"))
        pages.append(page["rows"])
        if page["next"] is None:
            break
        more = ["--before", page["next"]]
    assert [len(page) for page in pages] == [4, 2]
    rows = [row for page in pages for row in page]
    with Store(url, read_only=True) as store:
        found = store.query(include_text=False)
        assert rows == [row.model_dump(mode="json") for row in found]
    assert "request_text" in json.loads(done("query", "--url", url, "--text", "--json"))["rows"][0]


@pytest.mark.parametrize(
    "command", [["cleanup", "--older-than", "1d"], ["maintain"], ["downgrade", "base"], ["check"]]
)
def test_a_mistyped_path_makes_no_file(command, tmp_path):
    path = tmp_path / "typo" / "telemetry.db"
    ended = run(*command, "--url", f"sqlite:///{path}")
    assert ended.returncode == 3
    assert f"{path} does not exist" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_backup_that_was_not_needed_is_said(tmp_path):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    assert "no copy: there was nothing to change" in done("upgrade", "--url", url, "--backup")
    done("downgrade", "0009", "--url", url)
    assert "copied to" in done("upgrade", "--url", url, "--backup")
    assert "no copy" not in done("upgrade", "--url", url)


def test_the_version_is_said():
    assert done("--version") == f"lynkr-store {__version__}, revision {revisions.head()}\n"


def test_every_option_has_help():
    for command in typer.main.get_command(commands.app).commands.values():
        for option in command.params:
            assert option.help, (command.name, option.name)


def test_gateway_has_the_gateways_structure(url):
    stats = json.loads(done("stats", "--url", url, "--gateway", *WHOLE))
    assert stats["totalRequests"] == 6
    assert stats["errorRate"] == 16.7
    one = json.loads(done("stats", "--url", url, "--gateway", "--provider", "ollama", *WHOLE))
    assert one["total"] == 2
    assert json.loads(done("stats", "--url", url, "--gateway")) is None, (
        "the last 24 hours are empty"
    )
    assert "no requests" in done("stats", "--url", url)


def test_query_lists_pages_and_filters(url):
    said = done("query", "--url", url, "--limit", 2)
    cursor = said.split("--before ")[1].split()[0]
    rest = json.loads(done("query", "--url", url, "--before", cursor, "--gateway"))
    assert [row["timestamp"] - NOW for row in rest] == [3, 2, 1, 0]
    assert "request_text" not in rest[0]
    failed = json.loads(done("query", "--url", url, "--errors", "--text", "--gateway"))
    assert [row["error_type"] for row in failed] == ["overloaded"]
    assert failed[0]["request_text"] == "a question"
    several = done(
        "query", "--url", url, "--provider", "ollama", "--provider", "bedrock", "--gateway"
    )
    assert len(json.loads(several)) == 4
    assert json.loads(done("query", "--url", url, "--last", "1h", "--gateway")) == []
    iso = done("query", "--url", url, "--since", "2025-06-15T15:06:40.003Z", "--gateway")
    assert len(json.loads(iso)) == 3


def test_a_window_may_end_anywhere(url):
    first, last = "0001-01-01T00:00+14:00", "9999-12-31T23:59:59.999-14:00"
    found = json.loads(done("query", "--url", url, "--since", first, "--until", last, "--gateway"))
    assert len(found) == 6
    for command in (["stats"], ["stats", "--provider", "ollama"]):
        assert json.loads(done(*command, "--url", url, "--since", first, "--until", last, "--json"))
    none = [("--until", first), ("--since", last), ("--until", "0", "--last", "1000000y")]
    for window in none:
        assert json.loads(done("query", "--url", url, *window, "--gateway")) == [], window
    small = done("query", "--url", url, "--since", "2025-06-15t15:06:40.003z", "--gateway")
    assert len(json.loads(small)) == 3


def test_health_check_and_maintain(url):
    health = json.loads(done("health", "--url", url, "--json"))
    assert health["reachable"] is True
    assert health["revision"] == revisions.head()
    for_people = done("health", "--url", url)
    assert "oldest row" in for_people
    assert re.search(r"reachable +yes\b", for_people)
    assert re.search(r"size +[\d.]+ [kM]B\b", for_people)
    assert json.loads(done("check", "--url", url, "--json"))["ok"] is True
    assert f"revision {revisions.head()}" in done("check", "--url", url)
    assert json.loads(done("maintain", "--url", url, "--json")) == {
        "indexes_built": [],
        "indexes_left": [],
        "waited_for": None,
        "sequences_set": [],
        "rows_folded": 6,
        "rollup_lag": 0,
        "rows_deleted": 0,
        "rows_remaining": 0,
        "texts_removed": 0,
        "texts_remaining": 0,
        "bytes_freed": 0,
    }
    said = done("maintain", "--url", url, "--rebuild")
    assert "indexes built: none" in said
    assert "rows folded: 6" in said


def test_retention_runs_when_configured(url):
    report = done("maintain", "--url", url, "--json", LYNKR_STORE_RETENTION_DAYS="1")
    assert json.loads(report)["rows_deleted"] == 6


def test_text_retention_runs_when_configured_and_within_its_budget(url):
    def maintained(*options):
        return done("maintain", "--url", url, *options, LYNKR_STORE_TEXT_RETENTION_DAYS="1")

    assert "texts removed: 0; remaining: 6" in maintained("--budget", "0s")
    assert "texts removed: 6; remaining: 0" in maintained()


def test_cleanup_says_how_many(url):
    assert json.loads(done("cleanup", "--url", url, "--older-than", "1d", "--json")) == {
        "rows_deleted": 6
    }
    assert "0 rows deleted" in done("cleanup", "--url", url, "--older-than", "30d")


def test_upgrade_and_downgrade(empty_url):
    assert "at revision 0003" in done("upgrade", "0003", "--url", empty_url)
    behind = run("check", "--url", empty_url)
    assert behind.returncode == 1
    assert "lynkr-store upgrade" in behind.stdout
    assert f"at revision {revisions.head()}" in done("upgrade", "--url", empty_url)
    assert "at revision base" in done("downgrade", "base", "--url", empty_url)
    done("upgrade", "--url", empty_url)
    if empty_url.startswith("sqlite"):
        with Store(empty_url) as store:
            store.record(provider="p")
        refused = run("downgrade", "base", "--url", empty_url)
        assert refused.returncode == 1
        assert "--drop-data" in refused.stderr
        done("downgrade", "base", "--drop-data", "--url", empty_url)


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://nobody@/none"])
def test_scripts_need_no_database(url):
    up = done("upgrade", "--sql", "--url", url)
    assert "CREATE TABLE routing_telemetry" in up
    assert "DROP TABLE" in done("downgrade", "head:base", "--sql", "--url", url)


def test_the_url_comes_from_the_environment(tmp_path):
    url = f"sqlite:///{tmp_path}/a.db"
    done("upgrade", LYNKR_STORE_URL=url)
    assert f"revision {revisions.head()}" in done("check", LYNKR_STORE_URL=url)
    assert (tmp_path / "a.db").exists()


def test_the_schema_is_an_option_of_every_command(postgres_url):
    url = postgres_url
    given = ("--url", url, "--schema", "telemetry")
    assert 'CREATE SCHEMA "telemetry"' in done("upgrade", "--sql", *given)
    assert "at revision" in done("upgrade", *given)
    settings = StoreSettings(url=url, schema_name="telemetry")
    with Store(settings=settings, clock=lambda: NOW) as store:
        store.record(provider="ollama")
    assert "revision" in done("check", *given)
    assert json.loads(done("stats", "--json", "--last", "30y", *given))["stats"]
    assert json.loads(done("query", "--json", *given))["rows"]
    assert json.loads(done("health", "--json", *given))["revision"] == revisions.head()
    assert json.loads(done("maintain", "--json", *given))["rows_folded"] == 1
    assert json.loads(done("cleanup", "--older-than", "1d", "--trust-clock", "--json", *given))
    other = ("--url", url, "--schema", "elsewhere")
    assert "upgrade" in run("stats", *other).stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LYNKR_STORE_SCHEMA", "elsewhere")
        assert 'CREATE SCHEMA "telemetry"' in done("upgrade", "--sql", *given)
        assert "CREATE SCHEMA" not in done("upgrade", "--sql", "--url", url, "--schema", "")
        assert done("downgrade", "base", "--drop-data", *given) == "at revision base\n"
    for command in typer.main.get_command(commands.app).commands.values():
        options = {option for parameter in command.params for option in parameter.opts}
        assert options & {"--schema", "--target-schema"}, command.name


def test_a_copy_says_what_it_did(url, tmp_path):
    said = done("copy", url, tmp_path / "rows.jsonl")
    assert said.splitlines() == [
        "copied: 6 rows, 0 savings events, 0 roll-ups",
        "verified: 6 rows (UTC days: 1) have the source's counts and sums",
    ]
    assert json.loads(done("copy", url, tmp_path / "rows.jsonl", "--json"))["rows_verified"] == 6


def test_a_copy_shows_how_far_it_has_come(url, tmp_path, monkeypatch):
    assert "rows/s" in run("copy", url, tmp_path / "1.jsonl", FORCE_COLOR="1").stderr
    assert run("copy", url, tmp_path / "2.jsonl").stderr == ""
    monkeypatch.setattr(progress, "_INTERVAL_S", 0)
    lines = run("copy", url, tmp_path / "3.jsonl").stderr.splitlines()
    assert lines[0] == "rows: 6 of about 6"


def test_a_copy_to_standard_output_tells_the_rest_on_standard_error(url):
    command = [sys.executable, "-m", "lynkr_store", "copy", url, "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line)["id"] for line in done.stdout.split("\n") if line] == [*range(1, 7)]
    assert done.stderr.startswith("copied: 6 rows")


def test_a_copy_that_leaves_rows_out_says_no(new_url, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"provider":"p","request_id":"r","timestamp":1750000000000,"tool_count":1.5}\n'
        '{"provider":"p","request_id":"r"}\n'
    )
    finished = run("copy", path, new_url("sqlite-file", at_head=True))
    assert finished.returncode == 1
    assert finished.stdout.splitlines()[1:3] == [
        "changed: tool_count: rounded: 1",
        "left out: 1 rows because of timestamp",
    ]


def test_a_copy_whose_rows_differ_says_no(url, tmp_path):
    path = tmp_path / "rows.jsonl"
    done("copy", url, path)
    path.write_text(path.read_text().replace('"input_tokens":', '"input_tokens":9', 1))
    finished = run("copy", url, path)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: 1 rows of the target have other values")


def test_rows_that_the_source_removed_are_told(url, tmp_path):
    done("copy", url, tmp_path / "rows.jsonl")
    engine = create_store_engine(url)
    with writing(engine).begin() as connection:
        connection.execute(delete(TELEMETRY).where(TELEMETRY.c.id == 1))
    engine.dispose()
    assert "only in the target: 1 rows" in done("copy", url, tmp_path / "rows.jsonl")


def test_a_command_works_where_stores_are_switched_off(url):
    assert json.loads(done("query", "--json", "--url", url, LYNKR_STORE_ENABLED="false"))["rows"]


def test_a_schema_that_is_behind_is_refused_with_the_command(postgres_url):
    for command in (["stats"], ["query"], ["cleanup", "--older-than", "1d"], ["maintain"]):
        refused = run(*command, "--url", postgres_url)
        assert refused.returncode == 1, refused.stderr
        assert "lynkr-store upgrade" in refused.stderr


@pytest.mark.skipif(bool(CITUS), reason="needs a server without Citus")
def test_where_nothing_can_be_distributed_the_command_says_what_is_missing(url):
    refused = run("distribute", "--url", url)
    if url.startswith("sqlite"):
        assert refused.returncode == 2
        assert "only a PostgreSQL database" in refused.stderr
    else:
        assert refused.returncode == 1
        assert "CREATE EXTENSION citus" in refused.stderr
    found = json.loads(done("check", "--json", "--url", url))
    assert (found["distributed_tables"], found["undistributed_tables"]) == ([], [])


@pytest.mark.skipif(not CITUS, reason="LYNKR_STORE_TEST_CITUS_URL is not set")
def test_distribute_says_what_it_did_and_check_what_is_left(new_url):
    url = new_url("citus")
    refused = run("distribute", "--url", url)
    assert (refused.returncode, "lynkr-store upgrade" in refused.stderr) == (1, True)
    done("upgrade", "--url", url)
    said = done("distribute", "--url", url)
    assert "distributed: routing_telemetry, ingest_batches\n" in said
    assert "copied to every server: savings_events" in said
    assert "nothing to do" in done("distribute", "--url", url)
    assert "runs no triggers on it" in done("check", "--url", url)
    done("downgrade", "0009", "--url", url)
    done("upgrade", "--url", url)
    assert "only the coordinator has routing_changes" in done("check", "--url", url)
    assert "copied to every server: routing_changes" in done("distribute", "--url", url)


def test_a_file_that_is_behind_is_not_upgraded_unasked(tmp_path):
    path = gateway_file(tmp_path / "telemetry.db", rows=[RecordFactory(timestamp=NOW)])
    before = path.read_bytes()
    for command in (["cleanup", "--older-than", "1d"], ["maintain"]):
        refused = run(*command, "--url", f"sqlite:///{path}")
        assert refused.returncode == 1
        assert "lynkr-store upgrade" in refused.stderr
    for command in (["stats"], ["query"], ["health"]):
        looked = run(*command, "--url", f"sqlite:///{path}")
        assert looked.returncode == 0, looked.stderr
    assert run("check", "--url", f"sqlite:///{path}").returncode == 1
    assert path.read_bytes() == before


def test_a_gateway_at_work_is_read_with_its_wal(tmp_path):
    path = gateway_file(tmp_path / "telemetry.db")
    with closing(sqlite3.connect(path)) as gateway:
        gateway.execute("PRAGMA journal_mode = wal")
        insert_rows(gateway, [RecordFactory(timestamp=NOW)])
        gateway.commit()
        assert path.with_name("telemetry.db-wal").stat().st_size > 0
        rows = json.loads(done("query", "--url", f"sqlite:///{path}", "--gateway"))
        assert len(rows) == 1


def test_adoption_says_what_is_left_to_maintain(tmp_path):
    path = gateway_file(tmp_path / "telemetry.db", 2, (), [RecordFactory()])
    said = done("upgrade", "--url", f"sqlite:///{path}")
    assert "left to 'lynkr-store maintain': " in said
    assert "idx_telemetry_timestamp" in said
    assert "indexes left to" in done("check", "--url", f"sqlite:///{path}")
    built = done("maintain", "--url", f"sqlite:///{path}").partition("indexes built: ")[2]
    assert "idx_telemetry_timestamp" in built


@needs_data
def test_the_gateways_real_file_is_read_as_it_is(tmp_path):
    path = shutil.copy(DATA / "gateway-28185.db", tmp_path / "telemetry.db")
    before = path.read_bytes()
    looked = run("stats", "--last", "10y", "--url", f"sqlite:///{path}")
    assert looked.returncode == 0, looked.stderr
    assert "the file is not changed" in looked.stderr
    for words in ("28,185", "3.1 %", "1,675 ms", "5,680 ms", "$67.8597", "668", "1,107", "66.1"):
        assert words in looked.stdout, words
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["telemetry.db"]


WRONG_USE = [
    (["stats", "--last", "fortnight"], "fortnight"),
    (["stats", "--last", "9e999d"], "age"),
    (["stats", "--last", "99999999999y"], "age"),
    (["stats", "--last", "1d", "--since", "0"], "together"),
    (["stats", "--since", "2026-01-31"], "2026-11-01T00:00:00Z"),
    (["stats", "--since", "noon"], "ISO 8601"),
    (["query", "--limit", "-1"], "limit"),
    (["query", "--before", "x"], "cursor"),
    (["query", "--since", "9" * 30], "64 bits"),
    (["query", "--since", "9" * 5_000], "ISO 8601"),
    (["query", "--before", f"{2**63}:1"], "cursor"),
    (["query", "--before", f"1:{2**63}"], "cursor"),
    (["query", "--limit", str(2**63)], "limit"),
    (["query", "--status-code", str(2**63)], "64 bits"),
    (["stats", "--until", str(1 - 2**63), "--last", "1d"], "64 bits"),
    (["cleanup", "--older-than", "-5d"], "age"),
    (["nonsense"], "nonsense"),
    (["check", "--url", "mysql://h/d"], "sqlite:///"),
    (["check", "--url", "postgres://h/d"], "postgresql://"),
    (["check", "--url", "postgresql+psycopg2://h/d"], "psycopg2"),
    (["check", "--url", "not a url"], "sqlite:///"),
    (["check", "--url", "sqlite://"], "memory"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG_USE)
def test_wrong_use_is_2_and_named(arguments, named, tmp_path):
    finished = run(*arguments, LYNKR_STORE_URL=f"sqlite:///{tmp_path}/a.db")
    assert finished.returncode == 2, finished.stderr
    assert named in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_database_out_of_reach_is_3(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "text.db").write_text("this is no database at all, and long enough to tell\n" * 99)
    for url, named in (
        (f"sqlite:///{tmp_path}/missing.db", "does not exist"),
        (f"sqlite:///{folder}", "is a directory; give"),
        (f"sqlite:///{tmp_path}/text.db", "not a database"),
        (f"postgresql://nobody@/none?host={tmp_path}", "failed"),
    ):
        for command in ("stats", "check", "query", "health"):
            finished = run(command, "--url", url)
            assert finished.returncode == 3, (command, url, finished.stdout, finished.stderr)
            assert "Traceback" not in finished.stderr
            if command == "stats":
                assert named in finished.stderr
    upgraded = run("upgrade", "--url", f"sqlite:///{tmp_path}/text.db")
    assert upgraded.returncode == 3
    assert "Traceback" not in upgraded.stderr


def test_main_maps_errors_to_exit_codes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lynkr-store", "stats", "--url", f"sqlite:///{tmp_path}/x"])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == commands.Exit.UNREACHABLE
    assert "does not exist" in capsys.readouterr().err


def test_following_takes_no_window_page_or_limit(url):
    for given in (["--last", "1h"], ["--since", "0"], ["--until", "9"], ["--before", "1:1"]):
        finished = run("query", "--follow", *given, "--url", url)
        assert finished.returncode == 2
        assert f"{given[0]} and --follow cannot be used together" in finished.stderr
    assert run("query", "--follow", "--limit", "5", "--url", url).returncode == 2
    finished = run("query", "--after", "5", "--url", url)
    assert finished.returncode == 2
    assert "--after needs --follow" in finished.stderr
