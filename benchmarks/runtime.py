"""What the runtime costs: decoding against the bare loop and others, and the second turn.

    python benchmarks/runtime.py [--pairs 5] [--tokens 40]

Decodes with a Qwen2 file of random weights whose token takes at least 10 ms of a core, made in a
temporary folder. All sides take turns; ratios are of medians, by processor time and by the clock.
"""

import argparse
import queue
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from qwq_local import QwQ, Sampling
from qwq_local.engines.isolated import IsolatedEngine
from tests.synthetic import write_checkpoint

CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
NANO = Path("quant_eval/nano/checkpoint")
CONTEXT = 4096
SAMPLING = Sampling()
QUESTION = "Tell me all there is to tell."
THOUGHT = "So it begins, and so it goes on for a while. " * 6
ANSWER = "".join(f"{number} is a number. " for number in range(150))
SECOND = "And what is the next?"
Clocks = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="how often each side runs")
    parser.add_argument("--tokens", type=int, default=40, help="tokens decoded in each run")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("making a model ...", file=sys.stderr)
        checkpoint = write_checkpoint(Path(folder) / "model", config=CONFIG)
        path = export(checkpoint, Path(folder))
        decode(path, arguments.pairs, arguments.tokens, arguments.threads)
        decode_folder(checkpoint, arguments.pairs, arguments.tokens, arguments.threads)
        second_turn(export(NANO, Path(folder)), arguments.pairs, arguments.threads)


def export(checkpoint_folder: Path, folder: Path) -> Path:
    path = folder / f"{checkpoint_folder.name}.gguf"
    with Checkpoint.open(checkpoint_folder) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
    return path


def decode(path: Path, n_pairs: int, n_tokens: int, n_threads: int) -> None:
    """Seconds for n_tokens after the first, of each side in turn."""
    with (
        QwQ.open(path, context=CONTEXT, threads=n_threads) as isolated,
        QwQ.open(path, context=CONTEXT, threads=n_threads, isolated=False) as within,
        closing(high_level(path, n_threads)) as llama,
    ):
        ids = within.engine.tokenize(QUESTION * 4, parse_special=False)

        def ours(qwq: QwQ) -> Iterator[int]:
            return qwq.engine.generate(
                ids, sampling=SAMPLING, seed=1, max_tokens=n_tokens + 1, stop_ids=()
            )

        def session() -> Iterator[Any]:
            messages = [{"role": "user", "content": QUESTION * 4}]
            return isolated.reply(messages, seed=1, max_tokens=n_tokens + 1)

        sides: dict[str, Callable[[], Iterator[Any]]] = {
            "bare loop": lambda: bare_loop(within, ids, n_tokens + 1),
            "engine": lambda: ours(within),
            "engine in a process": lambda: ours(isolated),
            "qwq.reply": session,
            "llama-cpp-python": lambda: high_level_tokens(llama, ids, n_tokens + 1),
        }
        clocks = measure(sides, n_pairs, clock_of(isolated))
    print(f"\ndecoding {n_tokens} tokens, {n_threads} thread(s), {n_pairs} runs a side")
    show(clocks, "bare loop", n_tokens)


def bare_loop(qwq: QwQ, ids: list[int], n_tokens: int) -> Iterator[int]:
    """llama_decode and llama_sampler_sample, and nothing else."""
    from qwq_local.engines.gguf import GgufEngine, make_chain

    engine = qwq.engine
    assert isinstance(engine, GgufEngine)
    llama, context = engine._llama, engine._open_context()
    llama.llama_memory_seq_rm(llama.llama_get_memory(context), 0, 0, -1)
    engine._sequence, engine._n_filled, engine._n_reusable = [], 0, 0
    chain = make_chain(
        llama, SAMPLING, seed=1, vocab_size=engine.vocab_size, n_window=CONTEXT, prompt=ids
    )
    prompt = (llama.llama_token * len(ids))(*ids)
    llama.llama_decode(context, llama.llama_batch_get_one(prompt, len(ids)))
    one = (llama.llama_token * 1)()
    for _ in range(n_tokens):
        one[0] = llama.llama_sampler_sample(chain, context, -1)
        yield one[0]
        llama.llama_decode(context, llama.llama_batch_get_one(one, 1))
    llama.llama_sampler_free(chain)


def high_level(path: Path, n_threads: int) -> Any:
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=n_threads, n_threads_batch=n_threads, verbose=False
    )


def high_level_tokens(llama: Any, ids: list[int], n_tokens: int) -> Iterator[int]:
    llama.reset()
    tokens = llama.generate(ids, temp=0.6, top_k=40, top_p=0.95, min_p=0.0, repeat_penalty=1.0)
    for _ in range(n_tokens):
        yield next(tokens)


def decode_folder(path: Path, n_pairs: int, n_tokens: int, n_threads: int) -> None:
    """The same of a checkpoint in float32, against transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM

    with QwQ.open(path, context=CONTEXT, threads=n_threads) as qwq:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        ids = qwq.engine.tokenize(QUESTION * 40, parse_special=False)

        def ours() -> Iterator[int]:
            return qwq.engine.generate(
                ids, sampling=SAMPLING, seed=1, max_tokens=n_tokens + 1, stop_ids=()
            )

        sides = {
            "transformers' generate": lambda: generated(model, ids, n_tokens + 1),
            "our engine": ours,
        }
        clocks = measure(sides, n_pairs, own_clock)
    print(
        f"\ndecoding {n_tokens} tokens of a folder after {len(ids)} others, {n_pairs} runs a side"
    )
    show(clocks, "transformers' generate", n_tokens)


def generated(model: Any, ids: list[int], n_tokens: int) -> Iterator[int]:
    """What model.generate gives to a streamer, as it comes."""
    import torch

    class Streamer:
        def __init__(self) -> None:
            self.ids: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def put(self, value: Any) -> None:
            if value.numel() == 1:  # the prompt comes first
                self.ids.put(int(value))

        def end(self) -> None:
            self.ids.put(None)

    streamer = Streamer()
    options = {
        "do_sample": True,
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "top_p": SAMPLING.top_p,
        "min_new_tokens": n_tokens,
        "max_new_tokens": n_tokens,
        "streamer": streamer,
    }
    worker = threading.Thread(
        target=model.generate, args=(torch.tensor([ids]),), kwargs=options, daemon=True
    )
    worker.start()
    while (token_id := streamer.ids.get()) is not None:
        yield token_id
    worker.join()


def second_turn(path: Path, n_pairs: int, n_threads: int) -> None:
    """Time to the second turn's first token, after an answer of about 1,000 tokens, on nano-qwq."""
    literal = ANSWER.replace('"', "")
    ours: list[Clocks] = []
    theirs: list[Clocks] = []
    with (
        QwQ.open(path, context=CONTEXT, threads=n_threads) as qwq,
        closing(high_level(path, n_threads)) as llama,
    ):
        clock = clock_of(qwq)
        n_answer = len(qwq.engine.tokenize(ANSWER, parse_special=False))
        for _ in range(n_pairs):
            session = qwq.session(seed=1)
            first = session.ask(
                QUESTION, reasoning_tokens=100, answer_format=f'root ::= "{literal}"'
            )
            assert first.answer == literal, first
            qwq.wait_until_idle()
            with timed(ours, clock):
                reply = session.ask(SECOND, max_tokens=1)
            n_read = reply.timings.n_prefilled
            messages = [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": ANSWER},
                {"role": "user", "content": SECOND},
            ]
            rendered = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n"
            said = f"{rendered}{THOUGHT}\n</think>\n\n{ANSWER}"
            llama.reset()
            llama.eval(llama.tokenize(said.encode(), add_bos=False, special=True))
            with timed(theirs, clock):
                llama.create_chat_completion(messages, max_tokens=1)
    print(f"\nthe second turn, after an answer of {n_answer:,} tokens; ours reads {n_read} anew")
    show({"llama-cpp-python": theirs, "qwq session": ours}, "llama-cpp-python", 1)


def own_clock() -> Clocks:
    """Processor seconds of this process, and seconds by the clock."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime, time.perf_counter()


def clock_of(qwq: QwQ) -> Callable[[], Clocks]:
    """Processor seconds of this process and the engine's, and seconds by the clock."""
    engine = qwq.engine
    assert isinstance(engine, IsolatedEngine)
    child = psutil.Process(engine.pid)

    def clock() -> Clocks:
        (own_s, now), other = own_clock(), child.cpu_times()
        return own_s + other.user + other.system, now

    return clock


@contextmanager
def timed(into: list[Clocks], clock: Callable[[], Clocks]) -> Iterator[None]:
    before = clock()
    yield
    after = clock()
    into.append((after[0] - before[0], after[1] - before[1]))


def measure(
    sides: dict[str, Callable[[], Iterator[Any]]], n_pairs: int, clock: Callable[[], Clocks]
) -> dict[str, list[Clocks]]:
    clocks: dict[str, list[Clocks]] = {name: [] for name in sides}
    for _ in range(n_pairs):
        for name, side in sides.items():
            tokens = side()
            next(tokens)  # the prefill is another matter
            with timed(clocks[name], clock):
                for _ in tokens:
                    pass
    return clocks


def show(clocks: dict[str, list[Clocks]], base: str, n_tokens: int) -> None:
    """Each side's median and range, and its ratio to the base."""
    print(f"{'':22} {'processor, ms':>24} {'ratio':>7} {'clock, ms':>24} {'ratio':>7}")
    medians = {
        name: [statistics.median(run[i] for run in runs) for i in (0, 1)]
        for name, runs in clocks.items()
    }
    for name, runs in clocks.items():
        cells = []
        for i in (0, 1):
            values = [1000 * run[i] / n_tokens for run in runs]
            median = 1000 * medians[name][i] / n_tokens
            cells.append(f"{median:.2f} ({min(values):.2f} to {max(values):.2f})")
            cells.append(f"{medians[name][i] / medians[base][i]:.3f}")
        print(f"{name:22} {cells[0]:>24} {cells[1]:>7} {cells[2]:>24} {cells[3]:>7}")


if __name__ == "__main__":
    main()
