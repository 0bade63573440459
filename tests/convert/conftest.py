"""Checkpoints that several tests of `convert` read and none changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.synthetic import write_checkpoint


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint of 8 layers with random weights, in one file."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random-qwen2")


@pytest.fixture(params=["cuda", "mps"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kind of device but the processor; one that is not here is pretended."""
    from tests.pretended_device import real_or_pretended  # imports torch

    name: str = request.param
    with real_or_pretended(name):
        yield name


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One layer in three shards, to be damaged by the test."""
    config = {"num_hidden_layers": 1, "max_window_layers": 1}
    return write_checkpoint(tmp_path / "small", config=config, n_shards=3)
