# ruff: noqa: INP001, PLR2004, T201 - a script; its numbers are the sample's own
"""Record a generated sample of requests in an embedded database and show its statistics.

The sample is generated from one seed, so it is the same each time, and ends now. It contains no
real traffic.
"""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lynkr_store import Store

REQUESTS = 6_000
FOLDER = Path(".lynkr/demo")

# tier: its share, then (provider, model, ms per token, US dollars per million tokens in and out)
TIERS = {
    "SIMPLE": (0.45, ("ollama", "qwen2.5-coder:7b", 14, 0.0, 0.0)),
    "MEDIUM": (0.30, ("openrouter", "gpt-4o-mini", 9, 0.15, 0.60)),
    "COMPLEX": (0.18, ("bedrock", "claude-sonnet-4-5", 17, 3.0, 15.0)),
    "REASONING": (0.07, ("azure-openai", "o4-mini", 21, 1.1, 4.4)),
}


def sample(count: int, end: datetime) -> Iterator[dict[str, Any]]:
    """Requests of the 24 hours before ``end``, oldest first, busier by day than by night."""
    rng = random.Random(7)  # noqa: S311 - a sample, no secret
    hours = sorted(rng.triangular(0, 24, 15) for _ in range(count))
    for number, hour in enumerate(hours):
        tier = rng.choices(list(TIERS), [share for share, _ in TIERS.values()])[0]
        provider, model, ms_a_token, price_in, price_out = TIERS[tier][1]
        fallback = rng.random() < 0.03
        failed = rng.random() < (0.12 if fallback else 0.02)
        tokens_in = int(rng.lognormvariate(6.8, 0.9))
        tokens_out = 0 if failed else int(rng.lognormvariate(4.6, 0.8))
        latency = 120 + tokens_in / 40 + tokens_out * ms_a_token * rng.uniform(0.7, 1.5)
        cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
        yield {
            "request_id": f"demo-{number}",
            "session_id": f"session-{number // 12}",
            "timestamp": end - timedelta(hours=24 - hour),
            "tier": tier,
            "provider": provider,
            "model": model,
            "routing_method": "fallback" if fallback else "tier_config",
            "request_type": rng.choice(["chat", "code", "tool_result"]),
            "was_fallback": fallback,
            "input_tokens": tokens_in,
            "output_tokens": tokens_out,
            "latency_ms": round(latency, 1),
            "status_code": 503 if failed else 200,
            "error_type": "overloaded" if failed else None,
            "cost_usd": None if rng.random() < 0.01 else round(cost, 6),
            "quality_score": max(0.0, min(100.0, rng.gauss(30 if failed else 68, 12))),
            "request_text": f"sample question {number}",
            "response_text": None if failed else f"sample answer {number}",
        }


def main() -> None:
    """Record the sample, then show it with the command line."""
    shutil.rmtree(FOLDER, ignore_errors=True)  # the demo's own folder, from its last run
    url = f"sqlite:///{FOLDER}/telemetry.db"
    began = time.perf_counter()
    with Store(url) as store:
        for request in sample(REQUESTS, datetime.now(UTC)):
            store.record(request)
        store.flush(timeout_s=60)
        health = store.health()
    seconds = time.perf_counter() - began
    done = f"{health.written:,} of {health.submitted:,} requests"
    print(f"{done} written to {url} in {seconds:.1f} s", flush=True)
    command = [sys.executable, "-m", "lynkr_store"]
    subprocess.run([*command, "stats", "--url", url], check=True)  # noqa: S603
    subprocess.run([*command, "query", "--url", url, "--errors", "--limit", "5"], check=True)  # noqa: S603


if __name__ == "__main__":
    main()
