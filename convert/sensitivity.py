"""What errors in each matrix cost, in nats of divergence, from one pass forward and one back.

A small error d in a matrix changes the model's predictions by a divergence of about (d . g)^2 / 2,
where g is the gradient of the log-probability of tokens drawn from those predictions. Its mean
square is the Fisher information; here it is kept as a product, so that errors d_ij cost about
1/2 sum_ij rows_i columns_j d_ij^2 nats a token: columns are the importance, rows from gradients.
Source: Martens 2020, "New insights and perspectives on the natural gradient method", section 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.calibration import SET_DIGEST, TokenBatch
from convert.checkpoint import Checkpoint, Float32Array
from convert.errors import NumericalError, QwqError
from convert.files import remove, replacing_file
from convert.layer_stream import INPUT_SITES, LayerStream, n_tokens_of, threads_for
from convert.layer_work import LayerWork, read_states, write_states
from convert.qwen2 import EMBEDDINGS, HEAD
from convert.safetensors_writer import write_tensors

if TYPE_CHECKING:
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

SENSITIVITIES = "sensitivities.safetensors"
LINEARS = tuple(linear for linears in INPUT_SITES.values() for linear in linears)
HEAD_TOKENS = 512  # of logits at a time: 311 MB for QwQ-32B
HEAD_ROWS = 8192  # of the output matrix at a time
SMALLEST = 1e-30  # where a linear reads nothing but zeros
_NORM = "model.norm.weight"
_SEED = 0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of a matrix; rows: (n_out,), columns: (n_in,), None where the importance says it."""

    rows: Float32Array
    columns: Float32Array | None = None


def load_sensitivities(folder: Path, checkpoint: Checkpoint) -> dict[str, list[Sensitivity]]:
    """What was kept, by matrix; tied embeddings have two, as they are used twice.

    Raises QwqError where the file is missing or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / SENSITIVITIES
    if not path.is_file():
        raise QwqError(
            f"{folder}: holds no {SENSITIVITIES}; run `qwq calibrate --sensitivities` on the "
            "checkpoint"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise QwqError(f"{path}: cannot be read ({error}); calibrate again") from error
    found: dict[str, list[Sensitivity]] = {}
    for key, rows in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind == "rows":
            matrix = EMBEDDINGS if name == HEAD and checkpoint.model.tied_embeddings else name
            one = Sensitivity(rows, tensors.get(f"{name}.columns"))
            found.setdefault(matrix, []).append(one)
    return found


class SensitivityPass:
    """The sample through all layers and back, from the first unfinished step on.

    n_before: steps of the work that are another's.
    """

    def __init__(
        self,
        stream: LayerStream,
        batches: Sequence[TokenBatch],
        work: LayerWork,
        *,
        n_before: int,
        on_progress: Progress | None,
    ) -> None:
        self._stream = stream
        self._checkpoint = stream.checkpoint
        self._model = stream.checkpoint.model
        self._batches = batches
        self._n_tokens = n_tokens_of(batches)
        self._work = work
        self._n_before = n_before
        self._on_progress = on_progress

    @property
    def _n_done(self) -> int:
        return self._work.n_done - self._n_before

    def run(self, calibration_sha256: str) -> None:
        """Write SENSITIVITIES into the work's folder. calibration_sha256: of the sample's set."""
        with threads_for(self._model):
            self._forward()
            if self._n_done == self._model.n_layers:
                self._head()
            self._backward()
        self._merge(calibration_sha256)

    def _forward(self) -> None:
        import torch

        with torch.inference_mode():
            if self._n_done == 0:
                write_states(self._inputs(0), self._stream.embed(self._batches))
            for index, layer in self._stream.layers(max(0, self._n_done)):
                moved = (
                    layer(states, position_embeddings=self._stream.positions(states))
                    for states in self._read(self._inputs(index))
                )
                write_states(self._inputs(index + 1), moved)
                self._finish_step()

    def _head(self) -> None:
        """From the last layer's output to the predictions, and back."""
        import torch

        n_layers = self._model.n_layers
        generator = torch.Generator().manual_seed(_SEED)
        device = self._stream.device
        weight = torch.from_numpy(self._checkpoint.read(_NORM)).to(device)
        rows = torch.zeros(self._model.vocab_size, dtype=torch.float64)
        columns = torch.zeros(self._model.hidden_size, dtype=torch.float64)

        def gradients() -> Iterator[torch.Tensor]:
            read = self._read(self._inputs(n_layers))
            for states, batch in zip(read, self._batches, strict=True):
                is_token = batch.is_token.to(device)
                wanted = torch.zeros_like(states)
                parts = []
                for tokens in torch.split(states[is_token], HEAD_TOKENS):
                    tokens.requires_grad_(True)
                    variance = tokens.square().mean(dim=-1, keepdim=True)
                    normed = weight * tokens * torch.rsqrt(variance + self._model.rms_norm_eps)
                    gradient, fisher = self._predict(normed.detach(), generator)
                    normed.backward(gradient)  # type: ignore[no-untyped-call]
                    assert tokens.grad is not None
                    parts.append(tokens.grad)
                    rows.add_(fisher)
                    columns.add_(normed.detach().cpu().double().square().sum(dim=0))
                wanted[is_token] = torch.cat(parts)
                yield wanted

        write_states(self._gradients(n_layers), gradients())
        path = self._path("head")
        kept = {f"{HEAD}.rows": rows, f"{HEAD}.columns": columns}
        write_tensors(path, {name: (sum_ / self._n_tokens).float() for name, sum_ in kept.items()})
        self._finish_step(path)

    def _predict(
        self, normed: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of a drawn token's log-probability, (n, hidden_size), up to its sign.

        And the sum over tokens of the logits' own Fisher information, (vocab_size,).
        """
        import torch

        logits = torch.cat([normed @ matrix.T for matrix in self._head_matrix()], dim=1)
        errors = logits.softmax(dim=1)  # (n, vocab_size)
        drawn = torch.multinomial(errors.cpu(), 1, generator=generator).to(errors.device)
        fisher = (errors * (1 - errors)).sum(dim=0).cpu().double()
        errors.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=errors.dtype))
        gradient = torch.zeros_like(normed)
        start = 0
        for matrix in self._head_matrix():
            gradient += errors[:, start : start + len(matrix)] @ matrix
            start += len(matrix)
        return gradient, fisher

    def _head_matrix(self) -> Iterator[torch.Tensor]:
        """The output matrix in slices of its rows."""
        import torch

        name = EMBEDDINGS if self._model.tied_embeddings else HEAD
        for start in range(0, self._model.vocab_size, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, self._model.vocab_size)
            yield torch.from_numpy(self._checkpoint.rows(name, start, stop)).to(self._stream.device)

    def _backward(self) -> None:
        n_layers = self._model.n_layers
        for index, layer in self._stream.layers(self._n_done - n_layers - 1, backwards=True):
            sums = {linear: _RowSums(layer.get_submodule(linear)) for linear in LINEARS}
            write_states(self._gradients(index), self._layer_gradients(index, layer, sums))
            path = self._path(f"{index:03}")
            rows = {
                f"model.layers.{index}.{name}.weight.rows": one.rows for name, one in sums.items()
            }
            write_tensors(path, rows)
            self._finish_step(path)
            remove(self._inputs(index + 1))
            remove(self._gradients(index + 1))

    def _layer_gradients(
        self, index: int, layer: Qwen2DecoderLayer, sums: Mapping[str, _RowSums]
    ) -> Iterator[torch.Tensor]:
        """Of a layer's inputs, batch by batch, while those of its linears are added to sums."""
        inputs = self._read(self._inputs(index))
        after = self._read(self._gradients(index + 1))
        for states, gradient, batch in zip(inputs, after, self._batches, strict=True):
            for one in sums.values():
                one.is_token = batch.is_token.to(states.device)
            states.requires_grad_(True)
            put_out = layer(states, position_embeddings=self._stream.positions(states))
            put_out.backward(gradient)
            assert states.grad is not None
            if not bool(states.grad.isfinite().all()):
                raise NumericalError(
                    f"model.layers.{index}: its gradients hold NaN or Inf; the weights are damaged"
                )
            yield states.grad

    def _merge(self, calibration_sha256: str) -> None:
        """One file of all steps' results; what else was written goes."""
        import torch
        from safetensors.torch import load_file, save

        folder = self._work.folder
        if not (folder / SENSITIVITIES).is_file():
            tensors: dict[str, torch.Tensor] = {}
            for step in ("head", *(f"{index:03}" for index in range(self._model.n_layers))):
                tensors |= load_file(self._path(step))
            embedded = torch.zeros(self._model.hidden_size, dtype=torch.float64)
            for gradient in self._read(self._gradients(0)):
                embedded += gradient.cpu().double().square().sum(dim=(0, 1))
            n_rows = self._model.vocab_size  # which of them a text uses says little of another text
            tensors[f"{EMBEDDINGS}.rows"] = torch.full((n_rows,), 1 / n_rows)
            tensors[f"{EMBEDDINGS}.columns"] = (embedded / self._n_tokens).float()
            with replacing_file(folder / SENSITIVITIES) as file:
                file.write(save(tensors, metadata={SET_DIGEST: calibration_sha256}))
        for kind in ("sensitivity-*.safetensors", "inputs-*.f32", "gradients-*.f32"):
            for path in folder.glob(kind):
                remove(path)

    def _path(self, step: str) -> Path:
        return self._work.folder / f"sensitivity-{step}.safetensors"

    def _inputs(self, index: int) -> Path:
        """What enters a layer; after the last one, what enters the norm."""
        return self._work.folder / f"inputs-{index:03}.f32"

    def _gradients(self, index: int) -> Path:
        """Of the same."""
        return self._work.folder / f"gradients-{index:03}.f32"

    def _read(self, path: Path) -> Iterator[torch.Tensor]:
        for states in read_states(path, self._batches, self._model.hidden_size):
            yield states.to(self._stream.device)

    def _finish_step(self, *files: Path) -> None:
        self._work.finish_layer(*files)
        if self._on_progress is not None:
            self._on_progress(self._n_done, n_steps(self._model.n_layers))


def n_steps(n_layers: int) -> int:
    """Steps of the pass: each layer forward, the head, each layer backward."""
    return 2 * n_layers + 1


class _RowSums:
    """Sums over sequences of a linear's squared weight gradients, by row, and what they go with.

    A sequence's gradient is that of all its drawn tokens together, since an error in a weight acts
    on every position at once. Padding adds nothing: no prediction depends on it.
    """

    def __init__(self, linear: torch.nn.Module) -> None:
        import torch

        self.is_token = torch.ones(0, dtype=torch.bool)
        n_out = linear.get_parameter("weight").shape[0]
        self._gradients = torch.zeros(n_out, dtype=torch.float64)
        self._inputs = 0.0
        linear.register_forward_hook(self._watch)

    @property
    def rows(self) -> torch.Tensor:
        """(n_out,), to be multiplied by the importance of the columns."""
        return (self._gradients / max(self._inputs, SMALLEST)).float()

    def _watch(
        self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...], put_out: torch.Tensor
    ) -> None:
        inputs = arguments[0].detach()
        self._inputs += float(inputs[self.is_token].square().sum())

        def add(gradient: torch.Tensor) -> None:
            for of_sequence, its_inputs in zip(gradient, inputs, strict=True):
                squares = (of_sequence.T @ its_inputs).square().sum(dim=1)  # (n_out,)
                self._gradients += squares.cpu().double()  # MPS has no float64

        put_out.register_hook(add)  # type: ignore[no-untyped-call]
