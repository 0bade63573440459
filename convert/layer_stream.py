"""The decoder one layer at a time: load a layer, push all hidden states through it, let it go.

Layers are transformers' own modules, so the arithmetic is the reference's: weights widened from the
checkpoint's dtype to float32, computed in float32. Memory: one layer, the next one, and a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.calibration import TokenBatch
from convert.checkpoint import Checkpoint
from convert.errors import UsageError
from convert.layer_work import LayerWork, read_states, write_states
from convert.qwen2 import Qwen2Config, tensor_specs

if TYPE_CHECKING:
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

EMBEDDING_ROWS = 8192  # read at a time
SMALL_MODEL_WEIGHTS = 100_000_000


@dataclass(frozen=True, slots=True)
class Half:
    """Half a decoder layer, x + body(norm(x)), and its linears in the order of computation.

    `first` all read norm's output; `last` reads what the body makes of theirs.
    """

    norm: str
    body: str
    first: tuple[str, ...]
    last: str


HALVES = (
    Half("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    Half("post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), "down_proj"),
)

INPUT_SITES = {
    f"{half.body}.{names[0]}": tuple(f"{half.body}.{name}" for name in names)
    for half in HALVES
    for names in (half.first, (half.last,))
}
"""Where a layer's linears take their inputs: the first linear that reads them, and all that do."""


class LayerStream:
    """A checkpoint's decoder, ready to hand out one layer at a time.

    device: where layers compute and hidden states lie.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu") -> None:
        import torch
        import transformers
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self._config = transformers.Qwen2Config.from_dict(dict(checkpoint.config))
        self._config._attn_implementation = "sdpa"
        self._rotary = Qwen2RotaryEmbedding(self._config).to(self.device)

    def load_layer(self, index: int) -> Qwen2DecoderLayer:
        """Layer `index` with its weights in float32, in evaluation mode, without gradients."""
        import torch
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

        with torch.device("meta"):
            layer = Qwen2DecoderLayer(self._config, index)
        weights = {
            name: torch.from_numpy(self.checkpoint.read(f"model.layers.{index}.{name}"))
            for name, _ in layer.named_parameters()
        }
        layer.load_state_dict(weights, assign=True)
        layer.eval().requires_grad_(False)
        return layer.to(self.device)

    def layers(
        self, start: int = 0, *, backwards: bool = False
    ) -> Iterator[tuple[int, Qwen2DecoderLayer]]:
        """Each layer with its index; the next is read while the caller computes.

        start: how many to leave out. backwards: from the last layer to the first.
        """
        order = range(self.checkpoint.model.n_layers)[:: -1 if backwards else 1][start:]
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self.load_layer, index) for index in order[:1]]
            for n_done, index in enumerate(order, start=1):
                layer = coming.pop().result()
                coming += [reader.submit(self.load_layer, later) for later in order[n_done:][:1]]
                yield index, layer

    def embed(self, batches: Sequence[TokenBatch]) -> Iterator[torch.Tensor]:
        """Hidden states before the first layer: (n_sequences, n_positions, hidden_size) a batch.

        Reads the embedding matrix once, in slices, and keeps only the rows that occur.
        """
        import torch

        name = "model.embed_tokens.weight"
        occurring = torch.unique(torch.cat([batch.ids.flatten() for batch in batches]))
        table = torch.empty(len(occurring), self.checkpoint.model.hidden_size)
        for start in range(0, self.checkpoint.model.vocab_size, EMBEDDING_ROWS):
            stop = min(start + EMBEDDING_ROWS, self.checkpoint.model.vocab_size)
            here = (occurring >= start) & (occurring < stop)
            if bool(here.any()):
                rows = torch.from_numpy(self.checkpoint.rows(name, start, stop))
                table[here] = rows[occurring[here] - start]
        for batch in batches:
            yield table[torch.searchsorted(occurring, batch.ids)].to(self.device)

    def positions(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary embedding, (1, n_positions, head_dim) each."""
        import torch

        ids = torch.arange(hidden.shape[1], device=self.device)[None]
        cosines, sines = self._rotary(hidden, ids)
        return cosines, sines

    def run_body(self, layer: Qwen2DecoderLayer, half: Half, normed: torch.Tensor) -> torch.Tensor:
        """What half a layer adds to its input, from the normed input."""
        if half.body == "mlp":
            added: torch.Tensor = layer.mlp(normed)
            return added
        # Without a mask attention is causal, so padding on the right is never looked at.
        added, _ = layer.self_attn(
            normed, position_embeddings=self.positions(normed), attention_mask=None
        )
        return added

    def inputs_of_last(
        self, layer: Qwen2DecoderLayer, half: Half, normed: torch.Tensor
    ) -> torch.Tensor:
        """What the last linear of half a layer reads, from the normed input."""
        import torch

        body = layer.get_submodule(half.body)
        last = body.get_submodule(half.last)
        setattr(body, half.last, torch.nn.Identity())
        try:
            return self.run_body(layer, half, normed)
        finally:
            setattr(body, half.last, last)

    def final_hidden(
        self,
        batches: Sequence[TokenBatch],
        work: LayerWork,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Hidden states after the last layer and before the final norm, batch by batch.

        work: keeps them after each layer; layers that it has done are not run again.
        """
        import torch

        model = self.checkpoint.model
        with torch.inference_mode(), threads_for(model):
            if work.n_done == 0:
                write_states(work.states_path(0), self.embed(batches))
            for index, layer in self.layers(work.n_done):
                before = read_states(work.states_path(index), batches, model.hidden_size)
                moved = (
                    layer(states, position_embeddings=self.positions(states))
                    for states in (one.to(self.device) for one in before)
                )
                write_states(work.states_path(index + 1), moved)
                work.finish_layer()
                if on_progress is not None:
                    on_progress(index + 1, model.n_layers)
        return read_states(work.states_path(model.n_layers), batches, model.hidden_size)


def find_device(wanted: str | None) -> str:
    """The device that was asked for, or the best there is; raises UsageError where it is absent."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    present["cpu"] = True
    usable = [name for name, is_there in present.items() if is_there]
    if wanted is None:
        return usable[0]
    if wanted.partition(":")[0] not in usable:
        raise UsageError(f"--device {wanted}: is not here; give one of {', '.join(usable)}")
    return wanted


@contextmanager
def threads_for(model: Qwen2Config) -> Iterator[None]:
    """While the context lasts, torch computes small models on one thread.

    Their steps are shorter than threads take to wait for one another on busy cores.
    """
    import torch

    n_threads = torch.get_num_threads()
    if sum(math.prod(spec.shape) for spec in tensor_specs(model)) < SMALL_MODEL_WEIGHTS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@contextmanager
def capturing_input(
    module: torch.nn.Module, visit: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Hand every input of `module` to `visit` while the context lasts."""

    def hook(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        visit(arguments[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def n_tokens_of(batches: Iterable[TokenBatch]) -> int:
    return sum(int(batch.is_token.sum()) for batch in batches)
