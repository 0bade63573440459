"""Parity on the checkpoint's own file, and on files that got something wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from quant_eval.parity import check_parity
from tests.synthetic import write_checkpoint

ONE_LAYER = {"num_hidden_layers": 1}


def failed(path: Path, source: Path) -> dict[str, str]:
    with Checkpoint.open(source) as checkpoint:
        checks = list(check_parity(path, checkpoint, threads=1))
    assert {check.name for check in checks} == {
        "metadata",
        "tokenizer",
        "template",
        "stop tokens",
        "sampling",
    }
    return {check.name: check.words for check in checks if check.verdict != "passed"}


def export(folder: Path, path: Path) -> Path:
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
    return path


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_a_sound_file_is_as_its_checkpoint(tmp_path: Path) -> None:
    """Catches a check that fails what is right."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    assert failed(export(source, tmp_path / "tiny.gguf"), source) == {}


@pytest.mark.parametrize(
    ("file", "edit", "name", "words"),
    [
        (
            "tokenizer_config.json",
            lambda data: data.update(
                chat_template=data["chat_template"].replace("<|im_end|>\n", "<|im_end|>")
            ),
            "template",
            "of the case: one question",
        ),
        (
            "tokenizer.json",
            lambda data: data["model"]["merges"].pop(1),
            "tokenizer",
            "the checkpoint's",
        ),
        (
            "generation_config.json",
            lambda data: data.update(temperature=0.7),
            "sampling",
            "temperature=0.7",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, file: str, edit: Callable[[dict[str, Any]], object], name: str, words: str
) -> None:
    """Catches a check that looks at the file alone, or at the checkpoint alone."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    wrong = shutil.copytree(source, tmp_path / "wrong")
    edit_json(wrong / file, edit)
    problems = failed(export(wrong, tmp_path / "tiny.gguf"), source)
    assert words in problems[name]


def test_a_missing_end_is_named(tmp_path: Path) -> None:
    """Catches a file that does not say where replies end: not every program knows it otherwise."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    path = export(source, tmp_path / "tiny.gguf")
    data = path.read_bytes()
    assert data.count(b"tokenizer.ggml.eos_token_id") == 1
    path.write_bytes(data.replace(b"ggml.eos_token_id", b"ggml.eox_token_id"))
    problems = failed(path, source)
    assert problems["stop tokens"].startswith("has [] and lacks [")
    assert "tokenizer.ggml.eos_token_id is missing" in problems["metadata"]
