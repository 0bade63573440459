"""Checkpoints that several tests of `convert` read and none changes."""

from pathlib import Path

import pytest

from tests.synthetic import write_checkpoint


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint of 8 layers with random weights, in one file."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random-qwen2")


@pytest.fixture(params=["cuda", "mps"])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device but the processor; a test is skipped for one that is not here."""
    import torch

    name: str = request.param
    backend = torch.cuda if name == "cuda" else torch.backends.mps
    if not backend.is_available():
        pytest.skip(f"no {name} device here")
    return name


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One layer in three shards, to be damaged by the test."""
    config = {"num_hidden_layers": 1, "max_window_layers": 1}
    return write_checkpoint(tmp_path / "small", config=config, n_shards=3)
