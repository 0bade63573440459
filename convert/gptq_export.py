"""A checkpoint -> a folder in GPTQ's format, one layer at a time.

What the folder holds is what transformers, GPTQModel, vLLM and AutoGPTQ agree on: each linear as
qweight, qzeros, scales and g_idx, packed into int32 along the inputs; all else in its own dtype.
`checkpoint_format: gptq` (v1) stores zeros minus one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from convert.calibration import (
    Conversation,
    TokenBatch,
    load_tokenizer,
    set_digest,
    take_tokens,
    token_batches,
    tokenize_conversation,
)
from convert.checkpoint import Checkpoint
from convert.errors import CheckpointError, NumericalError
from convert.files import check_disk_space, refuse_existing, replacing_folder
from convert.gptq import GptqSettings, GptqSolution, dequantize, quantize_matrix
from convert.hessian import accumulate_hessian
from convert.layer_stream import HALVES, Half, LayerStream, capturing_input, n_tokens_of
from convert.qwen2 import TensorSpec, tensor_specs
from convert.safetensors_writer import OutputTensor, split_into_shards, write_shards

if TYPE_CHECKING:
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

MAX_SEQUENCE_LENGTH = 2048
BATCH_TOKENS = 2048
DEFAULT_N_TOKENS = 16_384
COPY_ROWS = 8192  # of an unquantized matrix at a time
COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)

Chunk = tuple[str, npt.NDArray[Any]]
Progress = Callable[[int, int], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GptqPlan:
    """What will be written, known from the headers alone."""

    tensors: tuple[OutputTensor, ...]
    n_weights: int
    n_quantized: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights


@dataclass(frozen=True, slots=True)
class GptqResult:
    """What was written. raised_damp: the linears whose Hessian needed more damping, and how much."""

    path: Path
    nbytes: int
    bits_per_weight: float
    n_calibration_tokens: int
    calibration_sha256: str
    raised_damp: dict[str, float]


def plan_gptq(checkpoint: Checkpoint, settings: GptqSettings) -> GptqPlan:
    """Every tensor of the output in the order in which it is written.

    Raises CheckpointError for a linear whose sizes the format cannot hold.
    """
    tensors: list[OutputTensor] = []
    n_weights = n_quantized = 0
    for spec in tensor_specs(checkpoint.model):
        n_weights += int(np.prod(spec.shape, dtype=np.int64))
        if is_quantized(spec):
            n_quantized += 1
            tensors += _packed_tensors(spec, settings)
        else:
            info = checkpoint.tensors[spec.name]
            tensors.append(OutputTensor(spec.name, info.dtype, info.shape, info.nbytes))
    return GptqPlan(tuple(tensors), n_weights, n_quantized)


def is_quantized(spec: TensorSpec) -> bool:
    """The linears of the layers; embeddings, head, norms and biases stay as they are."""
    return spec.layer_index is not None and len(spec.shape) == 2


def calibration_batches(
    checkpoint: Checkpoint,
    conversations: Sequence[Conversation],
    *,
    n_tokens: int | None = DEFAULT_N_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> list[TokenBatch]:
    """The first conversations that hold n_tokens, rendered by the checkpoint's own template."""
    tokenizer = load_tokenizer(checkpoint.path)
    sequences = (tokenize_conversation(one, tokenizer).ids for one in conversations)
    taken = list(take_tokens(sequences, n_tokens, max_length=MAX_SEQUENCE_LENGTH))
    highest = max((max(ids) for ids in taken), default=0)
    if highest >= checkpoint.model.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer gives id {highest} and vocab_size is "
            f"{checkpoint.model.vocab_size}; use the tokenizer of this checkpoint"
        )
    return token_batches(taken, batch_tokens=batch_tokens)


def export_gptq(
    checkpoint: Checkpoint,
    out_folder: Path,
    *,
    settings: GptqSettings,
    calibration: Sequence[Conversation],
    n_tokens: int | None = DEFAULT_N_TOKENS,
    force: bool = False,
    on_progress: Progress | None = None,
) -> GptqResult:
    """Quantize every linear of every layer and write the folder, whole or not at all.

    on_progress: called with the linears done and all there are. The same input gives the same bytes
    on the same machine and threads.
    Raises QwqError for an output that exists, a full disk, and weights or inputs that are broken.
    """
    refuse_existing(out_folder, force=force)
    plan = plan_gptq(checkpoint, settings)
    check_disk_space(out_folder, plan.nbytes)
    batches = calibration_batches(checkpoint, calibration, n_tokens=n_tokens)
    meta = {
        "quantizer": [f"qwq-local:{version('qwq-local')}"],
        "calibration_sha256": set_digest(calibration),
        "calibration_tokens": n_tokens_of(batches),
        "clip_steps": settings.clip_steps,
    }
    run = _Run(checkpoint, settings, batches, plan.n_quantized, on_progress)
    with replacing_folder(out_folder, force=force) as folder:
        write_shards(folder, split_into_shards(plan.tensors), run.chunks())
        _write_configs(checkpoint, folder, settings, meta)
    return GptqResult(
        path=out_folder,
        nbytes=plan.nbytes,
        bits_per_weight=plan.bits_per_weight,
        n_calibration_tokens=n_tokens_of(batches),
        calibration_sha256=set_digest(calibration),
        raised_damp=run.raised_damp,
    )


class _Run:
    """One pass over the layers; it holds the count of linears done and the dampings raised."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: GptqSettings,
        batches: Sequence[TokenBatch],
        n_linears: int,
        on_progress: Progress | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.batches = batches
        self.stream = LayerStream(checkpoint)
        self.raised_damp: dict[str, float] = {}
        self._n_done = 0
        self._n_linears = n_linears
        self._on_progress = on_progress

    def chunks(self) -> Iterator[Chunk]:
        """All output tensors in the plan's order."""
        import torch

        specs = list(tensor_specs(self.checkpoint.model))
        for spec in specs:
            if spec.layer_index is None and "embed_tokens" in spec.name:
                yield from self._copied(spec.name)
        hidden = self.stream.embed(self.batches)
        for index in range(self.checkpoint.model.n_layers):
            with torch.inference_mode():
                yield from self._layer_chunks(index, hidden)
        for spec in specs:
            if spec.layer_index is None and "embed_tokens" not in spec.name:
                yield from self._copied(spec.name)
