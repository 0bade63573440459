"""The streamed decoder against transformers' whole model."""

from pathlib import Path
from threading import Event

import pytest
import torch

from convert.calibration import token_batches
from convert.checkpoint import Checkpoint
from convert.layer_stream import HALVES, LayerStream, capturing_input
from convert.layer_work import passing_work
from tests.synthetic import write_checkpoint

SEQUENCES = [[7, 70, 200, 12, 90, 33, 61], [101, 102, 3], [5], [88, 250, 17, 44]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, object] = {"num_hidden_layers": 3}
    return write_checkpoint(tmp_path_factory.mktemp("stream") / "model", config=config, n_shards=2)


def whole_model(folder: Path) -> torch.nn.Module:
    from transformers import Qwen2ForCausalLM

    model: torch.nn.Module = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("batch_tokens", [1, 8, 1000])
def test_hidden_states_equal_the_whole_models(
    folder: Path, tmp_path: Path, batch_tokens: int
) -> None:
    """Catches a layer skipped or filled with another's weights, positions shifted, padding seen."""
    expected: list[torch.Tensor] = []
    model = whole_model(folder)
    last = model.get_submodule("model.layers.2")
    with torch.no_grad():
        for ids in sorted(SEQUENCES, key=len):
            with last.register_forward_hook(lambda _m, _i, output: expected.append(output[0])):
                model(torch.tensor([ids]))
    batches = token_batches(SEQUENCES, batch_tokens=batch_tokens)
    with Checkpoint.open(folder) as checkpoint, passing_work(tmp_path / "layers", {}) as work:
        hidden = list(LayerStream(checkpoint).final_hidden(batches, work))
    rows = [
        states[mask]
        for batch, all_states in zip(batches, hidden, strict=True)
        for states, mask in zip(all_states, batch.is_token, strict=True)
    ]
    for ours, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_next_layer_is_read_while_the_caller_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    """Catches layers read one after the other, by need, and more than one in advance."""
    order = [2, 1, 0] if backwards else [0, 1, 2]
    begun: list[int] = []
    is_read = {index: Event() for index in order}
    load_layer = LayerStream.load_layer

    def watched(stream: LayerStream, index: int) -> object:
        begun.append(index)
        layer = load_layer(stream, index)
        is_read[index].set()
        return layer

    monkeypatch.setattr(LayerStream, "load_layer", watched)
    with Checkpoint.open(folder) as checkpoint:
        for place, (index, _) in enumerate(LayerStream(checkpoint).layers(backwards=backwards)):
            assert index == order[place]
            for later in order[place + 1 :][:1]:
                assert is_read[later].wait(timeout=30), "the next layer is not read meanwhile"
            assert begun == order[: place + 2]


def test_two_halves_are_a_layer(folder: Path) -> None:
    """Catches halves that no longer add up to transformers' own layer."""
    batches = token_batches(SEQUENCES, batch_tokens=1000)
    with Checkpoint.open(folder) as checkpoint:
        stream = LayerStream(checkpoint)
        ((_, layer),) = stream.layers(start=2)
        (states,) = stream.embed(batches)
    expected = layer(states, position_embeddings=stream.positions(states))
    for half in HALVES:
        normed = layer.get_submodule(half.norm)(states)
        inputs = stream.inputs_of_last(layer, half, normed)
        added = stream.run_body(layer, half, normed)
        assert torch.equal(layer.get_submodule(f"{half.body}.{half.last}")(inputs), added)
        states = states + added
    assert torch.equal(states, expected)


def test_the_input_of_a_linear_is_captured(folder: Path) -> None:
    """Catches a hook that stays, or that sees something else."""
    linear = torch.nn.Linear(4, 4)
    seen: list[torch.Tensor] = []
    inputs = torch.ones(2, 4)
    with capturing_input(linear, seen.append):
        linear(inputs)
    linear(inputs)
    assert len(seen) == 1
    assert seen[0] is inputs


def test_every_linear_is_in_a_half(folder: Path) -> None:
    """Catches a linear of the architecture that would be left unquantized."""
    with Checkpoint.open(folder) as checkpoint:
        layer = LayerStream(checkpoint).load_layer(0)
    linears = {
        name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)
    }
    listed = {f"{half.body}.{name}" for half in HALVES for name in (*half.first, half.last)}
    assert linears == listed
