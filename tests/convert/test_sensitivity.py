"""Sensitivities: against one backward pass of the whole model, and against measured divergence."""

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.calibrate import CalibrationSettings, calibrate, open_calibration, plan_calibration
from convert.calibration import token_batches
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.files import partial_path
from convert.imatrix import read_imatrix
from convert.passages import calibration_sequences
from convert.qwen2 import EMBEDDINGS, HEAD, tensor_specs
from convert.sensitivity import HEAD_TOKENS, SENSITIVITIES, load_sensitivities
from tests.synthetic import sums, write_checkpoint

N_LAYERS = 2
N_SAMPLED = 700
SETTINGS = CalibrationSettings(
    n_tokens=1000, sensitivities=True, n_sensitivity_tokens=N_SAMPLED, batch_tokens=256
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, object] = {"num_hidden_layers": N_LAYERS}
    return write_checkpoint(tmp_path_factory.mktemp("sensitivity") / "source", config=config)


@pytest.fixture(scope="module")
def finished(source: Path) -> Path:
    return run(source, source.parent / "out")


def run(source: Path, out: Path, *, stop_after: int | None = None) -> Path:
    """Calibrate; stop_after: interrupt once so many steps of the sensitivities are done."""

    def on_step(done: int, total: int) -> None:
        assert total == 2 * N_LAYERS + 1
        if done == stop_after:
            raise KeyboardInterrupt

    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(checkpoint, out, passages=sums(16), settings=SETTINGS)
        assert plan.result.n_sampled == N_SAMPLED
        return calibrate(plan, on_sensitivities=on_step).path


def sample(source: Path) -> list[list[int]]:
    """The sampled sequences in the order in which the pass meets them."""
    with Checkpoint.open(source) as checkpoint:
        sequences = calibration_sequences(checkpoint, sums(16), n_tokens=N_SAMPLED)
    batches = token_batches(sequences, batch_tokens=SETTINGS.batch_tokens)
    return [
        ids[is_token].tolist()
        for batch in batches
        for ids, is_token in zip(batch.ids, batch.is_token, strict=True)
    ]


def test_sensitivities_equal_the_whole_models_gradients(source: Path, finished: Path) -> None:
    """Catches a layer's gradient given to another, a norm left out, padding counted, a mean of
    means, and labels that are not drawn from the predictions.
    """
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    linears = {name: one for name, one in model.named_modules() if name.endswith("_proj")}
    gradients = dict.fromkeys(linears, torch.zeros(()))
    inputs = dict.fromkeys(linears, torch.zeros(()))
    embedded = information = torch.zeros(())

    def measure(name: str, read: torch.Tensor) -> None:
        inputs[name] = inputs[name] + read.detach().square().sum()

    for name, linear in linears.items():
        linear.register_forward_hook(lambda _, read, __, name=name: measure(name, read[0]))
    # The pass draws for a batch at a time, in chunks.
    sequences = sample(source)
    generator = torch.Generator().manual_seed(0)
    ends = np.cumsum([0, *batch_sizes(source)])
    for start, stop in pairwise(ends):
        group = sequences[start:stop]
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([ids])).logits[0] for ids in group])
        predicted = logits.softmax(dim=1)
        information = information + (predicted * (1 - predicted)).sum(dim=0)
        drawn = [
            torch.multinomial(predicted[first : first + HEAD_TOKENS], 1, generator=generator)[:, 0]
            for first in range(0, len(predicted), HEAD_TOKENS)
        ]
        labels = iter(torch.cat(drawn))
        for ids in group:
            read = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_(True)
            model.zero_grad()
            logits = model(inputs_embeds=read).logits[0]
            expected = torch.stack([*islice(labels, len(ids))])
            loss = torch.nn.functional.cross_entropy(logits, expected, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            assert read.grad is not None
            embedded = embedded + read.grad[0].square().sum(dim=0)
            for name, linear in linears.items():
                gradient = linear.get_parameter("weight").grad
                assert gradient is not None
                gradients[name] = gradients[name] + gradient.square().sum(dim=1)
    with Checkpoint.open(source) as checkpoint:
        found = load_sensitivities(finished, checkpoint)
        assert found.keys() == {s.name for s in tensor_specs(checkpoint.model) if len(s.shape) > 1}
    for name, squares in gradients.items():
        (one,) = found[f"{name}.weight"]
        # Inputs were measured in both runs, to draw and to differentiate.
        np.testing.assert_allclose(one.rows, 2 * squares / inputs[name], rtol=2e-3)
        assert one.columns is None
    (head,), (embeddings,) = found[HEAD], found[EMBEDDINGS]
    np.testing.assert_allclose(head.rows, information / N_SAMPLED, rtol=1e-3)
    assert embeddings.columns is not None
    np.testing.assert_allclose(embeddings.columns, embedded / N_SAMPLED, rtol=2e-3)
    assert embeddings.rows.sum() == pytest.approx(1)


def batch_sizes(source: Path) -> list[int]:
    with Checkpoint.open(source) as checkpoint:
        sequences = calibration_sequences(checkpoint, sums(16), n_tokens=N_SAMPLED)
    return [len(one.ids) for one in token_batches(sequences, batch_tokens=SETTINGS.batch_tokens)]


def test_they_predict_what_errors_cost(source: Path, finished: Path) -> None:
    """Catches a factor of two, rows taken for columns, and a matrix left out of the sum."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    changed, predicted = {}, 0.0
    imatrix = read_imatrix(finished / "imatrix.gguf")
    random = np.random.default_rng(3)
    with Checkpoint.open(source) as checkpoint:
        sensitivities = load_sensitivities(finished, checkpoint)
        for spec in tensor_specs(checkpoint.model):
            if spec.name in sensitivities:
                weight = checkpoint.read(spec.name)
                error = random.normal(0, 0.02 * weight.std(), weight.shape).astype(np.float32)
                changed[spec.name] = torch.from_numpy(weight + error)
                importance = imatrix.importance_of(spec.gguf_name, spec.shape[-1])
                for one in sensitivities[spec.name]:
                    columns = importance if one.columns is None else one.columns
                    assert columns is not None
                    predicted += 0.5 * float(one.rows @ (np.square(error) @ columns))
    divergence = 0.0
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0].log_softmax(1) for ids in sample(source)]
        model.load_state_dict(changed, strict=False)
        for ids, before in zip(sample(source), expected, strict=True):
            after = model(torch.tensor([ids])).logits[0].log_softmax(1)
            divergence += float((before.exp() * (before - after)).sum())
    assert predicted == pytest.approx(divergence / N_SAMPLED, rel=0.25)


@pytest.mark.parametrize("step", range(1, 2 * N_LAYERS + 2))
def test_interruption_does_not_matter(
    source: Path, finished: Path, tmp_path: Path, step: int
) -> None:
    """Catches a step done twice or left out, and what is left lying in the folder."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, stop_after=step)
    assert partial_path(out).exists()
    run(source, out)
    names = sorted(path.name for path in finished.iterdir())
    assert names == ["calibration.json", "imatrix.dat", "imatrix.gguf", SENSITIVITIES]
    assert names == sorted(path.name for path in out.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_tied_embeddings_matter_twice(tmp_path: Path) -> None:
    """Catches a matrix that reads and predicts but is priced for one of the two."""
    config: dict[str, object] = {"num_hidden_layers": N_LAYERS, "tie_word_embeddings": True}
    source = write_checkpoint(tmp_path / "tied", config=config)
    out = run(source, tmp_path / "out")
    with Checkpoint.open(source) as checkpoint:
        assert open_calibration(out, checkpoint).n_sampled == N_SAMPLED
        found = load_sensitivities(out, checkpoint)
        assert HEAD not in found
        assert len(found[EMBEDDINGS]) == 2
        with pytest.raises(QwqError, match="calibrate --sensitivities"):
            load_sensitivities(tmp_path, checkpoint)
        (out / SENSITIVITIES).write_bytes(b"cut")
        with pytest.raises(QwqError, match="cannot be read"):
            load_sensitivities(out, checkpoint)
