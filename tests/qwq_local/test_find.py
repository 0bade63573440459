"""Which model a path means."""

import os
from pathlib import Path

import pytest

from convert.errors import QwqError
from qwq_local.find import ModelPath, find_model, newest_model


def gguf(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"GGUF")
    return path


def checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_files_and_checkpoints_are_themselves(tmp_path: Path) -> None:
    file, folder = gguf(tmp_path, "a.gguf"), checkpoint(tmp_path / "b")
    assert find_model(file) == ModelPath(file, "gguf")
    assert find_model(folder) == ModelPath(folder, "folder")


def test_the_best_of_a_folder(tmp_path: Path) -> None:
    """Would catch a choice by chance, or Q2_K where Q4_K_M is there."""
    gptq = checkpoint(tmp_path / "a-gptq-4bit")
    assert find_model(tmp_path).path == gptq
    for name in ("a-Q2_K.gguf", "a-BF16.gguf", "a-Q8_0.gguf", "a-Q4_K_M.gguf"):
        path = gguf(tmp_path, name)
        assert find_model(tmp_path) == ModelPath(path, "gguf")
    gguf(tmp_path, "a-Q6_K.gguf")
    gguf(tmp_path, "b-Q4_K_M.gguf.partial")
    assert find_model(tmp_path) == ModelPath(path, "gguf")


def test_the_newest_of_the_models(tmp_path: Path) -> None:
    old = gguf(tmp_path / "old", "old-Q4_K_M.gguf")
    new = gguf(tmp_path / "new", "new-Q2_K.gguf")
    (tmp_path / "empty").mkdir()
    os.utime(old.parent, (1_000, 1_000))
    os.utime(new.parent, (2_000, 2_000))
    assert newest_model(tmp_path).path == new
    os.utime(old.parent, (3_000, 3_000))
    assert newest_model(tmp_path).path == old


def test_nothing_there_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(QwqError, match=r"there is no such file or folder; check"):
        find_model(tmp_path / "none")
    with pytest.raises(QwqError, match=r"holds no model.*`make quantize`"):
        find_model(tmp_path)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(QwqError, match=r"no model was found there; .*`make quantize`"):
            newest_model(folder)
