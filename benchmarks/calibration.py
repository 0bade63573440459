"""What calibrating buys: time, memory and quality of what is made with it, side by side.

`make bench-calibrate` calibrates a checkpoint (nano-qwq by default) with its Hessians. Then it
writes GGUF files of each type with the imatrix alone, which is byte for byte what llama.cpp's
quantizer makes of the same imatrix, and with GPTQ rounding; and GPTQ folders in two orders of
columns. Quality is the KL of the weights as stored, computed in float32 on the evaluation set's
replies; its error and that of the difference to the base, the line before, are clustered by
conversation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from convert.calibration import TokenizedConversation, load_tokenizer, tokenize_conversation
from convert.checkpoint import Checkpoint
from convert.decode import decode_rows
from convert.gguf_header import read_header
from convert.gptq_folder import open_gptq
from convert.layer_stream import threads_for
from convert.qwen2 import tensor_specs
from quant_eval.suite import read_evaluation_text

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "quant_eval" / "nano" / "checkpoint"
REASONING = ROOT / "convert" / "data" / "calibration.jsonl"
WORK = ROOT / "build" / "calibration"
TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
GPTQ_TOKENS = 16_384

Weights = Mapping[str, torch.Tensor]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a process: seconds of processor time, peak of resident memory in bytes."""

    cpu_s: float
    peak_nbytes: int


def run(out: Path, *command: str) -> Cost:
    """Run a command that makes `out`, anew."""
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    log = WORK / "log.txt"
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    if status:
        sys.exit(f"{' '.join(command[:5])} ...: ended with status {status}; see {log}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


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
        if is_base:
            self._base = found
        assert self._base is not None
        base = clustered(self._base)[0]
        gain, gain_error = clustered(
            [one - other for one, other in zip(found, self._base, strict=True)]
        )
        share = "the base" if is_base else f"{1 + gain / base:.2f} ± {gain_error / base:.2f}"
        print(
            f"| {title} | {mean:.5f} ± {error:.5f} | {share} | {cost.cpu_s:.0f} "
            f"| {cost.peak_nbytes / 2**20:.0f} |",
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


def compare_gptq(source: Path, text: Path, table: Table) -> None:
    for order in ("columns", "groups"):
        out = WORK / f"gptq-{order}"
        options = ("--calibration", str(text), "--tokens", str(GPTQ_TOKENS), "--order", order)
        cost = qwq(out, "convert", "gptq", str(source), *options)
        table.line(f"GPTQ 4 bit, {order}", gptq_weights(out), cost, is_base=order == "columns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=NANO)
    parser.add_argument("--text", type=Path, default=REASONING, help="to calibrate on")
    parser.add_argument("--evaluation", type=Path, help="text to score (default: the built-in one)")
    parser.add_argument("--passages", type=int, help="of the evaluation set (default: all)")
    arguments = parser.parse_args()
    source = arguments.checkpoint
    WORK.mkdir(parents=True, exist_ok=True)
    calibration = WORK / "statistics"
    start_s = time.perf_counter()
    options = ("--text", str(arguments.text), "--hessians", "--device", "cpu")
    cost = qwq(calibration, "calibrate", str(source), *options)
    print(
        f"calibrated with Hessians: {cost.cpu_s:.0f} s of processor time, "
        f"{time.perf_counter() - start_s:.0f} s, peak {cost.peak_nbytes / 2**20:.0f} MiB\n",
        flush=True,
    )
    with Checkpoint.open(source) as checkpoint, threads_for(checkpoint.model):
        table = Table(Judge(source, arguments.evaluation, arguments.passages))
        compare_gguf(source, calibration, table)
        compare_gptq(source, arguments.text, table)


if __name__ == "__main__":
    main()
