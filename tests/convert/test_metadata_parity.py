"""What a file says otherwise than its checkpoint is named, the grave apart from the rest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from convert.gguf_parts import GgufModel, read_model
from convert.metadata_parity import Difference, metadata_differences
from qwq_local.cli import main
from tests.synthetic import write_checkpoint

ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)


def converted(folder: Path, path: Path) -> GgufModel:
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path)
    return read_model(path)


def differences(model: GgufModel, folder: Path) -> list[Difference]:
    with Checkpoint.open(folder) as checkpoint:
        return metadata_differences(model, checkpoint)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def swap_tokens(table: dict[str, Any]) -> None:
    vocab = table["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    ("file_name", "change", "expected"),
    [
        (
            "config.json",
            {"rope_theta": 1e4},
            [("qwen2.rope.freq_base", "is 1e+06 and 10000 by", True)],
        ),
        ("config.json", {"rms_norm_eps": 1e-6}, [("rms_epsilon", "is 1e-05 and 1e-06 by", True)]),
        (
            "config.json",
            {"rope_scaling": YARN},
            [
                ("scaling.type", "is missing, and yarn by the checkpoint", True),
                ("scaling.factor", "is missing, and 4 by", True),
                ("scaling.original_context_length", "is missing, and 32768 by", True),
            ],
        ),
        (
            "config.json",
            {"max_position_embeddings": 131072},
            [("qwen2.context_length", "is 4096 and 131072 by", False)],
        ),
        (
            "tokenizer_config.json",
            {"eos_token": "<|endoftext|>"},
            [("ggml.eos_token_id", "is 261 and 259 by", True)],
        ),
        (
            "tokenizer.json",
            swap_tokens,
            [("ggml.tokens", "in 2 of 320 entries, first in 97: a and b", True)],
        ),
        (
            "tokenizer_config.json",
            {"chat_template": "x" * 100},
            [("chat_template", "differs from the checkpoint's from character 0 on", False)],
        ),
        ("generation_config.json", {"top_k": 20}, [("sampling.top_k", "is 40 and 20 by", False)]),
    ],
)
def test_differences(
    tmp_path: Path,
    folder: Path,
    file_name: str,
    change: dict[str, Any] | Callable[[dict[str, Any]], object],
    expected: list[tuple[str, str, bool]],
) -> None:
    """A checkpoint changed after it was converted: just what changed, and none of it before."""
    model = converted(folder, tmp_path / "x.gguf")
    assert differences(model, folder) == []
    edit_json(
        folder / file_name,
        change if callable(change) else lambda table: table.update(change),
    )
    found = differences(model, folder)
    assert len(found) == len(expected), found
    for one, (key, words, grave) in zip(found, expected, strict=True):
        assert one.key.endswith(key)
        assert words in one.words
        assert one.grave == grave


def test_scaling_that_the_checkpoint_has_not(tmp_path: Path, folder: Path) -> None:
    """YaRN that was written into the file alone is grave: short texts are computed otherwise."""
    edit_json(folder / "config.json", lambda config: config.update(rope_scaling=YARN))
    model = converted(folder, tmp_path / "x.gguf")
    edit_json(folder / "config.json", lambda config: config.pop("rope_scaling"))
    found = differences(model, folder)
    assert [(one.key.rpartition(".")[2], one.grave) for one in found] == [
        ("type", True),
        ("factor", True),
        ("original_context_length", True),
    ]
    assert found[0].words == "is yarn, and missing by the checkpoint"


def test_in_the_program(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A note leaves the exit code at 0; a grave difference is the error, once tensors are sound."""
    path = converted(folder, tmp_path / "x.gguf").path
    monkeypatch.setattr("sys.argv", ["qwq", "verify", str(path), "--source", str(folder)])

    def run() -> tuple[object, str]:
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, capsys.readouterr().err

    edit_json(folder / "generation_config.json", lambda table: table.update(top_k=20))
    assert run() == (0, "note: general.sampling.top_k is 40 and 20 by the checkpoint\n")
    edit_json(folder / "config.json", lambda config: config.update(rope_theta=1e4))
    code, stderr = run()
    assert code == 1
    assert f"error: {path}: qwen2.rope.freq_base is 1e+06 and 10000 by the checkpoint; " in stderr
