"""Files that are no models: one line with a remedy, never a crash in native code."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.errors import CheckpointError, GgufError, QwqError
from qwq_local import QwQ
from tests.qwq_local.conftest import NANO


@pytest.mark.parametrize("n_kept", [0, 3, 4, 20, 1000, 60_000, -1])
def test_a_cut_gguf_is_refused(bf16_gguf: Path, tmp_path: Path, n_kept: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(bf16_gguf.read_bytes()[:n_kept])
    with pytest.raises(GgufError, match=r"^/.*cut\.gguf: .*; "):
        QwQ.open(path)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "letter.gguf"
    path.write_text("Dear reader")
    with pytest.raises(GgufError, match=r"letter\.gguf: .*GGUF"):
        QwQ.open(path)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0llama", "architecture is 'llama'"),
        (b"tokenizer.chat_template", b"tokenizer.chat_templatX", "it has no chat template"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenX", "it has no tokenizer"),
        (b"qwen2.block_count", b"qwen2.block_counX", "qwen2.block_count is None and must be"),
        (b"blk.3.attn_q.weight", b"blk.3.attn_X.weight", "llama.cpp cannot load it .*attn_q"),
        (b"token_embd.weight", b"token_embX.weight", "llama.cpp cannot load it .*token_embd"),
    ],
    ids=lambda value: value.decode("latin-1")[-12:] if isinstance(value, bytes) else "",
)
def test_a_gguf_that_lacks_something_is_refused(
    bf16_gguf: Path, tmp_path: Path, old: bytes, new: bytes, error: str
) -> None:
    data = bf16_gguf.read_bytes()
    assert old in data
    path = tmp_path / "odd.gguf"
    path.write_bytes(data.replace(old, new))
    with pytest.raises(GgufError, match=error):
        QwQ.open(path)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("block_count", 0, "block_count is 0 and must be 1 to 512; make"),
        ("block_count", 100_000, "block_count is 100000 and must be 1 to 512; make"),
        ("attention.head_count", 0, "head_count is 0 and must be"),
        ("attention.head_count", 7, "llama.cpp cannot load it"),
        ("embedding_length", 512, "llama.cpp cannot load it"),
        ("context_length", 2**32 - 1, "context_length is 4294967295 and must be"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    bf16_gguf: Path, tmp_path: Path, key: str, value: int, error: str
) -> None:
    """Would catch an abort in native code, which would take the test with it."""
    data = bytearray(bf16_gguf.read_bytes())
    name = f"qwen2.{key}".encode()
    at = data.index(name) + len(name) + 4  # after the value's type
    data[at : at + 4] = value.to_bytes(4, "little")
    path = tmp_path / "odd.gguf"
    path.write_bytes(data)
    with pytest.raises(GgufError, match=error):
        QwQ.open(path)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _break(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:100])

    return cut


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_remove("tokenizer.json"), r"tokenizer\.json: cannot be read .*; fetch"),
        (_remove("tokenizer_config.json"), r"tokenizer_config\.json: cannot be read .*; fetch"),
        (_remove("model.safetensors"), r"model\.safetensors.*; "),
        (_break("config.json"), r"config\.json: cannot be read .*; fetch"),
        (_break("tokenizer.json"), r"tokenizer\.json: .*; fetch"),
        (_break("model.safetensors"), r"model\.safetensors.*; "),
    ],
    ids=["tokenizer", "settings", "weights", "cut config", "cut tokenizer", "cut weights"],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], error: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=error) as caught:
        QwQ.open(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QwqError, match="make quantize"):
        QwQ.open(tmp_path)
