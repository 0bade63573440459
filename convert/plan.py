"""What a conversion will write: every tensor's type and place, and exact bytes, before any work."""

import io
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from convert.checkpoint import Checkpoint
from convert.encode import QuantType, row_nbytes
from convert.errors import CheckpointError
from convert.qwen2 import Qwen2Config, tensor_specs
from convert.recipe import Recipe, choose_type
from convert.tokenizer_metadata import add_general, add_tokenizer

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of one output; `offset` counts from the start of the tensor data."""

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    offset: int
    nbytes: int
    note: str


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One output file: header bytes, padded to the alignment, then tensors, each padded too."""

    path: Path
    recipe: Recipe
    header: bytes
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        last = self.tensors[-1]
        return len(self.header) + _aligned(last.offset + last.nbytes)

    @property
    def n_weights(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / self.n_weights


def plan_file(checkpoint: Checkpoint, recipe: Recipe, path: Path) -> FilePlan:
    """Plan one GGUF file down to the byte; raises CheckpointError for a tokenizer that is unfit."""
    tensors = plan_tensors(checkpoint.model, recipe)
    return FilePlan(path, recipe, _header(checkpoint, recipe, tensors), tensors)


def plan_tensors(model: Qwen2Config, recipe: Recipe) -> tuple[TensorPlan, ...]:
    """Types, offsets and bytes of all tensors; needs the model's sizes alone."""
    tensors: list[TensorPlan] = []
    offset = 0
    for spec in tensor_specs(model):
        choice = choose_type(recipe, spec, model)
        nbytes = prod(spec.shape[:-1]) * row_nbytes(choice.quant_type, spec.shape[-1])
        tensors.append(
            TensorPlan(
                spec.name,
                spec.gguf_name,
                spec.shape,
                choice.quant_type,
                offset,
                nbytes,
                choice.note,
            )
        )
        offset += _aligned(nbytes)
    return tuple(tensors)


def _header(checkpoint: Checkpoint, recipe: Recipe, tensors: tuple[TensorPlan, ...]) -> bytes:
    """All that precedes the tensor data, key for key what llama.cpp's converter writes."""
    model = checkpoint.model
    writer = gguf.GGUFWriter(None, "qwen2")
    add_general(writer, checkpoint, sum(prod(tensor.shape) for tensor in tensors))
    _add_sizes(writer, checkpoint)
    writer.add_file_type(recipe.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, checkpoint.path, model.vocab_size)
    for tensor in tensors:
        dtype = np.dtype(np.float32)  # not read: raw_dtype decides
        writer.add_tensor_info(
            tensor.gguf_name, tensor.shape, dtype, tensor.nbytes, raw_dtype=tensor.quant_type
        )
    return _serialized(writer, checkpoint.path)


def _add_sizes(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    model = checkpoint.model
    writer.add_block_count(model.n_layers)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    if model.rope_scaling is not None:
        _add_rope_scaling(writer, model)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    if model.head_dim * model.n_heads != model.hidden_size or "head_dim" in checkpoint.config:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)


def _add_rope_scaling(writer: gguf.GGUFWriter, model: Qwen2Config) -> None:
    scaling = model.rope_scaling
    assert scaling is not None
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.original_context_length is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context_length)
    add_parameter = {
        "extrapolation_factor": writer.add_rope_scaling_yarn_ext_factor,
        "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for name, value in scaling.parameters.items():
        add_parameter[name](value)


def _serialized(writer: gguf.GGUFWriter, folder: Path) -> bytes:
    """The writer's output for a buffer in place of a file, padded to where the data starts."""
    buffer = io.BytesIO()
    writer.fout = [cast("io.BufferedWriter", buffer)]
    writer.state = WriterState.EMPTY
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: a value of the model card or tokenizer does not fit a GGUF key ({error}); "
            "use the checkpoint's own files"
        ) from error
    header = buffer.getvalue()
    return header.ljust(_aligned(len(header)), b"\0")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
