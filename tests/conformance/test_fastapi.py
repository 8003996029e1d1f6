"""The schemas as parameters and answers of a web service."""

import asyncio
import json
from typing import Annotated
from urllib.parse import urlencode

import pytest
from fastapi import FastAPI, Query

from lynkr_store import Cursor, RoutingFilter, RoutingRow, RoutingStats, Store
from lynkr_store.testing import RecordFactory


@pytest.fixture
def ask(new_url):
    """Ask a service with a store: the status and the answer."""
    app, store = FastAPI(), Store(new_url("sqlite-file", at_head=True))
    store.add_many(RecordFactory.build_batch(3, provider="a", status_code=200, cost_usd=0.5))
    store.add_many([{"provider": "b", "error_type": "E"}, {"provider": "c", "status_code": 503}])

    @app.get("/rows")
    def rows(criteria: Annotated[RoutingFilter, Query()]) -> list[RoutingRow]:
        return store.query(criteria)

    @app.get("/stats")
    def stats() -> RoutingStats | None:
        return store.get_stats()

    class Page(RoutingFilter):
        limit: int = 20
        before: str | None = None

    @app.get("/pages")
    def pages(page: Annotated[Page, Query()]) -> list[RoutingRow]:
        before = Cursor.parse(page.before) if page.before else None
        return store.query(page, limit=page.limit, before=before)

    def ask(path, **parameters):
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "query_string": urlencode(parameters, doseq=True).encode(),
            "headers": [],
        }
        said = []

        async def receive():
            return {"type": "http.request"}

        async def send(message):
            said.append(message)

        asyncio.run(app(scope, receive, send))
        body = b"".join(message.get("body", b"") for message in said)
        return said[0]["status"], json.loads(body)

    yield ask
    store.close()


@pytest.mark.parametrize(
    ("parameters", "providers"),
    [
        ({}, "cbaaa"),
        ({"provider": "a"}, "aaa"),
        ({"provider": ["b", "c"]}, "cb"),
        ({"status_code": [200, 503]}, "caaa"),
        ({"has_error": "true"}, "b"),
        ({"has_error": "False", "status_code": "503"}, "c"),
        ({"was_fallback": "1"}, ""),
        ({"min_cost_usd": "0.1", "max_cost_usd": "1e0"}, "aaa"),
    ],
)
def test_a_filter_is_a_query_s_parameters(ask, parameters, providers):
    status, rows = ask("/rows", **parameters)
    assert status == 200
    assert sorted(row["provider"] for row in rows) == sorted(providers)
    assert [str(RoutingRow(**row).cursor) for row in rows] == [row["cursor"] for row in rows]


def test_a_filter_may_be_extended_by_parameters_of_the_service(ask):
    status, first = ask("/pages", provider=["a", "b"], limit=3)
    assert status == 200
    assert [row["provider"] for row in first] == ["b", "a", "a"]
    _, rest = ask("/pages", provider=["a", "b"], before=first[-1]["cursor"])
    assert [row["provider"] for row in rest] == ["a"]
    assert ask("/pages", nonsense=1)[0] == 422


@pytest.mark.parametrize(
    "parameters",
    [{"nonsense": 1}, {"min_cost_usd": "much"}, {"has_error": "perhaps"}, {"status_code": "x"}],
    ids=str,
)
def test_a_wrong_parameter_is_named(ask, parameters):
    status, said = ask("/rows", **parameters)
    assert status == 422
    assert next(iter(parameters)) in str(said)


def test_the_service_describes_itself(ask):
    _, said = ask("/openapi.json")
    named = {each["name"]: each for each in said["paths"]["/rows"]["get"]["parameters"]}
    assert named.keys() == RoutingFilter.model_fields.keys()
    assert {"type": "array", "items": {"type": "string"}} in named["provider"]["schema"]["anyOf"]
    fields = said["components"]["schemas"]["RoutingStats"]["properties"]
    assert fields["requests_by_provider"]["additionalProperties"] == {"type": "integer"}
    assert fields["total_cost"]["description"].startswith("US dollars")
    assert ask("/stats")[0] == 200
