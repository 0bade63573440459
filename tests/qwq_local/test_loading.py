"""What a process really takes for a model: against the plan, and given back when it is closed."""

from pathlib import Path

import psutil
import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from qwq_local import QwQ
from tests.loading import Load, Memory, measure
from tests.synthetic import write_checkpoint

CONFIG = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "vocab_size": 16_384,
}
MIB = 1 << 20
OWN_NBYTES = 48 * MIB
"""What a process takes beside what is planned: the vocabulary, threads, holes in its heap."""
LOOSE_NBYTES = 24 * MIB
"""What may come and go between two loads that are the same; half of what one takes, or less."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", config=CONFIG)


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    path = folder.parent / "wide.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "BF16", path, threads=1)
    return path


def taken(memory: Memory) -> int:
    return memory.most - memory.before


@pytest.mark.slow
def test_gguf_takes_what_was_planned_and_gives_it_back(gguf: Path, tmp_path: Path) -> None:
    """Two contexts and types, read to the end; then the same thrice; then a long context.

    Would catch buffers that nobody planned, n_ctx x n_vocab logits (2 GiB here), and a leak.
    """
    short, long, same = 1024, 4096, Load(gguf, 1024, "f16")
    loads = [
        same,  # imports what there is to import
        *(Load(gguf, short, kv_type, n_read=short - 64) for kv_type in ("q8_0", "f16")),
        *(Load(gguf, long, kv_type, n_read=long - 64) for kv_type in ("q8_0", "f16")),
        Load(gguf, 32_768, "f16", n_read=600),
        *(same, same, same),
    ]
    first, *planned, again, _, last = measure(loads, tmp_path / "log")
    assert len(planned) == 5
    for memory in planned[:4]:
        assert 0.8 * memory.planned < taken(memory) < memory.planned + OWN_NBYTES
    assert taken(planned[4]) < 300 * MIB
    assert last.after < again.after + LOOSE_NBYTES
    assert last.after < first.after + OWN_NBYTES


@pytest.mark.slow
def test_a_folder_takes_what_was_planned_and_gives_it_back(folder: Path, tmp_path: Path) -> None:
    """Would catch weights or buffers that stay when the engine is closed."""
    same, full = Load(folder, 1024), Load(folder, 4096, n_read=4032)
    first, second, memory, again, _, last = measure(
        [same, same, full, same, same, same], tmp_path / "log"
    )
    file_nbytes = (folder / "model.safetensors").stat().st_size  # mapped while it is read
    assert second.planned == first.planned > 0
    assert taken(memory) > 0.6 * (memory.planned - file_nbytes)
    assert taken(memory) < memory.planned + file_nbytes + OWN_NBYTES
    assert last.after < again.after + LOOSE_NBYTES


@pytest.mark.slow
def test_an_isolated_engine_leaves_nothing(gguf: Path, tmp_path: Path) -> None:
    loads = [Load(gguf, 1024, isolated=True)] * 4
    _, again, _, last = measure(loads, tmp_path / "log")
    assert last.after < again.after + LOOSE_NBYTES
    children = set(psutil.Process().children(recursive=True))
    with QwQ.open(gguf, context=64, threads=1):
        (child,) = set(psutil.Process().children(recursive=True)) - children
        assert child.memory_info().rss > 0
    assert not child.is_running()
