"""The examples of the README and of the documentation run, and what their pages say is so."""

import re

import pytest

from lynkr_store import (
    Health,
    ProviderStats,
    RoutingAccuracy,
    RoutingEvent,
    RoutingFilter,
    RoutingStats,
    Store,
    StoreSettings,
)
from lynkr_store import __all__ as public_names
from lynkr_store.cli.commands import app
from tests.conftest import POSTGRES
from tests.support.gateway import RELEASES, open_as
from tests.support.model_server import serving
from tests.support.pages import PAGES, Runner, blocks, examples
from tests.support.recorded import ROOT

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
QUIET = pytest.mark.filterwarnings("ignore")
NOISY = {"litellm.md": [QUIET], "opentelemetry.md": [QUIET]}  # at the imports of other packages
EXAMPLES = [
    pytest.param(
        page,
        found,
        id=str(page.relative_to(ROOT)),
        marks=() if page.name == "README.md" else [pytest.mark.slow, *NOISY.get(page.name, ())],
    )
    for page, found in examples()
]

APPLICATION = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

URL = "sqlite:///application.db"


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
"""


INI = """
[alembic]
script_location = migrations
path_separator = os
prepend_sys_path = .
"""


@pytest.fixture(scope="module")
def models():
    with serving() as url:
        yield url


@pytest.mark.parametrize(("page", "found"), EXAMPLES)
def test_the_examples_run(page, found, tmp_path, new_url, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    if page.name == "alembic.md":
        (tmp_path / "application.py").write_text(APPLICATION)
        (tmp_path / "alembic.ini").write_text(INI)
        (tmp_path / "migrations" / "versions").mkdir(parents=True)
    if page.name == "adopt.md":
        open_as(RELEASES["9.4.6"], tmp_path / "telemetry.db").close()
    runner = Runner(monkeypatch, new_url(POSTGRES[-1], at_head=True), models)
    for block in found:
        if block.language != "sql":  # tests/faults/test_other_roles.py runs these
            runner.run(block)
        if (block.title or "").startswith("test_"):
            assert f"$ pytest -q {block.title}" in page.read_text()


def test_the_first_example_has_ten_lines():
    first = next(block for block in blocks(README) if block.language == "python")
    assert len([line for line in first.text.splitlines() if line]) <= 10


def test_every_option_is_named():
    for name in StoreSettings.model_fields:
        assert f"`{name}`" in README, f"name the option {name}"


def test_every_dimension_is_named():
    for name in RoutingFilter.model_fields:
        assert name.removeprefix("min_").removeprefix("max_") in README


def test_every_command_is_named():
    page = (DOCS / "reference" / "command.md").read_text()
    names = [command.callback.__name__ for command in app.registered_commands]
    assert " | ".join(names) in README
    for name in names:
        assert re.search(rf"(?m)^\| `{name}\b", page), name


def test_every_public_method_is_named():
    for name in vars(Store):
        if not name.startswith("_") and name != "engine":
            assert f"{name}(" in README, f"say what {name} does"


def test_every_public_name_has_its_reference():
    page = (DOCS / "reference" / "api.md").read_text()
    named = re.findall(r"(?m)^::: lynkr_store\.(\w+)$", page)
    assert sorted(named) == sorted(set(public_names) - {"__version__"})


def test_every_field_has_its_meaning_and_kind():
    page = (DOCS / "reference" / "fields.md").read_text()
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([\w ]+) \| (.*) \|$", page)
    properties = RoutingEvent.model_json_schema()["properties"]
    said = {name: " ".join(found["description"].split()) for name, found in properties.items()}
    assert {name: meaning for name, _, meaning in rows} == said
    for name in said:
        assert f"`{name}`" in README


def test_every_figure_of_health_is_explained():
    """Nobody can alert on a figure that is not named."""
    text = "".join(page.read_text() for page in PAGES)
    for name in Health.model_fields:
        assert f"`{name}`" in text or f"health.{name}" in text, name


def test_every_statistics_figure_has_its_meaning():
    page = (DOCS / "reference" / "statistics.md").read_text()
    for result in (RoutingStats, ProviderStats, RoutingAccuracy):
        for name in result.model_fields:
            assert f"`{name}`" in page, f"{result.__name__}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page):
    text = page.read_text()
    for name in re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|md|toml))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "lynkr_store")), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


def test_the_readme_has_no_link_that_a_package_index_cannot_follow():
    assert re.findall(r"\]\((?!https://)", README) == []
    for page in PAGES[1:]:
        name = str(page.relative_to(ROOT))
        assert f"`{name}`" in README or page.name in (
            "index.md",
            "first-hour.md",
            "values.md",
            "api.md",
        ), name


def test_lines_are_short():
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            short = len(line) <= 100 or line.startswith(("|", "$", "  ")) or "http" in line
            assert short, f"{page.name}:{number}"
