"""One pass over the checkpoint's layers that keeps the statistics of every linear's inputs.

A calibration is a folder: `imatrix.gguf` and `imatrix.dat` for llama.cpp, `calibration.json`, and
where Hessians were asked for, `layer-NNN.safetensors` with a layer's statistics.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.calibration import (
    SET_DIGEST,
    Passage,
    TokenBatch,
    load_tokenizer,
    set_digest,
    take_tokens,
    token_batches,
    tokenize_passage,
)
from convert.checkpoint import Checkpoint, Float32Array, read_json_object
from convert.errors import NumericalError, QwqError, UsageError
from convert.estimate import Estimate, estimate_calibration, sites
from convert.evaluation_states import write_evaluation
from convert.files import check_disk_space, missing_nbytes, refuse_existing, replacing_file
from convert.fingerprint import fingerprint
from convert.hessian import InputStatistics
from convert.imatrix import write_imatrix
from convert.layer_stream import INPUT_SITES, LayerStream, capturing_input, n_tokens_of, threads_for
from convert.layer_work import LayerWork, layer_work, read_states, write_states
from convert.passages import (
    BATCH_TOKENS,
    HELD_OUT_EVERY,
    MAX_SEQUENCE_LENGTH,
    calibration_sequences,
)
from convert.qwen2 import Qwen2Config, tensor_specs
from convert.safetensors_writer import write_tensors
from convert.sensitivity import SensitivityPass

if TYPE_CHECKING:
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

DESCRIPTION = "calibration.json"
IMATRIX_NAMES = ("imatrix.gguf", "imatrix.dat")
STATISTICS = ("importance", "hessian", "held_out")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """What to keep, and of how much text.

    n_tokens: None takes all text. n_hessian_tokens, n_sensitivity_tokens: the first of them, for
    whole Hessians, and for how much each matrix matters. batch_tokens: computed at once; it changes
    speed and memory alone.
    """

    n_tokens: int | None = None
    hessians: bool = False
    n_hessian_tokens: int = 16_384
    sensitivities: bool = False
    n_sensitivity_tokens: int = 4096
    batch_tokens: int = BATCH_TOKENS


@dataclass(frozen=True, slots=True)
class Calibration:
    """A finished calibration folder.

    n_tokens: in the importance. n_fitted, n_held_out: in the Hessians and beside them, 0 without.
    n_sampled: in the sensitivities, 0 without.
    """

    path: Path
    checkpoint_sha256: str
    calibration_sha256: str
    n_layers: int
    n_tokens: int
    n_fitted: int
    n_held_out: int
    n_sampled: int

    def statistics(self, layer_index: int, site: str) -> dict[str, torch.Tensor]:
        """Of an input site: importance (n_in,), hessian (n_in, n_in), held_out (n_tokens, n_in).

        Raises QwqError where Hessians were not kept, or the file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        if not self.n_fitted:
            raise QwqError(
                f"{self.path}: holds no Hessians; run `qwq calibrate --hessians` on the checkpoint"
            )
        path = _layer_path(self.path, layer_index)
        try:
            with safe_open(path, "pt") as tensors:
                return {name: tensors.get_tensor(f"{site}.{name}") for name in STATISTICS}
        except (OSError, SafetensorError) as error:
            raise QwqError(
                f"{path}: cannot be read ({error}); run `qwq calibrate --hessians` again"
            ) from error


def open_calibration(path: Path, checkpoint: Checkpoint) -> Calibration:
    """Read a calibration folder; raises QwqError where it is none or of another checkpoint."""
    if not (path / DESCRIPTION).is_file():
        raise QwqError(f"{path}: holds no {DESCRIPTION}; make it with `qwq calibrate`")
    record = read_json_object(path / DESCRIPTION)
    names = [field.name for field in dataclasses.fields(Calibration) if field.name != "path"]
    if missing := [name for name in names if name not in record]:
        raise QwqError(f"{path / DESCRIPTION}: lacks {missing[0]}; run `qwq calibrate` again")
    calibration = Calibration(path, **{name: record[name] for name in names})
    found = fingerprint(checkpoint)
    if calibration.checkpoint_sha256 != found:
        raise QwqError(
            f"{path}: was made of checkpoint {calibration.checkpoint_sha256[:12]} and "
            f"{checkpoint.path} is {found[:12]}; calibrate this checkpoint"
        )
    return calibration


@dataclass(frozen=True, slots=True)
class _Part:
    """Batches whose tokens are used in the same way; those not counted are but kept at the end."""

    batches: list[TokenBatch]
    counted: bool = True
    fitted: bool = False
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """A calibration before its work: `result` says what it will be.

    sample: what sensitivities are measured on.
    """

    checkpoint: Checkpoint
    settings: CalibrationSettings
    parts: tuple[_Part, ...]
    sample: list[TokenBatch]
    evaluation_sha256: str
    result: Calibration

    @property
    def states_nbytes(self) -> int:
        """Most bytes of hidden states at a time, all of which lie on the disk, padding included.

        The pass has those before and after a layer. Sensitivities begin beside the last of them,
        and need those of every layer and two layers' gradients in the end.
        """
        n_layers = self.checkpoint.model.n_layers
        n_streamed = sum(batch.ids.numel() for part in self.parts for batch in part.batches)
        n_sampled = sum(batch.ids.numel() for batch in self.sample)
        n_positions = max(2 * n_streamed, n_streamed + 2 * n_sampled, (n_layers + 3) * n_sampled)
        return 4 * n_positions * self.checkpoint.model.hidden_size

    @property
    def disk_nbytes(self) -> int:
        """Bytes that the folder takes while it is made, at most."""
        model = self.checkpoint.model
        per_layer = sum(n_in for n_in, _ in sites(model))
        if self.settings.hessians:
            n_held_out = self.result.n_held_out
            per_layer += sum(n_in * (n_in + n_held_out) for n_in, _ in sites(model))
        matrices = (one for one in tensor_specs(model) if one.layer_index is not None)
        in_imatrix = sum(one.shape[-1] for one in matrices if len(one.shape) > 1)
        n_riding = sum(n_tokens_of(part.batches) for part in self.parts if not part.counted)
        return (
            self.states_nbytes
            + 4 * (model.n_layers * per_layer + len(IMATRIX_NAMES) * in_imatrix)
            + 2 * n_riding * model.hidden_size
        )

    def estimate(self) -> Estimate:
        result = self.result
        return estimate_calibration(
            self.checkpoint.model,
            n_tokens=result.n_tokens,
            n_fitted=result.n_fitted,
            n_held_out=result.n_held_out,
            n_sampled=result.n_sampled,
            batch_tokens=self.settings.batch_tokens,
        )


def plan_calibration(
    checkpoint: Checkpoint,
    out_folder: Path,
    *,
    passages: Sequence[Passage],
    settings: CalibrationSettings,
    evaluation: Sequence[Passage] = (),
) -> CalibrationPlan:
    """Tokenize the passages and say what will be done; raises QwqError for text that is unfit.

    evaluation: rides along for its final hidden states, and counts in no statistics.
    """
    sequences = calibration_sequences(checkpoint, passages, n_tokens=settings.n_tokens)
    if not sequences:
        raise UsageError("calibration text: holds no token; give some text")
    parts = (*_parts(sequences, settings), _evaluation_part(checkpoint, evaluation, settings))
    n_sampled = settings.n_sensitivity_tokens if settings.sensitivities else 0
    sampled = list(take_tokens(sequences, n_sampled, max_length=MAX_SEQUENCE_LENGTH))
    sample = token_batches(sampled, batch_tokens=settings.batch_tokens)
    result = Calibration(
        path=out_folder,
        checkpoint_sha256=fingerprint(checkpoint),
        calibration_sha256=set_digest(passages),
        n_layers=checkpoint.model.n_layers,
        n_tokens=sum(n_tokens_of(part.batches) for part in parts if part.counted),
        n_fitted=sum(n_tokens_of(part.batches) for part in parts if part.fitted),
        n_held_out=sum(n_tokens_of(part.batches) for part in parts if part.held_out),
        n_sampled=n_tokens_of(sample),
    )
    return CalibrationPlan(checkpoint, settings, parts, sample, set_digest(evaluation), result)


def calibrate(
    plan: CalibrationPlan,
    *,
    device: str = "cpu",
    force: bool = False,
    on_progress: Progress | None = None,
    on_sensitivities: Progress | None = None,
) -> Calibration:
    """Run all layers over the text and write the calibration folder, whole or not at all.

    on_progress: called with the tokens done, summed over layers, and all there are.
    on_sensitivities: with the steps done and all there are. After an interruption the same call
    continues with the first unfinished layer or step, to the same bytes.
    Raises QwqError for an output that exists, a full disk, and weights or inputs that are broken.
    """
    result, settings = plan.result, plan.settings
    refuse_existing(result.path, force=force)
    check_disk_space(result.path, missing_nbytes(result.path, plan.disk_nbytes))
    made_of = describe(result) | {
        "settings": dataclasses.asdict(settings),
        "evaluation": plan.evaluation_sha256,
    }
    with layer_work(result.path, made_of, force=force) as work:
        stream = LayerStream(plan.checkpoint, device=device)
        _Pass(plan, stream, on_progress=on_progress).run(work)
        if plan.sample:
            SensitivityPass(
                stream, plan.sample, work, n_before=result.n_layers, on_progress=on_sensitivities
            ).run(result.calibration_sha256)
        _write_results(work.folder, plan)
    return result


def describe(calibration: Calibration) -> dict[str, Any]:
    """What the folder says of itself, as JSON values."""
    record = dataclasses.asdict(calibration)
    del record["path"]
    return record


def _parts(sequences: Sequence[Sequence[int]], settings: CalibrationSettings) -> tuple[_Part, ...]:
    fitted: list[Sequence[int]] = []
    held_out: list[Sequence[int]] = []
    rest: list[Sequence[int]] = []
    n_left = settings.n_hessian_tokens if settings.hessians else 0
    for sequence in sequences:
        if n_left <= 0:
            rest.append(sequence)
            continue
        n_left -= len(sequence)
        is_held_out = (len(fitted) + len(held_out)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        (held_out if is_held_out else fitted).append(sequence)
    if settings.hessians and not held_out:
        raise UsageError(
            f"calibration text: {len(fitted)} sequences of up to {MAX_SEQUENCE_LENGTH} tokens are "
            f"too few to hold one out of {HELD_OUT_EVERY}; give more text, or more --hessian-tokens"
        )
    packed = partial(token_batches, batch_tokens=settings.batch_tokens)
    return (
        _Part(packed(fitted), fitted=True),
        _Part(packed(held_out), held_out=True),
        _Part(packed(rest)),
    )


def _evaluation_part(
    checkpoint: Checkpoint, evaluation: Sequence[Passage], settings: CalibrationSettings
) -> _Part:
    if not evaluation:
        return _Part([], counted=False)
    tokenizer = load_tokenizer(checkpoint.path)
    sequences = [tokenize_passage(one, tokenizer).ids for one in evaluation]
    return _Part(token_batches(sequences, batch_tokens=settings.batch_tokens), counted=False)


class _Pass:
    """The layers over all batches, from the first unfinished one on."""

    def __init__(
        self, plan: CalibrationPlan, stream: LayerStream, *, on_progress: Progress | None
    ) -> None:
        self._model = plan.checkpoint.model
        self._stream = stream
        self._parts = [part for part in plan.parts for _ in part.batches]
        self._batches = [batch for part in plan.parts for batch in part.batches]
        self._n_tokens = sum(n_tokens_of(part.batches) for part in plan.parts)
        self._with_hessian = plan.settings.hessians
        self._calibration_sha256 = plan.result.calibration_sha256
        self._on_progress = on_progress

    def run(self, work: LayerWork) -> None:
        import torch

        with torch.inference_mode(), threads_for(self._model):
            if work.n_done == 0:
                write_states(work.states_path(0), self._stream.embed(self._batches))
            for index, layer in self._stream.layers(work.n_done):
                path = self._run_layer(index, layer, work)
                if index + 1 == self._model.n_layers:
                    self._keep_evaluation(work)
                work.finish_layer(path)

    def _run_layer(self, index: int, layer: Qwen2DecoderLayer, work: LayerWork) -> Path:
        """Write a layer's statistics and what comes out of it; returns the statistics' file.

        What it fills is gone when it returns, since the next layer's Hessians need the room.
        """
        statistics = {
            site: InputStatistics(
                layer.get_submodule(site).get_parameter("weight").shape[1],
                with_hessian=self._with_hessian,
                device=self._stream.device,
            )
            for site in INPUT_SITES
        }
        states = self._through(index, layer, statistics, work.states_path(index))
        write_states(work.states_path(index + 1), states)
        tensors = {
            f"{site}.{name}": tensor
            for site, one in statistics.items()
            for name, tensor in one.tensors().items()
        }
        path = _layer_path(work.folder, index)
        write_tensors(path, tensors, {SET_DIGEST: self._calibration_sha256})
        return path

    def _keep_evaluation(self, work: LayerWork) -> None:
        batches = [
            batch
            for part, batch in zip(self._parts, self._batches, strict=True)
            if not part.counted
        ]
        if batches:
            path, size = work.states_path(self._model.n_layers), self._model.hidden_size
            every = zip(self._parts, read_states(path, self._batches, size), strict=True)
            states = (one.numpy() for part, one in every if not part.counted)
            write_evaluation(
                work.folder,
                batches,
                states,
                eps=self._model.rms_norm_eps,
                calibration_sha256=self._calibration_sha256,
            )

    def _through(
        self,
        index: int,
        layer: Qwen2DecoderLayer,
        statistics: dict[str, InputStatistics],
        states_path: Path,
    ) -> Iterator[torch.Tensor]:
        """Push every batch through a layer, folding what its linears read into the statistics."""
        n_done = index * self._n_tokens
        before = read_states(states_path, self._batches, self._model.hidden_size)
        for part, batch, on_disk in zip(self._parts, self._batches, before, strict=True):
            states = on_disk.to(self._stream.device)
            with ExitStack() as stack:
                for site, one in statistics.items() if part.counted else ():
                    visit = partial(
                        _fold, one, batch=batch, part=part, name=f"model.layers.{index}.{site}"
                    )
                    stack.enter_context(capturing_input(layer.get_submodule(site), visit))
                yield layer(states, position_embeddings=self._stream.positions(states))
            n_done += int(batch.is_token.sum())
            if self._on_progress is not None:
                self._on_progress(n_done, self._model.n_layers * self._n_tokens)


def _fold(
    statistics: InputStatistics,
    inputs: torch.Tensor,
    *,
    batch: TokenBatch,
    part: _Part,
    name: str,
) -> None:
    """Fold the inputs of one batch in, without its padding."""
    try:
        statistics.add(
            inputs[batch.is_token.to(inputs.device)], fitted=part.fitted, held_out=part.held_out
        )
    except NumericalError as error:
        raise NumericalError(f"{name}.weight: {error}") from error


def _write_results(folder: Path, plan: CalibrationPlan) -> None:
    """The imatrix in both formats from the layers' files, and the description, which goes last."""
    result, model = plan.result, plan.checkpoint.model
    if not (folder / DESCRIPTION).is_file():
        importance = _importance(model, folder)
        dataset = f"qwq-local:{result.calibration_sha256}"
        for name in IMATRIX_NAMES:
            write_imatrix(
                folder / name, importance, n_tokens=result.n_tokens, dataset=dataset, force=True
            )
        with replacing_file(folder / DESCRIPTION) as file:
            file.write(json.dumps(describe(result), indent=2, sort_keys=True).encode())
    if not plan.settings.hessians:
        for index in range(model.n_layers):
            _layer_path(folder, index).unlink(missing_ok=True)


def _importance(model: Qwen2Config, folder: Path) -> dict[str, Float32Array]:
    """What the layers' files say, by GGUF name."""
    from safetensors import safe_open

    gguf_names = {spec.name: spec.gguf_name for spec in tensor_specs(model)}
    importance = {}
    for index in range(model.n_layers):
        with safe_open(_layer_path(folder, index), "np") as tensors:
            for site, linears in INPUT_SITES.items():
                values = tensors.get_tensor(f"{site}.importance")
                for linear in linears:
                    importance[gguf_names[f"model.layers.{index}.{linear}.weight"]] = values
    return importance


def _layer_path(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:03}.safetensors"
