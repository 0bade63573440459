"""What a conversion will write: every tensor's type and place, and exact bytes, before any work."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, cast

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from convert.checkpoint import Checkpoint
from convert.encode import ByteArray, QuantType, row_nbytes
from convert.errors import CheckpointError
from convert.gguf_parts import part_name
from convert.imatrix import Imatrix
from convert.provenance import add_provenance
from convert.qwen2 import Qwen2Config, tensor_specs
from convert.recipe import Recipe, choose_types
from convert.recipe_file import recipe_text
from convert.rounding_report import Choice
from convert.tokenizer_metadata import add_general, add_tokenizer

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


class RowSource(Protocol):
    """Encodes matrices with more knowledge than a slice of rows has, as GPTQ rounding does.

    description: what decides its rows, for the file's metadata.
    """

    @property
    def description(self) -> str: ...

    def expect(self, wanted: Mapping[str, frozenset[QuantType]]) -> None:
        """Of which matrices, in which types, rows will be asked for from now on."""

    def rows(self, name: str, quant_type: QuantType, start: int, stop: int) -> ByteArray | None:
        """Encoded rows start to stop; None leaves them to the encoder. Any thread may call it."""

    def release(self, name: str) -> None:
        """No more rows of this matrix will be asked for."""

    def choice(self, name: str, quant_type: QuantType) -> Choice | None:
        """How the rows that it gave were encoded; None where it gave none."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of one output; `offset` counts from the start of the tensor data of its part."""

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    part: int
    offset: int
    nbytes: int
    note: str


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One file: header bytes, padded to the alignment, then tensors, each padded too."""

    path: Path
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One output: a GGUF file, or the parts that it is split into."""

    recipe: Recipe
    imatrix: Imatrix | None
    parts: tuple[PartPlan, ...]
    tensors: tuple[TensorPlan, ...]
    row_source: RowSource | None = None

    @property
    def path(self) -> Path:
        """The file to open: of several parts the first."""
        return self.parts[0].path

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def n_weights(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / self.n_weights


def plan_file(
    checkpoint: Checkpoint,
    recipe: Recipe,
    path: Path,
    *,
    imatrix: Imatrix | None = None,
    row_source: RowSource | None = None,
    split_nbytes: int | None = None,
) -> FilePlan:
    """Plan one GGUF file down to the byte, or its parts of at most split_nbytes of tensors each.

    A tensor larger than split_nbytes is a part of its own; what fits into one part is not split.
    Raises CheckpointError for a tokenizer that is unfit, UsageError where choose_types
    does.
    """
    tensors = plan_tensors(checkpoint.model, recipe, imatrix=imatrix, split_nbytes=split_nbytes)
    rounding = "" if row_source is None else row_source.description
    headers = _headers(checkpoint, recipe, imatrix, tensors, rounding=rounding)
    n_parts = len(headers)
    parts = []
    for number, header in enumerate(headers):
        last = [tensor for tensor in tensors if tensor.part == number][-1]
        part_path = path
        if n_parts > 1:
            part_path = path.with_name(part_name(path.stem, number + 1, n_parts))
        parts.append(PartPlan(part_path, header, len(header) + aligned(last.offset + last.nbytes)))
    return FilePlan(recipe, imatrix, tuple(parts), tensors, row_source)


def plan_tensors(
    model: Qwen2Config,
    recipe: Recipe,
    *,
    imatrix: Imatrix | None = None,
    split_nbytes: int | None = None,
) -> tuple[TensorPlan, ...]:
    """Types, places and bytes of all tensors; needs the model's sizes alone."""
    tensors: list[TensorPlan] = []
    part = offset = part_nbytes = 0
    for spec, choice in choose_types(recipe, model, imatrix=imatrix):
        nbytes = prod(spec.shape[:-1]) * row_nbytes(choice.quant_type, spec.shape[-1])
        if split_nbytes is not None and part_nbytes and part_nbytes + nbytes > split_nbytes:
            part, offset, part_nbytes = part + 1, 0, 0
        tensors.append(
            TensorPlan(
                spec.name,
                spec.gguf_name,
                spec.shape,
                choice.quant_type,
                part,
                offset,
                nbytes,
                choice.note,
            )
        )
        offset += aligned(nbytes)
        part_nbytes += nbytes
    return tuple(tensors)


def described(checkpoint: Checkpoint) -> gguf.GGUFWriter:
    """A writer that holds all keys that do not depend on the recipe."""
    writer = gguf.GGUFWriter(None, "qwen2")
    specs = tensor_specs(checkpoint.model)
    add_general(writer, checkpoint, sum(prod(spec.shape) for spec in specs))
    _add_sizes(writer, checkpoint)
    add_tokenizer(writer, checkpoint.path, checkpoint.model.vocab_size)
    return writer


def _headers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    imatrix: Imatrix | None,
    tensors: tuple[TensorPlan, ...],
    *,
    rounding: str,
) -> list[bytes]:
    """All that precedes the tensor data, part by part; what the file says stands in the first.

    Key for key what llama.cpp's converter writes, then where the file comes from.
    """
    writer = described(checkpoint)
    writer.add_file_type(recipe.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_provenance(
        writer,
        checkpoint,
        recipe=recipe_text(recipe),
        file_type=recipe.file_type,
        imatrix=imatrix,
        rounding=rounding,
        n_tensors=len(tensors),
    )
    for tensor in tensors:
        if tensor.part == len(writer.tensors):
            writer.tensors.append({})  # the writer adds to the last part
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


def _serialized(writer: gguf.GGUFWriter, folder: Path) -> list[bytes]:
    """The writer's output for buffers in place of files, padded to where the data starts."""
    buffers = [io.BytesIO() for _ in writer.tensors]
    writer.fout = [cast("io.BufferedWriter", buffer) for buffer in buffers]
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
    headers = [buffer.getvalue() for buffer in buffers]
    return [header.ljust(aligned(len(header)), b"\0") for header in headers]


def aligned(nbytes: int) -> int:
    """The next offset at which a tensor may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
