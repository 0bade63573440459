"""/metrics, as Prometheus's own client reads it."""

import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.qwq_local.server.running import THOUGHT, Running, fake_qwq, running
from tests.qwq_local.server.test_engine_room import Held, answer, asking


def scrape(server: Running) -> dict[str, float]:
    """What is there between two replies; each is a counter or a gauge, and says what it counts."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=120) as response:
        assert response.headers.get_content_type() == "text/plain"
        families = list(text_string_to_metric_families(response.read().decode()))
    assert all(family.documentation for family in families)
    samples = [(f.type, sample) for f in families for sample in f.samples]
    assert all(sample.name.endswith("_total") == (kind == "counter") for kind, sample in samples)
    return {sample.name.removeprefix("qwq_"): sample.value for _, sample in samples}


def asked(server: Running, **body: Any) -> dict[str, float]:
    """What a reply moves."""
    server.wait(lambda: server.room.n_running == 0)
    before = scrape(server)
    with asking(server, **body) as request:
        status, reply = answer(request)
    assert status == 200
    server.wait(lambda: server.room.n_running == 0)
    after = scrape(server)
    moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    usage = reply["usage"]
    assert moved["requests_total"] == 1
    assert moved["prompt_tokens_total"] == usage["prompt_tokens"]
    assert moved["completion_tokens_total"] == usage["completion_tokens"]
    n_thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert moved.get("reasoning_tokens_total", 0) == n_thought
    n_cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert moved.get("cached_tokens_total", 0) == n_cached
    # what Prometheus's rate() makes speeds of
    timings = reply["timings"]
    assert moved["prefill_seconds_total"] == pytest.approx(timings["prefill_s"], abs=1e-3)
    assert moved["decode_seconds_total"] == pytest.approx(timings["decode_s"], abs=1e-3)
    return moved


def test_counters_follow_the_replies(nano_server: Running) -> None:
    """Tokens, cache hits and the times that speeds come from, each as the reply itself says."""
    messages = [{"role": "user", "content": "How many stories are there? " * 20}]
    asked(nano_server, messages=messages, max_tokens=20)
    again = asked(nano_server, messages=messages, max_tokens=30, thinking_budget=5)
    assert again["cached_tokens_total"] > again["prompt_tokens_total"] / 2
    assert 5 <= again["reasoning_tokens_total"] <= again["completion_tokens_total"]


def test_gauges_follow_the_queue() -> None:
    """And whether the engine can be asked."""
    engine = Held(*[THOUGHT] * 3)
    with running(lambda: fake_qwq(engine=engine)) as server:
        names = ("requests_running", "requests_waiting", "engine_ready")

        def gauges() -> tuple[float, ...]:
            scraped = scrape(server)
            return tuple(scraped[name] for name in names)

        assert gauges() == (0, 0, 1)
        with asking(server) as first, asking(server) as second, asking(server) as third:
            server.wait(lambda: gauges() == (1, 2, 1))
            engine.go.set()
            assert [answer(one)[0] for one in (first, second, third)] == [200] * 3
        server.wait(lambda: gauges() == (0, 0, 1))
        server.room.close()
        assert gauges() == (0, 0, 0)
