"""Where a file's error comes from: what each layer and each kind of tensor adds to hidden states.

Two streams run side by side, one layer in memory at a time: the checkpoint's weights, and the
weights that the file's blocks stand for. Both compute in float32, so the engine's own rounding of
activations is not in these numbers. An error is relative: the root of the mean, over tokens, of
|error|^2 / |state|^2, so that the huge states of first tokens do not drown all others.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from convert.calibration import TokenBatch, token_batches
from convert.checkpoint import Checkpoint
from convert.layer_stream import HALVES, LayerStream, threads_for
from quant_eval.divergence import Estimate, Floats, clustered_mean, root
from quant_eval.stored_weights import ALL, ReadWeights, open_weights

if TYPE_CHECKING:
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

BATCH_TOKENS = 2048
MATRIX_ROWS = 16_384  # of the output matrix at a time
KINDS = tuple(name for half in HALVES for name in (*half.first, half.last))
"""The linears of a layer in the order of computation: q_proj to down_proj."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """Errors behind one layer, relative to the reference's states there.

    so_far: with all layers up to here from the file. added: with this layer alone from the file, on
    the reference's states; by_kind: with one linear alone.
    """

    so_far: Estimate
    added: Estimate
    by_kind: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """The errors of one file over n_tokens tokens, clustered by passage.

    embedding: of the states before the first layer. output: of the logits, less their mean, by the
    output matrix alone.
    """

    n_tokens: int
    n_passages: int
    embedding: Estimate
    layers: tuple[LayerError, ...]
    output: Estimate

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `to_json` made of it."""
        return cls(
            data["n_tokens"],
            data["n_passages"],
            _estimate(data["embedding"]),
            tuple(
                LayerError(
                    _estimate(one["so_far"]),
                    _estimate(one["added"]),
                    {kind: _estimate(each) for kind, each in one["by_kind"].items()},
                )
                for one in data["layers"]
            ),
            _estimate(data["output"]),
        )

    def of_kind(self, kind: str) -> float:
        """The root mean square, over layers, of what one kind of linear adds."""
        squares = [layer.by_kind[kind].value ** 2 for layer in self.layers]
        return float(np.sqrt(np.mean(squares)))


def _estimate(data: Mapping[str, Any]) -> Estimate:
    return Estimate(data["value"], data.get("standard_error"), data["n"])


def layer_errors(
    path: Path,
    checkpoint: Checkpoint,
    passages: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> LayerErrors:
    """Run both streams over the passages' token ids.

    About five times the work of the reference alone. on_progress: (layers done, layers).
    Raises QwqError where the file cannot be read or was not made from the checkpoint.
    """
    import torch

    read = open_weights(path, checkpoint)
    stream = LayerStream(checkpoint)
    batches = token_batches(passages, batch_tokens=batch_tokens)
    layers = []
    with torch.inference_mode(), threads_for(checkpoint.model):
        exact = list(stream.embed(batches))
        found = [_embed(batch, read) for batch in batches]
        embedding = _Errors(batches)
        for i, states in enumerate(exact):
            embedding.add("", i, found[i] - states, states)
        for index, layer in stream.layers():
            errors = _Errors(batches)
            stored = _read_layer(layer, index, read)
            for i, states in enumerate(exact):
                exact[i], found[i] = _through(stream, layer, stored, i, states, found[i], errors)
            layers.append(
                LayerError(
                    errors.estimate("so far"),
                    errors.estimate("added"),
                    {kind: errors.estimate(kind) for kind in KINDS},
                )
            )
            if on_progress is not None:
                on_progress(index + 1, checkpoint.model.n_layers)
        output = _output_error(exact, batches, checkpoint, read)
    return LayerErrors(
        n_tokens=output.n,
        n_passages=len(passages),
        embedding=embedding.estimate(""),
        layers=tuple(layers),
        output=output,
    )


class _Errors:
    """Squared relative errors of every token by name, a passage at a time; padding left out."""

    def __init__(self, batches: Sequence[TokenBatch]) -> None:
        self._batches = batches
        self._squares: defaultdict[str, list[Floats]] = defaultdict(list)

    def add(self, name: str, batch: int, error: "torch.Tensor", states: "torch.Tensor") -> None:
        self.add_squares(name, batch, error.square().sum(-1), states.square().sum(-1))

    def add_squares(
        self, name: str, batch: int, errors: "torch.Tensor", sizes: "torch.Tensor"
    ) -> None:
        """errors, sizes: (n_sequences, n_positions), squared."""
        for squares, mask in zip(
            errors.double() / sizes.double(), self._batches[batch].is_token, strict=True
        ):
            self._squares[name].append(squares[mask].cpu().numpy())

    def estimate(self, name: str) -> Estimate:
        return root(clustered_mean(self._squares[name]))


def _embed(batch: TokenBatch, read: ReadWeights) -> "torch.Tensor":
    import torch

    occurring, places = torch.unique(batch.ids, return_inverse=True)
    return torch.from_numpy(read("model.embed_tokens.weight", occurring.numpy()))[places]


def _read_layer(
    layer: "Qwen2DecoderLayer", index: int, read: ReadWeights
) -> dict[str, "torch.Tensor"]:
    import torch

    return {
        name: torch.from_numpy(read(f"model.layers.{index}.{name}", ALL))
        for name, _ in layer.named_parameters()
    }


def _through(
    stream: LayerStream,
    layer: "Qwen2DecoderLayer",
    stored: Mapping[str, "torch.Tensor"],
    batch: int,
    exact: "torch.Tensor",
    found: "torch.Tensor",
    errors: _Errors,
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Both streams' states behind the layer, for one batch."""
    states = exact
    by_kind = {}
    for half in HALVES:
        normed = getattr(layer, half.norm)(states)
        added = stream.run_body(layer, half, normed)
        for kind in (*half.first, half.last):
            with _replaced(layer, stored, f"{half.body}.{kind}."):
                by_kind[kind] = stream.run_body(layer, half, normed) - added
        states = states + added
    for kind, error in by_kind.items():
        errors.add(kind, batch, error, states)
    positions = stream.positions(exact)
    with _replaced(layer, stored, ""):
        errors.add("added", batch, layer(exact, position_embeddings=positions) - states, states)
        found = layer(found, position_embeddings=positions)
    errors.add("so far", batch, found - states, states)
    return states, found


@contextmanager
def _replaced(
    layer: "Qwen2DecoderLayer", stored: Mapping[str, "torch.Tensor"], prefix: str
) -> Iterator[None]:
    """The layer with the file's values in all parameters of this beginning."""
    own = {name: one.data for name, one in layer.named_parameters() if name.startswith(prefix)}
    for name in own:
        layer.get_parameter(name).data = stored[name]
    try:
        yield
    finally:
        for name, values in own.items():
            layer.get_parameter(name).data = values


def _output_error(
    exact: Sequence["torch.Tensor"],
    batches: Sequence[TokenBatch],
    checkpoint: Checkpoint,
    read: ReadWeights,
) -> Estimate:
    """Of the logits by the output matrix alone, which is read in slices."""
    import torch

    model = checkpoint.model
    name = "model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight"
    weight = torch.from_numpy(checkpoint.read("model.norm.weight"))
    normed = [
        torch.nn.functional.rms_norm(one, (model.hidden_size,), weight, model.rms_norm_eps)
        for one in exact
    ]
    sums, squares, errors = ([torch.zeros(one.shape[:2]).double() for one in exact] for _ in "123")
    for start in range(0, model.vocab_size, MATRIX_ROWS):
        stop = min(start + MATRIX_ROWS, model.vocab_size)
        matrix = torch.from_numpy(checkpoint.rows(name, start, stop))
        difference = torch.from_numpy(read(name, slice(start, stop))) - matrix
        for i, states in enumerate(normed):
            logits = states @ matrix.T
            sums[i] += logits.sum(-1, dtype=torch.float64)
            squares[i] += logits.square().sum(-1, dtype=torch.float64)
            errors[i] += (states @ difference.T).square().sum(-1, dtype=torch.float64)
    collected = _Errors(batches)
    for i in range(len(normed)):
        centred = squares[i] - sums[i].square() / model.vocab_size
        collected.add_squares("", i, errors[i], centred)
    return collected.estimate("")
