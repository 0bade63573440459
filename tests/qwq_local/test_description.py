"""What a checkpoint's files say about running it, in the forms that are found in the wild."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.errors import CheckpointError
from qwq_local.description import describe_folder


def folder(path: Path, **files: dict[str, Any]) -> Path:
    contents: dict[str, dict[str, Any]] = {"config": {}, "tokenizer_config": {}}
    for name, content in (contents | files).items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_template_has_its_own_file_or_stands_in_the_settings(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "listed"}]
    for given, expected in (("alone", "alone"), (named, "listed")):
        path = folder(tmp_path, tokenizer_config={"chat_template": given})
        assert describe_folder(path).template == expected
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert describe_folder(tmp_path).template == "own file"


def test_no_template_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no chat template.*; fetch"):
        describe_folder(folder(tmp_path))


def test_special_tokens_are_texts_or_objects(tmp_path: Path) -> None:
    tokens = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>", "bos_token": None}
    path = folder(tmp_path, tokenizer_config={"chat_template": "x"} | tokens)
    assert describe_folder(path).template_variables == {
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
    }


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8}),
        ({"eos_token_id": 7}, {}, {7}),
        ({}, {"eos_token_id": 9}, {9}),
        ({}, {}, set()),
    ],
)
def test_stop_ids(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: set[int]
) -> None:
    """Would catch a reply that runs on because one of two stop tokens was left out."""
    path = folder(
        tmp_path,
        tokenizer_config={"chat_template": "x"},
        generation_config=generation,
        config=config,
    )
    assert describe_folder(path).stop_ids == expected
