"""What the suite's own work adds to the engine's on a pass of KL, at QwQ-32B's shapes.

`make bench-eval` writes a checkpoint with QwQ-32B's widths, vocabulary of 152,064 and one layer,
quantizes it to Q4_K_M and scores passages. The engine's time for 64 layers is 64 times that of one
(prefill without logits) and once that of the output matrix (with logits less without). The suite's
own work is the same for any number of layers: the reference's logits, KL, and the summary.
llama.cpp's own route keeps the base model's logits on the disk; what that takes is worked out.
"""

import argparse
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.calibration import TokenizedConversation
from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from quant_eval.divergence import rows_between, score_passage, scored_rows, summarize
from quant_eval.reference import Reference
from qwq_local import QwQ
from tests.real_shapes import write_real_shapes

WORK = Path(__file__).resolve().parent.parent / "build" / "evaluation"
N_LAYERS = 64
N_TOKENS = 16_384  # of a whole pass
BF16_NBYTES = 65.5e9
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens of a passage, a multiple of 256"
    )
    parser.add_argument("--passages", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the 6 GB of files")
    options = parser.parse_args()
    source, path = WORK / "checkpoint", WORK / "one-layer-Q4_K_M.gguf"
    if not path.exists():
        shutil.rmtree(WORK, ignore_errors=True)
        write_real_shapes(source, n_layers=1)
        with Checkpoint.open(source) as checkpoint:
            export_gguf(checkpoint, "Q4_K_M", path, threads=options.threads)
    with Checkpoint.open(source) as checkpoint:
        measure(checkpoint, path, options.tokens, options.passages, options.threads)
    if not options.keep:
        shutil.rmtree(WORK)


def measure(
    checkpoint: Checkpoint, path: Path, n_tokens: int, n_passages: int, threads: int
) -> None:
    """Time each part over the passages and print medians per token."""
    model = checkpoint.model
    rng = np.random.default_rng(0)
    passages = []
    for _ in range(n_passages):
        ids = tuple(map(int, rng.integers(0, 150_000, n_tokens + 1)))
        passages.append(TokenizedConversation(ids, 1, n_tokens // 2, n_tokens + 1))
    states = tuple(
        rng.standard_normal((n_tokens + 1, model.hidden_size), dtype=np.float32).astype(np.float16)
        for _ in passages
    )
    reference = Reference(checkpoint, states)
    times: dict[str, list[float]] = {}
    scores = []
    n_before = peak_nbytes()
    unseen = tuple(map(int, rng.integers(0, 150_000, 65)))  # files are read before time is taken
    list(reference.logits(0, 0, 1))
    with QwQ.open(path, context=n_tokens + 64, threads=threads, isolated=False) as qwq:
        consume(qwq.engine.logits, unseen)
        for passage in passages:
            timed(times, "prefill", partial(consume, qwq.engine.prefill, passage.ids))
            flipped = passage.ids[::-1]  # so that nothing is cached
            timed(times, "logits", partial(consume, qwq.engine.logits, flipped))
    with QwQ.open(path, context=n_tokens + 64, threads=threads) as qwq:
        consume(qwq.engine.logits, unseen)
        for index, passage in enumerate(passages):
            start, stop = scored_rows(passage)
            theirs = timed(times, "received", partial(consume, qwq.engine.logits, passage.ids))
            rows = list(rows_between(theirs, start, stop))
            again = partial(consume, reference.logits, index, start, stop)
            exact = timed(times, "reference", again)
            scores.append(timed(times, "scores", partial(score_passage, passage, exact, rows)))
    many = scores * (N_TOKENS // (n_tokens * n_passages))
    timed(times, "summary", partial(summarize, many))
    each = {name: statistics.median(found) / n_tokens for name, found in times.items()}
    each["summary"] = times["summary"][0] / N_TOKENS
    head = max(0.0, each["logits"] - each["prefill"])
    engine = N_LAYERS * each["prefill"] + head
    moved = max(0.0, each["received"] - each["logits"])
    own = moved + each["reference"] + each["scores"] + each["summary"]
    for name, seconds in (
        (f"engine, {N_LAYERS} layers", N_LAYERS * each["prefill"]),
        ("engine, output matrix", head),
        ("suite, logits between processes", moved),
        ("suite, reference's logits", each["reference"]),
        ("suite, KL", each["scores"]),
        ("suite, quantiles and errors", each["summary"]),
    ):
        print(f"{name:<32} {1000 * seconds:9.3f} ms a token")
    print(f"the suite's own work on top of the engine's: {own / engine:.1%}")
    print(
        f"a pass over {N_TOKENS:,} tokens: engine {engine * N_TOKENS / 3600:.2f} h, "
        f"suite {own * N_TOKENS / 60:.1f} min"
    )
    print(
        f"peak memory: {peak_nbytes() / 1e9:.2f} GB, {n_before / 1e9:.2f} GB of it before scoring; "
        f"{2 * n_tokens * model.vocab_size * 4 / 1e9:.2f} GB are the logits that "
        "this benchmark holds to time the parts alone"
    )
    states_nbytes = N_TOKENS * model.hidden_size * 2
    base_nbytes = N_TOKENS * model.vocab_size * 2
    tool = shutil.which("llama-perplexity") or "not at hand, so not timed"
    print(
        f"the reference on the disk: {states_nbytes / 1e6:.0f} MB of states here; by llama.cpp's "
        f"route {base_nbytes / 1e9:.1f} GB of logits at 2 bytes a column, and "
        f"{BF16_NBYTES / 1e9:.0f} GB of memory to make them (llama-perplexity: {tool})"
    )


def timed(times: dict[str, list[float]], name: str, work: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - started)
    return result


def consume(stream: Callable[..., Iterable[T]], *arguments: Any) -> list[T]:
    return list(stream(*arguments))


def peak_nbytes() -> int:
    """Of this process; the engine has one of its own."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
