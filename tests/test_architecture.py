"""Imports point downward, and what needs no database imports none."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lynkr_store
from lynkr_store import AsyncStore, Store

PACKAGE = Path(lynkr_store.__file__).parent

LEVELS = {
    "cli": 0,
    "store": 0,
    "maintenance": 0,
    "queries": 0,
    "rollups": 0,
    "storage": 0,
    "migrate": 0,
    "db": 0,
    "ingest": 0,
    "process": 0,
    "exceptions": 0,
    "backend": 0,
    "schemas.units": 0,
    "db.triggers": 1,
    "version": 0,
    "maintenance.background": 2,
    "ingest.account": 0,
    "process.files": 0,
    "storage.company": 1,
    "storage.write_lock": 0,
    "ingest.handoff": 0,
    "ingest.batch": 0,
    "schemas": 1,
    "schemas.base": 1,
    "schemas.events": 1,
    "schemas.health": 1,
    "schemas.rows": 1,
    "schemas.statistics": 1,
    "schemas.values": 1,
    "db.errors": 1,
    "process.lifecycle": 1.5,
    "process.waiting": 2,
    "db.psycopg_async": 2.2,
    "db.event_loops": 2.2,
    "process.log": 1,
    "db.postgresql": 1,
    "db.catalogue": 1,
    "db.urls": 1,
    "cache": 2,
    "ingest.codec": 2,
    "ingest.validation": 2.5,
    "ingest.queue": 3,
    "ingest.preparer": 4,
    "schemas.filters": 2,
    "settings": 2,
    "db.column_types": 2,
    "db.functions": 3,
    "db.forking": 2,
    "db.engines": 2.5,
    "migrate.adoption": 2,
    "ingest.spool": 3,
    "ingest.writer": 5,
    "migrate.operations": 3,
    "migrate.lock": 3,
    "migrate.backup": 3,
    "db.models": 3,
    "migrate.revisions": 4,
    "migrate.upgrade": 5,
    "queries.pages": 4,
    "rollups.measures": 4,
    "rollups.buckets": 1,
    "rollups.state": 4.5,
    "rollups.answer_sql": 5,
    "maintenance.clock_check": 5,
    "rollups.fold_sql": 5,
    "rollups.answer": 6,
    "rollups.fold": 7,
    "rollups.repair": 7.5,
    "maintenance.indexes": 6,
    "storage.bulk": 4,
    "storage.identities": 4,
    "storage.diagnosis": 5,
    "storage.inserts": 6,
    "storage.progress": 4,
    "storage.ledger": 5,
    "storage.text_policy": 5,
    "queries.statistics": 6.5,
    "maintenance.retention_sql": 5,
    "queries.repository": 7,
    "maintenance.restoration": 7.5,
    "storage.database": 8,
    "maintenance.run": 10,
    "maintenance.retention": 9,
    "store.health": 9,
    "store.base": 11,
    "cli.render": 11,
    "store.sync": 12,
    "store.aio": 12,
    "__init__": 13,
    "cli.commands": 13,
    "__main__": 14,
}
WITHOUT_DATABASE = [
    "exceptions",
    "backend",
    "schemas.units",
    "rollups.buckets",
    "cache",
    "schemas",
    "ingest.validation",
    "schemas.filters",
    "settings",
    "ingest.account",
    "process.files",
    "storage.company",
    "storage.write_lock",
    "process.lifecycle",
    "process.log",
    "ingest.codec",
    "ingest.queue",
    "ingest.preparer",
    "ingest.spool",
    "ingest.writer",
    "maintenance.background",
    "process.waiting",
]


def file_of(module):
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules():
    """Each module's dotted name below the package's; a package's is that of its `__init__`."""
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "_migrations":
            yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(module):
    """Every module name imported anywhere in a module; nothing is executed."""
    file = file_of(module)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write absolute imports"
            source = node.module or ""
            yield source
            if source.partition(".")[0] == "lynkr_store":
                yield from (f"{source}.{alias.name}" for alias in node.names)


def package_imports(module):
    names = (name.removeprefix("lynkr_store.") for name in imported(module))
    return {name for name in names if name in LEVELS} - {module}


def test_every_module_has_a_level():
    assert set(modules()) == LEVELS.keys(), "give the new module its level"


@pytest.mark.parametrize("module", LEVELS)
def test_imports_point_downward(module):
    for name in package_imports(module):
        if name.partition(".")[0] == module.partition(".")[0]:
            continue  # a package is in order by itself
        assert LEVELS[name] < LEVELS[module], (
            f"{module} may not import {name}; move the shared part lower"
        )


@pytest.mark.parametrize("module", WITHOUT_DATABASE)
def test_the_rules_of_data_and_queue_need_no_database(module):
    tops = {name.partition(".")[0] for name in imported(module)}
    assert not tops & {"sqlalchemy", "alembic"}, "its tests must run without a database"


def test_revisions_import_the_frozen_steps_alone():
    revisions = sorted((PACKAGE.parent / "migrations" / "versions").glob("*.py"))
    assert revisions
    for path in revisions:
        names = [
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lynkr_store")
            for alias in node.names
        ]
        assert set(names) <= {"lynkr_store.migrate.operations"}, "declare the columns it needs"
        assert ast.get_docstring(ast.parse(path.read_text())), "open with the runbook"


def test_the_package_says_that_it_is_typed():
    spec = importlib.util.find_spec("lynkr_store")
    assert spec is not None
    assert (PACKAGE / "py.typed").exists()


def test_both_stores_have_the_same_names_and_parameters():
    names = {name for name in vars(Store) if not name.startswith("_")} - {"engine"}
    assert names == {name for name in vars(AsyncStore) if not name.startswith("_")}
    for name in names:
        ours, theirs = (inspect.signature(getattr(store, name)) for store in (Store, AsyncStore))
        assert ours.parameters == theirs.parameters, name


def test_importing_has_no_side_effects(tmp_path):
    watch = (
        "import os, sys, threading, logging\n"
        "os.environ['LYNKR_STORE_URL'] = 'nonsense'\n"
        "import lynkr_store, lynkr_store.cli.commands\n"
        "assert threading.active_count() == 1, 'a thread'\n"
        "assert not logging.getLogger('lynkr_store').handlers, 'logging set-up'\n"
        "assert not logging.getLogger().handlers, 'logging set-up'\n"
        "assert not os.listdir(), 'a file'\n"
        "assert 'psycopg' not in sys.modules, 'a driver'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", watch], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
