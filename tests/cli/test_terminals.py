"""The command where standard output is no UTF-8, closed, full, narrow or wide."""

import io
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from rich.cells import cell_len

from lynkr_store import Store
from lynkr_store.cli import commands, render
from tests.conftest import POSTGRES

NOW = 1_750_000_000_000
ENCODINGS = ["cp1252", "ascii", "cp932", "latin-1", "koi8-r", "utf-8"]
ODD = "größe–模型🚀▏\ud800"
WHOLE = ["--since", "0", "--until", str(NOW + 100)]
NO, UNREACHABLE = 1, 3


@pytest.fixture(params=["sqlite-file", POSTGRES[-1]])
def url(request, new_url):
    """A database with rows whose names no old encoding has."""
    url = new_url(request.param, at_head=True)
    with Store(url) as store:
        for n in range(6):
            named = dict.fromkeys(("provider", "model", "tier", "request_type"), f"{ODD}{n % 2}")
            assert store.record(
                **named, timestamp=NOW + n, latency_ms=10.0 * n, error_type=ODD, cost_usd=0.5
            )
        assert store.flush(30)
    return url


def commands_of(url):
    """Each command and its exit code, those that change nothing first."""
    at = ["--url", url]
    yield from (
        ([*command, *at], 0)
        for command in (
            ["stats", *WHOLE],
            ["stats", "--gateway", *WHOLE],
            ["stats", "--provider", ODD.replace("\ud800", "\ufffd") + "0", *WHOLE],
            ["stats"],
            ["query"],
            ["query", "--gateway"],
            ["health"],
            ["health", "--json"],
            ["check"],
            ["check", "--json"],
            ["upgrade"],
            ["upgrade", "--sql"],
            ["downgrade", "head:base", "--sql"],
            ["maintain"],
            ["maintain", "--json"],
            ["cleanup", "--older-than", "90y"],
            ["cleanup", "--older-than", "90y", "--json"],
        )
    )
    yield ["--help"], 0
    yield ["stats", "--help"], 0
    yield ["downgrade", "base", *at], NO
    yield ["query", "--limit", "–"], 2
    yield ["check", "--url", f"sqlite:////nowhere/{ODD[:6]}.db"], UNREACHABLE


def ended(encoding, *arguments, columns=100):
    """Run the command in this process with such streams: exit code, and what each has, in bytes."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", ["lynkr-store", *arguments])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command sets
        with pytest.raises(SystemExit) as ended:
            commands.main()
        for stream in streams:
            stream.flush()
    return int(ended.value.code or 0), *(stream.buffer.getvalue() for stream in streams)


@pytest.mark.sample(7)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_ends_with_the_answer_s_exit_code_in_every_encoding(url, encoding):
    for arguments, code in commands_of(url):
        found, out, err = ended(encoding, *arguments)
        assert found == code, (arguments, err)
        out.decode(encoding)
        err.decode(encoding)
        assert b"Traceback" not in err
        assert (out if code in (0, NO) else err) or code == NO
        if "--json" in arguments and encoding != "utf-8":
            assert out.isascii()
    _, out, _ = ended(encoding, "query", "--gateway", "--url", url)
    names = {row["provider"] for row in json.loads(out)}
    assert names == {ODD.replace("\ud800", "\ufffd") + n for n in "01"}, "nothing is replaced"


def test_characters_that_are_lacking_are_replaced_in_as_many_cells(url):
    plain = ended("utf-8", "query", "--url", url, columns=200)[1].decode()
    shown = ended("ascii", "query", "--url", url, columns=200)[1].decode()
    assert "gr??e-????" in shown
    assert "🚀" in plain
    [wide] = {cell_len(line) for line in plain.splitlines() if "🚀" in line}
    [replaced] = {cell_len(line) for line in shown.splitlines() if "gr??e" in line}
    assert replaced - wide in (0, 1), "rich frames a table of ASCII"
    bars = ended("ascii", "stats", "--url", url, *WHOLE, columns=200)[1].decode()
    assert "####" in bars


def test_a_script_is_never_altered(monkeypatch, tmp_path):
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", "größe")
    arguments = ["upgrade", "--sql", "--url", "postgresql://nobody@/none"]
    code, out, err = ended("cp932", *arguments)
    assert (code, out) == (2, b"")
    assert b"PYTHONIOENCODING=utf-8" in err
    assert "größe" in ended("utf-8", *arguments)[1].decode()


@pytest.mark.sample(3)
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal_and_nothing_is_cut_off(url, columns):
    listed = ended("utf-8", "query", "--url", url, columns=columns)[1].decode()
    assert listed.count("🚀") == 6 * 4, "each name is there"
    for figure in ("40", "$0.5000", "06-15 15:06:40"):
        assert figure in listed
    figures = ended("utf-8", "stats", *WHOLE, "--url", url, columns=columns)[1].decode()
    for words in ("under-provisioned", "unpriced requests", "100.0 %", "$1.5000"):
        assert words in figures
    assert figures.count("🚀") == 4
    for arguments in (
        ["stats", *WHOLE, "--url", url],
        ["stats", *WHOLE, "--provider", "größe–模型🚀▏\ufffd0", "--url", url],
        ["query", "--url", url],
        ["health", "--url", url],
    ):
        for encoding in ("utf-8", "cp1252"):
            code, out, _ = ended(encoding, *arguments, columns=columns)
            said = out.decode(encoding)
            assert code == 0
            for line in said.splitlines():
                if "next page: --before" not in line:
                    assert cell_len(line.rstrip()) <= columns, (arguments, line)
            assert "…" not in said


def test_the_cursor_of_the_next_page_can_be_copied_at_every_width(url):
    for columns in (60, 80, 120):
        said = ended("utf-8", "query", "--limit", "2", "--url", url, columns=columns)[1].decode()
        cursor = said.split("--before ")[1].split()[0]
        code, out, _ = ended("utf-8", "query", "--before", cursor, "--gateway", "--url", url)
        assert (code, len(json.loads(out))) == (0, 4)


# -- as programs -----------------------------------------------------------------------------------


def program(*arguments, **options):
    # unbuffered, Python takes a write that a closed pipe cut short for a whole one
    given = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = given | {"COLUMNS": "80"} | options.pop("environment", {})
    return subprocess.Popen(
        [sys.executable, "-m", "lynkr_store", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        **options,
    )


LOCALES = [
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp932"},
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii:strict"},
]


def check_program(arguments, code, environment):
    with program(*arguments, stdout=subprocess.PIPE, environment=environment) as started:
        _, err = started.communicate()
    assert started.returncode == code, (arguments, environment, err)
    assert b"Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(("url", "turn"), [("sqlite-file", 0), (POSTGRES[-1], 1)], indirect=["url"])
def test_every_command_as_a_program_in_two_encodings(url, turn):
    """Above, each has every encoding; here the interpreter sets the streams up."""
    for number, (arguments, code) in enumerate(commands_of(url)):
        # what a command line's bytes become in an old locale is the interpreter's
        if all(argument.isascii() for argument in arguments):
            check_program(arguments, code, LOCALES[(number + turn * 3) % len(LOCALES)])


@pytest.mark.parametrize("url", ["sqlite-file"], indirect=True)
def test_a_pipe_that_is_closed_ends_the_command_quietly(url):
    with Store(url) as store:  # more than a pipe holds
        store.add_many({"provider": "p", "model": "m" * 500} for _ in range(300))  # folded
    for arguments in (
        ["query", "--gateway", "--limit", "300"],
        ["query", "--limit", "300"],
        ["check"],  # what fits into a buffer is written at the end
    ):
        with program(*arguments, "--url", url, stdout=subprocess.PIPE) as started:
            if "--limit" in arguments:
                assert started.stdout.readline()
            started.stdout.close()
            assert started.stderr.read() == b""
        assert started.returncode == 128 + signal.SIGPIPE, arguments


def test_rows_are_printed_as_they_are_stored_until_the_command_is_interrupted(url):
    with Store(url) as store:
        last = store.query(limit=1)[0].id
        for arguments, read in (
            (["--json"], lambda line: json.loads(line)["id"]),
            (["--gateway"], lambda line: json.loads(line)["id"]),
            ([], lambda line: int(line.split()[0])),
        ):
            with program(
                *("query", "--follow", "--after", "0", "--provider", "new", *arguments),
                *("--url", url),
                stdout=subprocess.PIPE,
            ) as started:
                for _ in range(2):
                    store.add_many([{"provider": "new", "model": "m\u202em"}])
                    last += 1
                    while (found := read(started.stdout.readline())) < last:
                        pass
                    assert found == last
                started.send_signal(signal.SIGINT)
                assert started.stderr.read() == b""
            assert started.returncode == 130, arguments


def test_a_follower_whose_reader_is_gone_ends_with_the_next_row(url):
    with (
        Store(url) as store,
        program(
            "query", "--follow", "--after", "0", "--url", url, stdout=subprocess.PIPE
        ) as started,
    ):
        assert started.stdout.readline()
        started.stdout.close()
        store.add_many([{"provider": "new"}])
        assert started.stderr.read() == b""
    assert started.returncode == 128 + signal.SIGPIPE


@pytest.mark.slow
@pytest.mark.parametrize("url", ["sqlite-file"], indirect=True)
def test_a_full_disk_under_standard_output_is_reported(url):
    for arguments in (["query", "--gateway"], ["stats", *WHOLE]):
        with (
            open("/dev/full", "wb") as full,  # noqa: PTH123
            program(*arguments, "--url", url, stdout=full) as started,
        ):
            said = started.stderr.read()
        assert started.returncode == 2
        assert b"error: standard output: No space left on device" in said
        assert b"Traceback" not in said


def test_the_handler_of_characters_takes_no_other_error():
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")
    with pytest.raises(UnicodeDecodeError):
        render._fitting(error)
