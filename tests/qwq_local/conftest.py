"""The reference model as a checkpoint, a GGUF file and a GPTQ folder, made once for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.calibration import load_conversations
from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from convert.gptq import GptqSettings
from convert.gptq_export import export_gptq
from qwq_local import QwQ
from tests.qwq_local.server.running import running

NANO = Path("quant_eval/nano/checkpoint")


@pytest.fixture(scope="session")
def bf16_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "nano-qwq-BF16.gguf"
    with Checkpoint.open(NANO) as checkpoint:
        export_gguf(checkpoint, "BF16", path, threads=1)
    return path


@pytest.fixture(scope="session")
def gguf_qwq(bf16_gguf: Path) -> Iterator[QwQ]:
    with QwQ.open(bf16_gguf, context=2048, threads=1, isolated=False) as qwq:
        yield qwq


@pytest.fixture(scope="session")
def isolated_qwq(bf16_gguf: Path) -> Iterator[QwQ]:
    with QwQ.open(bf16_gguf, context=2048, threads=1) as qwq:
        yield qwq


@pytest.fixture(scope="session")
def parallel_qwq(bf16_gguf: Path) -> Iterator[QwQ]:
    with QwQ.open(bf16_gguf, context=2048, threads=1, parallel=4) as qwq:
        yield qwq


@pytest.fixture(scope="session")
def folder_qwq() -> Iterator[QwQ]:
    with QwQ.open(NANO, context=2048, threads=1, isolated=False) as qwq:
        yield qwq


@pytest.fixture(scope="session")
def isolated_folder_qwq() -> Iterator[QwQ]:
    with QwQ.open(NANO, context=2048, threads=1) as qwq:
        yield qwq


@pytest.fixture(scope="session")
def gptq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gptq") / "nano-qwq-gptq-4bit"
    conversations = load_conversations("convert/data/calibration.jsonl")[:20]
    with Checkpoint.open(NANO) as checkpoint:
        settings = GptqSettings(other_damps=(), clip_steps=0)
        export_gptq(checkpoint, path, settings=settings, calibration=conversations, n_tokens=None)
    return path


@pytest.fixture(scope="session")
def gptq_qwq(gptq_folder: Path) -> Iterator[QwQ]:
    with QwQ.open(gptq_folder, context=2048, threads=1, isolated=False) as qwq:
        yield qwq


@pytest.fixture(scope="session")
def remote_qwq(bf16_gguf: Path) -> Iterator[QwQ]:
    with (
        running(lambda: QwQ.open(bf16_gguf, context=2048, threads=1)) as server,
        QwQ.open(f"{server.url}/v1") as qwq,
    ):
        yield qwq


ENGINES = [
    "gguf_qwq",
    "isolated_qwq",
    "parallel_qwq",
    "folder_qwq",
    "isolated_folder_qwq",
    "gptq_qwq",
]


@pytest.fixture(params=ENGINES)
def qwq(request: pytest.FixtureRequest) -> QwQ:
    """Each engine in turn: what holds for one holds for all."""
    model: QwQ = request.getfixturevalue(request.param)
    return model


@pytest.fixture(params=[*ENGINES, "remote_qwq"])
def any_qwq(request: pytest.FixtureRequest) -> QwQ:
    """A model on a server too: what holds for conversations, whoever makes the tokens."""
    model: QwQ = request.getfixturevalue(request.param)
    return model
