"""What a checkpoint's folder takes in torch: planned from its headers, held against a real load."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from convert.errors import QwqError
from convert.gptq import GptqSettings
from convert.gptq_format import packed_tensors, quantization_config
from convert.qwen2 import parse_config, tensor_specs
from convert.safetensors_writer import OutputTensor
from qwq_local import QwQ
from qwq_local.engine import EngineSettings
from qwq_local.engines import transformers
from qwq_local.engines.folder import Folder, plan_folder, read_folder
from qwq_local.engines.transformers import TransformersEngine
from qwq_local.memory_plan import Device
from tests import real_shapes
from tests.qwq_local.conftest import NANO

GIB = 1 << 30
PROCESSOR = Device("memory", False, 1 << 40)
GPU = Device("GPU", True, 1 << 40)
QWQ_NBYTES = 65_527_752_704
"""total_size in QwQ-32B's own model.safetensors.index.json, all in bfloat16."""


def write_headers(folder: Path, config: dict[str, Any], tensors: list[OutputTensor]) -> Path:
    """A checkpoint whose weights are holes in a file: all of its size and none of its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape}
        header[tensor.name]["data_offsets"] = offsets
        end += tensor.nbytes
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def qwq_32b(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    specs = tensor_specs(parse_config(real_shapes.CONFIG, "QwQ-32B"))
    tensors = [OutputTensor(s.name, "BF16", s.shape, 2 * prod(s.shape)) for s in specs]
    path = tmp_path_factory.mktemp("qwq") / "qwq-32b"
    return read_folder(write_headers(path, real_shapes.CONFIG, tensors))


@pytest.fixture(scope="module")
def qwq_32b_gptq(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    settings = GptqSettings(bits=4, group_size=128)
    tensors: list[OutputTensor] = []
    for spec in tensor_specs(parse_config(real_shapes.CONFIG, "QwQ-32B")):
        if spec.name.endswith("proj.weight"):
            tensors += packed_tensors(spec, settings)
        else:
            tensors.append(OutputTensor(spec.name, "BF16", spec.shape, 2 * prod(spec.shape)))
    config = real_shapes.CONFIG | {"quantization_config": quantization_config(settings, {})}
    path = tmp_path_factory.mktemp("qwq") / "qwq-32b-gptq"
    return read_folder(write_headers(path, config, tensors))


def test_qwq_32b_by_its_headers(qwq_32b: Folder, qwq_32b_gptq: Folder) -> None:
    """Would catch float32 counted as 16 bits, and a kv_cache off by a factor."""
    settings = EngineSettings(32_768)
    on_gpu, on_processor = (plan_folder(qwq_32b, settings, where) for where in (GPU, PROCESSOR))
    assert (on_gpu.kv_type, on_processor.kv_type) == ("bfloat16", "float32")
    assert on_gpu.shares[0].weights_nbytes == QWQ_NBYTES
    assert on_processor.shares[0].weights_nbytes == 2 * QWQ_NBYTES
    assert on_gpu.shares[0].kv_nbytes == 8 * GIB
    assert on_processor.shares[0].kv_nbytes == 16 * GIB
    assert (on_gpu.n_gpu_layers, on_processor.n_gpu_layers) == (65, 0)
    packed = plan_folder(qwq_32b_gptq, settings, GPU)
    # 31.0 G weights of layers in 4 bits and groups of 128, 1.56 G of embeddings and head in 16
    assert 19.2 * 10**9 < packed.shares[0].weights_nbytes < 21.5 * 10**9
    assert packed.shares[0].kv_nbytes == 8 * GIB


def test_the_context_follows_from_what_is_free(qwq_32b: Folder) -> None:
    """Would catch free memory that is taken for the kv_cache's alone."""
    free = Device("memory", False, 2 * QWQ_NBYTES + 17 * GIB)
    plan = plan_folder(qwq_32b, EngineSettings(), free)
    assert (plan.context, plan.fits) == (16_384, True)
    assert not plan_folder(qwq_32b, EngineSettings(32_768), free).fits


def storages(model: Any) -> int:
    """Bytes of all tensors that a model's modules hold, each storage once."""
    import torch

    held: dict[int, int] = {}
    for module in model.modules():
        for table in (vars(module), module._parameters, module._buffers):
            for value in table.values():
                if isinstance(value, torch.Tensor):
                    held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(held.values())


def kv_cache(engine: TransformersEngine) -> tuple[int, str]:
    """Bytes and type of an engine's buffers."""
    layers: list[Any] = list(engine._kv_cache.layers)
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return nbytes, str(layers[0].keys.dtype)


def test_a_load_takes_what_was_counted(folder_qwq: QwQ) -> None:
    """Would catch a dtype, a shape or a length that torch does not really use."""
    folder_qwq.ask("Hi", max_tokens=1)
    engine = folder_qwq.engine
    assert isinstance(engine, TransformersEngine)
    (share,) = engine.memory_plan.shares
    model = engine._model
    assert share.weights_nbytes == sum(parameter.nbytes for parameter in model.parameters())
    rotary_nbytes = sum(table.nbytes for table in model.buffers())
    assert storages(model) == share.weights_nbytes + rotary_nbytes
    assert (share.kv_nbytes, f"torch.{engine.memory_plan.kv_type}") == kv_cache(engine)


def test_a_gptq_load_takes_what_was_counted(gptq_qwq: QwQ) -> None:
    """Kernels rearrange codes at the first use; what they then keep is within what was counted."""
    gptq_qwq.ask("Hi", max_tokens=1)
    engine = gptq_qwq.engine
    assert isinstance(engine, TransformersEngine)
    (share,) = engine.memory_plan.shares
    assert 0.9 * share.weights_nbytes < storages(engine._model) <= share.weights_nbytes
    assert (share.kv_nbytes, f"torch.{engine.memory_plan.kv_type}") == kv_cache(engine)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded."""

    def load(*_: object) -> None:
        pytest.fail("torch read the weights")

    monkeypatch.setattr(transformers, "_load_model", load)


@pytest.mark.usefixtures("unread")
def test_what_does_not_fit_is_refused_before_torch_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Would catch a load that takes the machine down."""

    def refuse(free_nbytes: int, expected: str) -> None:
        free = Device("memory", False, free_nbytes)
        monkeypatch.setattr(transformers, "find_torch_device", lambda torch: free)
        with pytest.raises(QwqError, match=expected):
            QwQ.open(NANO, context=32_768, isolated=False)

    refuse(200_000_000, r"takes 318\.\d+ MB of memory, where 200\.000 MB are free; --context 16384")
    refuse(20_000_000, r"where 20\.000 MB are free; choose a GGUF file of it, which takes less")


def test_it_is_shown_without_loading(gptq_folder: Path) -> None:
    from typer.testing import CliRunner

    from qwq_local.cli import app

    result = CliRunner().invoke(app, ["plan", str(NANO), "--context", "4096"])
    expected = "4,096 tokens, kv_cache in float32, batches of 512, 0 layers on GPUs: fits"
    assert expected in result.stdout
    assert "memory: weights 19.559 MB, kv_cache 16.777 MB, compute" in result.stdout
    result = CliRunner().invoke(app, ["plan", str(gptq_folder), "--context", "4096", "--json"])
    (plan,) = json.loads(result.stdout)
    assert (plan["context"], plan["fits"], plan["chosen"]) == (4096, True, True)
    assert plan["shares"][0]["device"]["free_nbytes"] > 0


def test_loading_a_folder_is_told_of(tmp_path: Path) -> None:
    """Would catch a bar that stands still, goes back or never comes to its end."""
    told: list[tuple[int, int]] = []
    with QwQ.open(NANO, context=64, isolated=False, on_progress=lambda *n: told.append(n)):
        done = [n_done for n_done, _ in told]
    assert {total for _, total in told} == {100}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 100)
    assert len(set(done)) > 20
    told.clear()
    with QwQ.open(NANO, context=64, isolated=False):
        assert not told
