"""The newer release, as a program of its own that does to a database what it is told.

Its code is this release's; its number is another, and it knows the revisions in this folder beside
this release's own. ``python -m tests.migrations.newer.release FOLDER`` takes orders, one line of
JSON each, and answers each by one.
"""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from alembic import command
from sqlalchemy import Connection, Engine, event

from lynkr_store import create_store_engine
from lynkr_store.db.dialect import disposing
from lynkr_store.migrate import revisions, scripts
from lynkr_store.migrate import upgrade as migrate
from lynkr_store.migrate.lock import exclusively
from tests.support.programs import Child

RELEASE = "9.9.9"
ADDITIVE, RENAMING, ADDITIVE_AGAIN = "9997", "9998", "9999"

_note_applied = scripts.note_applied
_HERE = Path(__file__).parent
_FILES = ("additive.py", "renaming.py", "additive_again.py")
_HUNG_S = 90  # an order that takes longer is ended by the program's alarm


def _script_directory(folder: Path) -> Path:
    """This release's revisions and the newer ones after them, in a new folder."""
    made = folder / "migrations"
    shutil.copytree(scripts.directory(), made, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        source = (_HERE / name).read_text()
        own = source.replace('down_revision = "head"', f'down_revision = "{revisions.head()}"')
        (made / "versions" / name).write_text(own)
    return made


class NewerRelease:
    """The program, as tests speak to it.

    Args:
        folder: Where its revisions can be put together.
    """

    def __init__(self, folder: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LYNKR_STORE_")}
        program = [sys.executable, "-W", "error", "-m", __name__, str(_script_directory(folder))]
        self._child = Child(program, environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.__exit__(*exc)

    def upgrade(self, url: str, to: str, *, notes: bool = True) -> None:
        """Upgrade; without notes as a release would that knows of none."""
        self._ask(do="upgrade", url=url, to=to, notes=notes)

    @contextmanager
    def upgrading(self, url: str, to: str) -> Iterator[None]:
        """Upgrade, and wait before the commit until the block has ended."""
        self._tell(do="upgrade", url=url, to=to, notes=True, pause=True)
        assert self._child.heard() == {"paused": True}
        try:
            yield
        finally:
            self._tell(go=True)
            self._answer()

    def downgrade(self, url: str, to: str) -> None:
        self._ask(do="downgrade", url=url, to=to)

    def stamp(self, url: str, to: str) -> None:
        """Set the version and change nothing else, as ``alembic stamp`` does."""
        self._ask(do="stamp", url=url, to=to)

    def script(self, url: str, span: str, *, down: bool = False) -> str:
        """What ``--sql`` prints."""
        answer: str = self._ask(do="script", url=url, to=span, down=down)
        return answer

    def _ask(self, **order: Any) -> Any:
        self._tell(**order)
        return self._answer()

    def _tell(self, **order: Any) -> None:
        self._child.tell(json.dumps(order))

    def _answer(self) -> Any:
        answer = self._child.heard()
        assert "error" not in answer, answer["error"]
        return answer["done"]


# -- the program ----------------------------------------------------------------------------------


class _Program:
    def __init__(self, out: int) -> None:
        self._out = out
        self._pauses = False
        event.listen(Engine, "commit", self._before_commit)

    def say(self, **said: Any) -> None:
        os.write(self._out, f"{json.dumps(said)}\n".encode())

    def run(self) -> None:
        for line in iter(sys.stdin.readline, ""):
            signal.alarm(_HUNG_S)
            order = json.loads(line)
            try:
                with disposing(create_store_engine(order["url"])) as engine:
                    self.say(done=getattr(self, order["do"])(engine, order))
            except Exception as error:  # noqa: BLE001 - the test has to hear of it
                self.say(error=f"{type(error).__name__}: {error}")
            signal.alarm(0)

    def _before_commit(self, _: Connection) -> None:
        if self._pauses:
            self._pauses = False
            self.say(paused=True)
            sys.stdin.readline()

    def upgrade(self, engine: Engine, order: dict[str, Any]) -> None:
        self._pauses = order.get("pause", False)
        scripts.note_applied = _note_applied if order["notes"] else _no_note
        migrate.upgrade(engine, order["to"])

    def downgrade(self, engine: Engine, order: dict[str, Any]) -> None:
        migrate.downgrade(engine, order["to"])

    def stamp(self, engine: Engine, order: dict[str, Any]) -> None:
        def body(connection: Connection) -> None:
            command.stamp(scripts.config(connection=connection), order["to"])

        exclusively(engine, body)

    def script(self, _: Engine, order: dict[str, Any]) -> str:
        output = io.StringIO()
        migrate.write_script(order["url"], order["to"], output, down=order["down"])
        return output.getvalue()


def _no_note(**_: object) -> None:
    pass


def _main() -> None:
    folder = Path(sys.argv[1])
    scripts.directory = lambda: folder
    scripts.__version__ = RELEASE
    revisions.REVISIONS += (ADDITIVE, RENAMING, ADDITIVE_AGAIN)
    out = os.dup(1)
    os.dup2(2, 1)  # what Alembic prints is no answer
    _Program(out).run()


if __name__ == "__main__":
    _main()
