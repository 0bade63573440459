"""What calibrating buys: time, memory and quality of what is made with it, side by side.

`make bench-calibrate` calibrates a checkpoint (nano-qwq by default) with its Hessians and
sensitivities. Then it writes GGUF files of each type with the imatrix alone, which is byte for byte
what llama.cpp's quantizer makes of the same imatrix, with GPTQ rounding, and of the same size with
the types that cost least; and GPTQ folders in two orders of columns, and GPTQModel's, plain and
with its own search of scales, of the same bits and calibration tokens. Quality is the KL of the
weights as stored, computed in float32 on the evaluation set's replies; its error and that of the
difference to the base, the first line of its kind, are clustered by conversation.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.calibration import TokenizedConversation, load_tokenizer, tokenize_conversation
from convert.checkpoint import Checkpoint
from convert.decode import decode_rows
from convert.gguf_header import GgufHeader, read_header
from convert.gptq_folder import open_gptq
from convert.layer_stream import threads_for
from convert.memory import share_out
from convert.passages import calibration_sequences, load_passages
from convert.qwen2 import tensor_specs
from quant_eval.suite import read_evaluation_text
from tests.processes import Cost, run_whole

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "quant_eval" / "nano" / "checkpoint"
REASONING = ROOT / "convert" / "data" / "calibration.jsonl"
WORK = ROOT / "build" / "calibration"
PARTS = ("gguf", "gptq", "gptqmodel")
TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
GPTQ_TOKENS = 16_384

Weights = Mapping[str, torch.Tensor]
Floats = npt.NDArray[np.float64]


GPTQMODEL = """
import json, os, sys
source, text, out, mse, scratch = sys.argv[1:]
os.chdir(scratch)  # it leaves a folder of logs wherever it runs
from gptqmodel import GPTQModel, QuantizeConfig
config = QuantizeConfig(bits=4, group_size=128, mse=float(mse))
model = GPTQModel.load(source, config, device="cpu")
model.quantize(json.load(open(text)), batch_size=1)
model.save(out)
"""
GPTQMODEL_SETTINGS = (
    "GPTQMODEL_CPU_WORKERS=2",  # with fewer cores its pool is an error
    "OMP_WAIT_POLICY=PASSIVE",  # threads that spin while they wait take each other's cores
    "GOMP_SPINCOUNT=0",
)
GPTQMODEL_MSE = 2.4  # the exponent that its own examples search scales with


def run(out: Path, *command: str) -> Cost:
    """Run a command that makes `out`, anew."""
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    return run_whole(command, log=WORK / "log.txt")


def qwq(out: Path, *arguments: str) -> Cost:
    program = "from qwq_local.cli import main; main()"
    return run(out, sys.executable, "-c", program, *arguments, "-q", "-o", str(out))


class Judge:
    """KL of changed weights against the checkpoint's, in float32, a passage at a time."""

    def __init__(self, source: Path, text: Path | None, n_passages: int | None) -> None:
        from transformers import Qwen2ForCausalLM

        tokenizer = load_tokenizer(source)
        conversations = read_evaluation_text(text)[0][:n_passages]
        self._passages = [tokenize_conversation(one, tokenizer) for one in conversations]
        self._model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
        self._original = {name: value.clone() for name, value in self._model.state_dict().items()}
        with torch.inference_mode():
            self._reference = [self._logprobs(passage) for passage in self._passages]

    def divergences(self, weights: Weights) -> list[Floats]:
        """KL(checkpoint || weights) in nats of every reply token, by passage."""
        self._model.load_state_dict({**self._original, **weights})
        divergences = []
        with torch.inference_mode():
            for passage, expected in zip(self._passages, self._reference, strict=True):
                difference = expected - self._logprobs(passage)
                divergences.append((expected.exp() * difference).sum(dim=-1).numpy())
        return divergences

    def _logprobs(self, passage: TokenizedConversation) -> torch.Tensor:
        ids = torch.tensor([list(passage.ids)])
        logits: torch.Tensor = self._model(ids).logits[0, passage.n_prompt - 1 : passage.stop - 1]
        return torch.log_softmax(logits.double(), dim=-1)


def clustered(values: list[Floats]) -> tuple[float, float]:
    """Mean and its standard error, passages being drawn together."""
    n = sum(map(len, values))
    mean = sum(float(one.sum()) for one in values) / n
    return mean, float(np.sqrt(sum(float((one - mean).sum()) ** 2 for one in values)) / n)


def gguf_weights(path: Path, source: Path) -> Weights:
    header = read_header(path)
    with Checkpoint.open(source) as checkpoint, path.open("rb") as file:
        weights = {}
        for spec in tensor_specs(checkpoint.model):
            tensor = header.tensors[spec.gguf_name]
            file.seek(tensor.offset)
            blocks = np.frombuffer(file.read(tensor.nbytes), dtype=np.uint8)
            n_rows = int(np.prod(spec.shape[:-1], dtype=np.int64))
            rows = decode_rows(blocks.reshape(n_rows, -1), tensor.quant_type, spec.shape[-1])
            weights[spec.name] = torch.from_numpy(rows.reshape(spec.shape))
    return weights


def gptq_weights(path: Path) -> Weights:
    folder = open_gptq(path)
    return {name: torch.from_numpy(folder.weight(name)) for name in folder.linears}


class Table:
    """Lines in Markdown, as they come."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._base: list[Floats] | None = None
        print("| made | KL, nats | of the base's | processor time, s | peak memory, MiB |")
        print("|---|---|---|---|---|", flush=True)

    def line(self, title: str, weights: Weights, cost: Cost, *, is_base: bool = False) -> None:
        found = self._judge.divergences(weights)
        mean, error = clustered(found)
        share = ""
        if is_base:
            self._base, share = found, "the base"
        elif self._base is not None:
            base = clustered(self._base)[0]
            gain, gain_error = clustered(
                [one - other for one, other in zip(found, self._base, strict=True)]
            )
            share = f"{1 + gain / base:.2f} ± {gain_error / base:.2f}"
        print(
            f"| {title} | {mean:.5f} ± {error:.5f} | {share} | {cost.cpu_s:.0f} "
            f"| {cost.peak_nbytes / 2**20:.0f} |",
            flush=True,
        )


def calibrate(source: Path, text: Path, calibration: Path) -> None:
    options = ("--text", str(text), "--hessians", "--sensitivities", "--device", "cpu")
    cost = qwq(calibration, "calibrate", str(source), *options)
    print(
        f"calibrated with Hessians and sensitivities: {cost.cpu_s:.0f} s of processor time, "
        f"{cost.wall_s:.0f} s, peak {cost.peak_nbytes / 2**20:.0f} MiB\n",
        flush=True,
    )


def compare_gguf(source: Path, calibration: Path, table: Table) -> None:
    for name in TYPES:
        for rounding in ("nearest", "gptq"):
            out = WORK / f"{name}-{rounding}.gguf"
            options = ("--type", name, "--rounding", rounding, "--calibration", str(calibration))
            cost = qwq(out, "convert", "gguf", str(source), *options, "--threads", "1")
            title = f"{name}, {'imatrix' if rounding == 'nearest' else 'GPTQ rounding'}"
            table.line(title, gguf_weights(out, source), cost, is_base=rounding == "nearest")
        stock = read_header(WORK / f"{name}-nearest.gguf")
        for rounding in ("nearest", "gptq"):
            out = WORK / f"{name}-fit-{rounding}.gguf"
            given = ("--calibration", str(calibration), "--rounding", rounding, "--threads", "1")
            cost = qwq(out, "convert", "gguf", str(source), *fit_options(source, stock), *given)
            title = f"its size, types that cost least{', GPTQ rounding' * (rounding == 'gptq')}"
            table.line(title, gguf_weights(out, source), cost)


def fit_options(source: Path, stock: GgufHeader) -> tuple[str, ...]:
    """Options that leave as much for weights as a stock file's tensors take."""
    nbytes = sum(tensor.nbytes for tensor in stock.tensors.values())
    with Checkpoint.open(source) as checkpoint:
        beside = share_out(checkpoint.model, 0, context=1, kv_type="f16", margin_nbytes=1000)
    size = f"{(nbytes - beside.weights) / 1000:.3f}KB"
    return ("--fit", size, "--context", "1", "--margin", "1KB")


def compare_gptq(source: Path, text: Path, table: Table) -> None:
    for order in ("columns", "groups"):
        out = WORK / f"gptq-{order}"
        options = ("--calibration", str(text), "--tokens", str(GPTQ_TOKENS), "--order", order)
        cost = qwq(out, "convert", "gptq", str(source), *options)
        table.line(f"GPTQ 4 bit, {order}", gptq_weights(out), cost, is_base=order == "columns")


def compare_gptqmodel(source: Path, text: Path, table: Table) -> None:
    with Checkpoint.open(source) as checkpoint:
        sequences = calibration_sequences(checkpoint, load_passages(text), n_tokens=GPTQ_TOKENS)
    ids = WORK / "calibration-ids.json"
    rows = [{"input_ids": list(one), "attention_mask": [1] * len(one)} for one in sequences]
    ids.write_text(json.dumps(rows))
    for mse in (0.0, GPTQMODEL_MSE):
        out = WORK / f"gptqmodel-{mse}"
        with tempfile.TemporaryDirectory() as scratch:
            arguments = (source, ids, out, mse, scratch)
            program = (sys.executable, "-c", GPTQMODEL, *map(str, arguments))
            cost = run(out, "env", *GPTQMODEL_SETTINGS, *program)
        title = f"GPTQModel 4 bit, {f'its search, {mse}' if mse else 'as it comes'}"
        table.line(title, gptq_weights(out), cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=NANO)
    parser.add_argument("--text", type=Path, default=REASONING, help="to calibrate on")
    parser.add_argument("--evaluation", type=Path, help="text to score (default: the built-in one)")
    parser.add_argument("--only", choices=PARTS, action="append", help="of the comparisons")
    parser.add_argument("--passages", type=int, help="of the evaluation set (default: all)")
    arguments = parser.parse_args()
    source = arguments.checkpoint.absolute()
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only or PARTS
    calibration = WORK / "statistics"
    if "gguf" in chosen:
        calibrate(source, arguments.text, calibration)
    with Checkpoint.open(source) as checkpoint, threads_for(checkpoint.model):
        table = Table(Judge(source, arguments.evaluation, arguments.passages))
        if "gguf" in chosen:
            compare_gguf(source, calibration, table)
        if "gptq" in chosen:
            compare_gptq(source, arguments.text, table)
        if "gptqmodel" in chosen:
            compare_gptqmodel(source, arguments.text, table)


if __name__ == "__main__":
    main()
