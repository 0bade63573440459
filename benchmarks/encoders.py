"""Our block encoders and three builds of ggml's, side by side: which bytes differ, and how fast.

`make bench-encoders` builds libggml-base alone (under a minute) from the sources of the pinned
llama-cpp-python: with stock flags ("stock"), with `-march=native -ffp-contract=off` as set-up
builds it ("native"), and with `-march=native` alone ("contracted"). "Lanes" are the encoders of
convert/lane_encoders.py. Rows are nano-qwq's weights and random ones, with and without importance.
Speed is the median, over pairs of runs taken in turn, of a ratio of processor times on one thread.
"""

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.checkpoint import Checkpoint
from convert.encode import LANE_TYPES, QuantType, choose_encoder, row_nbytes

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "encoders"
CHECKPOINT = ROOT / "quant_eval" / "nano" / "checkpoint"
PACKAGE = "llama-cpp-python"
VARIANTS = {
    "stock": "",
    "native": "-march=native -ffp-contract=off",
    "contracted": "-march=native",
}
TYPES = (
    QuantType.Q8_0,
    QuantType.Q6_K,
    QuantType.Q5_K,
    QuantType.Q4_K,
    QuantType.Q3_K,
    QuantType.Q2_K,
    QuantType.IQ4_XS,
)
N_IN = 1024

Float32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table: a type, and whether importance is given."""

    quant_type: QuantType
    importance: Float32Array | None

    @property
    def name(self) -> str:
        return self.quant_type.name + (" with importance" if self.importance is not None else "")


Encoder = Callable[[Case, Float32Array, ByteArray], None]


def pinned_version() -> str:
    """Return the version of llama-cpp-python that constraints.txt names."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{PACKAGE}=="))


def fetch_sources() -> Path:
    """Return the folder of llama.cpp, taken from the source archive of the pinned package."""
    name = f"llama_cpp_python-{pinned_version()}"
    archive = BUILD / f"{name}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", PACKAGE, "--dest", str(BUILD)]
        subprocess.run([*command, f"{PACKAGE}=={pinned_version()}"], check=True)
    sources = BUILD / name / "vendor" / "llama.cpp"
    if not sources.exists():
        with tarfile.open(archive) as files:
            files.extractall(BUILD, filter="data")
    return sources


def build_library(sources: Path, variant: str) -> Encoder:
    """Build libggml-base alone with a variant's flags, and return its encoder."""
    cmake = shutil.which("cmake")
    if cmake is None:
        sys.exit("cmake: not found; install it, or `.venv/bin/pip install cmake` and run again")
    folder = BUILD / variant
    configure = [cmake, "-S", str(sources), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON", "-DGGML_CCACHE=OFF"]
    configure += [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES")]
    configure += [f"-DCMAKE_{language}_FLAGS={VARIANTS[variant]}" for language in ("C", "CXX")]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    build = [cmake, "--build", str(folder), "--target", "ggml-base", "--parallel"]
    subprocess.run([*build, "1"], check=True, stdout=subprocess.DEVNULL)
    path = next(file for file in folder.rglob("libggml-base.*") if file.suffix in {".so", ".dylib"})
    library = ctypes.CDLL(str(path.resolve()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    for quant_type in TYPES:
        library.ggml_quantize_init(int(quant_type))

    def encode(case: Case, rows: Float32Array, blocks: ByteArray) -> None:
        importance = case.importance
        n_written = library.ggml_quantize_chunk(
            int(case.quant_type),
            rows.ctypes.data,
            blocks.ctypes.data,
            0,
            *rows.shape,
            None if importance is None else importance.ctypes.data,
        )
        assert n_written == blocks.nbytes, (case.name, n_written, blocks.nbytes)

    return encode


def encode_in_lanes(case: Case, rows: Float32Array, blocks: ByteArray) -> None:
    """Encode by convert/lane_encoders.py."""
    choose_encoder(case.quant_type, sys.maxsize)(rows, case.quant_type, case.importance, blocks)


def encoded(encoder: Encoder, case: Case, rows: Float32Array) -> ByteArray:
    """Encode rows on one thread: (n_rows, n_in) -> (n_rows, row bytes)."""
    blocks = np.empty((len(rows), row_nbytes(case.quant_type, rows.shape[1])), dtype=np.uint8)
    encoder(case, rows, blocks)
    return blocks


def test_rows(n_random: int, rng: np.random.Generator) -> Float32Array:
    """Return nano-qwq's matrices and random rows of several scales as (n_rows, N_IN) float32."""
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        matrices = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
        weights = np.concatenate([checkpoint.read(name).ravel() for name in matrices])
    real = weights[: weights.size // N_IN * N_IN].reshape(-1, N_IN)
    scales = np.exp2(rng.integers(-12, 2, size=(n_random, 1))).astype(np.float32)
    drawn = rng.standard_normal((n_random, N_IN), dtype=np.float32) * scales
    drawn[::7] **= 3  # heavy tails
    drawn[::11, ::256] = 0.0
    return np.concatenate([real, drawn])


def changed_percent(ours: ByteArray, theirs: ByteArray) -> float:
    """Return the share of bytes that differ, in per cent."""
    return 100.0 * float(np.count_nonzero(ours != theirs)) / ours.size


def seconds(encoder: Encoder, case: Case, rows: Float32Array) -> float:
    """Return the processor seconds that one encoding takes, so that other work counts little."""
    started_s = time.thread_time()
    encoded(encoder, case, rows)
    return time.thread_time() - started_s


def speed_ratio(ours_s: list[float], theirs_s: list[float]) -> str:
    """Return the median, the least and the greatest of how many times as fast ours is."""
    ratios = sorted(theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main() -> None:
    """Build, compare, and print a table in Markdown; exit 1 where bytes differ that must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="timed runs of each encoder")
    parser.add_argument("--random-rows", type=int, default=8192, help=f"rows of {N_IN} weights")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = fetch_sources()
    builds = {variant: build_library(sources, variant) for variant in VARIANTS}
    rng = np.random.default_rng(0)
    rows = test_rows(arguments.random_rows, rng)
    timed = rows[-1024:]
    importance = rng.gamma(0.5, size=N_IN).astype(np.float32)

    print(f"{PACKAGE} {pinned_version()}, {rows.size / 1e6:.1f} M weights compared,")
    print(f"{timed.size / 1e6:.1f} M timed in {arguments.pairs} pairs on one thread\n")
    print(
        "| type | stock, M weights/s | lanes, M weights/s | native / stock | lanes / native ",
        end="",
    )
    print("| bytes changed: native | lanes | -march=native alone |")
    print("|---|---|---|---|---|---|---|---|")
    n_wrong = 0
    for case in [Case(kind, given) for kind in TYPES for given in (None, importance)]:
        encoders = dict(builds)
        if case.quant_type in LANE_TYPES:
            encoders["lanes"] = encode_in_lanes
        blocks = {name: encoded(encoder, case, rows) for name, encoder in encoders.items()}
        changed = {name: changed_percent(blocks[name], blocks["stock"]) for name in encoders}
        del encoders["contracted"]
        times: dict[str, list[float]] = {name: [] for name in encoders}
        for _ in range(arguments.pairs):
            for name, encoder in encoders.items():
                times[name].append(seconds(encoder, case, timed))
        rates = {name: timed.size / 1e6 / statistics.median(times[name]) for name in encoders}
        lanes = ("-", "-", "-")
        if "lanes" in encoders:
            ratio = speed_ratio(times["lanes"], times["native"])
            lanes = (f"{rates['lanes']:.1f}", ratio, f"{changed['lanes']:.4f} %")
        print(
            f"| {case.name} | {rates['stock']:.1f} | {lanes[0]} "
            f"| {speed_ratio(times['native'], times['stock'])} | {lanes[1]} "
            f"| {changed['native']:.4f} % | {lanes[2]} | {changed['contracted']:.4f} % |",
            flush=True,
        )
        n_wrong += changed["native"] > 0 or changed.get("lanes", 0) > 0
    if n_wrong:
        sys.exit(f"{n_wrong} cases: bytes differ from the stock build's")


if __name__ == "__main__":
    main()
