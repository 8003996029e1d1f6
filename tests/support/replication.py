"""A primary and a standby that follows it, each of which can be killed, promoted and fenced."""

import pwd
import time
from pathlib import Path

import psycopg

from tests.support.children import MortalServer
from tests.support.postgres import PgInstallation, _spawn

_WAIT_S = 60.0
_BACKUP_S = 60.0
_POLL_S = 0.02


class Primary(MortalServer):
    """A server on 127.0.0.1 that a standby may follow."""

    def __init__(self, installation: PgInstallation) -> None:
        super().__init__(installation, listen=True)

    @property
    def host(self) -> str:
        """As `Health.server` shows it."""
        return f"127.0.0.1:{self.port}"

    def execute(self, *statements: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def wait_for_standby(self) -> None:
        """From now on a commit is confirmed when the standby has it too."""
        self._await("SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")
        self.execute("ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        self._await("SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")

    def make_read_only(self) -> None:
        self._set_read_only("on")

    def take_writes(self) -> None:
        """Again, after `make_read_only`."""
        self._set_read_only("off")

    def _set_read_only(self, state: str) -> None:
        self.execute(
            f"ALTER SYSTEM SET default_transaction_read_only = {state}", "SELECT pg_reload_conf()"
        )
        self._await(f"SELECT current_setting('default_transaction_read_only') = '{state}'")

    def promote(self) -> None:
        """Make a standby the primary."""
        self.execute(
            "SELECT pg_promote()",
            "ALTER SYSTEM SET synchronous_standby_names = ''",
            "SELECT pg_reload_conf()",
        )
        self._await("SELECT NOT pg_is_in_recovery()")

    def return_as_standby(self) -> None:
        """Start a killed primary again so that it takes no writes, as one that was fenced."""
        assert self._folder
        (self._folder / "data" / "standby.signal").touch(mode=0o644)
        self.start_again()

    def _await(self, question: str) -> None:
        deadline = time.monotonic() + _WAIT_S
        while True:
            with psycopg.connect(self.url("postgres")) as connection:
                if connection.execute(question).fetchone() == (True,):
                    return
            assert time.monotonic() < deadline, question
            time.sleep(_POLL_S)


class Standby(Primary):
    """Follows a primary until it is promoted."""

    def __init__(self, installation: PgInstallation, primary: Primary) -> None:
        super().__init__(installation)
        self._primary = primary

    def start(self) -> "Standby":
        super(MortalServer, self).start()  # without statements of its own
        return self

    def _initialise(self, programs: Path, user: pwd.struct_passwd | None) -> None:
        assert self._folder
        command = [str(programs / "pg_basebackup"), "--write-recovery-conf", "--no-sync"]
        command += ["--checkpoint=fast", "--host=127.0.0.1", f"--port={self._primary.port}"]
        command += ["--username=postgres", f"--pgdata={self._folder}/data"]
        with (self._folder / "log").open("w+b") as log:
            if _spawn(command, log, self._folder, user).wait(_BACKUP_S):
                log.seek(0)
                raise RuntimeError(log.read().decode(errors="replace")[-2000:])
