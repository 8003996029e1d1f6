"""JSON Lines and Parquet, out and in, whoever wrote them."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from pyarrow import parquet
from sqlalchemy import text

from lynkr_store import (
    BadArgument,
    CopyDiffers,
    Store,
    StoreUnavailable,
    copy,
)
from lynkr_store.transfer import json_lines
from lynkr_store.transfer import parquet as parquet_files
from lynkr_store.transfer import run as transfer_run
from tests.conftest import ON_DISK
from tests.support.copies import START, all_rows, answers, change, filled
from tests.support.recorded import gateway_file

FILES = ["rows.jsonl", "rows.ndjson", "rows.parquet"]
LINE = {"timestamp": START, "provider": "ollama", "request_id": "r"}


@pytest.fixture(params=ON_DISK)
def source(request, new_url):
    return filled(new_url(request.param, at_head=True), 1_234)


@pytest.fixture
def target(new_url):
    return new_url("sqlite-file", at_head=True)


@pytest.fixture
def written(tmp_path):
    """Write a file of JSON Lines from objects, lines or bytes."""

    def write(*lines, name="in.jsonl"):
        whole = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path = tmp_path / name
        path.write_bytes(b"\n".join([*whole, b""]))
        return path

    return write


@pytest.fixture
def table(tmp_path):
    """Write a file of Parquet from columns."""

    def write(**columns):
        path = tmp_path / "in.parquet"
        given = {"timestamp": [START], "provider": ["ollama"], "request_id": ["r"], **columns}
        given = {name: values for name, values in given.items() if values is not None}
        parquet.write_table(pa.table(given), path)
        return path

    return write


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_every_row(source, target, tmp_path, name):
    path = tmp_path / name
    out = copy(source, path)
    assert (out.rows_copied, out.rows_verified) == (1_234, 1_234)
    assert path.stat().st_mode & 0o777 == 0o600  # it holds prompts
    back = copy(path, target)
    assert (back.rows_copied, back.rows_verified) == (1_234, 1_234)
    assert not back.coerced
    assert all_rows(target) == all_rows(source)
    assert answers(target) == answers(source)


@pytest.mark.parametrize("name", FILES)
def test_a_second_copy_appends_only_what_is_new(source, target, tmp_path, name):
    path = tmp_path / name
    copy(source, path)
    copy(path, target)
    assert copy(source, path).rows_copied == 0
    filled(source, 100, first=2_000)
    assert copy(source, path).rows_copied == 100
    again = copy(path, target)
    assert (again.rows_copied, again.rows_verified) == (100, 1_334)
    assert all_rows(target) == all_rows(source)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_source_is_refused(source, new_url, tmp_path, name):
    path, other = tmp_path / name, filled(new_url("sqlite-file", at_head=True), 50, first=5_000)
    copy(other, path)
    before = path.read_bytes()
    with pytest.raises(BadArgument, match="not this source's"):
        copy(source, path)
    with pytest.raises(BadArgument, match="has rows that no copy wrote"):
        copy(path, source)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_by_a_target_of_another(target, new_url, tmp_path, name):
    for number in (1, 2):
        url = filled(new_url("sqlite-file", at_head=True), 20, first=1_000 * number)
        copy(url, tmp_path / f"{number}{name}")
    copy(tmp_path / f"1{name}", target)
    with pytest.raises(BadArgument, match="not this source's"):
        copy(tmp_path / f"2{name}", target)


@pytest.mark.parametrize("name", FILES)
def test_an_empty_database_gives_an_empty_file(new_url, target, tmp_path, name):
    assert copy(new_url("sqlite-file", at_head=True), tmp_path / name).rows_copied == 0
    assert copy(tmp_path / name, target).rows_verified == 0


@pytest.mark.parametrize("name", FILES)
def test_a_changed_value_in_a_file_is_found(source, tmp_path, name):
    path = tmp_path / name
    copy(source, path)
    change(source, text("UPDATE routing_telemetry SET tool_count = 77 WHERE id = 600"))
    with pytest.raises(CopyDiffers, match="id 600: tool_count"):
        copy(source, path)


def test_pyarrow_and_duckdb_read_the_same_sums(source, tmp_path):
    copy(source, tmp_path / "rows.parquet")
    copy(source, tmp_path / "rows.jsonl")
    rows = all_rows(source)
    tokens = sum(row.input_tokens for row in rows)
    costs = math.fsum(row.cost_usd for row in rows if row.cost_usd is not None)
    instants = sum(round(row.timestamp.timestamp() * 1000) for row in rows)
    read = parquet.read_table(tmp_path / "rows.parquet")
    assert read.num_rows == len(rows)
    assert sum(read["input_tokens"].to_pylist()) == tokens
    assert math.fsum(cost for cost in read["cost_usd"].to_pylist() if cost is not None) == costs
    asked = "SELECT count(*), sum(input_tokens), sum(epoch_ms(timestamp)) FROM '{}'"
    [counted] = duckdb.sql(asked.format(tmp_path / "rows.parquet")).fetchall()
    assert counted == (len(rows), tokens, instants)
    lines = "SELECT count(*), sum(input_tokens), sum(timestamp) FROM '{}'"
    assert duckdb.sql(lines.format(tmp_path / "rows.jsonl")).fetchall() == [counted]
    schema = dict(zip(read.schema.names, map(str, read.schema.types), strict=True))
    assert schema["timestamp"] == "timestamp[ms, tz=UTC]"
    assert (schema["was_fallback"], schema["id"], schema["pinned"]) == ("bool", "int64", "bool")


# -- streams --------------------------------------------------------------------------------------


def through(monkeypatch, given=b""):
    """Standard streams of bytes."""
    streams = io.BytesIO(given), io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(streams[0]))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(streams[1]))
    return streams[1]


def test_rows_pass_through_the_standard_streams(source, target, monkeypatch):
    out = through(monkeypatch)
    report = copy(source, "-")
    assert (report.rows_copied, report.rows_verified) == (1_234, 1_234)
    through(monkeypatch, out.getvalue())
    report = copy("-", target)
    assert (report.rows_copied, report.rows_verified) == (1_234, 1_234)
    through(monkeypatch, out.getvalue())
    assert copy("-", target).rows_copied == 0
    monkeypatch.undo()
    assert all_rows(target) == all_rows(source)


def test_a_reader_that_goes_away_ends_the_copy_quietly(source):
    command = [sys.executable, "-m", "lynkr_store", "copy", source, "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())["id"] == 1
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


# -- files that others wrote ----------------------------------------------------------------------


def test_lines_without_ids_are_numbered_in_their_order(target, written):
    path = written({**LINE, "request_id": "b"}, {**LINE, "request_id": "a"})
    assert copy(path, target).rows_copied == 2
    assert [(row.id, row.request_id) for row in all_rows(target)] == [(1, "b"), (2, "a")]
    path = written({**LINE, "request_id": "b"}, {**LINE, "request_id": "a"}, LINE)
    assert copy(path, target).rows_copied == 1


def test_what_a_person_or_program_writes_in_json_is_read(target, written):
    path = written(
        b"\xef\xbb\xbf" + json.dumps({**LINE, "timestamp": "2026-01-01T02:00:00+02:00"}).encode(),
        b"  ",
        json.dumps({**LINE, "stream": True, "pinned": 0, "attributes": {"a": [1]}}).encode()
        + b"\r",
        {**LINE, "cost_usd": 1, "latency_ms": 2, "request_text": "a\u2028b\u0085\u001c"},
        {**LINE, "cursor": "1:2", "tool_count": 12.0},
        b'{"provider":"x","provider":"y","timestamp":1767225600000,"request_id":"q"}',
    )
    report = copy(path, target)
    assert report.rows_verified == 5
    assert not report.coerced
    rows = all_rows(target)
    assert {row.timestamp for row in rows} == {datetime(2026, 1, 1, tzinfo=UTC)}
    assert (rows[1].stream, rows[1].pinned, rows[1].attributes) == (True, False, '{"a":[1]}')
    assert rows[2].request_text == "a\u2028b\u0085\u001c"
    assert rows[3].tool_count == 12
    assert rows[4].provider == "y"


def test_values_that_no_column_takes_are_counted(target, written):
    path = written(
        {**LINE, "input_tokens": 2**63, "tool_count": 2.5, "retry_count": "7"},
        {**LINE, "input_tokens": True, "cost_usd": "much", "stream": 3, "latency_ms": [1]},
        b'{"timestamp":1767225600000,"provider":"p","request_id":"n","cost_usd":NaN,'
        b'"quality_score":-1e999,"tier":"x\\u0000y","request_text":"\\ud800"}',
        {**LINE, "session_id": "s" * 600, "model": 5},
    )
    report = copy(path, target)
    assert dict(report.coerced) == {
        "cost_usd: unreadable": 2,
        "input_tokens: unreadable": 2,
        "latency_ms: unreadable": 1,
        "model: parsed": 1,
        "quality_score: unreadable": 1,
        "request_text: surrogate": 1,
        "retry_count: parsed": 1,
        "session_id: cut": 1,
        "stream: unreadable": 1,
        "tier: nul": 1,
        "tool_count: rounded": 1,
    }
    assert report.rows_verified == 4
    rows = all_rows(target)
    assert (rows[0].input_tokens, rows[0].tool_count, rows[0].retry_count) == (None, 3, 7)
    assert (rows[2].tier, rows[2].request_text) == ("x\ufffdy", "\ufffd")


def test_rows_without_what_each_needs_are_left_out_and_counted(target, written):
    nothing = {"request_id": "x"}
    path = written(LINE, nothing, {**LINE, "timestamp": "yesterday"}, {**LINE, "provider": None})
    report = copy(path, target)
    assert dict(report.left_out) == {"provider": 2, "timestamp": 1}
    assert (report.rows_copied, report.rows_verified) == (1, 1)
    again = copy(path, target)
    assert (again.rows_copied, again.left_out) == (0, report.left_out)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 2: not JSON in UTF-8; write one"),
        (b'"text"', "line 2: not a JSON object"),
        (b'{"modle":1}', "line 2: unknown field 'modle'; did you mean model?"),
        (b"\xff\xfe{\x00}\x00", "line 2: not JSON in UTF-8"),
        (b'{"tool_count":' + b"9" * 5_000 + b"}", "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b'{"id":1}', "line 2: ids must be whole numbers of 64 bits that ascend"),
        (b'{"id":"2"}', "line 2: ids must be whole"),
        (b'{"id":true}', "line 2: ids must be whole"),
        (b'{"tier":"x"}', "line 2: give an id in every line, or in none"),
    ],
    ids=range(10),
)
def test_a_wrong_line_is_named_with_its_number(target, written, line, words):
    path = written({**LINE, "id": 1}, line, name="odd.jsonl")
    with pytest.raises(BadArgument, match=f"odd.jsonl: {words}"):
        copy(path, target)
    mended = written({**LINE, "id": 1}, {**LINE, "id": 2}, name="odd.jsonl")
    assert copy(mended, target).rows_verified == 2


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_file_is_named(target, written, magic):
    with pytest.raises(BadArgument, match=r"compressed; .*lynkr-store copy - TARGET"):
        copy(written(magic), target)


def test_a_file_that_ends_within_a_line_is_named(target, tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b"\n" + json.dumps(LINE).encode()[:-5])
    with pytest.raises(BadArgument, match="line 2: not JSON in UTF-8, and the file ends within it"):
        copy(path, target)


def test_the_last_line_needs_no_end(target, tmp_path):
    path = tmp_path / "whole.jsonl"
    path.write_text(json.dumps(LINE))
    assert copy(path, target).rows_verified == 1


@pytest.mark.slow
def test_an_export_that_was_cut_at_any_byte_is_continued(new_url, tmp_path):
    source, path = filled(new_url("sqlite-file", at_head=True), 5), tmp_path / "rows.jsonl"
    copy(source, path)
    whole = path.read_bytes()
    starts = [at for at in range(len(whole)) if whole[at - 1 : at] in (b"", b"\n")]
    for size in range(starts[-2], len(whole)):
        path.write_bytes(whole[:size])
        assert copy(source, path).rows_verified == 5
        assert path.read_bytes() == whole
    for size in range(1, starts[1]):  # nothing but a part of the first line
        path.write_bytes(whole[:size])
        copy(source, path)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"notes", b"notes\n", b'{"id":"x"}\n', b"{}\nnotes"])
def test_another_file_is_not_written_over(new_url, tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadArgument, match=r"mine\.jsonl"):
        copy(filled(new_url("sqlite-file", at_head=True), 5), path)
    assert path.read_bytes() == content


@pytest.mark.slow
def test_two_copies_into_one_file_do_not_mix(source, tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        command = [sys.executable, "-m", "tests.support.copies", source, str(tmp_path / name)]
        both = [
            subprocess.Popen([*command, "none", "1"], stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            said = process.communicate()[1]
            assert process.returncode == 0 or "another process" in said, said
        assert copy(source, tmp_path / name).rows_verified == 1_234


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_that_another_copy_wrote_meanwhile_is_left_as_it_is(
    source, tmp_path, name, monkeypatch
):
    """It decided what is new before it had the file for itself."""
    path, settled = tmp_path / name, transfer_run.settled_id

    def slow(*arguments):
        monkeypatch.setattr(transfer_run, "settled_id", settled)
        copy(source, path)
        return settled(*arguments)

    monkeypatch.setattr(transfer_run, "settled_id", slow)
    with pytest.raises(StoreUnavailable, match="another process has written it meanwhile"):
        copy(source, path)
    report = copy(source, path)
    assert (report.rows_copied, report.rows_verified) == (0, 1_234)


def test_a_file_that_came_to_its_place_meanwhile_is_not_emptied(source, tmp_path, monkeypatch):
    """Between opening `rows.parquet.part` and locking it, another copy puts it in its place."""
    path, alone = tmp_path / "rows.parquet", parquet_files.alone

    def slow(file, name):
        monkeypatch.setattr(parquet_files, "alone", alone)
        copy(source, path)
        return alone(file, name)

    monkeypatch.setattr(parquet_files, "alone", slow)
    with pytest.raises(StoreUnavailable, match="another process has written it meanwhile"):
        copy(source, path)
    assert parquet.ParquetFile(path).metadata.num_rows == 1_234


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_is_continued_when_the_source_removed_its_last_row(source, tmp_path, name):
    path = tmp_path / name
    copy(source, path)
    change(source, text("DELETE FROM routing_telemetry WHERE id = 1234"))
    filled(source, 5, first=5_000)
    report = copy(source, path)
    assert (report.rows_copied, report.rows_only_in_target) == (5, 1)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_symbolic_link_stays(source, tmp_path, name):
    real, link = tmp_path / f"real-{name}", tmp_path / name
    link.symlink_to(real)
    for first in (2_000, 3_000):
        filled(source, 5, first=first)
        copy(source, link)
    assert link.is_symlink()
    assert copy(source, real).rows_copied == 0


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_pipe_with_the_name_of_a_file_is_refused(source, target, tmp_path, name):
    os.mkfifo(tmp_path / name)
    for one, other in ((source, tmp_path / name), (tmp_path / name, target)):
        with pytest.raises(StoreUnavailable, match="is a pipe, a device or a socket"):
            copy(one, other)


@pytest.mark.parametrize("ids", [[-(2**63) + 1, -1], [0], [-5, 0, 2**63 - 1]])
@pytest.mark.parametrize("place", ["rows.jsonl", "rows.parquet", *ON_DISK])
def test_rows_of_every_id_are_copied(new_url, target, tmp_path, place, ids):
    rows = [{"id": n, "request_id": "r", "timestamp": START, "provider": "p"} for n in ids]
    source = gateway_file(tmp_path / "source.db", 11, rows=rows)
    middle = tmp_path / place if "." in place else new_url(place, at_head=True)
    for one, other in ((source, middle), (middle, target)):
        assert copy(one, other).rows_verified == len(ids)
    assert [row.id for row in all_rows(target)] == ids


@pytest.mark.parametrize(("closed", "places"), [("<&-", "- '{url}'"), (">&-", "'{url}' -")])
def test_a_standard_stream_that_is_closed_is_named(target, closed, places):
    command = f"{sys.executable} -m lynkr_store copy {places.format(url=target)} {closed}"
    ended = subprocess.run(["/bin/sh", "-c", command], check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: standard (in|out)put is closed: give .*\n", ended.stderr)


@pytest.mark.slow
def test_standard_output_that_takes_no_more_is_named(source):
    command = [sys.executable, "-m", "lynkr_store", "copy", source, "-"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 3
    assert re.fullmatch(r"error: standard output: No space left .*copy again\n", ended.stderr)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_killed_export_is_completed(source, tmp_path, name):
    path = tmp_path / name
    command = [sys.executable, "-m", "tests.support.copies", source, str(path), "rows", "1"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert copy(source, path).rows_verified == 1_234
    assert sorted(file.name for file in tmp_path.glob("rows*")) == [name]
    if name == "rows.jsonl":
        ids = [json.loads(line)["id"] for line in path.read_text().split("\n") if line]
        assert ids == list(range(1, 1_235))


def test_columns_of_other_writers_of_parquet_are_read(target, table):
    at = datetime(2026, 1, 1, tzinfo=UTC)
    path = table(
        id=[1.0, 2.0],
        timestamp=pa.array([at, at], pa.timestamp("ns", "Europe/Berlin")),
        request_id=pa.array(["a", "b"], pa.large_string()),
        provider=pa.array(["x", "x"]).dictionary_encode(),
        tier=pa.array(["x", None], pa.string_view()),
        model=pa.array([None, None], pa.null()),
        input_tokens=pa.array([12.0, None], pa.float64()),
        output_tokens=pa.array([2**53 + 1, None], pa.uint64()),
        tool_count=pa.array([Decimal(7), None], pa.decimal128(20, 0)),
        cost_usd=pa.array([1, 2], pa.int8()),
        request_text=pa.array([b"a\xff", None], pa.binary()),
    )
    report = copy(path, target)
    assert report.rows_verified == 2
    assert dict(report.coerced) == {"request_text: parsed": 1}
    row = all_rows(target)[0]
    assert (row.id, row.timestamp, row.provider, row.tier) == (1, at, "x", "x")
    assert (row.input_tokens, row.output_tokens, row.tool_count) == (12, 2**53 + 1, 7)
    assert (row.cost_usd, row.request_text) == (1.0, "a\ufffd")


def test_parts_that_json_cannot_express_are_counted(target, table):
    instant = datetime(2026, 1, 1, tzinfo=UTC)
    path = table(
        attributes=[{"a": instant, "b": b"x"}], candidates=[{"a": math.nan}], cost_usd=[1.5]
    )
    report = copy(path, target)
    assert report.coerced.keys() <= {"attributes: unreadable", "candidates: unreadable"}
    assert report.coerced["candidates: unreadable"] == 1
    row = all_rows(target)[0]
    assert (row.candidates, row.cost_usd) == ('{"a":null}', 1.5)


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.parquet", *ON_DISK])
def test_whole_numbers_that_no_double_holds_are_rounded(new_url, tmp_path, written, place):
    row = {**LINE, "latency_ms": 2**53 + 1, "cost_usd": 10**400}
    report = copy(written(row), new_url("sqlite-file", at_head=True))
    assert report.coerced == {"latency_ms: rounded": 1, "cost_usd: unreadable": 1}
    row = {"request_id": "r", "timestamp": START, "provider": "p", "latency_ms": 2**53 + 1}
    source = gateway_file(tmp_path / "source.db", 11, rows=[row])
    other = tmp_path / place if "." in place else new_url(place, at_head=True)
    report = copy(source, other)
    assert (report.rows_verified, report.coerced) == (1, {"latency_ms: rounded": 1})


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_instants_of_every_unit_are_the_same(target, table, unit):
    at = datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)
    copy(table(timestamp=pa.array([at], pa.timestamp(unit, "UTC"))), target)
    assert all_rows(target)[0].timestamp == at


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"modle": [1]}, "unknown column 'modle'; did you mean model?"),
        ({"provider": None}, "the column provider is missing"),
        ({"timestamp": pa.array([1], pa.timestamp("ms"))}, "the column timestamp has no time zone"),
        (
            {"id": pa.array([2**63], pa.uint64())},
            "ids must be whole numbers of 64 bits that ascend",
        ),
        ({"id": [1.5]}, "ids must be whole numbers of 64 bits that ascend"),
    ],
    ids=range(5),
)
def test_a_wrong_column_is_named(target, table, columns, words):
    with pytest.raises(BadArgument, match=rf"in\.parquet: {words}"):
        copy(table(**columns), target)


def test_two_columns_of_one_name_are_named(target, tmp_path):
    arrays = [pa.array([START]), *map(pa.array, (["p"], ["r"], ["r"]))]
    names = ["timestamp", "provider", "request_id", "request_id"]
    parquet.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "two.parquet")
    with pytest.raises(BadArgument, match="more than one column is named request_id"):
        copy(tmp_path / "two.parquet", target)


def test_a_file_that_is_no_parquet_or_damaged_is_named(source, target, tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("no parquet")
    for one, other in ((path, target), (source, path)):
        with pytest.raises(BadArgument, match=r"rows\.parquet: not a Parquet file"):
            copy(one, other)
    assert path.read_text() == "no parquet"
    path.unlink()
    copy(source, path)
    content = bytearray(path.read_bytes())
    content[100:2_000] = bytes(1_900)
    path.write_bytes(content)
    with pytest.raises(BadArgument, match=r"rows\.parquet: the file is damaged after row 0"):
        copy(path, target)


def test_a_parquet_file_of_other_columns_is_not_written_over(source, table):
    path = table(id=[1], request_id=["r-0"], provider=["x"])
    before = path.read_bytes()
    filled(source, 10, first=3_000)
    with pytest.raises(BadArgument):
        copy(source, path)
    assert path.read_bytes() == before


def test_row_groups_stay_small(new_url, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_files, "_GROUP_BYTES", 100_000)
    source = filled(new_url("sqlite-file", at_head=True), 3_000)
    copy(source, tmp_path / "rows.parquet")
    assert parquet.ParquetFile(tmp_path / "rows.parquet").num_row_groups > 1


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_there_is_named(target, tmp_path, name):
    with pytest.raises(StoreUnavailable, match="does not exist: give a file's path"):
        copy(tmp_path / name, target)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_that_is_not_there_is_named(source, target, tmp_path, name):
    path = tmp_path / "none" / name
    for one, other in ((source, path), (path, target)):
        with pytest.raises(StoreUnavailable, match="/none does not exist: create this directory"):
            copy(one, other)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "telemetry.db"])
def test_a_disk_that_fills_is_named_and_the_copy_continues(source, target, tmp_path, name):
    path = Path(target.removeprefix("sqlite:///")) if name == "telemetry.db" else tmp_path / name
    limit = 400_000 if name == "telemetry.db" else 20_000
    program = (
        "import resource, signal, sys\n"
        "from lynkr_store.cli.commands import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = ['lynkr-store', 'copy', {source!r}, {str(path)!r}]\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 3, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert "File too large" in ended.stderr or "disk" in ended.stderr
    assert copy(source, path).rows_verified == 1_234


def test_a_row_is_one_line_and_begins_with_its_id():
    line = json_lines.lines_of({"id": [5], "tier": ["\n\u2028"], "pinned": [1], "model": [None]})
    assert line == '{"id":5,"tier":"\\n\u2028","pinned":true}\n'.encode()


def test_records_are_read_as_they_are_recorded(target, written):
    """A host can bring its own log: the fields are those of `record()`."""
    copy(written({**LINE, "tier": "SIMPLE", "latency_ms": 12.5, "was_fallback": False}), target)
    with Store(target, read_only=True) as store:
        assert [row.latency_ms for row in store.iter_records()] == [12.5]
