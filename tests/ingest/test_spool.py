"""The spool: what goes in comes out, each file has one owner, damage costs what it hit."""

import json
import logging
import math
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynkr_store.exceptions import SpoolError
from lynkr_store.ingest.spool import Spool, SpoolDamaged, _decoded, _encoded
from lynkr_store.ingest.validation import TextPolicy
from lynkr_store.ingest.writer import Writer
from tests.support.programs import WITHOUT_DATABASE

MIB = 2**20
NOBODY = 65_534
SLOW = pytest.mark.slow
PYTHON = (sys.executable, "-W", "error", "-c")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spool.db"


@pytest.fixture
def make(path):
    made = []

    def make(at=path, max_bytes=64 * MIB, *, opened=True):
        spool = Spool(at, max_bytes)
        made.append(spool)
        if opened:
            spool.open()
        return spool

    yield make
    for spool in made:
        spool.close()


def rows(name, count=3, text=""):
    return [
        {"request_id": f"{name}-{n}", "provider": "p", "request_text": text} for n in range(count)
    ]


def drained(spool):
    """Every batch's first request id, in order; the spool is empty afterwards."""
    seen = []
    while entry := spool.first():
        loaded = spool.load(entry)
        assert len(loaded) == entry.rows
        seen.append(loaded[0]["request_id"])
        spool.remove(entry)
    return seen


def run(code, *arguments, expect=0):
    done = subprocess.run(
        [*PYTHON, WITHOUT_DATABASE + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done.stdout


HOLDER = """
    import sys
    from pathlib import Path
    from lynkr_store.ingest.spool import Spool

    spool = Spool(Path(sys.argv[1]), 2**26)
    spool.open()
    for batch in sys.argv[2:]:
        spool.enter(batch, [{"request_id": batch}], None)
    print(spool._own.path, spool.found_rows, flush=True)
    sys.stdin.readline()
    spool.close()
"""


class Holder:
    """Another process that holds a file of the spool until it is told to go, or killed."""

    def __init__(self, path, *batches):
        self._process = subprocess.Popen(
            [*PYTHON, WITHOUT_DATABASE + textwrap.dedent(HOLDER), path, *batches],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self._process.stdout.readline().split()
        self.path, self.found_rows = Path(said[0]), int(said[1])

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._process.poll() is None:
            self._process.communicate("\n", timeout=60)
        self._process.stdin.close()
        self._process.stdout.close()

    def kill(self):
        self._process.kill()
        assert self._process.wait(60) == -signal.SIGKILL


def test_what_goes_in_comes_out(make):
    values = {
        "none": None,
        "yes": True,
        "no": False,
        "zero": 0,
        "minus": -1,
        "big": 2**63 - 1,
        "bigger": -(10**30),
        "float": 0.1,
        "tiny": 5e-324,
        "huge": 1.7976931348623157e308,
        "minus zero": -0.0,
        "whole": 79.0,
        "empty": "",
        "quote": "\"'\\",
        "control": "\x01\x1f\x7f\r\n\t",
        "unicode": "größe \u2028 \U0001f642 \ufffd",
        "long": "x" * 200_000,
        "json": '{"a":[1,null]}',
    }
    spool = make()
    entry = spool.enter("a", [values, dict.fromkeys(values), values], None)
    spool.close()
    spool = make()
    entry = spool.first()
    assert (entry.batch_id, entry.rows, entry.attempted_at) == ("a", 3, None)
    loaded = spool.load(entry)
    assert loaded == [values, dict.fromkeys(values), values]
    assert list(loaded[0]) == list(values), "columns keep their order"
    for name, value in values.items():
        assert type(loaded[0][name]) is type(value), name
    assert math.copysign(1, loaded[0]["minus zero"]) == -1


@given(
    st.lists(
        st.builds(
            lambda *values: dict(zip("abc", values, strict=True)),
            st.none() | st.booleans() | st.integers(),
            st.floats(allow_nan=False),
            st.text(st.characters(exclude_categories=["Cs"])),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_value_survives(table):
    def exact(loaded):
        return json.dumps(loaded), [[repr(value) for value in row.values()] for row in loaded]

    payload = _encoded(table)
    assert exact(_decoded(zlib.crc32(payload), payload)) == exact(table)


def test_batches_come_in_the_order_in_which_they_went(make):
    spool = make()
    for n in range(30):
        spool.enter(f"id-{n}", rows(f"b{n}"), None)
    assert spool.first() is spool.first(), "looking takes nothing"
    assert drained(spool) == [f"b{n}-0" for n in range(30)]
    assert spool.first() is None


def test_order_is_kept_by_the_next_process(make, path):
    run(HOLDER.replace("sys.stdin.readline()", ""), path, *(f"b{n}" for n in range(20)))
    spool = make()
    assert spool.found_rows == 20
    spool.enter("late", rows("late"), None)
    assert drained(spool) == [f"b{n}" for n in range(20)] + ["late-0"]


def test_nothing_is_found_in_a_fresh_file(make):
    spool = make()
    spool.enter("a", rows("a"), None)
    assert (spool.found_rows, spool.set_aside) == (0, [])


def test_opening_twice_finds_nothing_twice(make):
    first = make()
    first.enter("a", rows("a"), None)
    first.close()
    spool = make()
    spool.open()
    assert spool.found_rows == 3
    assert drained(spool) == ["a-0"]


def test_entering_opens_the_file_by_itself(make):
    spool = make(opened=False)
    spool.enter("a", rows("a"), None)
    assert drained(spool) == ["a-0"]


def test_the_moment_of_an_attempt_is_kept(make):
    spool = make()
    spool.enter("never", rows("never"), None)
    spool.enter("once", rows("once"), 5)
    never = spool.first()
    spool.mark_attempt(never, 7)
    spool.close()
    spool = make()
    moments = []
    while entry := spool.first():
        spool.mark_attempt(entry, 9)
        moments.append((entry.batch_id, entry.attempted_at))
        spool.remove(entry)
    assert moments == [("never", 7), ("once", 5)], "the first attempt counts"


def test_a_batch_enters_once(make):
    spool = make()
    spool.enter("a", rows("a"), None)
    with pytest.raises(SpoolError):
        spool.enter("a", rows("a"), None)
    assert drained(spool) == ["a-0"]


@pytest.mark.parametrize("kib", [100, 1_000])
def test_bytes_are_bounded(make, path, kib):
    spool = make(max_bytes=kib * 1_024)
    for entered in range(1_000):
        try:
            spool.enter(f"{entered}", rows(f"{entered}", text="x" * 3_000), None)
        except SpoolError:
            break
    assert path.stat().st_size <= kib * 1_024
    assert entered * 9_000 >= kib * 1_024 * 0.7, "most of it carries rows"
    with pytest.raises(SpoolError, match="spool_max_bytes"):
        spool.enter("again", rows("again", text="x" * 3_000), None)
    assert path.stat().st_size <= kib * 1_024
    spool.remove(spool.first())
    spool.enter("again", rows("again", text="x" * 3_000), None)
    assert drained(spool) == [f"{n}-0" for n in range(1, entered)] + ["again-0"]
    for n in range(entered):
        spool.enter(f"second {n}", rows(f"{n}", text="x" * 3_000), None)


def test_the_space_is_given_back(make, path):
    spool = make()
    empty = path.stat().st_size
    for n in range(20):
        spool.enter(f"{n}", rows(f"{n}", text="x" * 100_000), None)
    assert path.stat().st_size > 5 * MIB
    drained(spool)
    assert path.stat().st_size <= empty
    [journal] = [p.stat().st_size for p in path.parent.glob("*-journal")] or [0]
    assert journal == 0


def test_what_people_wrote_does_not_stay_behind(make, path):
    spool = make()
    spool.enter("kept", rows("kept"), None)
    secret = spool.enter("a", rows("a", text="SECRET" * 5_000), None)
    assert b"SECRET" in path.read_bytes()
    spool.remove(secret)
    assert b"SECRET" not in path.read_bytes()
    assert all(b"SECRET" not in p.read_bytes() for p in path.parent.iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read_it(make, path, umask):
    before = os.umask(umask)
    try:
        spools = [make(), make()]
        for spool in spools:
            spool.enter("a", rows("a"), None)
    finally:
        os.umask(before)
    files = list(path.parent.iterdir())
    assert {path, path.with_name("spool.db.2")} <= set(files)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_directory_is_made(make, path):
    at = path.parent / "a" / "b" / "spool.db"
    make(at)
    assert at.exists()


# -- owners ------------------------------------------------------------------------------------


def test_two_spools_in_a_process_hold_two_files(make, path):
    first, second = make(), make()
    first.enter("a", rows("first"), None)
    second.enter("a", rows("second"), None)
    assert (first._own.path, second._own.path) == (path, path.with_name("spool.db.2"))
    assert drained(first) == ["first-0"]
    assert drained(second) == ["second-0"]


def test_two_spools_in_two_processes_hold_two_files(make, path):
    with Holder(path, "theirs") as holder:
        mine = make()
        assert holder.path == path
        assert mine._own.path == path.with_name("spool.db.2")
        assert mine.found_rows == 0
        mine.enter("a", rows("mine"), None)
        assert drained(mine) == ["mine-0"]


def test_a_second_spool_in_a_process_does_not_open_the_first_to_others(make, path):
    first = make()
    first.enter("a", rows("first"), None)
    second = make()
    second.enter("b", rows("second"), None)
    for _ in range(2):  # nor does another process that looked
        with Holder(path) as holder:
            assert holder.path == path.with_name("spool.db.3")
            assert holder.found_rows == 0
    second.close()
    with Holder(path) as holder:
        assert holder.path == path.with_name("spool.db.2"), "what was given back is free"
        assert holder.found_rows == 3
    assert drained(first) == ["first-0"]


def test_an_empty_file_is_left_to_the_process_that_will_take_it(make, path):
    second = path.with_name("spool.db.2")
    first, other = make(), make()
    other.close()
    assert second.exists()
    first.open()  # looks again for what others left
    with Holder(path) as holder:
        assert holder.path == second


def test_many_processes_share_a_path(make, path):
    holders = [Holder(path, f"b{n}") for n in range(4)]
    try:
        names = {holder.path.name for holder in holders}
        assert names == {"spool.db", "spool.db.2", "spool.db.3", "spool.db.4"}
    finally:
        for holder in holders:
            holder.__exit__()
    spool = make()
    assert spool.found_rows == 4, "one process takes all that is left"
    assert sorted(drained(spool)) == ["b0", "b1", "b2", "b3"]
    with Holder(path) as holder:
        assert (holder.path, holder.found_rows) == (path.with_name("spool.db.2"), 0)


def test_a_file_that_another_process_holds_is_not_read(make, path):
    with Holder(path, "a"), Holder(path, "b"):
        spool = make()
        assert (spool.found_rows, spool.first()) == (0, None)
        spool.enter("c", rows("c"), None)
        assert drained(spool) == ["c-0"]
    assert make().found_rows == 2


def test_what_a_killed_process_left_is_found(make, path):
    with Holder(path, "a", "b", "c") as holder:
        spool = make()
        assert spool.found_rows == 0
        spool.close()
        holder.kill()
    spool = make()
    assert spool.found_rows == 3
    assert drained(spool) == ["a", "b", "c"]


@pytest.mark.slow
def test_a_process_killed_at_any_statement_leaves_a_sound_file(make, path):
    code = """
        import os, signal, sqlite3, sys
        from pathlib import Path
        from lynkr_store.ingest import spool as module

        at = int(sys.argv[2])
        made, statements = sqlite3.connect, 0

        class Connection(sqlite3.Connection):
            def execute(self, *arguments):
                global statements
                statements += 1
                if statements == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().execute(*arguments)

        sqlite3.connect = lambda *a, **k: made(*a, factory=Connection, **k)
        spool = module.Spool(Path(sys.argv[1]), 2**26)
        spool.open()
        for n in range(4):
            spool.enter(f"b{n}", [{"request_id": f"b{n}"}], None)
            print(f"b{n}", flush=True)
        spool.mark_attempt(spool.first(), 5)
        spool.remove(spool.first())
        print("removed", flush=True)
        print(statements, file=sys.stderr)
    """
    whole = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path.with_name("whole"), "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    moments = int(whole.stderr)
    for moment in range(1, moments + 1):
        at = path.with_name(f"killed{moment}")
        said = run(code, at, moment, expect=-signal.SIGKILL).split()
        spool = make(at)
        assert spool.set_aside == []
        found = drained(spool)
        if "removed" in said:
            assert found == ["b1", "b2", "b3"]
        else:
            least = [name for name in said if name != "removed"]
            assert found in (least, [*least, f"b{len(least)}"], ["b1", "b2", "b3"])
        spool.close()
    print(f"{moments} moments of a kill")


def test_threads_share_a_spool(make):
    spool, failures = make(), []

    def enter(name):
        try:
            for n in range(50):
                spool.enter(f"{name}-{n}", rows(f"{name}-{n}"), None)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=enter, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    seen = drained(spool)
    assert len(seen) == 200
    for name in "abcd":
        assert [s for s in seen if s[0] == name] == [f"{name}-{n}-0" for n in range(50)]


# -- damage ------------------------------------------------------------------------------------


def filled(make, batches=5, at=None):
    spool = make(at) if at else make()
    for n in range(batches):
        spool.enter(f"id-{n}", rows(f"b{n}", text="x" * 20_000), None if n % 2 else 5)
    spool.close()


def overwrite(path, place, what):
    content = bytearray(path.read_bytes())
    content[place : place + len(what)] = what
    path.write_bytes(content)


def replayed(spool):
    """Each batch that can be read: its id, its rows, and when it was attempted."""
    seen = []
    for _ in range(1_000):
        entry = spool.first()
        if entry is None:
            return seen
        try:
            batch = spool.load(entry)
        except SpoolDamaged:
            spool.abandon(entry)
        else:
            seen.append((entry.batch_id, batch, entry.attempted_at))
            with suppress(SpoolDamaged):  # it is not given again
                spool.remove(entry)
    raise AssertionError("it has no end")


@pytest.mark.parametrize("size", [1, 50, 4_096, 100_000])
def test_a_file_of_garbage_is_set_aside(make, path, size):
    garbage = b"\xde\xad\xbe\xef" * (size // 4 + 1)
    path.write_bytes(garbage)
    spool = make()
    [aside] = spool.set_aside
    assert aside.read_bytes() == garbage, "for whoever wants to look"
    assert aside.name.startswith("spool.db.damaged-")
    spool.enter("a", rows("a"), None)
    spool.close()
    spool = make()
    assert spool.set_aside == [], "once"
    assert drained(spool) == ["a-0"]


def test_an_empty_file_is_a_fresh_one(make, path):
    path.touch()
    spool = make()
    assert spool.set_aside == []
    spool.enter("a", rows("a"), None)
    assert drained(spool) == ["a-0"]


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_set_aside(make, path, part):
    filled(make)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    spool = make()
    replayed(spool)
    assert len(spool.set_aside) == 1
    spool.enter("a", rows("a"), None)
    assert drained(spool) == ["a-0"]


@pytest.mark.parametrize("batch", [0, 2, 4])
def test_a_flipped_byte_costs_the_batch_that_it_hit(make, path, batch):
    filled(make)
    place = path.read_bytes().index(f'"b{batch}-1"'.encode())
    overwrite(path, place + 1, b"c")
    spool = make()
    assert spool.found_rows == 15
    seen = replayed(spool)
    assert spool.lost_rows == 3
    [aside] = spool.set_aside
    assert aside.exists()
    assert spool.found_rows == 15, "what moved is not found again"
    left = [n for n in range(5) if n != batch]
    assert [(b, t) for b, _, t in seen] == [(f"id-{n}", None if n % 2 else 5) for n in left]
    assert [r for _, r, _ in seen] == [rows(f"b{n}", text="x" * 20_000) for n in left]
    spool.close()
    assert make().found_rows == 0


def test_damage_in_another_processs_file_leaves_the_own_one_alone(make, path):
    filled(make, at=path.with_name("spool.db.2"))
    other = path.with_name("spool.db.2")
    overwrite(other, other.read_bytes().index(b'"b3-1"') + 1, b"c")
    spool = make()
    spool.enter("own", rows("own"), None)
    assert (spool._own.path, spool.found_rows) == (path, 15)
    seen = sorted(batch for batch, _, _ in replayed(spool))
    assert seen == ["id-0", "id-1", "id-2", "id-4", "own"]
    assert spool.lost_rows == 3
    assert spool._own.path == path
    assert not other.exists()


@pytest.mark.parametrize("moment", range(0, 40, 3))
def test_damage_anywhere_is_survived(make, path, moment):
    filled(make)
    size = path.stat().st_size
    for part in range(10):
        overwrite(path, (moment * 10 + part) * size // 400, bytes([255 - part]) * 40)
    spool = make()
    seen = sum(len(batch) for _, batch, _ in replayed(spool))
    assert seen + spool.lost_rows == spool.found_rows, "each is counted once"
    spool.enter("a", rows("a"), None)
    assert drained(spool) == ["a-0"]


def test_random_damage_is_survived(make, path):
    filled(make)
    sound = path.read_bytes()
    for seed in range(60):
        random = Random(seed)
        content = bytearray(sound)
        for _ in range(random.choice([1, 3, 30])):
            end = random.choice([3 * 4_096, len(sound) - 100])  # the schema's pages more often
            place, size = random.randrange(end), random.choice([1, 4, 100])
            content[place : place + size] = random.randbytes(size)
        at = path.with_name(f"damaged {seed}")
        at.write_bytes(content)
        spool = make(at, opened=False)
        try:
            spool.open()
            seen = sum(len(batch) for _, batch, _ in replayed(spool))
            assert seen + spool.lost_rows == spool.found_rows
            with suppress(SpoolDamaged):  # found on the way in: the next time it works
                spool.enter("a", rows("a"), None)
            spool.enter("b", rows("b"), None)
            spool.close()
        except SpoolError as error:
            # what may be another program's stays where it is
            assert "another program's" in str(error), seed  # noqa: PT017


PAYLOADS = {
    "too deep": b"[" * 200_000,
    "no UTF-8": b'{"columns":["provider"],"rows":[["\xff"],["p"],["p"]]}',
    "no JSON": b"{",
    "nothing": b"",
    "a number of too many digits": b"1" * 10_000,
    "null": b"null",
    "a list": b"[]",
    "no rows": json.dumps({"columns": ["provider"]}).encode(),
    "no columns": json.dumps({"columns": [], "rows": [[], [], []]}).encode(),
    "columns that are no list": json.dumps({"columns": "ab", "rows": [["p", "q"]] * 3}).encode(),
    "columns without names": json.dumps({"columns": [1], "rows": [["p"]] * 3}).encode(),
    "one column twice": json.dumps({"columns": ["a", "a"], "rows": [["p", "q"]] * 3}).encode(),
    "rows of other lengths": json.dumps(
        {"columns": ["a"], "rows": [["p"], ["p", "q"], []]}
    ).encode(),
    "rows that are no lists": json.dumps({"columns": ["a"], "rows": [{"a": "p"}] * 3}).encode(),
    "rows of texts": json.dumps({"columns": ["a"], "rows": ["p", "q", "r"]}).encode(),
    "a list as a value": json.dumps({"columns": ["a"], "rows": [[["p"]]] * 3}).encode(),
    "an object as a value": json.dumps({"columns": ["a"], "rows": [[{"p": 1}]] * 3}).encode(),
    "fewer rows": json.dumps({"columns": ["provider"], "rows": [["p"]] * 2}).encode(),
    "more rows": json.dumps({"columns": ["provider"], "rows": [["p"]] * 4}).encode(),
}
"""Payloads in the place of three rows', whose checksum is right."""

SAYINGS = {
    "row_count": [-1, 0, 1, 2, 4, 50, 2**62, -(2**62), 1.5, "x", b"\x01"],
    "attempted_at": [-1, 1.5, "x", b"\x01"],
    "batch_id": ["", "\n", "\0", "größe", "x" * 65, b"\x01"],
}
"""What cannot be true of a batch of three rows."""


def alter(path, batch, **columns):
    """Write other values into a spool that nobody holds."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for name, value in columns.items():
            connection.execute(f"UPDATE batches SET {name} = ? WHERE batch_id = ?", (value, batch))


def replays_all_but(make, path, batch_id, lost=None):
    """The batch alone is lost, the others are stored, and nothing is left for the next process."""
    sink = Sink()
    writer = replaying(path, sink, 11_000)
    eventually(lambda: writer.counters().recovered > 0 == writer.counters().spooled)
    writer.close(30)
    account = writer.counters()
    assert account.written == 12
    assert sorted(batch for batch, _ in sink.seen) == sorted(
        {f"id-{n}" for n in range(5)} - {batch_id}
    )
    assert (account.spooled, account.pending, account.submitted) == (0, 0, 0)
    assert account.recovered == 12 + account.dropped_by["spool_damaged"]
    assert list(account.dropped_by) == ["spool_damaged"]
    if lost is not None:
        assert account.dropped_by["spool_damaged"] == lost
    assert all(count > 0 for count in (*account.dropped_by.values(), *account.faults_by.values()))
    assert len(list(path.parent.glob("spool.db.damaged-*[0-9]"))) == 1
    again = make()
    assert (again.found_rows, again.first()) == (0, None), "the next process starts with nothing"


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize(
    "batch", [pytest.param("id-0", marks=SLOW), "id-2", pytest.param("id-4", marks=SLOW)]
)
def test_a_batch_that_cannot_be_decoded_costs_its_rows_alone(make, path, payload, batch):
    filled(make)
    alter(path, batch, payload=payload, checksum=zlib.crc32(payload))
    # the file says that there are three: of less than three bytes that cannot be
    replays_all_but(make, path, batch, lost=3 if len(payload) >= 3 else 1)


def test_a_batch_of_columns_that_no_record_has_costs_its_rows_alone(make, path):
    filled(make)
    payload = json.dumps({"columns": ["provider", "id"], "rows": [["p", 1]] * 3}).encode()
    alter(path, "id-2", payload=payload, checksum=zlib.crc32(payload))
    replays_all_but(make, path, "id-2", lost=3)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SAYINGS.items() for value in values]
)
def test_what_a_file_says_of_a_batch_is_not_believed(make, path, name, value):
    filled(make)
    alter(path, "id-2", **{name: value})
    lost = value if name == "row_count" and value in (1, 2, 4, 50) else None
    replays_all_but(make, path, "id-2", lost=lost or (3 if name != "row_count" else 1))


def test_a_batch_for_which_memory_is_short_waits_until_it_is_there(make, path, monkeypatch):
    filled(make)
    loads, short = json.loads, [2]

    def loads_with_little_memory(payload):
        if b"b2-0" in payload and short[0]:
            short[0] -= 1
            raise MemoryError
        return loads(payload)

    monkeypatch.setattr(json, "loads", loads_with_little_memory)
    monkeypatch.setattr("lynkr_store.ingest.spooling.SPOOL_AGAIN_S", 0.01)
    sink = Sink()
    writer = replaying(path, sink, 11_000)
    eventually(lambda: writer.counters().written == 15)
    writer.close(30)
    assert [batch for batch, _ in sink.seen] == [f"id-{n}" for n in range(5)], "in order"
    assert writer.counters().faults_by == {"MemoryError": 2}
    assert writer.counters().dropped_by == {}


def test_batches_move_from_a_damaged_file_one_at_a_time(make, path, monkeypatch):
    filled(make, batches=40)
    alter(path, "id-0", row_count=2)
    spool = make()
    sizes, load = [], spool.load

    def watched(entry):
        sizes.append(sum(other.file is spool._own for other in spool._entries))
        return load(entry)

    monkeypatch.setattr(spool, "load", watched)
    spool.abandon(spool.first())
    assert sizes == list(range(39)), "what was read is in the other file before the next is read"
    assert drained(spool) == [f"b{n}-0" for n in range(1, 40)]


def foreign(path, mode, *, application_id=0, tables=True, auto_vacuum="NONE"):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA auto_vacuum = {auto_vacuum}")
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute(f"PRAGMA application_id = {application_id}")
        if tables:
            connection.execute("CREATE TABLE theirs (a)")
            connection.execute("INSERT INTO theirs VALUES ('kept')")
        connection.commit()


@pytest.mark.parametrize("mode", ["DELETE", "WAL", "TRUNCATE"])
@pytest.mark.parametrize("auto_vacuum", ["NONE", "FULL"])
@pytest.mark.parametrize("application_id", [0, 0x0F055111])
def test_another_programs_database_is_refused_untouched(
    make, path, mode, auto_vacuum, application_id
):
    foreign(path, mode, application_id=application_id, auto_vacuum=auto_vacuum)
    path.chmod(0o640)
    before, files = path.read_bytes(), sorted(path.parent.iterdir())
    spool = make(opened=False)
    for attempt in (spool.open, lambda: spool.enter("a", rows("a"), None)):
        with pytest.raises(SpoolError, match="another program's database"):
            attempt()
    spool.close()
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(path.parent.iterdir()) == files
    assert spool.set_aside == []


def test_another_programs_database_that_is_in_use_stays_whole(make, path):
    foreign(path, "WAL")
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute("INSERT INTO theirs VALUES ('in the log')")
        theirs.commit()
        spool = make(opened=False)
        with suppress(SpoolError):  # locked, it cannot be told from a spool that another holds
            spool.open()
            assert spool._own.path == path.with_name("spool.db.2")
        theirs.execute("INSERT INTO theirs VALUES ('later')")
        theirs.commit()
        assert theirs.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with closing(sqlite3.connect(path)) as theirs:
        assert theirs.execute("SELECT count(*) FROM theirs").fetchone() == (3,)


def test_a_name_that_is_no_spools_is_left_alone(make, path):
    for name in ("spool.db.bak", "spool.db.2x", "spool.db.damaged-20250101T000000-0", "spool.dbx"):
        path.with_name(name).write_bytes(b"theirs")
    make().enter("a", rows("a"), None)
    for name in ("spool.db.bak", "spool.db.2x", "spool.db.damaged-20250101T000000-0", "spool.dbx"):
        assert path.with_name(name).read_bytes() == b"theirs"


@pytest.mark.parametrize("at", ["file/spool.db", "."])
def test_a_place_where_no_file_can_be_is_named(make, tmp_path, at):
    (tmp_path / "file").write_text("no directory")
    spool = make(tmp_path / at, opened=False)
    for attempt in (spool.open, lambda: spool.enter("a", rows("a"), None)):
        with pytest.raises(SpoolError, match="spool_path") as told:
            attempt()
        assert str(tmp_path) in str(told.value)
    assert spool.first() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="as another user the next test says it")
def test_a_directory_where_an_unprivileged_user_may_not_write_is_named():
    code = """
        import os, sys
        from pathlib import Path
        from lynkr_store.exceptions import SpoolError
        from lynkr_store.ingest.spool import Spool

        os.setgroups([])
        os.setgid(int(sys.argv[2]))
        os.setuid(int(sys.argv[2]))
        spool = Spool(Path(sys.argv[1]) / "spool.db", 2**20)
        for attempt in (spool.open, lambda: spool.enter("a", [{"a": 1}], None)):
            try:
                attempt()
            except SpoolError as error:
                print(error)
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # others may enter it
        Path(folder).chmod(0o555)
        first, second = run(code, folder, NOBODY).splitlines()
        assert first == second == f"spool_path: {folder}/spool.db: Permission denied"
        assert list(Path(folder).iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_where_nobody_may_write_is_named(make, tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(SpoolError, match="Permission denied"):
            make(opened=False).open()
    finally:
        tmp_path.chmod(0o755)


def test_a_later_call_tries_again(make, path):
    path.mkdir()
    spool = make(opened=False)
    with pytest.raises(SpoolError):
        spool.open()
    path.rmdir()
    spool.open()
    spool.enter("a", rows("a"), None)
    assert drained(spool) == ["a-0"]


def test_a_file_that_was_removed_from_its_path_takes_no_more(make, path):
    spool = make()
    spool.enter("a", rows("a"), None)
    path.unlink()
    spool.enter("b", rows("b"), None)
    spool.close()
    assert make().found_rows >= 3, "what came afterwards is where the next process looks"


def test_errors_name_no_value(make, path):
    spool = make(max_bytes=4 * 4_096)
    with pytest.raises(SpoolError) as told:
        spool.enter("a", rows("SECRET", text="SECRET" * 10_000), None)
    assert "SECRET" not in str(told.value)
    assert told.value.__cause__ is None


# -- the writer and a spool --------------------------------------------------------------------


class Sink:
    """Keeps what it is given."""

    def __init__(self):
        self.seen = []

    def write(self, batch_id, batch):
        self.seen.append((batch_id, [row["request_id"] for row in batch]))
        return {}


def replaying(path, sink, now_ms, **options):
    writer = Writer(
        sink,
        policy=TextPolicy(),
        clock=lambda: now_ms,
        max_rows=100,
        max_bytes=10**6,
        batch_rows=10,
        interval_s=0.01,
        spool=lambda: Spool(path, MIB),
        **options,
    )
    writer.start()
    return writer


def eventually(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def test_a_batch_whose_answer_was_lost_longer_ago_than_the_ledger_remembers_is_dropped(
    make, path, caplog
):
    spool = make()
    for name, attempted_at in (("old", 1_000), ("known", 1_001), ("never", None)):
        spool.enter(name, rows(name), attempted_at)
    spool.close()
    sink = Sink()
    with caplog.at_level(logging.WARNING, "lynkr_store"):
        writer = replaying(path, sink, 11_000, forget_after_ms=10_000)
        eventually(lambda: writer.counters().written == 6)
        writer.close(30)
    account = writer.counters()
    assert [batch for batch, _ in sink.seen] == ["known", "never"]
    assert (account.submitted, account.recovered, account.written) == (0, 9, 6)
    assert account.dropped_by == {"outcome_unknown": 3}
    assert (account.spooled, account.pending) == (0, 0)
    assert any("outcome_unknown" in line for line in caplog.messages)
    assert make().found_rows == 0


def test_a_damaged_batch_costs_the_writer_its_rows_alone(make, path, caplog):
    filled(make)
    overwrite(path, path.read_bytes().index(b'"b1-1"') + 1, b"c")
    sink = Sink()
    with caplog.at_level(logging.WARNING, "lynkr_store"):
        writer = replaying(path, sink, 11_000)
        eventually(lambda: writer.counters().written == 12)
        writer.close(30)
    account = writer.counters()
    assert [batch for batch, _ in sink.seen] == ["id-0", "id-2", "id-3", "id-4"]
    assert (account.recovered, account.written, account.spooled) == (15, 12, 0)
    assert account.dropped_by == {"spool_damaged": 3}
    assert sum("set aside" in line for line in caplog.messages) == 1
    assert sum("spool_damaged" in line for line in caplog.messages) == 1
