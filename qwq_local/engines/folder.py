"""A checkpoint's folder before torch reads anything of it: what it holds, and what it will take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import QwqError
from qwq_local.description import is_gptq, read_json
from qwq_local.engine import EngineSettings
from qwq_local.engines.loop import PREFILL_BATCH, n_logits_rows
from qwq_local.memory import choose_context
from qwq_local.memory_plan import GPU_RESERVE_NBYTES, Device, MemoryPlan, Share, find_memory
from qwq_local.rope import longest_context

if TYPE_CHECKING:
    from convert.checkpoint import TensorInfo
    from convert.qwen2 import Qwen2Config

STEP_UNIT = 1024
"""On CUDA a decoded id sees so many positions or a multiple; the last ones are masked."""
_ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TORCH_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PACKED = ("qweight", "qzeros", "scales", "g_idx")
_UNPACKING_NBYTES = 28
"""Of a weight of the largest matrix, while a processor's kernel unpacks it: as measured."""
_SMALLEST_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder whose headers are those of the model that its config.json describes.

    dtype: torch's name of what the checkpoint is meant to be computed in.
    """

    path: Path
    model: Qwen2Config
    tensors: dict[str, TensorInfo]
    is_gptq: bool
    dtype: str


def read_folder(path: Path) -> Folder:
    """Check all that can be checked without reading weights.

    Raises CheckpointError naming the file or tensor that is wrong.
    """
    config = read_json(path / "config.json")
    if is_gptq(config):
        from convert.gptq_headers import read_gptq_headers

        headers = read_gptq_headers(path)
        model, tensors = headers.model, headers.tensors
    else:
        from convert.checkpoint import Checkpoint

        with Checkpoint.open(path) as checkpoint:
            model, tensors = checkpoint.model, checkpoint.tensors
    named = config.get("dtype", config.get("torch_dtype"))
    if not isinstance(named, str) or named not in _ITEM_NBYTES:
        # as transformers does, what the first weight is stored in
        named = _TORCH_TYPES[tensors["model.embed_tokens.weight"].dtype]
    return Folder(path, model, tensors, is_gptq(config), named)


def torch_device(torch: Any) -> Any:
    """The device of torch that a model is put on, whole."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def import_torch(path: Path) -> Any:
    """torch. Raises QwqError where it or transformers is missing."""
    try:
        import torch
        import transformers  # noqa: F401 - to tell that it is missing
    except ImportError as error:
        raise QwqError(
            f"{path}: running a folder of safetensors needs torch and transformers; "
            "install them with: pip install 'qwq-local[gptq]'"
        ) from error
    return torch


def find_torch_device(torch: Any) -> Device:
    """What the device that torch uses has free."""
    kind = torch_device(torch).type
    if kind == "cuda":
        return Device(torch.cuda.get_device_name(), True, torch.cuda.mem_get_info()[0])
    memory = find_memory()
    if kind == "mps":
        n_left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return Device("Metal", True, min(n_left, memory.free_nbytes))
    return memory


def plan_folder(folder: Folder, settings: EngineSettings, device: Device) -> MemoryPlan:
    """What torch takes of the device that holds the whole model, whether it fits or not.

    On a processor everything is computed in float32, on a GPU in the checkpoint's own type; the
    kv_cache is stored in that too. Weights are counted exactly where they are not packed, and with
    the tables that a kernel may keep beside packed ones; compute buffers from above.
    """
    model = folder.model
    dtype = folder.dtype if device.is_gpu else "float32"
    item_nbytes = _ITEM_NBYTES[dtype]
    weights_nbytes = _weights_nbytes(folder, item_nbytes)
    position_nbytes = 2 * model.n_layers * model.n_kv_heads * model.head_dim * item_nbytes
    context = choose_context(
        settings.context,
        n_possible=longest_context(settings.rope, model.context_length),
        kv_nbytes_per_token=position_nbytes,
        weights_nbytes=weights_nbytes,
        free_nbytes=device.free_nbytes,
    )
    compute_nbytes = _compute_nbytes(folder, context, item_nbytes)
    if device.is_gpu:
        compute_nbytes += GPU_RESERVE_NBYTES + _graphs_nbytes(model, context, item_nbytes)
    elif folder.is_gptq:
        largest = model.hidden_size * max(model.intermediate_size, model.n_heads * model.head_dim)
        compute_nbytes += largest * _UNPACKING_NBYTES
    share = Share(device, weights_nbytes, context * position_nbytes, compute_nbytes)
    n_gpu_layers = model.n_layers + 1 if device.is_gpu else 0
    return MemoryPlan(context, dtype, PREFILL_BATCH, n_gpu_layers, (share,))


def smaller_plans(folder: Folder, settings: EngineSettings, device: Device) -> Iterator[MemoryPlan]:
    """Shorter contexts, the longest first."""
    context = plan_folder(folder, settings, device).context // 2
    while context >= _SMALLEST_CONTEXT:
        yield plan_folder(folder, dataclasses.replace(settings, context=context), device)
        context //= 2


def _weights_nbytes(folder: Folder, item_nbytes: int) -> int:
    from convert.qwen2 import is_ignorable

    nbytes = 0
    for name, info in folder.tensors.items():
        base, _, part = name.rpartition(".")
        if is_ignorable(name, folder.model):
            continue
        if part in _PACKED:
            nbytes += info.nbytes
        elif f"{base}.qweight" in folder.tensors:
            nbytes += 2 * prod(info.shape)  # a bias is in float16 there
        else:
            nbytes += item_nbytes * prod(info.shape)
    # scales and zeros side by side in 16 bits, the order of the columns and its inverse
    nbytes += sum(6 * prod(info.shape) for info in _packed(folder, "scales"))
    nbytes += sum(8 * info.shape[0] for info in _packed(folder, "g_idx"))
    return nbytes


def _packed(folder: Folder, part: str) -> Iterator[TensorInfo]:
    return (info for name, info in folder.tensors.items() if name.endswith(f".{part}"))


def _compute_nbytes(folder: Folder, context: int, item_nbytes: int) -> int:
    """A batch through a layer late in the context, and logits of as many rows as at a time.

    Attention under a mask spreads keys and values out over all heads.
    """
    model = folder.model
    n_activations = 4 * model.intermediate_size + 8 * model.hidden_size
    mask_nbytes = PREFILL_BATCH * context * (1 + item_nbytes)
    logits_nbytes = 3 * 4 * n_logits_rows(model.vocab_size) * model.vocab_size
    return (
        PREFILL_BATCH * n_activations * item_nbytes
        + _spread_nbytes(model, context, item_nbytes)
        + mask_nbytes
        + logits_nbytes
    )


def _spread_nbytes(model: Qwen2Config, n_positions: int, item_nbytes: int) -> int:
    return 2 * n_positions * model.n_heads * model.head_dim * item_nbytes


def _graphs_nbytes(model: Qwen2Config, context: int, item_nbytes: int) -> int:
    """What captured steps hold: room for the largest, which they share, and logits of each."""
    n_units = -(-context // STEP_UNIT)
    logits_nbytes = n_units * model.vocab_size * item_nbytes
    return _spread_nbytes(model, context, item_nbytes) + logits_nbytes
