"""The lowest versions that pyproject.toml allows are those that work."""

import tomllib

import pytest

from tests.support import oldest


def test_every_requirement_has_a_lowest_version():
    project = tomllib.loads((oldest.ROOT / "pyproject.toml").read_text())["project"]
    pinned = list(oldest.constraints(project, ["postgres", "async"]))
    assert "sqlalchemy==2.1.3" in pinned
    assert "psycopg==3.2.11" in pinned, "of an extra, without its own extra"
    named = {line.partition("==")[0] for line in pinned}
    assert {"aiosqlite", "greenlet", "pydantic", "typer"} <= named
    assert not named & {"pytest", "mypy", "lynkr-store"}, "tools are the newest"
    for bad in ("rich", "rich<15", "rich==14"):
        with pytest.raises(ValueError, match="lower bound"):
            list(oldest.constraints(project | {"dependencies": [bad]}, []))


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_the_tests_pass_with_the_lowest_versions(tmp_path):
    oldest.main(tmp_path)
