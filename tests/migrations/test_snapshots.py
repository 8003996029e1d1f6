"""What is committed of the schema is what a fresh upgrade makes, statement by statement."""

import ast
import inspect
import re

import pytest

from lynkr_store.migrate import scripts
from lynkr_store.migrate.scripts import directory
from lynkr_store.migrate.upgrade import upgrade
from tests.support.snapshot import FOLDER, schema_of, script_of

_REMEDY = "a new revision: run `make snapshots`; an old one: leave what has landed alone"


def test_a_fresh_upgrade_makes_the_committed_schema(empty_engine):
    upgrade(empty_engine)
    committed = (FOLDER / f"schema.{empty_engine.dialect.name}.txt").read_text()
    assert schema_of(empty_engine) == committed, _REMEDY


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_every_statement_of_every_revision_is_the_committed_one(backend):
    assert script_of(backend) == (FOLDER / f"upgrade.{backend}.sql").read_text(), _REMEDY


def modules():
    return [script.module for script in scripts.script_directory().walk_revisions()]


def test_every_revision_says_whether_older_code_can_continue_and_why():
    assert len(modules()) == 10
    for module in modules():
        words = inspect.getdoc(module)
        assert isinstance(module.rolling, bool), f"{module.revision}: rolling = True or False"
        for heading in ("Why:", "Locks:", "Older code:", "Undo:"):
            assert heading in words, f"{module.revision}: its docstring lacks {heading}"
        assert len(re.search(r"Older code:(.*?)Undo:", words, re.DOTALL)[1]) > 3


def test_no_revision_imports_a_model():
    for path in directory().glob("versions/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                assert "models" not in name, f"{path.name}: a model changes, a revision does not"
