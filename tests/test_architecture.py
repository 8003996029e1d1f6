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

ORDER = (
    {"exceptions", "version", "backend"},
    {"process"},
    {"schemas", "cache"},
    {"settings"},
    {"ingest", "db"},
    {"migrate"},
    {"storage"},
    {"rollups"},
    {"queries", "maintenance", "transfer"},
    {"store"},
    {"cli", "__init__"},
    {"__main__", "integrations", "testing"},
)
"""A package imports only packages of earlier lines; those of one line never import each other."""
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}
FOR_HOSTS = ("integrations", "testing")
WITHOUT_DATABASE = ("exceptions", "version", "backend", "process", "schemas", "cache", "settings")
WITHOUT_DATABASE += ("ingest",)


def modules(package):
    """Each file of a package, or the one module, as a dotted name and a path."""
    folder = PACKAGE / package
    if not folder.is_dir():
        return [(f"lynkr_store.{package}", PACKAGE / f"{package}.py")]
    return [(f"lynkr_store.{package}.{file.stem}", file) for file in sorted(folder.glob("*.py"))]


def imported(file):
    """Every name that a file imports, dotted, anywhere in it; nothing is executed."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_package_has_its_place():
    found = {path.stem for path in PACKAGE.glob("*.py")}
    found |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"_migrations"}
    assert found == LEVEL.keys()


@pytest.mark.parametrize("package", sorted(LEVEL))
def test_imports_point_downward(package):
    for _, file in modules(package):
        for name in imported(file):
            if package in FOR_HOSTS and name.startswith("lynkr_store."):
                public = name.removeprefix("lynkr_store.")
                assert public in lynkr_store.__all__ or public.startswith(f"{package}."), (
                    f"{file.name} imports {name}: it uses public names, as a host does"
                )
                continue
            top, _, other = name.partition(".")
            other = other.partition(".")[0]
            if top == "lynkr_store" and other != package:
                assert other in LEVEL, f"{file.name} imports {name}: import it where it is made"
                assert LEVEL[other] < LEVEL[package], (
                    f"{package}/{file.name} may not import {name}: move the shared part lower"
                )
    if package == "cache":
        assert not {n for n in imported(PACKAGE / "cache.py") if "lynkr_store.schemas" in n}


@pytest.mark.parametrize(
    "package", sorted(path.name for path in PACKAGE.iterdir() if path.is_dir())
)
def test_a_package_says_what_it_is_for(package):
    init = PACKAGE / package / "__init__.py"
    if init.exists():
        assert len(ast.get_docstring(ast.parse(init.read_text()))) > 150


def test_what_needs_no_database_loads_no_sqlalchemy():
    names = [name for package in WITHOUT_DATABASE for name, _ in modules(package)]
    look = (
        "import importlib, sys, types\n"
        "package = sys.modules['lynkr_store'] = types.ModuleType('lynkr_store')\n"
        f"package.__path__ = [{str(PACKAGE)!r}]  # without what its __init__ imports\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('sqlalchemy', 'alembic'):\n"
        "        assert heavy not in sys.modules, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


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
