"""GPTQ folders of drawn codes, to hold our reading of the format against llama.cpp's converter."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from convert.checkpoint import Float32Array
from convert.gptq import GptqSettings, GptqSolution
from convert.gptq_export import is_quantized
from convert.gptq_format import packed_arrays, quantization_config
from convert.qwen2 import TensorSpec, parse_config, tensor_specs
from tests.synthetic import CONFIG, write_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "gptq_weights.json"
"""SHA-256 of every matrix as llama.cpp's converter reads it; made by tests/golden/make.py."""

CASES = {
    "2 bits, groups of 32": GptqSettings(bits=2, group_size=32),
    "4 bits, groups of 128": GptqSettings(),
    "4 bits, columns of any group, version 2": GptqSettings(
        group_size=64, order="activations", version=2
    ),
    "8 bits, rows": GptqSettings(bits=8, group_size=-1),
}
"""The converter has no reading of 3 bits."""

ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}
LINEARS = tuple(
    spec
    for spec in tensor_specs(parse_config(CONFIG | ONE_LAYER, "GPTQ case"))
    if is_quantized(spec)
)


def write_case(name: str, folder: Path) -> Path:
    """Write the folder of a case: every linear of one layer, all else of a synthetic checkpoint."""
    from safetensors.torch import load_file, save_file

    settings = CASES[name]
    write_checkpoint(folder, config=ONE_LAYER)
    tensors = load_file(folder / "model.safetensors")
    for seed, spec in enumerate(LINEARS):
        del tensors[spec.name]
        for part, values in packed_arrays(spec.name, _drawn(spec, settings, seed), settings):
            tensors[part] = torch.from_numpy(values)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(settings, {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _drawn(spec: TensorSpec, settings: GptqSettings, seed: int) -> GptqSolution:
    random = np.random.default_rng(seed)
    n_out, n_in = spec.shape
    group_size = settings.columns_per_group(n_in)
    grid = (n_out, n_in // group_size)
    is_ordered = settings.order != "activations"
    columns = np.arange(n_in) if is_ordered else random.permutation(n_in)
    return GptqSolution(
        torch.from_numpy(random.integers(0, settings.max_code + 1, (n_out, n_in), dtype=np.uint8)),
        torch.from_numpy(random.uniform(1e-4, 1e-2, grid).astype(np.float16)),
        torch.from_numpy(random.integers(1, settings.max_code + 1, grid, dtype=np.uint8)),
        torch.from_numpy(columns // group_size),
        settings.damp,
    )


def digest(weight: Float32Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(weight, dtype="<f4").tobytes()).hexdigest()
