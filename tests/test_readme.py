"""The README's examples run, and what it says of functions and options is so."""

import os
import re
import subprocess
import sys

import pytest

from lynkr_store import RoutingFilter, Store, StoreSettings
from lynkr_store.cli.commands import app
from tests.support.recorded import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_run(example, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_examples():
    assert len(EXAMPLES) == 4
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 10


def test_every_option_is_named():
    for name in StoreSettings.model_fields:
        assert f"`{name}`" in README or name == "url", f"name the option {name}"


def test_every_dimension_is_named():
    for name in RoutingFilter.model_fields:
        assert name.removeprefix("min_").removeprefix("max_") in README


def test_every_command_is_named():
    names = [command.callback.__name__ for command in app.registered_commands]
    assert " | ".join(names) in README


def test_every_public_method_is_named():
    for name in vars(Store):
        if not name.startswith("_") and name not in ("engine", "add_many"):
            assert f"{name}(" in README, f"say what {name} does"


@pytest.mark.parametrize("page", ["README.md", "migrations/NOTES.md", "docs/architecture.md"])
def test_every_file_that_is_named_exists(page):
    text, here = (ROOT / page).read_text(), (ROOT / page).parent
    for name in re.findall(r"`([\w/]+\.(?:py|md|toml))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "lynkr_store", here)), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (here / link).exists(), link
