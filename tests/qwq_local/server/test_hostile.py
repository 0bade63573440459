"""Requests made from the server's own description, right and wrong ones: none is a 5xx."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from tests.qwq_local.server.running import THOUGHT, Repeating, Running, fake_qwq, running

PATHS = [
    "/v1/chat/completions",
    "/v1/chat/completions/{id_}/steer",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(lambda: fake_qwq(engine=Repeating(THOUGHT))) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.name)
def test_no_request_is_the_servers_fault(
    server: Running, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Whatever fits the description, and whatever does not."""
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def try_it(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    try_it()
