"""Programs that tests run in processes of their own, which speak in lines of JSON."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tests.support.recorded import ROOT

WITHOUT_DATABASE = f"""
import sys
import types

package = sys.modules["lynkr_store"] = types.ModuleType("lynkr_store")
package.__path__ = [{str(ROOT / "lynkr_store")!r}]
"""
"""What a program begins with that needs a package below the database alone.

It spares the second that importing the whole library takes.
"""
_END_S = 280  # longer than anything that a program waits for


def command(module: str, name: str, options: dict[str, Any]) -> list[str]:
    """The command line that runs one of a module's programs."""
    return [sys.executable, "-W", "error", "-m", module, name, json.dumps(options)]


def run(module: str, name: str, options: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """What a program said until its end, which must be a good one."""
    done = subprocess.run(
        command(module, name, options),
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


class Child:
    """A program that runs while the test does: it is told words and says lines.

    Args:
        program: Its command line.
        env: Its environment, if it is not the test's own.
    """

    def __init__(self, program: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            program,
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def line(self) -> str:
        """Wait for its next line."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the program ended without a word"
        return line.strip()

    def heard(self) -> Any:
        """Wait for its next line, and decode it."""
        return json.loads(self.line())

    def heard_of(self, what: str) -> Any:
        """Wait until it says this, and return its value; lines before it are passed over."""
        while what not in (said := self.heard()):
            pass
        return said[what]

    def tell(self, word: str = "go") -> None:
        """Write a line to its input."""
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")

    def ask(self, word: str) -> Any:
        """Write a line to its input, and wait for the line that answers it."""
        self.tell(word)
        return self.heard()

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._process.kill()
        self._process.wait()

    def end(self) -> list[str]:
        """Close its input and wait for its end, a good one; return the lines it still said."""
        said, _ = self._process.communicate(timeout=_END_S)
        assert self._process.returncode == 0
        return said.splitlines()
