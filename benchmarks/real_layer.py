"""What calibration and all that uses it cost for QwQ-32B, from layers of its shapes.

`make bench-layer` runs each command on a checkpoint of QwQ-32B's widths, few layers and random
weights, as a whole process, and holds time and peak of memory against the estimate that the
command itself prints before it works. The whole model's cost is then that estimate for it, at the
measured speed. A narrower ffn (--intermediate-size) saves what three factorizations of 27,648
columns take on a few cores; operations are counted, so the whole model's figure holds all the
same. One of them, which decides GPTQ's time and memory, is measured by itself, always of 27,648
columns (--only factor).
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.one_pass import write_checkpoint
from convert.checkpoint import Checkpoint
from convert.estimate import (
    FACTORING,
    Estimate,
    estimate_calibration,
    estimate_gptq,
    estimate_rounding,
)
from convert.gptq import GptqSettings
from convert.passages import HELD_OUT_EVERY
from convert.qwen2 import Qwen2Config, parse_config
from convert.rounding import DAMPS, N_SWEEPS
from tests.processes import Cost, run_whole
from tests.real_shapes import CONFIG

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "real-layer"
CALIBRATION = WORK / "calibration"
K_TYPES = ("Q4_K", "Q6_K")  # of Q4_K_M
GB = 1e9
FACTOR = """
import sys, torch
from convert.code_feedback import factor
factor(torch.eye(int(sys.argv[1])), 0.05)
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A command, and what it is to cost by our own count, by model and tokens.

    estimate: None where nothing is counted. whole_tokens: for the whole of QwQ-32B.
    """

    name: str
    command: Callable[[int], list[str]]
    estimate: Callable[[Qwen2Config, int], Estimate] | None = None
    whole_tokens: int = 0


def calibration_estimate(model: Qwen2Config, n: int, kind: str) -> Estimate:
    n_held_out = n // HELD_OUT_EVERY if kind == "hessians" else 0
    n_fitted = n - n_held_out if kind == "hessians" else 0
    n_sampled = n if kind == "sensitivities" else 0
    return estimate_calibration(
        model, n_tokens=n, n_fitted=n_fitted, n_held_out=n_held_out, n_sampled=n_sampled
    )


CASES = (
    Case(
        "imatrix",
        lambda n: ["calibrate", "--tokens", f"{n}"],
        lambda model, n: calibration_estimate(model, n, "imatrix"),
        262_144,
    ),
    Case(
        "sensitivities",
        lambda n: [
            *("calibrate", "--tokens", f"{n}"),
            *("--sensitivities", "--sensitivity-tokens", f"{n}"),
        ],
        lambda model, n: calibration_estimate(model, n, "sensitivities"),
        4096,
    ),
    Case(
        "Hessians",
        lambda n: ["calibrate", "--tokens", f"{n}", "--hessians", "--hessian-tokens", f"{n}"],
        lambda model, n: calibration_estimate(model, n, "hessians"),
        16_384,
    ),
    Case(
        "GPTQ 4 bit",
        lambda n: ["convert", "gptq", "--tokens", f"{n}"],
        lambda model, n: estimate_gptq(model, GptqSettings(), n),
        16_384,
    ),
    Case(
        "Q4_K_M, GPTQ rounding",
        lambda _: [
            *("convert", "gguf", "--type", "Q4_K_M"),
            *("--calibration", str(CALIBRATION), "--rounding", "gptq"),
        ],
        lambda model, n: estimate_rounding(
            model,
            n_types=len(K_TYPES),
            n_dampings=len(DAMPS),
            n_sweeps=N_SWEEPS,
            n_held_out=n // HELD_OUT_EVERY,
        ),
        16_384,
    ),
    Case(
        "best recipe, nearest",
        lambda _: [
            *("convert", "gguf", "--fit", "3GiB", "--context", "4096"),
            *("--calibration", str(CALIBRATION)),
        ],
    ),
)


def measure(case: Case, folder: Path, n_tokens: int) -> Cost:
    out = WORK / "out"
    shutil.rmtree(out, ignore_errors=True)
    cost = run(case.command(n_tokens), folder, out)
    shutil.rmtree(out)
    return cost


def run(words: list[str], folder: Path, out: Path) -> Cost:
    first, *rest = words
    verb = [first, rest.pop(0)] if first == "convert" else [first]
    program = "from qwq_local.cli import main; main()"
    command = [sys.executable, "-c", program, *verb, str(folder), "-o", str(out), *rest]
    return run_whole([*command, "--device", "cpu", "-q"], log=WORK / "log.txt")


def calibrate(folder: Path, n_tokens: int) -> None:
    """What the last commands of CASES begin from: Hessians and sensitivities."""
    n = str(n_tokens)
    kept = ("--hessians", "--hessian-tokens", n, "--sensitivities", "--sensitivity-tokens", n)
    run(["calibrate", "--tokens", n, *kept], folder, CALIBRATION)


def measure_factor(n_in: int, nothing: Cost) -> None:
    cost = run_whole([sys.executable, "-c", FACTOR, f"{n_in}"])
    peak = (4 * FACTORING * n_in**2 + nothing.peak_nbytes) / GB
    print(
        f"| one factor of {n_in:,} columns | {cost.wall_s:.0f} | {cost.cpu_s:.0f} "
        f"| {cost.peak_nbytes / GB:.2f} ({peak:.2f}) | {n_in**3 / 3 / cost.wall_s / GB:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--intermediate-size", type=int, default=6912, help="QwQ-32B has 27,648")
    parser.add_argument("--tokens", type=int, default=2048)
    names = [*(case.name for case in CASES), "factor"]
    parser.add_argument("--only", choices=names, action="append", help="of the commands")
    arguments = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    folder = WORK / "checkpoint"
    write_checkpoint(
        folder, n_layers=arguments.layers, intermediate_size=arguments.intermediate_size
    )
    with Checkpoint.open(folder) as checkpoint:
        model = checkpoint.model
    qwq = parse_config(CONFIG, "QwQ-32B")
    nothing = run_whole([sys.executable, "-c", "import torch, transformers.models.qwen2"])
    print(
        f"{arguments.layers} layers, ffn of {model.intermediate_size:,}, "
        f"{arguments.tokens:,} tokens"
    )
    print("| command | clock, s | processor time, s | peak, GB (counted) | matrix GFLOP a second |")
    print("|---|---|---|---|---|")
    chosen = arguments.only or names
    if "factor" in chosen:
        measure_factor(qwq.intermediate_size, nothing)
    wholes = []
    for case in CASES:
        if case.name not in chosen:
            continue
        if str(CALIBRATION) in case.command(0) and not CALIBRATION.exists():
            calibrate(folder, arguments.tokens)
        cost = measure(case, folder, arguments.tokens)
        if case.estimate is None:
            print(
                f"| {case.name} | {cost.wall_s:.0f} | {cost.cpu_s:.0f} "
                f"| {cost.peak_nbytes / GB:.2f} | |",
                flush=True,
            )
            continue
        counted = case.estimate(model, arguments.tokens)
        n_operations = counted.n_matrix + counted.n_elementwise
        rate = n_operations / cost.wall_s
        peak = (counted.peak_nbytes + nothing.peak_nbytes) / GB
        print(
            f"| {case.name} | {cost.wall_s:.0f} | {cost.cpu_s:.0f} "
            f"| {cost.peak_nbytes / GB:.2f} ({peak:.2f}) | {rate / GB:.0f} |",
            flush=True,
        )
        whole = case.estimate(qwq, case.whole_tokens)
        hours = (whole.n_matrix + whole.n_elementwise) / rate / 3600
        memory = (whole.peak_nbytes + nothing.peak_nbytes) / GB
        wholes.append(
            f"{case.name}: {case.whole_tokens:,} tokens, {hours:.1f} hours, {memory:.1f} GB"
        )
    if wholes:
        print("\nall of QwQ-32B at this speed, counted:")
        print("\n".join(wholes))
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
