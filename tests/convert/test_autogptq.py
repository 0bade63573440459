"""Our GPTQ folders as AutoGPTQ reads them, in an environment of its own: `make autogptq`.

AutoGPTQ defined the format and is kept no more; it runs beside the packages of its time alone.
"""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.calibration import Conversation
from convert.checkpoint import Checkpoint
from convert.gptq import GptqSettings
from convert.gptq_export import export_gptq
from convert.gptq_folder import open_gptq
from tests.processes import ROOT
from tests.synthetic import sums, write_checkpoint

ENVIRONMENT = ROOT / "build" / "autogptq"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

READ = """
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

BASE = GptqSettings(other_damps=(), clip_steps=0, n_sweeps=0)
SETTINGS = {
    "4-bit": BASE,
    "2-bit": replace(BASE, bits=2, group_size=32),
    "3-bit-rows-asymmetric": replace(BASE, bits=3, group_size=-1, symmetric=False),
    "8-bit": replace(BASE, bits=8, group_size=64),
    "columns": replace(BASE, order="columns"),
    "activations-asymmetric": replace(BASE, order="activations", symmetric=False, group_size=32),
}


@pytest.fixture(scope="module")
def read_by_autogptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of SETTINGS, and beside each what AutoGPTQ reads of it."""
    if not (ENVIRONMENT / "ready").exists():
        pytest.skip("`make autogptq` has not been run")
    work = tmp_path_factory.mktemp("autogptq")
    source = write_checkpoint(work / "source", config={"num_hidden_layers": 1})
    text: list[Conversation] = list(sums(24)[:2])
    with Checkpoint.open(source) as checkpoint:
        for name, settings in SETTINGS.items():
            export_gptq(checkpoint, work / name, settings=settings, calibration=text)
    command = [str(PYTHON), "-c", READ, *(str(work / name) for name in SETTINGS)]
    done = subprocess.run(
        command,
        cwd=work,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return work


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_it_reads_our_weights(read_by_autogptq: Path, name: str) -> None:
    """Catches a folder that it refuses, or any weight that it reads otherwise than we do."""
    folder = open_gptq(read_by_autogptq / name)
    with np.load(read_by_autogptq / f"{name}.npz") as arrays:
        read = dict(arrays)
    assert np.isfinite(read.pop("logits")).all()
    assert sorted(read) == sorted(folder.linears)
    for linear in folder.linears:
        ours = torch.from_numpy(folder.weight(linear)).half().numpy()
        np.testing.assert_array_equal(read[linear], ours, err_msg=linear)
