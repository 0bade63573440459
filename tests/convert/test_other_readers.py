"""Our GPTQ folders as AutoGPTQ and vLLM read them, each in an environment of its own.

`make autogptq` and `make vllm` set these up. AutoGPTQ defined the format and is kept no more; it
runs beside the packages of its time alone. vLLM's packages exclude some of ours.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from convert.calibration import Conversation
from convert.checkpoint import Checkpoint
from convert.gptq import GptqSettings
from convert.gptq_export import export_gptq
from convert.gptq_folder import open_gptq
from tests.processes import ROOT
from tests.synthetic import sums, write_checkpoint

Arrays = dict[str, npt.NDArray[np.float32]]

AUTOGPTQ = """
import sys
import numpy, torch
from auto_gptq import AutoGPTQForCausalLM
ids = torch.arange(5, 45)[None]
for folder in sys.argv[1:]:
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu")
    with torch.no_grad():
        arrays = {"logits": model(input_ids=ids).logits[0].float().numpy()}
        for name, linear in model.model.named_modules():
            if hasattr(linear, "qweight"):
                linear.bias = None
                columns = linear(torch.eye(linear.infeatures, dtype=torch.float16))
                arrays[f"{name}.weight"] = columns.T.numpy()
    numpy.savez(f"{folder}.npz", **arrays)
"""
"""Each weight as its linear gives it back: one input is 1, all others 0, so nothing is rounded."""

VLLM = """
import gc, sys
import numpy, torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.quantization.utils import quant_utils
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

def read(model):
    arrays = {}
    for name, linear in model.named_modules():
        if not hasattr(linear, "qweight"):
            continue
        config = linear.quant_method.kernel.config
        n_in, n_out = config.partition_weight_shape
        blocks = linear.qweight.data.view(n_out // 16, n_in, 2)  # 16 outputs, as its kernel wants
        packed = blocks.permute(1, 0, 2).reshape(n_in, -1)
        codes = quant_utils.unpack_quantized_values_into_int32(packed, config.weight_type, 1)
        scales = linear.scales.data.float()
        scales = scales.repeat_interleave(n_in // len(scales), dim=0)
        weight = ((codes - config.weight_type.bias) * scales).T.numpy()
        where, kind = name.rsplit(".", 1)
        sizes = getattr(linear, "output_sizes", [n_out])
        starts = numpy.cumsum(sizes)[:-1]
        for part, rows in zip(PARTS.get(kind, (kind,)), numpy.split(weight, starts), strict=True):
            arrays[f"{where}.{part}.weight"] = rows
    return arrays

for folder in sys.argv[1:]:
    llm = LLM(folder, dtype="float16", enforce_eager=True, max_model_len=64, max_num_seqs=1)
    [arrays] = llm.apply_model(read)
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):  # its kernel for packed weights
        ids = list(range(5, 45))
        settings = SamplingParams(max_tokens=1, prompt_logprobs=0)
        [reply] = llm.generate([{"prompt_token_ids": ids}], settings)
        asked = zip(ids[1:], reply.prompt_logprobs[1:], strict=True)
        arrays["logprobs"] = numpy.array([found[one].logprob for one, found in asked])
    numpy.savez(f"{folder}.npz", **arrays)
    del llm
    gc.collect()
"""
"""Weights as they lie ready for its kernel, of four symmetric bits, as it runs on processors."""

BASE = GptqSettings(other_damps=(), clip_steps=0, n_sweeps=0)
FOR_AUTOGPTQ = {
    "4-bit": BASE,
    "2-bit": replace(BASE, bits=2, group_size=32),
    "3-bit-rows-asymmetric": replace(BASE, bits=3, group_size=-1, symmetric=False),
    "8-bit": replace(BASE, bits=8, group_size=64),
    "columns": replace(BASE, order="columns"),
    "activations-asymmetric": replace(BASE, order="activations", symmetric=False, group_size=32),
}
FOR_VLLM = {
    "4-bit": BASE,
    "columns": replace(BASE, order="columns", group_size=32),
    "rows": replace(BASE, group_size=-1),
}


def read_by(
    reader: str, program: str, settings: Mapping[str, GptqSettings], work: Path, **variables: str
) -> Path:
    """Folders of all settings, and beside each what another program reads of it."""
    environment = ROOT / "build" / reader
    if not (environment / "ready").exists():
        pytest.skip(f"`make {reader}` has not been run")
    source = write_checkpoint(work / "source", config={"num_hidden_layers": 1})
    text: list[Conversation] = list(sums(24)[:2])
    with Checkpoint.open(source) as checkpoint:
        for name, one in settings.items():
            export_gptq(checkpoint, work / name, settings=one, calibration=text)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = subprocess.run(
        [str(python), "-c", program, *(str(work / name) for name in settings)],
        cwd=work,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return work


@pytest.fixture(scope="module")
def read_by_autogptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return read_by("autogptq", AUTOGPTQ, FOR_AUTOGPTQ, tmp_path_factory.mktemp("autogptq"))


@pytest.fixture(scope="module")
def read_by_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return read_by("vllm", VLLM, FOR_VLLM, tmp_path_factory.mktemp("vllm"), **variables)


def arrays_of(folder: Path) -> Arrays:
    with np.load(folder.with_name(f"{folder.name}.npz")) as arrays:
        return dict(arrays)


def assert_weights_are_ours(read: Arrays, folder: Path) -> None:
    ours = open_gptq(folder)
    assert sorted(read) == sorted(ours.linears)
    for linear in ours.linears:
        expected = torch.from_numpy(ours.weight(linear)).half().numpy()
        np.testing.assert_array_equal(
            read[linear].astype(np.float16), expected, err_msg=linear, strict=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_AUTOGPTQ)
def test_autogptq_reads_our_weights(read_by_autogptq: Path, name: str) -> None:
    """Catches a folder that it refuses, or any weight that it reads otherwise than we do."""
    read = arrays_of(read_by_autogptq / name)
    assert np.isfinite(read.pop("logits")).all()
    assert_weights_are_ours(read, read_by_autogptq / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_VLLM)
def test_vllm_reads_our_weights(read_by_vllm: Path, name: str) -> None:
    """Catches a folder that it refuses, or any weight that it puts elsewhere than we do."""
    read = arrays_of(read_by_vllm / name)
    read.pop("logprobs", None)
    assert_weights_are_ours(read, read_by_vllm / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_VLLM)
def test_vllm_runs_our_weights(read_by_vllm: Path, name: str) -> None:
    """Catches log-probabilities that are not those of our unpacked weights in transformers."""
    from transformers import Qwen2ForCausalLM

    folder = open_gptq(read_by_vllm / name)
    read = arrays_of(folder.path)
    if "logprobs" not in read:
        pytest.skip("vLLM has no kernel for packed weights on a processor without AVX-512")
    model = Qwen2ForCausalLM.from_pretrained(read_by_vllm / "source", dtype=torch.float32)
    weights = {name: torch.from_numpy(folder.weight(name)) for name in folder.linears}
    model.load_state_dict(model.state_dict() | weights)
    ids = torch.arange(5, 45)
    with torch.inference_mode():
        logprobs = model(ids[None]).logits[0, :-1].double().log_softmax(dim=-1)
    expected = logprobs.gather(1, ids[1:, None])[:, 0].numpy()
    off = np.abs(read["logprobs"] - expected)
    assert off.mean() < 0.01 * expected.std(), (off, expected)
