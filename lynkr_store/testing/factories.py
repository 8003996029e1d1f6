"""Records and events as a gateway makes them, by factory-boy."""

import factory

from lynkr_store import RoutingEvent


class RecordFactory(factory.DictFactory):
    """The keywords of ``Store.record``: a request that went well."""

    request_id = factory.Sequence("req-{}".format)
    session_id = factory.Sequence(lambda n: f"session-{n // 5}")
    timestamp = factory.Sequence(lambda n: 1_750_000_000_000 + n * 1_000)
    tier = factory.Iterator(["SIMPLE", "MEDIUM", "COMPLEX", "REASONING"])
    provider = factory.Iterator(["ollama", "openrouter", "bedrock"])
    model = factory.LazyAttribute(lambda o: f"{o.provider}/model")
    request_type = "chat"
    routing_method = "tier_config"
    input_tokens = factory.Sequence(lambda n: 100 + n)
    output_tokens = factory.Sequence(lambda n: 20 + n)
    latency_ms = factory.Sequence(lambda n: 100.0 + n)
    status_code = 200
    cost_usd = 0.001
    quality_score = 70.0
    request_text = "a question"
    response_text = "an answer"

    class Params:  # noqa: D106 - factory-boy reads it
        failed = factory.Trait(
            status_code=503, error_type="overloaded", output_tokens=None, quality_score=20.0
        )
        unmeasured = factory.Trait(
            latency_ms=None,
            cost_usd=None,
            quality_score=None,
            input_tokens=None,
            output_tokens=None,
        )


class EventFactory(factory.Factory[RoutingEvent]):
    """A `RoutingEvent`: a request that went well."""

    class Meta:  # noqa: D106
        model = RoutingEvent

    provider = "ollama"
    timestamp = factory.Sequence(lambda n: 1_750_000_000_000 + n * 1_000)
    tier = "SIMPLE"
    latency_ms = 120.0
