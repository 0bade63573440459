"""`qwq`, llama.cpp's quantizer and GPTQModel as whole processes, and how GPTQ's memory grows.

The growth is that of the peak from a synthetic checkpoint of few layers to one of more, over the
weights that came along: what Python and torch take cancels. GPTQModel is shown as it comes and as
it holds a model in memory. `make bench-calibrate` shows it too.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.checkpoint import Checkpoint
from convert.passages import calibration_sequences, load_passages
from convert.qwen2 import tensor_specs
from tests.processes import Cost, run_whole
from tests.synthetic import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
REASONING = ROOT / "convert" / "data" / "calibration.jsonl"
WORK = ROOT / "build" / "calibration"
LAYERS = (2, 18)
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "4000000"}
"""So that glibc returns what is freed of matrices as small as these, as it does those of QwQ."""
N_TOKENS = 512
WIDTHS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}

OWN_PEAK = """
import atexit, resource, sys
def note(path=sys.argv.pop(1), unit=1 if sys.platform == "darwin" else 1024):
    with open(path, "w") as file:
        file.write(str(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
atexit.register(note)
"""
"""A compiler that a process starts takes more than itself; its own peak is what is compared."""

QWQ = "from qwq_local.cli import main; main()"
EXPORT_GPTQ = """
import dataclasses, json, sys
from pathlib import Path
from convert.checkpoint import Checkpoint
from convert.gptq import GptqSettings
from convert.gptq_export import export_gptq
from convert.passages import load_passages
source, text, n_tokens, settings, out = sys.argv[1:]
settings = dataclasses.replace(GptqSettings(), **json.loads(settings))
with Checkpoint.open(Path(source)) as checkpoint:
    passages = load_passages(Path(text))
    export_gptq(
        checkpoint, Path(out), settings=settings, calibration=passages, n_tokens=int(n_tokens)
    )
"""
GPTQMODEL = """
import json, os, sys
source, text, out, mse, offload, scratch = sys.argv[1:]
os.chdir(scratch)  # it leaves a folder of logs wherever it runs
from gptqmodel import GPTQModel, QuantizeConfig
config = QuantizeConfig(
    bits=4, group_size=128, mse=float(mse), offload_to_disk=offload == "offload"
)
model = GPTQModel.load(source, config, device="cpu")
model.quantize(json.load(open(text)), batch_size=1)
model.save(out)
"""
LLAMA_CPP = """
import sys
from pathlib import Path
from convert.imatrix import read_imatrix
from convert.recipe import RECIPES
from tests.oracles.llama_quantizer import quantize_with_llama_cpp
source, name, imatrix, out = sys.argv[1:]
importance = read_imatrix(Path(imatrix)).importance
done = quantize_with_llama_cpp(Path(source), RECIPES[name], Path(out), importance=importance)
sys.exit(not done)
"""
GPTQMODEL_SETTINGS = (
    "GPTQMODEL_CPU_WORKERS=2",  # with fewer cores its pool is an error
    "OMP_WAIT_POLICY=PASSIVE",  # threads that spin while they wait take each other's cores
    "GOMP_SPINCOUNT=0",
)


def run(out: Path, program: str, *arguments: str | Path, settings: Sequence[str] = ()) -> Cost:
    """Run a Python program that makes `out`, anew; its peak is its own."""
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    peak = WORK / "peak.txt"
    command = ["env", *settings, sys.executable, "-c", OWN_PEAK + program, peak, *arguments]
    cost = run_whole(list(map(str, command)), log=WORK / "log.txt")
    return dataclasses.replace(cost, peak_nbytes=int(peak.read_text()))


def qwq(out: Path, *arguments: str | Path) -> Cost:
    return run(out, QWQ, *arguments, "-q", "-o", out)


def llama_cpp(out: Path, source: Path, name: str, imatrix: Path) -> Cost:
    """Let llama_model_quantize make a GGUF file of one in 16 bits."""
    return run(out, LLAMA_CPP, source, name, imatrix, out)


def export_gptq(
    out: Path, source: Path, text: Path, *, n_tokens: int, settings: Mapping[str, object]
) -> Cost:
    """As `qwq convert gptq` does, with settings that no option has."""
    arguments = (source, text, f"{n_tokens}", json.dumps(dict(settings)), out)
    return run(out, EXPORT_GPTQ, *arguments)


def gptqmodel(
    out: Path, source: Path, text: Path, *, n_tokens: int, mse: float = 0.0, offload: bool = True
) -> Cost:
    """Quantize with the calibration tokens that `qwq convert gptq` takes of the text.

    offload: keep on the disk what is not at work, as GPTQModel does unless told otherwise.
    """
    with Checkpoint.open(source) as checkpoint:
        sequences = calibration_sequences(checkpoint, load_passages(text), n_tokens=n_tokens)
    ids = WORK / "calibration-ids.json"
    rows = [{"input_ids": list(one), "attention_mask": [1] * len(one)} for one in sequences]
    ids.write_text(json.dumps(rows))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (source, ids, out, f"{mse}", "offload" if offload else "hold", scratch)
        return run(out, GPTQMODEL, *arguments, settings=GPTQMODEL_SETTINGS)


def compare_memory() -> None:
    """Print both peaks at both sizes, and the bytes that each weight more has taken."""
    sources = [WORK / f"layers-{n}" for n in LAYERS]
    sizes = []
    for n, source in zip(LAYERS, sources, strict=True):
        shutil.rmtree(source, ignore_errors=True)
        write_checkpoint(source, config=WIDTHS | {"num_hidden_layers": n, "max_window_layers": n})
        with Checkpoint.open(source) as checkpoint:
            sizes.append(sum(prod(spec.shape) for spec in tensor_specs(checkpoint.model)))
    columns = " | ".join(f"peak, MiB, {n} layers" for n in LAYERS)
    print(f"\n| 4 bit, {N_TOKENS} tokens | {columns} | processor time, s | bytes a weight more |")
    print("|---|---|---|---|---|", flush=True)
    os.environ.update(GIVES_BACK)
    out = WORK / "grown"
    options = ("--text", REASONING, "--tokens", f"{N_TOKENS}", "--device", "cpu")
    ours = partial(qwq, out, "convert", "gptq", *options)
    theirs = partial(gptqmodel, out, text=REASONING, n_tokens=N_TOKENS)
    for title, quantize in (
        ("ours", ours),
        ("GPTQModel, offloading, as it comes", theirs),
        ("GPTQModel, the model held", partial(theirs, offload=False)),
    ):
        costs = [quantize(source) for source in sources]
        peaks = " | ".join(f"{cost.peak_nbytes / 2**20:.0f}" for cost in costs)
        cpu = ", ".join(f"{cost.cpu_s:.0f}" for cost in costs)
        growth = (costs[1].peak_nbytes - costs[0].peak_nbytes) / (sizes[1] - sizes[0])
        print(f"| {title} | {peaks} | {cpu} | {growth:.2f} |", flush=True)
    for source in (*sources, out):
        shutil.rmtree(source)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    compare_memory()


if __name__ == "__main__":
    main()
