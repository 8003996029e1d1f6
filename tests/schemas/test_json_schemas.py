"""The JSON schemas of what goes in and comes out say what each field means."""

import pytest
from pydantic import BaseModel

import lynkr_store
from lynkr_store import Health, RoutingEvent, RoutingRow, RoutingStats
from lynkr_store.schemas import base

MODELS = [
    model
    for name in lynkr_store.__all__
    if isinstance(model := getattr(lynkr_store, name), type)
    and issubclass(model, BaseModel)
    and name != "StoreSettings"
]


@pytest.mark.parametrize("mode", ["validation", "serialization"])
@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_described(model, mode):
    properties = model.model_json_schema(mode=mode)["properties"]
    assert [name for name, field in properties.items() if not field.get("description")] == []


def test_a_description_is_the_docstring_of_the_field():
    fields = RoutingEvent.model_json_schema()["properties"]
    assert fields["cost_usd"]["description"].startswith("The price of the request in US dollars")
    assert fields["timestamp"]["description"].startswith("When it happened, kept as epoch")
    assert "   " not in fields["timestamp"]["description"], "not indented as in the source"
    row = RoutingRow.model_json_schema(mode="serialization")["properties"]
    assert row["cost_usd"]["description"] == fields["cost_usd"]["description"]
    assert row["timestamp"]["description"].startswith("UTC; None if"), "its own"


def test_mappings_say_what_their_values_are():
    for mode in ("validation", "serialization"):
        stats = RoutingStats.model_json_schema(mode=mode)["properties"]
        assert stats["requests_by_provider"]["additionalProperties"] == {"type": "integer"}
        assert stats["avg_quality_by_tier"]["additionalProperties"] == {"type": "number"}
        health = Health.model_json_schema(mode=mode)["properties"]
        assert health["rejected_by"]["additionalProperties"] == {"type": "integer"}


def test_without_its_source_a_model_has_no_descriptions(monkeypatch):
    def no_source(_):
        raise OSError

    base._docstrings.cache_clear()
    monkeypatch.setattr("inspect.getsource", no_source)
    try:
        assert "description" not in RoutingEvent.model_json_schema()["properties"]["tier"]
    finally:
        base._docstrings.cache_clear()
