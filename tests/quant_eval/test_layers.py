"""The error that each layer adds, against whole models of transformers with the weights put in."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gguf_export import export_gguf
from convert.qwen2 import tensor_specs
from quant_eval.layers import KINDS, LayerErrors, layer_errors
from quant_eval.results import to_json
from tests.synthetic import Array, write_checkpoint

CONFIG: dict[str, object] = {"num_hidden_layers": 2}
PASSAGES = [[7, 70, 200, 12, 90, 33, 61], [101, 102, 3, 88, 250, 17, 9, 8, 7, 40], [5, 6]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = write_checkpoint(tmp_path_factory.mktemp("layers") / "tiny", config=CONFIG)
    with Checkpoint.open(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def q4(checkpoint: Checkpoint) -> Path:
    path = checkpoint.path.parent / "tiny-Q4_K_M.gguf"
    export_gguf(checkpoint, "Q4_K_M", path, threads=1)
    return path


def load(folder: Path, put: dict[str, Array] | None = None) -> Any:
    """transformers' model in float32, with some weights replaced."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(
        {n: torch.from_numpy(w.copy()) for n, w in (put or {}).items()}, strict=False
    )
    return model


def states_of(model: Any) -> list[Array]:
    """Before the first layer, behind each layer, and the logits: (n_tokens, n), passages joined."""
    collected: list[list[Array]] = [[] for _ in range(len(model.model.layers) + 2)]

    def keep(i: int) -> Callable[..., None]:
        return lambda *arguments: collected[i].append(arguments[-1][0].numpy())

    handles = [model.model.embed_tokens.register_forward_hook(keep(0))]
    handles += [one.register_forward_hook(keep(i + 1)) for i, one in enumerate(model.model.layers)]
    handles.append(model.lm_head.register_forward_hook(keep(-1)))
    with torch.inference_mode():
        for ids in PASSAGES:
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [np.concatenate(one) for one in collected]


def relative(found: Array, exact: Array, *, centred: bool = False) -> float:
    size = exact - exact.mean(axis=1, keepdims=True) if centred else exact
    squares = np.square(found - exact).sum(axis=1) / np.square(size).sum(axis=1)
    return float(np.sqrt(squares.mean()))


def decoded(path: Path, checkpoint: Checkpoint) -> dict[str, Array]:
    """The file's weights by the gguf package's own decoders."""
    names = {spec.gguf_name: spec.name for spec in tensor_specs(checkpoint.model)}
    return {
        names[one.name]: gguf.dequantize(one.data, one.tensor_type).astype(np.float32)
        for one in gguf.GGUFReader(path).tensors
    }


def test_errors_are_those_of_whole_models(checkpoint: Checkpoint, q4: Path) -> None:
    """Catches a stream that begins from the wrong states, and padding counted as tokens."""
    weights = decoded(q4, checkpoint)
    exact = states_of(load(checkpoint.path))
    found = states_of(load(checkpoint.path, weights))
    errors = layer_errors(q4, checkpoint, PASSAGES, batch_tokens=25)
    assert (errors.n_tokens, errors.n_passages) == (19, 3)
    assert errors.embedding.value == pytest.approx(relative(found[0], exact[0]), rel=1e-3)
    for i, layer in enumerate(errors.layers):
        whole = relative(found[i + 1], exact[i + 1])
        assert layer.so_far.value == pytest.approx(whole, rel=1e-3)
        mine = {n: w for n, w in weights.items() if n.startswith(f"model.layers.{i}.")}
        alone = states_of(load(checkpoint.path, mine))
        assert layer.added.value == pytest.approx(relative(alone[i + 1], exact[i + 1]), rel=1e-3)
        assert layer.so_far.standard_error is not None
    head = states_of(load(checkpoint.path, {"lm_head.weight": weights["lm_head.weight"]}))
    logits = relative(head[-1], exact[-1], centred=True)
    assert errors.output.value == pytest.approx(logits, rel=1e-3)
    assert LayerErrors.from_json(to_json(errors)) == errors
    assert errors.of_kind("down_proj") == pytest.approx(
        np.sqrt(np.mean([one.by_kind["down_proj"].value ** 2 for one in errors.layers]))
    )


def test_batches_do_not_matter(checkpoint: Checkpoint, q4: Path) -> None:
    """Catches states of one batch held against another's."""
    one, other = (layer_errors(q4, checkpoint, PASSAGES, batch_tokens=n) for n in (1, 1000))
    for a, b in zip(one.layers, other.layers, strict=True):
        assert a.so_far.value == pytest.approx(b.so_far.value, rel=1e-4)
        assert a.so_far.standard_error == pytest.approx(b.so_far.standard_error, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_laid_to_its_tensor(kind: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Catches a linear that is not replaced, is not put back, or stands under another's name."""
    name = f"model.layers.1.{'mlp' if kind in KINDS[4:] else 'self_attn'}.{kind}.weight"

    def spoil(tensors: dict[str, Array]) -> None:
        tensors[name] = tensors[name][::-1].copy()

    other = write_checkpoint(tmp_path / "other", config=CONFIG, edit=spoil)
    path = tmp_path / "spoilt.gguf"
    with Checkpoint.open(other) as opened:
        export_gguf(opened, "BF16", path, threads=1)
    errors = layer_errors(path, checkpoint, PASSAGES)
    first, second = errors.layers
    assert max(first.so_far.value, errors.embedding.value, errors.output.value) == 0
    assert second.by_kind[kind].value > 0.01
    assert all(one.value < 1e-6 for other, one in second.by_kind.items() if other != kind)
    if kind in ("o_proj", "down_proj"):  # what they change goes straight into the states
        ratio = second.by_kind[kind].value / second.added.value
        assert ratio == pytest.approx(1, rel=1e-4 if kind == "down_proj" else 0.5)


def test_a_gptq_folder_is_read_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Catches codes in another order, and errors in what GPTQ leaves as it is."""
    from convert.gptq import GptqSettings
    from convert.gptq_export import export_gptq
    from tests.synthetic import sums

    path = tmp_path / "tiny-gptq"
    settings = GptqSettings(bits=8, other_damps=(), clip_steps=0)
    export_gptq(checkpoint, path, settings=settings, calibration=sums(4), n_tokens=None)
    errors = layer_errors(path, checkpoint, PASSAGES)
    assert errors.embedding.value == errors.output.value == 0
    assert all(0 < layer.added.value < 0.02 for layer in errors.layers)
    assert all(0 < one.value < 0.02 for layer in errors.layers for one in layer.by_kind.values())


def test_another_model_is_refused(checkpoint: Checkpoint, q4: Path, tmp_path: Path) -> None:
    """Catches errors between models that have nothing to do with each other."""
    deeper = write_checkpoint(tmp_path / "deeper", config={"num_hidden_layers": 3})
    with Checkpoint.open(deeper) as other, pytest.raises(QwqError, match=r"lacks blk\.2\."):
        layer_errors(q4, other, PASSAGES)
    wider = write_checkpoint(tmp_path / "wider", config=CONFIG | {"intermediate_size": 768})
    with Checkpoint.open(wider) as other, pytest.raises(QwqError, match="has the shape"):
        layer_errors(q4, other, PASSAGES)
