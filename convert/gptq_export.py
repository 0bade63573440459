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
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from convert.calibration import (
    Passage,
    TokenBatch,
    set_digest,
)
from convert.checkpoint import Checkpoint
from convert.errors import NumericalError
from convert.files import check_disk_space, refuse_existing, replacing_folder
from convert.gptq import GptqSettings, dequantize, quantize_matrix
from convert.gptq_format import packed_arrays, packed_tensors, quantization_config
from convert.hessian import accumulate_hessian
from convert.layer_stream import (
    HALVES,
    Half,
    LayerStream,
    capturing_input,
    n_tokens_of,
    threads_for,
)
from convert.passages import calibration_batches
from convert.qwen2 import TensorSpec, tensor_specs
from convert.safetensors_writer import OutputTensor, split_into_shards, write_shards

if TYPE_CHECKING:
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

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
    """What was written. raised_damp: what it rose to, for the Hessians that needed more."""

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
            tensors += packed_tensors(spec, settings)
        else:
            info = checkpoint.tensors[spec.name]
            tensors.append(OutputTensor(spec.name, info.dtype, info.shape, info.nbytes))
    return GptqPlan(tuple(tensors), n_weights, n_quantized)


def is_quantized(spec: TensorSpec) -> bool:
    """The linears of the layers; embeddings, head, norms and biases stay as they are."""
    return spec.layer_index is not None and len(spec.shape) == 2


def export_gptq(
    checkpoint: Checkpoint,
    out_folder: Path,
    *,
    settings: GptqSettings,
    calibration: Sequence[Passage],
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
    with replacing_folder(out_folder, force=force) as folder, threads_for(checkpoint.model):
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
        self._stream = LayerStream(checkpoint)
        self.raised_damp: dict[str, float] = {}
        self._n_done = 0
        self._n_linears = n_linears
        self._on_progress = on_progress

    def chunks(self) -> Iterator[Chunk]:
        """All output tensors in the plan's order."""
        hidden = list(self._stream.embed(self.batches))
        yield from self._copied("model.embed_tokens.weight")
        for index in range(self.checkpoint.model.n_layers):
            layer = self._stream.load_layer(index)
            for half in HALVES:
                yield from self._half_chunks(layer, f"model.layers.{index}", half, hidden)
        for spec in tensor_specs(self.checkpoint.model):
            if spec.layer_index is None and spec.name != "model.embed_tokens.weight":
                yield from self._copied(spec.name)

    def _half_chunks(
        self, layer: Qwen2DecoderLayer, prefix: str, half: Half, hidden: list[torch.Tensor]
    ) -> Iterator[Chunk]:
        """Quantize half a layer in place, then move the hidden states past it.

        Each linear sees inputs that come from what is already quantized.
        """
        norm, body = layer.get_submodule(half.norm), layer.get_submodule(half.body)
        yield from self._copied(f"{prefix}.{half.norm}.weight")
        where = f"{prefix}.{half.body}"
        hessian = self._hessian_of_norm(norm, hidden)
        yield from self._linear_chunks(where, body, half.first, hessian)
        hessian = self._hessian_of_last(layer, half, hidden)
        yield from self._linear_chunks(where, body, (half.last,), hessian)
        for i, states in enumerate(hidden):
            hidden[i] = states + self._stream.run_body(layer, half, norm(states))

    def _hessian_of_norm(self, norm: torch.nn.Module, hidden: list[torch.Tensor]) -> torch.Tensor:
        hessian, n_seen = _empty_hessian(self.checkpoint.model.hidden_size), 0
        for states, batch in zip(hidden, self.batches, strict=True):
            n_seen = accumulate_hessian(hessian, norm(states[batch.is_token]), n_seen)
        return hessian

    def _hessian_of_last(
        self, layer: Qwen2DecoderLayer, half: Half, hidden: list[torch.Tensor]
    ) -> torch.Tensor:
        norm = layer.get_submodule(half.norm)
        linear = layer.get_submodule(half.body).get_submodule(half.last)
        assert isinstance(linear.in_features, int)
        hessian, n_seen = _empty_hessian(linear.in_features), 0
        for states, batch in zip(hidden, self.batches, strict=True):
            inputs: list[torch.Tensor] = []
            with capturing_input(linear, inputs.append):
                self._stream.run_body(layer, half, norm(states))
            n_seen = accumulate_hessian(hessian, inputs[0][batch.is_token], n_seen)
        return hessian

    def _linear_chunks(
        self, where: str, body: torch.nn.Module, names: tuple[str, ...], hessian: torch.Tensor
    ) -> Iterator[Chunk]:
        """Solve linears that share their inputs, put what they became in their place, and yield it.

        Rows are independent, so that one solve does for all of them.
        """
        import torch

        linears = {name: body.get_submodule(name) for name in names}
        try:
            solution = quantize_matrix(
                torch.cat([linear.get_parameter("weight") for linear in linears.values()]),
                hessian,
                self.settings,
            )
        except NumericalError as error:
            raise NumericalError(f"{where}.{names[0]}.weight: {error}") from error
        if solution.damp != self.settings.damp:
            self.raised_damp |= dict.fromkeys((f"{where}.{name}" for name in names), solution.damp)
            log.warning("%s: its Hessian needed damping %g", f"{where}.{names[0]}", solution.damp)
        start = 0
        for name, linear in linears.items():
            weight = linear.get_parameter("weight")
            stop = start + len(weight)
            codes, scales = solution.codes[start:stop], solution.scales[start:stop]
            weight.copy_(dequantize(replace(solution, codes=codes, scales=scales), self.settings))
            start = stop
            yield from packed_arrays(
                f"{where}.{name}.weight", codes.cpu().numpy(), scales.cpu().numpy(), self.settings
            )
            if f"{where}.{name}.bias" in self.checkpoint.tensors:
                yield from self._copied(f"{where}.{name}.bias")
            self._n_done += 1
            if self._on_progress is not None:
                self._on_progress(self._n_done, self._n_linears)

    def _copied(self, name: str) -> Iterator[Chunk]:
        """A tensor in its own dtype, in slices: narrowing what was widened exactly is exact."""
        info = self.checkpoint.tensors[name]
        for start in range(0, info.shape[0], COPY_ROWS):
            rows = self.checkpoint.rows(name, start, min(start + COPY_ROWS, info.shape[0]))
            yield name, _narrowed(rows, info.dtype)


def _empty_hessian(n_in: int) -> torch.Tensor:
    import torch

    return torch.zeros(n_in, n_in, dtype=torch.float32)


def _narrowed(rows: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    if dtype == "BF16":
        return (rows.view(np.uint32) >> 16).astype("<u2")
    return rows.astype({"F16": "<f2", "F32": "<f4"}[dtype])


def _write_configs(
    checkpoint: Checkpoint, folder: Path, settings: GptqSettings, meta: dict[str, Any]
) -> None:
    """The tokenizer's files as they are, and the two configs."""
    for name in COPIED_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)
    quantization = quantization_config(settings, meta)
    _dump(folder / "quantize_config.json", quantization)
    _dump(folder / "config.json", checkpoint.config | {"quantization_config": quantization})


def _dump(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
