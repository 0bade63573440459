"""What the suite's own work adds to the engine's on a pass of KL, at QwQ-32B's shapes.

`make bench-eval` writes checkpoints with QwQ-32B's widths, vocabulary of 152,064 and two and four
layers, quantizes them to Q4_K_M and scores passages, every token of them. What four layers take
longer than two is the time of two, one with more bits as half of QwQ's have; the engine's time for
64 is 32 times that, and once that of the output matrix (two layers with logits, less two). One file
alone would not tell: without logits llama.cpp leaves out the last layer's ffn. The suite's own work
is the same for any number of layers: within the pass, what the reference's logits and the scores
take by the clock, and what the engine's logits take longer in a process of its own, whose passes
take turns with those of one in this process. Of a prompt neither computes logits. What is done once
for many tokens, reading and widening the output matrix, is timed apart and counted as often as a
pass of 16,384 tokens does it. llama.cpp's route keeps the base model's logits on the disk in 16
bits; that is timed with the same logits, kept and read as its tool keeps them, and where
llama-perplexity is at hand by its own two runs on the file of few layers: base logits, then KL.
"""

import argparse
import math
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.calibration import TokenizedConversation, load_conversations
from convert.checkpoint import Checkpoint
from convert.estimate import sites
from convert.gguf_export import export_gguf
from quant_eval.divergence import TokenScores, score_passage, scored_rows, summarize
from quant_eval.pipeline import NANO_CHECKPOINT
from quant_eval.reference import Reference
from quant_eval.suite import GENERAL_TEXT, read_evaluation_text, tokenize_text
from qwq_local import QwQ
from tests.processes import run_whole
from tests.real_shapes import write_real_shapes

WORK = Path(__file__).resolve().parent.parent / "build" / "evaluation"
N_LAYERS = 64
FEW, MORE = 2, 4  # layers of the files that are timed
N_TOKENS = 16_384  # of a whole pass
N_KEPT = 64  # tokens whose logits are kept by llama.cpp's route
BF16_NBYTES = 65.5e9
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens of a passage, a multiple of 256"
    )
    parser.add_argument("--passages", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the 9 GB of files")
    options = parser.parse_args()
    source = WORK / "checkpoint"
    files = {n: WORK / f"{n}-layers-Q4_K_M.gguf" for n in (MORE, FEW)}
    for n_layers, path in files.items():  # the checkpoint of few layers stays
        if not path.exists():
            shutil.rmtree(source, ignore_errors=True)
            write_real_shapes(source, n_layers=n_layers)
            with Checkpoint.open(source) as checkpoint:
                export_gguf(checkpoint, "Q4_K_M", path, threads=options.threads)
    with Checkpoint.open(source) as checkpoint:
        measure(checkpoint, files, options.tokens, options.passages, options.threads)
    run_llama_perplexity(files[FEW], options.tokens, options.passages, options.threads)
    if not options.keep:
        shutil.rmtree(WORK)


def measure(
    checkpoint: Checkpoint, files: Mapping[int, Path], n_tokens: int, n_passages: int, threads: int
) -> None:
    """Time each part over the passages and print medians per token. files: by layers."""
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
    unseen = tuple(map(int, rng.integers(0, 150_000, 65)))  # files are read before time is taken
    drop(next(reference.logits([(0, 0, 1)])))
    with ExitStack() as stack:
        opened = partial(QwQ.open, context=n_tokens + 64, threads=threads)
        qwq = stack.enter_context(opened(files[FEW]))
        drop(qwq.engine.logits(unseen))
        n_chunk = math.ceil(reference.chunk_rows / n_tokens)
        pass_over(qwq, None, reference, passages[:n_chunk], threads, {})
        n_peak = peak_nbytes()
        here, deeper = (stack.enter_context(opened(files[n], isolated=False)) for n in (FEW, MORE))
        drop(here.engine.logits(unseen))
        drop(deeper.engine.logits(unseen))
        for passage in passages:
            timed(times, "few", partial(drop, here.engine.prefill(passage.ids)))
            timed(times, "more", partial(drop, deeper.engine.prefill(passage.ids)))
        scores = pass_over(qwq, here, reference, passages, threads, times)
    for _ in range(3):
        timed(times, "matrix", partial(drop, reference.output_matrix()))
    first_rows = reference.logits([(0, 0, N_KEPT)])
    ours = np.concatenate(list(next(first_rows)))
    many = scores * (N_TOKENS // (n_tokens * n_passages))
    timed(times, "summary", lambda: summarize(many))
    kept = WORK / "logits.bin"
    timed(times, "kept", lambda: keep_in_16_bits(ours, kept))
    again = timed(times, "read", lambda: read_16_bits(kept, model.vocab_size))
    n_of = {"summary": N_TOKENS, "matrix": 1} | dict.fromkeys(("kept", "read"), N_KEPT)
    each = {
        name: statistics.median(found) / n_of.get(name, n_tokens) for name, found in times.items()
    }
    n_all = n_tokens * n_passages
    n_read, n_read_of_pass = (math.ceil(n / reference.chunk_rows) for n in (n_all, N_TOKENS))
    exact = sum(times["reference"]) / n_all  # a chunk serves several passages
    once = each["matrix"] / N_TOKENS * n_read_of_pass
    layer = (each["more"] - each["few"]) / (MORE - FEW)
    head = max(0.0, each["logits"] - FEW * layer)
    engine_s = N_LAYERS * layer + head
    pairs = zip(times["received"], times["logits"], strict=True)
    moved = statistics.median(there - at_home for there, at_home in pairs) / n_tokens
    products = exact - each["matrix"] * n_read / n_all
    own = products + each["scores"] + max(0.0, moved) + each["summary"]
    for name, seconds in (
        (f"engine, {N_LAYERS} layers", N_LAYERS * layer),
        ("engine, output matrix", head),
        ("suite, for every token", own),
        ("  reference's logits: products", products),
        ("  KL", each["scores"]),
        ("  logits between processes", moved),
        ("  quantiles and errors", each["summary"]),
        (f"suite, {n_read_of_pass} times a pass: matrix", once),
        ("llama.cpp's route, logits kept", each["kept"]),
        ("llama.cpp's route, logits read", each["read"]),
    ):
        print(f"{name:<32} {1000 * seconds:9.3f} ms a token")
    gflop = 2e-9 * model.vocab_size * model.hidden_size
    layer_gflop = 2e-9 * sum(n_in * n_out for n_in, n_out in sites(model))
    print(
        f"GFLOP/s: layers {layer_gflop / layer:.0f}, products {gflop / products:.0f}; "
        f"the output matrix once: {each['matrix']:.2f} s"
    )
    share = scored_share()
    print(
        f"the suite's own work on top of the engine's, {N_TOKENS:,} scored tokens: "
        f"{(own + once) / engine_s:.1%}, of which the products alone {products / engine_s:.1%}; "
        f"with prompts that are not scored, {share:.0%} of the tokens as of the built-in text by "
        "nano-qwq's tokenizer: "
        f"{share * (own + once) / (N_LAYERS * layer + share * head):.1%}"
    )
    here_too = exact + each["scores"] + max(0.0, moved)
    print(
        f"the same in these {n_passages} passages, which read the matrix {n_read} times for "
        f"{n_all:,} tokens: {here_too / engine_s:.1%}"
    )
    print(
        f"a pass over {N_TOKENS:,} scored tokens without prompts: engine "
        f"{engine_s * N_TOKENS / 3600:.2f} h, suite {(own + once) * N_TOKENS / 60:.1f} min"
    )
    print(f"peak memory beside the engine: {n_peak / 1e9:.2f} GB")
    print(
        f"the reference on the disk: {N_TOKENS * model.hidden_size * 2 / 1e6:.0f} MB of states; by "
        f"llama.cpp's route {N_TOKENS * model.vocab_size * 2 / 1e9:.1f} GB of logits, and "
        f"{BF16_NBYTES / 1e9:.0f} GB of memory to make them, where states take a layer at a time"
    )
    alone = TokenizedConversation(passages[0].ids[: N_KEPT + 1], 1, 2, N_KEPT + 1)
    error = score_passage(alone, [ours], [again]).kl_nats.mean()
    print(f"KL between these logits and the same in 16 bits: {error:.2g} nats")


def run_llama_perplexity(path: Path, n_tokens: int, n_passages: int, threads: int) -> None:
    """Time the tool's two runs, and say what they take of memory and disk, loading included.

    It scores the later half of each window of n_tokens.
    """
    program = shutil.which("llama-perplexity")
    if program is None:
        print("llama.cpp's own runs: llama-perplexity is not at hand")
        return
    n_windows = max(2, n_passages)  # it refuses less
    text, kept = WORK / "text.txt", WORK / "llama-logits.bin"
    written = "\n".join(one.answer for one in load_conversations(GENERAL_TEXT))
    text.write_text(written * (1 + 8 * n_tokens * n_windows // len(written)), encoding="utf-8")
    sizes = ("-c", n_tokens, "-b", n_tokens, "--chunks", n_windows, "-t", threads)
    common = (program, "-m", path, "-f", text, *sizes, "--kl-divergence-base", kept)
    n_scored = n_windows * (n_tokens - 1 - n_tokens // 2)
    for name, more in (("base logits", ()), ("KL", ("--kl-divergence",))):
        cost = run_whole([str(part) for part in (*common, *more)], log=WORK / "llama.log")
        print(
            f"llama-perplexity, {name}: {cost.wall_s:.1f} s for {n_windows * n_tokens:,} tokens "
            f"of {FEW} layers, {n_scored:,} scored; peak memory {cost.peak_nbytes / 1e9:.2f} GB, "
            f"{kept.stat().st_size / 1e6:.0f} MB on the disk"
        )
    kept.unlink()
    started = time.perf_counter()
    with QwQ.open(path, context=n_tokens + 64, threads=threads):
        opened_s = time.perf_counter() - started
    print(f"loading the file, which each of these runs does too: {opened_s:.1f} s")


def pass_over(
    qwq: QwQ,
    here: QwQ | None,
    reference: Reference,
    passages: Sequence[TokenizedConversation],
    threads: int,
    times: dict[str, list[float]],
) -> list[TokenScores]:
    """Score the passages as the suite does, and let the engine in this process take turns.

    times: gets the seconds of each passage by part: "reference", "received" (the engine's logits),
    "scores" (the rest), and "logits" (of the other engine).
    """
    spans = [(index, *scored_rows(passage)) for index, passage in enumerate(passages)]
    scores = []
    for passage, exact in zip(passages, reference.logits(spans), strict=True):
        if here is not None:
            timed(times, "logits", partial(drop, logits_of(here, passage)))
        spent = {"reference": 0.0, "received": 0.0}
        started = time.perf_counter()
        rows = clocked(logits_of(qwq, passage), "received", spent)
        streams = (clocked(exact, "reference", spent), rows)
        scores.append(score_passage(passage, *streams, threads=threads))
        whole = time.perf_counter() - started
        for name, seconds in (*spent.items(), ("scores", whole - sum(spent.values()))):
            times.setdefault(name, []).append(seconds)
    return scores


def logits_of(qwq: QwQ, passage: TokenizedConversation) -> Iterator[NDArray[np.float32]]:
    first, stop = scored_rows(passage)
    return qwq.engine.logits(passage.ids[:stop], first=first)


def clocked(stream: Iterable[T], name: str, spent: dict[str, float]) -> Iterator[T]:
    """The same stream; what is waited for it is added to spent."""
    each = iter(stream)
    while True:
        started = time.perf_counter()
        try:
            one = next(each)
        except StopIteration:
            return
        finally:
            spent[name] += time.perf_counter() - started
        yield one


def keep_in_16_bits(logits: NDArray[np.float32], path: Path) -> None:
    """Log-probabilities from the largest down to 16 nats less, in 65,536 steps a row.

    So does llama.cpp's `--kl-divergence-base` (tools/perplexity/perplexity.cpp).
    """
    with path.open("wb") as file:
        for row in logits:
            low = max(float(row.min() - row.max()), -16.0)
            shifted = np.maximum(row - row.max(), low)
            step = -low / 65_535
            log_sum = np.log(np.exp(shifted).sum(dtype=np.float64))
            file.write(np.array([step, low - log_sum], dtype=np.float32).tobytes())
            file.write(np.rint((shifted - low) / np.float32(step)).astype(np.uint16).tobytes())


def read_16_bits(path: Path, vocab_size: int) -> NDArray[np.float32]:
    """What keep_in_16_bits wrote, (n, vocab_size)."""
    row = np.dtype([("step", "<f4"), ("low", "<f4"), ("codes", "<u2", (vocab_size,))])
    kept = np.fromfile(path, dtype=row)
    logprobs: NDArray[np.float32] = kept["codes"] * kept["step"][:, None]
    logprobs += kept["low"][:, None]
    return logprobs


def scored_share() -> float:
    """Of the tokens of the built-in text, by nano-qwq's tokenizer, those of replies."""
    conversations, _ = read_evaluation_text(None, general=True)
    with Checkpoint.open(NANO_CHECKPOINT) as checkpoint:
        tokens = tokenize_text(checkpoint, conversations, N_TOKENS)
    return tokens.n_scored / sum(len(passage.ids) for passage in tokens.passages)


def timed(times: dict[str, list[float]], name: str, work: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - started)
    return result


def drop(stream: Iterable[object]) -> None:
    for _ in stream:
        pass


def peak_nbytes() -> int:
    """Of this process; the engine has one of its own."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
