"""The reference model, as a checkpoint and as a GGUF file, made once for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from qwq_local import QwQ

NANO = Path("quant_eval/nano/checkpoint")


@pytest.fixture(scope="session")
def bf16_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "nano-qwq-BF16.gguf"
    with Checkpoint.open(NANO) as checkpoint:
        export_gguf(checkpoint, "BF16", path, threads=1)
    return path


@pytest.fixture(scope="session")
def gguf_qwq(bf16_gguf: Path) -> Iterator[QwQ]:
    with QwQ.open(bf16_gguf, context=2048, threads=1) as qwq:
        yield qwq


@pytest.fixture(scope="session")
def folder_qwq() -> Iterator[QwQ]:
    with QwQ.open(NANO, context=2048, threads=1) as qwq:
        yield qwq


@pytest.fixture(params=["gguf_qwq", "folder_qwq"])
def qwq(request: pytest.FixtureRequest) -> QwQ:
    """Each engine in turn: what holds for one holds for all."""
    model: QwQ = request.getfixturevalue(request.param)
    return model
