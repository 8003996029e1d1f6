import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, text

from tests.support.postgres import (
    ExternalServer,
    PgInstallation,
    PgServer,
    _copied,
    available_servers,
)

SERVERS = available_servers()


def _folder(server: PgServer) -> Path:
    assert server._folder
    return server._folder


def _gone(pid: int, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module", params=SERVERS, ids=lambda i: i.name)
def server(request: pytest.FixtureRequest) -> Iterator[PgServer]:
    with PgServer(request.param) as started:
        yield started


@pytest.fixture(params=SERVERS, ids=lambda i: i.name)
def installation(request: pytest.FixtureRequest) -> PgInstallation:
    return request.param


def test_each_major_version_is_offered_once():
    names = [i.name for i in SERVERS]
    assert names == sorted(set(names))
    assert all((i.bin / "initdb").exists() for i in SERVERS)


def test_the_version_is_the_one_in_the_name(server):
    with psycopg.connect(server.url("postgres")) as connection:
        assert server.name == f"postgres{connection.info.server_version // 10000}"


def test_sqlalchemy_takes_the_url(server):
    engine = create_engine(server.url("postgres"))
    with engine.connect() as connection:
        assert engine.driver == "psycopg"
        assert connection.scalar(text("SHOW fsync")) == "off"
        assert connection.scalar(text("SHOW listen_addresses")) == ""
    engine.dispose()


def test_the_socket_answers_whatever_port_the_environment_names(server, monkeypatch):
    monkeypatch.setenv("PGPORT", "1")
    psycopg.connect(server.url("postgres")).close()


def test_a_template_is_copied_and_a_database_in_use_is_dropped(server):
    with psycopg.connect(server.create_database('Odd"name')) as connection:
        connection.execute("CREATE TABLE t AS SELECT 7 AS n")
    url = server.create_database("copy", template='Odd"name')
    connection = psycopg.connect(url)
    assert connection.execute("SELECT n FROM t").fetchone() == (7,)
    server.drop_database("copy")
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()
    server.drop_database("copy")
    server.drop_database('Odd"name')
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(url)


def test_an_external_server_keeps_runs_apart(server):
    first, second = (ExternalServer(server.url("postgres")) for _ in range(2))
    for one in (first, second):
        assert one.create_database("same") == one.url("same")
    psycopg.connect(first.create_database("copy", template="same")).close()
    first.drop_database("same")
    first.drop_database("copy")
    psycopg.connect(second.url("same")).close()
    second.drop_database("same")


@pytest.mark.slow
def test_stop_leaves_no_process_and_no_folder(installation):
    with PgServer(installation) as server:
        pid, folder = server.pid, _folder(server)
        assert len(str(folder / ".s.PGSQL.65535.lock")) < 100
    assert _gone(pid)
    assert not folder.exists()
    server.stop()
    with pytest.raises(RuntimeError, match="start it first"):
        server.url("postgres")


@pytest.mark.slow
def test_a_stopped_process_and_a_killed_one_are_cleared_away(installation):
    for fault in (signal.SIGSTOP, signal.SIGKILL):
        with PgServer(installation) as server:
            folder = _folder(server)
            os.kill(server.pid, fault)
        assert not folder.exists(), fault


@pytest.mark.slow
def test_it_listens_when_asked_and_starts_again(installation):
    server = PgServer(installation, listen=True)
    for _ in range(2):
        with server:
            url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
            psycopg.connect(url).close()
            psycopg.connect(server.url("postgres")).close()


def test_a_failing_program_is_quoted(tmp_path):
    for part in ("bin", "lib", "share"):
        (tmp_path / part).mkdir()
    for name in ("initdb", "postgres"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho it broke\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    server = PgServer(PgInstallation("postgres0", tmp_path / "bin"))
    with pytest.raises(RuntimeError, match="it broke"):
        server.start()
    assert server._folder is None


def test_a_forked_child_does_not_stop_its_parents_server(server):
    child = os.fork()
    if child == 0:
        server.stop()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    psycopg.connect(server.url("postgres")).close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does this on Linux only")
def test_the_server_ends_with_a_killed_test_run(installation):
    script = (
        "import time; from tests.support.postgres import *\n"
        f"s = PgServer(next(i for i in available_servers() if i.name == {installation.name!r}))\n"
        "s.start(); print(s.pid, s._folder, flush=True); time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout
    pid, folder = run.stdout.readline().split()
    run.kill()
    run.communicate()
    assert _gone(int(pid))
    assert Path(folder).name.startswith("pg")
    subprocess.run(["/bin/rm", "-rf", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_programs_below_a_private_folder_are_copied(installation, tmp_path):
    private = tmp_path / "home"
    source = installation.bin.parent
    below = private / source.parent.name / source.name
    if not (source / "share").is_dir():
        pytest.skip("the system's share folder is elsewhere; its programs are never private")
    for part in ("bin", "lib", "share"):
        below.mkdir(parents=True, exist_ok=True)
        (below / part).symlink_to(source / part)
    libraries = source.parent.with_name(f"{source.parent.name}.libs")
    if libraries.is_dir():
        (private / libraries.name).symlink_to(libraries)
    private.chmod(0o700)
    with PgServer(PgInstallation("private", below / "bin")) as server:
        psycopg.connect(server.url("postgres")).close()
    assert _copied(below / "bin") != below / "bin"
