"""Our one pass against the usual two: a BF16 file, then llama.cpp's quantizer for each type.

`make bench-convert` runs both in turn on one synthetic checkpoint with QwQ-32B's row lengths, as
whole processes with the same number of threads, from start to end: ours brings what it wrote to the
disk, reads it back and checks it, theirs does not. With `--sync` theirs, too, brings each file to
the disk, which a model larger than the memory would force it to. Their BF16 file is written by the
least code that can write one. Each ratio is the median over the pairs of runs.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.checkpoint import Checkpoint
from convert.encode import n_cores
from convert.plan import ALIGNMENT, plan_file
from convert.qwen2 import parse_config, tensor_specs
from convert.recipe import find_recipe
from tests.processes import Cost, run_whole

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "one-pass"
TOKENIZER_SOURCE = ROOT / "quant_eval" / "nano" / "checkpoint"
N_WEIGHTS_AT_ONCE = 1 << 22

QUANTIZE = """
import ctypes, os, sys
import llama_cpp
source, out, file_type, threads, sync = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = int(file_type), int(threads)
status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings))
if sync == "sync":
    os.fsync(os.open(out, os.O_RDWR))
sys.exit(status)
"""


@dataclass(frozen=True, slots=True)
class Route(Cost):
    """Of processes one after another: their times, the greatest peak, and bytes written."""

    written_nbytes: int


def write_checkpoint(folder: Path, *, n_layers: int, intermediate_size: int) -> None:
    """Random weights in QwQ-32B's widths, with a small vocabulary: nano-qwq's."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER_SOURCE / name, folder / name)
    for template in TOKENIZER_SOURCE.glob("*.jinja"):
        shutil.copy(template, folder / template.name)
    config = json.loads((TOKENIZER_SOURCE / "config.json").read_text("utf-8"))
    config |= {
        "hidden_size": 5120,
        "intermediate_size": intermediate_size,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "num_hidden_layers": n_layers,
        "max_window_layers": n_layers,
    }
    config.pop("head_dim", None)
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    specs = list(tensor_specs(parse_config(config, "config.json")))
    header: dict[str, object] = {}
    end = 0
    for spec in specs:
        start, end = end, end + 2 * prod(spec.shape)
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            for start in range(0, prod(spec.shape), N_WEIGHTS_AT_ONCE):
                n_weights = min(N_WEIGHTS_AT_ONCE, prod(spec.shape) - start)
                values = rng.standard_normal(n_weights, dtype=np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype("<u2").data)


def write_bf16_file(source: Path, path: Path, *, sync: bool) -> None:
    """Header, then every tensor as it lies in the shard, vectors widened to float32."""
    with Checkpoint.open(source) as checkpoint:
        plan = plan_file(checkpoint, find_recipe("BF16"), path)
        with path.open("wb") as file, (source / "model.safetensors").open("rb") as shard:
            file.write(plan.parts[0].header)
            for tensor in plan.tensors:
                if len(tensor.shape) == 1:
                    file.write(checkpoint.read(tensor.name).data)
                else:
                    shard.seek(checkpoint.tensors[tensor.name].offset)
                    for start in range(0, tensor.nbytes, 1 << 23):
                        file.write(shard.read(min(1 << 23, tensor.nbytes - start)))
                file.write(bytes(-tensor.nbytes % ALIGNMENT))
            if sync:
                file.flush()
                os.fsync(file.fileno())


def run(commands: Sequence[Sequence[str]], out: Path) -> Route:
    """Run the commands one after another; what they leave in `out` is what they wrote."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    costs = [run_whole(command, log=WORK / "log.txt") for command in commands]
    return Route(
        wall_s=sum(cost.wall_s for cost in costs),
        cpu_s=sum(cost.cpu_s for cost in costs),
        peak_nbytes=max(cost.peak_nbytes for cost in costs),
        written_nbytes=sum(path.stat().st_size for path in out.iterdir()),
    )


def our_route(source: Path, types: Sequence[str], threads: int, *, libggml: bool) -> Route:
    options = [option for name in types for option in ("--type", name)]
    program = "from qwq_local.cli import main; main()"
    if libggml:
        program = "import convert.encode; convert.encode.LANE_TYPES = frozenset(); " + program
    command = [sys.executable, "-c", program, "convert", "gguf", str(source), *options]
    command += ["-q", "-o", str(WORK / "ours"), "--threads", str(threads)]
    return run([command], WORK / "ours")


def their_route(
    source: Path, types: Sequence[str], threads: int, *, python: str, sync: bool
) -> Route:
    out = WORK / "theirs"
    bf16_path = out / "bf16.gguf"
    commands = [[sys.executable, __file__, "--write-bf16", str(source), str(bf16_path)]]
    if sync:
        commands[0].append("--sync")
    for name in types:
        file_type = str(int(find_recipe(name).file_type))
        paths = (str(bf16_path), str(out / f"{name}.gguf"))
        settings = (file_type, str(threads), "sync" if sync else "")
        commands.append([python, "-c", QUANTIZE, *paths, *settings])
    return run(commands, out)


def compare(source: Path, types: Sequence[str], arguments: argparse.Namespace) -> None:
    """Run both routes in turn and print their medians and ratios in Markdown."""
    threads, pairs = arguments.threads, arguments.pairs
    costs = [
        (
            our_route(source, types, threads, libggml=arguments.libggml),
            their_route(source, types, threads, python=arguments.python, sync=arguments.sync),
        )
        for _ in range(pairs)
    ]
    print(f"\n{', '.join(types)} on {threads} threads, {pairs} pairs\n")
    print("| | one pass | BF16 file and quantizer | ratio |\n|---|---|---|---|")
    for title, attribute, unit in (
        ("wall time, s", "wall_s", 1.0),
        ("processor time, s", "cpu_s", 1.0),
        ("peak memory, MiB", "peak_nbytes", 2.0**20),
        ("written, GB", "written_nbytes", 1e9),
    ):
        ours = [getattr(pair[0], attribute) / unit for pair in costs]
        theirs = [getattr(pair[1], attribute) / unit for pair in costs]
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"| {title} | {statistics.median(ours):.2f} | {statistics.median(theirs):.2f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="timed runs of each route")
    parser.add_argument("--threads", type=int, default=n_cores())
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--intermediate-size", type=int, default=27_648)
    parser.add_argument("--types", action="append", help="comma between types of one pass")
    parser.add_argument("--libggml", action="store_true", help="none of our own encoders")
    parser.add_argument("--python", default=sys.executable, help="another build's, for theirs")
    parser.add_argument("--sync", action="store_true", help="their files reach the disk too")
    parser.add_argument("--write-bf16", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_bf16:
        write_bf16_file(*arguments.write_bf16, sync=arguments.sync)
        return
    source = WORK / f"checkpoint-{arguments.layers}-{arguments.intermediate_size}"
    if not source.exists():
        partial = source.with_name(source.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(
            partial, n_layers=arguments.layers, intermediate_size=arguments.intermediate_size
        )
        partial.replace(source)
    print(f"checkpoint of {(source / 'model.safetensors').stat().st_size / 1e9:.2f} GB", flush=True)
    for types in arguments.types or ["Q4_K_M", "Q4_K_M,Q6_K,Q8_0"]:
        compare(source, types.split(","), arguments)


if __name__ == "__main__":
    main()
