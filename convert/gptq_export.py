"""A checkpoint -> a folder in GPTQ's format, one layer at a time.

What the folder holds is what transformers, GPTQModel, vLLM and AutoGPTQ agree on: each linear as
qweight, qzeros, scales and g_idx, packed into int32 along the inputs; all else in its own dtype.
`checkpoint_format: gptq` (v1) stores zeros minus one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from convert.calibration import (
    Passage,
    TokenBatch,
    set_digest,
    token_batches,
)
from convert.checkpoint import Checkpoint
from convert.errors import NumericalError, UsageError
from convert.files import check_disk_space, missing_nbytes, refuse_existing
from convert.fingerprint import fingerprint
from convert.gptq import (
    GptqSettings,
    GptqSolution,
    dequantize,
    quantize_matrix,
    refine_solution,
)
from convert.gptq_format import packed_arrays, packed_tensors, quantization_config
from convert.hessian import accumulate_hessian
from convert.layer_stream import (
    HALVES,
    INPUT_SITES,
    Half,
    LayerStream,
    n_tokens_of,
    threads_for,
)
from convert.layer_work import LayerWork, layer_work, read_states, write_states
from convert.passages import BATCH_TOKENS, HELD_OUT_EVERY, calibration_sequences
from convert.qwen2 import TensorSpec, tensor_specs
from convert.safetensors_writer import OutputTensor, write_index, write_shard

if TYPE_CHECKING:
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

DEFAULT_N_TOKENS = 16_384
EMBEDDINGS = "model.embed_tokens.weight"
LINEARS = tuple(name for names in INPUT_SITES.values() for name in names)
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
    """What will be written, known from the headers alone: shards by file name.

    The embeddings make the first shard, each layer one of its own, and what is left the last.
    """

    shards: dict[str, tuple[OutputTensor, ...]]
    n_weights: int
    n_quantized: int

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        return tuple(tensor for shard in self.shards.values() for tensor in shard)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights


@dataclass(frozen=True, slots=True)
class GptqResult:
    """What was written.

    n_held_out: calibration tokens that damping and codes were chosen by, 0 where there was no
    choice. damp: that each linear got. raised_damp: of those whose Hessian needed more than the
    settings asked for.
    """

    path: Path
    nbytes: int
    bits_per_weight: float
    n_calibration_tokens: int
    n_held_out: int
    calibration_sha256: str
    damp: dict[str, float]
    raised_damp: dict[str, float]

    @property
    def n_fitted(self) -> int:
        return self.n_calibration_tokens - self.n_held_out


@dataclass(frozen=True, slots=True)
class _Tried:
    """Some rows' solution, the damping asked for, and their squared error on held-out inputs."""

    asked_damp: float
    solution: GptqSolution
    error: float


def plan_gptq(checkpoint: Checkpoint, settings: GptqSettings) -> GptqPlan:
    """Every tensor of the output in the order in which it is written.

    Raises CheckpointError for a linear whose sizes the format cannot hold.
    """
    n_shards = checkpoint.model.n_layers + 2
    names = [f"model-{i:05}-of-{n_shards:05}.safetensors" for i in range(1, n_shards + 1)]
    shards: list[list[OutputTensor]] = [[] for _ in names]
    n_weights = n_quantized = 0
    for spec in tensor_specs(checkpoint.model):
        n_weights += int(np.prod(spec.shape, dtype=np.int64))
        if spec.layer_index is not None:
            shard = shards[spec.layer_index + 1]
        else:
            shard = shards[0 if spec.name == EMBEDDINGS else -1]
        if is_quantized(spec):
            n_quantized += 1
            shard += packed_tensors(spec, settings)
        else:
            info = checkpoint.tensors[spec.name]
            shard.append(OutputTensor(spec.name, info.dtype, info.shape, info.nbytes))
    return GptqPlan(dict(zip(names, map(tuple, shards), strict=True)), n_weights, n_quantized)


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
    device: str = "cpu",
    force: bool = False,
    on_progress: Progress | None = None,
) -> GptqResult:
    """Quantize every linear of every layer and write the folder, whole or not at all.

    on_progress: called with the linears done and all there are, at first with those of a run that
    was interrupted. The same input gives the same bytes
    on the same machine and threads; interrupted, the same call continues with the first unfinished
    layer.
    Raises QwqError for an output that exists, a full disk, and weights or inputs that are broken.
    """
    refuse_existing(out_folder, force=force)
    plan = plan_gptq(checkpoint, settings)
    fitted, held_out = gptq_batches(checkpoint, calibration, settings, n_tokens=n_tokens)
    n_held_out = n_tokens_of(held_out)
    n_calibration_tokens = n_tokens_of(fitted) + n_held_out
    n_needed = disk_nbytes(checkpoint, plan, [*fitted, *held_out])
    check_disk_space(out_folder, missing_nbytes(out_folder, n_needed))
    meta = {
        "quantizer": [f"qwq-local:{version('qwq-local')}"],
        "calibration_sha256": set_digest(calibration),
        "calibration_tokens": n_calibration_tokens,
        "held_out_tokens": n_held_out,
        "clip_steps": settings.clip_steps,
        "sweeps": settings.n_sweeps,
        "order": settings.order,
    }
    made_of = {
        "checkpoint": fingerprint(checkpoint),
        "meta": meta,
        "settings": dataclasses.asdict(settings),
    }
    with (
        layer_work(out_folder, made_of, force=force) as work,
        threads_for(checkpoint.model),
    ):
        run = _Run(checkpoint, settings, (fitted, held_out), work, plan, device=device)
        run.write_shards(on_progress)
        _write_configs(checkpoint, work.folder, settings, meta)
        write_index(work.folder, plan.shards)
        notes = dict(work.notes)
    return GptqResult(
        path=out_folder,
        nbytes=plan.nbytes,
        bits_per_weight=plan.bits_per_weight,
        n_calibration_tokens=n_calibration_tokens,
        n_held_out=n_held_out,
        calibration_sha256=set_digest(calibration),
        damp={name: used for name, (_, used) in notes.items()},
        raised_damp={name: used for name, (asked, used) in notes.items() if used != asked},
    )


def disk_nbytes(checkpoint: Checkpoint, plan: GptqPlan, batches: Sequence[TokenBatch]) -> int:
    """What the folder takes at most while it is made: with hidden states, and what ffn_down reads.

    Those before a layer, in its middle and after it are there at once.
    """
    n_positions = sum(batch.ids.numel() for batch in batches)
    model = checkpoint.model
    return plan.nbytes + 4 * n_positions * (3 * model.hidden_size + model.intermediate_size)


def gptq_batches(
    checkpoint: Checkpoint,
    calibration: Sequence[Passage],
    settings: GptqSettings,
    *,
    n_tokens: int | None,
) -> tuple[list[TokenBatch], list[TokenBatch]]:
    """The text to fit to, and the text to choose by, where the settings leave a choice.

    Raises UsageError where the text is a single sequence and there is a choice.
    """
    sequences = calibration_sequences(checkpoint, calibration, n_tokens=n_tokens)
    apart = range(0)
    if settings.is_judged:
        n = len(sequences)
        apart = range(n)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or range(1, n)[-1:]
        if not apart:
            raise UsageError(
                f"calibration text: {n} sequence is too few to hold one out; give more text or "
                "more tokens"
            )
    held_out = [sequences[i] for i in apart]
    fitted = [one for i, one in enumerate(sequences) if i not in apart]
    return (
        token_batches(fitted, batch_tokens=BATCH_TOKENS),
        token_batches(held_out, batch_tokens=BATCH_TOKENS),
    )


class _Run:
    """The layers from the first unfinished one on."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: GptqSettings,
        batches: tuple[Sequence[TokenBatch], Sequence[TokenBatch]],
        work: LayerWork,
        plan: GptqPlan,
        *,
        device: str,
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        fitted, held_out = batches
        self._batches = [*fitted, *held_out]
        self._n_fitted = len(fitted)
        self._work = work
        self._plan = plan
        self._stream = LayerStream(checkpoint, device=device)

    def write_shards(self, on_progress: Progress | None) -> None:
        work, shards = self._work, list(self._plan.shards.items())
        if on_progress is not None:
            on_progress(work.n_done * len(LINEARS), self._plan.n_quantized)
        if work.n_done == 0:
            self._write(shards[0], self._copied(EMBEDDINGS))
            write_states(work.states_path(0), self._stream.embed(self._batches))
        for index, layer in self._stream.layers(work.n_done):
            self._write(shards[index + 1], self._layer_chunks(index, layer, on_progress))
            work.finish_layer(work.folder / shards[0][0], work.folder / shards[index + 1][0])
        rest = (chunk for tensor in shards[-1][1] for chunk in self._copied(tensor.name))
        self._write(shards[-1], rest)

    def _write(self, shard: tuple[str, tuple[OutputTensor, ...]], chunks: Iterator[Chunk]) -> None:
        name, tensors = shard
        write_shard(self._work.folder / name, tensors, chunks)

    def _layer_chunks(
        self, index: int, layer: Qwen2DecoderLayer, on_progress: Progress | None
    ) -> Iterator[Chunk]:
        """Quantize a layer half by half, and move the hidden states past each half.

        Each linear sees inputs that come from what is already quantized, and computes once.
        """
        work = self._work
        between = work.states_path(index).with_suffix(".half.f32")
        paths = (work.states_path(index), between, work.states_path(index + 1))
        n_done = index * len(LINEARS)
        for half, before, after in zip(HALVES, paths, paths[1:], strict=False):
            for chunk in self._half_chunks(layer, f"model.layers.{index}", half, before, after):
                yield chunk
                n_done += chunk[0].endswith(".g_idx")
                if on_progress is not None and chunk[0].endswith(".g_idx"):
                    on_progress(n_done, self._plan.n_quantized)
        between.unlink()

    def _half_chunks(
        self, layer: Qwen2DecoderLayer, prefix: str, half: Half, before: Path, after: Path
    ) -> Iterator[Chunk]:
        norm, body = layer.get_submodule(half.norm), layer.get_submodule(half.body)
        last, where = body.get_submodule(half.last), f"{prefix}.{half.body}"
        inner = before.with_suffix(".inner.f32")  # what the last linear reads
        n_inner = last.get_parameter("weight").shape[1]
        yield from self._copied(f"{prefix}.{half.norm}.weight")
        # No name holds the statistics here, so that they go before the next ones are taken.
        normed = (norm(states) for states in self._states(before))
        yield from self._linear_chunks(
            where, body, half.first, self._statistics(normed, self._checkpoint.model.hidden_size)
        )
        normed = (norm(states) for states in self._states(before))
        write_states(inner, (self._stream.inputs_of_last(layer, half, one) for one in normed))
        yield from self._linear_chunks(
            where, body, (half.last,), self._statistics(self._states(inner, n_inner), n_inner)
        )
        each = zip(self._states(before), self._states(inner, n_inner), strict=True)
        write_states(after, (states + last(inputs) for states, inputs in each))
        inner.unlink()

    def _statistics(
        self, inputs: Iterable[torch.Tensor], n_in: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what a linear reads, batch by batch: the Hessian, and the held-out inputs."""
        import torch

        hessian, n_seen = torch.zeros(n_in, n_in, device=self._stream.device), 0
        held_out = [torch.empty(0, n_in, device=self._stream.device)]
        for i, (of_batch, batch) in enumerate(zip(inputs, self._batches, strict=True)):
            of_tokens = of_batch[batch.is_token.to(self._stream.device)]
            if i < self._n_fitted:
                n_seen = accumulate_hessian(hessian, of_tokens, n_seen)
            else:
                held_out.append(of_tokens)
        return hessian, torch.cat(held_out)

    def _states(self, path: Path, size: int | None = None) -> Iterator[torch.Tensor]:
        """size: numbers a position, the hidden states' by default."""
        for states in read_states(path, self._batches, size or self._checkpoint.model.hidden_size):
            yield states.to(self._stream.device)

    def _linear_chunks(
        self,
        where: str,
        body: torch.nn.Module,
        names: tuple[str, ...],
        statistics: tuple[torch.Tensor, torch.Tensor],
    ) -> Iterator[Chunk]:
        """Solve linears that share their inputs, put what they became in their place, and yield it.

        Rows are independent, so that one solve does for all of them.
        """
        hessian, held_out = statistics
        weights = {name: body.get_submodule(name).get_parameter("weight") for name in names}
        with _naming(f"{where}.{names[0]}.weight"):
            tried = self._tried([*weights.values()], hessian, held_out)
        for (name, weight), of_linear in zip(weights.items(), tried, strict=True):
            with _naming(f"{where}.{name}.weight"):
                asked_damp, solution = self._best(weight, hessian, held_out, of_linear)
            self._work.notes[f"{where}.{name}"] = [asked_damp, solution.damp]
            if solution.damp != asked_damp:
                log.warning("%s: its Hessian needed damping %g", f"{where}.{name}", solution.damp)
            weight.copy_(dequantize(solution))
            yield from packed_arrays(f"{where}.{name}.weight", solution, self._settings)
            if f"{where}.{name}.bias" in self._checkpoint.tensors:
                yield from self._copied(f"{where}.{name}.bias")

    def _tried(
        self, weights: Sequence[torch.Tensor], hessian: torch.Tensor, held_out: torch.Tensor
    ) -> list[list[_Tried]]:
        """Of each weight's sampled rows a solution for each damping."""
        import torch

        samples = [weight[self._settings.sample(len(weight))] for weight in weights]
        whole = torch.cat(samples) if len(samples) > 1 else samples[0]
        tried: list[list[_Tried]] = [[] for _ in samples]
        for damp in self._settings.damps:
            solution = quantize_matrix(
                whole, hessian, dataclasses.replace(self._settings, damp=damp)
            )
            errors, start = _errors(whole, solution, held_out), 0
            for of_linear, sample in zip(tried, samples, strict=True):
                rows = slice(start, start + len(sample))
                of_linear.append(_Tried(damp, solution.rows(rows), float(errors[rows].sum())))
                start = rows.stop
        return tried

    def _best(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        held_out: torch.Tensor,
        tried: Sequence[_Tried],
    ) -> tuple[float, GptqSolution]:
        """The damping that errs least on held-out inputs, and the solution with it, refined.

        It stays as it was where that raises their error.
        """
        settings = self._settings
        best = min(tried, key=lambda one: one.error)
        sampled = settings.sample(len(weight))
        solution = best.solution
        if len(solution.codes) < len(weight):
            damped = dataclasses.replace(settings, damp=best.asked_damp)
            solution = quantize_matrix(weight, hessian, damped)
        refined = refine_solution(weight, hessian, solution, settings)
        error = float(_errors(weight[sampled], refined.rows(sampled), held_out).sum())
        return best.asked_damp, refined if error <= best.error else solution

    def _copied(self, name: str) -> Iterator[Chunk]:
        """A tensor in its own dtype, in slices: narrowing what was widened exactly is exact."""
        info = self._checkpoint.tensors[name]
        for start in range(0, info.shape[0], COPY_ROWS):
            rows = self._checkpoint.rows(name, start, min(start + COPY_ROWS, info.shape[0]))
            yield name, _narrowed(rows, info.dtype)


@contextmanager
def _naming(matrix: str) -> Iterator[None]:
    """Say of which matrix an error is."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{matrix}: {error}") from error


def _errors(weight: torch.Tensor, solution: GptqSolution, held_out: torch.Tensor) -> torch.Tensor:
    """Each output's squared error on the held-out inputs, (n_out,)."""
    errors = held_out @ dequantize(solution).sub_(weight).T  # (n_tokens, n_out)
    return errors.square().sum(dim=0)


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
