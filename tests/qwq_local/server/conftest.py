"""A server with the reference model, for the tests that need one that thinks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwq_local import QwQ
from tests.qwq_local.server.running import Running, running


@pytest.fixture(scope="session")
def nano_server(bf16_gguf: Path) -> Iterator[Running]:
    with running(lambda: QwQ.open(bf16_gguf, context=2048, threads=1)) as server:
        yield server
