"""Headers of GPTQ folders that others made."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from convert.errors import CheckpointError
from convert.gptq_headers import read_gptq_headers
from tests.gptq_cases import write_case


def test_linears_of_other_bits_are_read_where_config_says_dynamic(tmp_path: Path) -> None:
    """Would catch GPTQModel's mixed folders refused, and any shape accepted in their name."""
    folder = write_case("4 bits, groups of 128", tmp_path / "mixed")
    other = write_case("8 bits, rows", tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    others = load_file(other / "model.safetensors")
    tensors |= {name: tensor for name, tensor in others.items() if ".down_proj." in name}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.qweight has shape"):
        read_gptq_headers(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["dynamic"] = {r"+:.*down_proj": {"bits": 8, "group_size": -1}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_gptq_headers(folder).bits == 4

    name = next(name for name in tensors if name.endswith("down_proj.qweight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.qweight has shape"):
        read_gptq_headers(folder)
