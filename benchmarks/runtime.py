"""What the runtime costs: decoding against the bare loop and others, and the second turn.

    python benchmarks/runtime.py [--pairs 5] [--tokens 40] [--threads 2]

Decodes with a Qwen2 file of random weights whose token takes at least 10 ms of two cores, made in a
temporary folder. All sides take turns; processor time and the clock are both shown.
"""

import argparse
import itertools
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from qwq_local import QwQ, Sampling
from qwq_local.child import Channel
from qwq_local.description import describe_gguf
from qwq_local.engine import Engine, EngineSettings
from qwq_local.engines.isolated import Calls, IsolatedEngine, open_engine
from qwq_local.local import LocalModel
from tests.synthetic import write_checkpoint

CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
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
TURN = 8  # tokens
SETTLE_S = 0.04
Clocks = tuple[float, float]
Turn = Callable[[], Clocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40, help="tokens decoded in each run")
    parser.add_argument("--pairs", type=int, default=5, help="how often each side runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("decode", "own", "folder", "second-turn"))
    arguments = parser.parse_args()
    only, pairs, threads = arguments.only, arguments.pairs, arguments.threads
    with tempfile.TemporaryDirectory() as folder:
        print("making a model ...", file=sys.stderr)
        checkpoint = write_checkpoint(Path(folder) / "model", config=CONFIG)
        path = export(checkpoint, Path(folder))
        if only in (None, "decode"):
            decode(path, pairs, arguments.tokens, threads)
        if only in (None, "own"):
            own_time(path, pairs, arguments.tokens, threads)
        if only in (None, "folder"):
            decode_folder(checkpoint, pairs, arguments.tokens, threads)
        if only in (None, "second-turn"):
            second_turn(export(NANO, Path(folder)), pairs, threads)


def export(checkpoint_folder: Path, folder: Path) -> Path:
    path = folder / f"{checkpoint_folder.name}.gguf"
    with Checkpoint.open(checkpoint_folder) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
    return path


class Measured(IsolatedEngine):
    """An engine in a process of its own that runs the bare loop there too, over the same memory."""

    entry = "benchmarks.runtime:serve"

    def bare_turn(self, ids: list[int]) -> Clocks:
        processor_s, clock_s = self._request("bare_turn", ids).value
        return processor_s, clock_s


class MeasuredCalls(Calls):
    loop: Iterator[int] | None = None

    def bare_turn(self, ids: list[int]) -> tuple[Clocks, bytes]:
        """Seconds for TURN tokens, after one."""
        self.loop = self.loop or bare_loop(self.engine, ids)
        return turn_of(self.loop, own_clock), b""


def serve(channel: Channel) -> None:
    """The life of a Measured engine's process."""
    calls = open_engine(channel)
    assert calls is not None
    measured = MeasuredCalls(calls.engine)
    while True:
        request = channel.receive()
        channel.send(*measured.answer(request), number=request.number)
        measured.engine.read_on()


def decode(path: Path, n_rounds: int, n_tokens: int, n_threads: int) -> None:
    """Each side in turn, some tokens at a time, so that a machine's moods are shared by all.

    Where a process has its memory moves speed by a tenth. So each side is held against a bare loop
    within its own process, and each round begins with new ones; llama-cpp-python loads the file
    into our process once more.
    """
    ratios: dict[str, list[Clocks]] = {}
    for _ in range(n_rounds):
        for name, turns in decode_round(path, n_tokens // TURN, n_threads).items():
            ratios.setdefault(name, []).extend(turns)
    print(f"\ndecoding with {n_threads} thread(s), {n_rounds} rounds of {n_tokens} tokens a side")
    print("speed against llama_decode and llama_sampler_sample alone; median and its 95 % interval")
    print(f"{'':22} {'by processor time':>24} {'by the clock':>24}")
    for name, pairs in ratios.items():
        print(f"{name:22} {interval(pairs, 0):>24} {interval(pairs, 1):>24}")


def decode_round(path: Path, n_turns: int, n_threads: int) -> dict[str, list[Clocks]]:
    options: dict[str, Any] = {"context": CONTEXT, "threads": n_threads}
    settings = EngineSettings(CONTEXT, n_threads)
    with (
        QwQ.open(path, isolated=False, **options) as within,
        closing(Measured(path, settings)) as isolated,
        closing(Measured(path, settings)) as answering,
        closing(high_level(path, n_threads)) as llama,
    ):
        ids = within.engine.tokenize(QUESTION, parse_special=False)

        def ours(engine: Engine) -> Iterator[int]:
            return engine.generate(
                ids, sampling=SAMPLING, seed=1, max_tokens=CONTEXT - 64, stop_ids=()
            )

        def turns_of(tokens: Iterator[Any], clock: Callable[[], Clocks]) -> Turn:
            return lambda: turn_of(tokens, clock)

        here = turns_of(bare_loop(within.engine, ids), own_clock)
        sides: dict[str, tuple[Turn, Turn]] = {
            "engine": (here, turns_of(ours(within.engine), own_clock)),
            "engine in a process": (
                lambda: isolated.bare_turn(ids),
                turns_of(ours(isolated), clock_of(isolated)),
            ),
            "qwq.reply": (
                lambda: answering.bare_turn(ids),
                turns_of(reply_tokens(answering, path), clock_of(answering)),
            ),
            "llama-cpp-python": (here, turns_of(high_level_tokens(llama, ids), own_clock)),
        }
        return in_turns(sides, n_turns)


def own_time(path: Path, n_rounds: int, n_tokens: int, n_threads: int) -> None:
    """What a token of an engine in another process costs this one, while that one reads ahead."""
    costs_us: dict[str, list[float]] = {"engine in a process": [], "qwq.reply": []}
    for _ in range(n_rounds):
        with closing(IsolatedEngine(path, EngineSettings(CONTEXT, n_threads))) as engine:
            ids = engine.tokenize(QUESTION, parse_special=False)
            tokens: Iterator[Any] = engine.generate(
                ids, sampling=SAMPLING, seed=1, max_tokens=CONTEXT - 64, stop_ids=()
            )
            for costs in costs_us.values():
                for _ in itertools.islice(tokens, TURN):
                    pass
                before_s = time.process_time()
                for _ in itertools.islice(tokens, n_tokens):
                    pass
                costs.append(1e6 * (time.process_time() - before_s) / n_tokens)
                tokens = reply_tokens(engine, path)
    print("\nmicroseconds of this process's own time for a token; median (least to greatest)")
    for name, costs in costs_us.items():
        median_us = statistics.median(costs)
        print(f"{name:22} {median_us:7.0f} ({min(costs):.0f} to {max(costs):.0f})")


def in_turns(sides: dict[str, tuple[Turn, Turn]], n_turns: int) -> dict[str, list[Clocks]]:
    """Speeds against the base's, turn by turn; another side and another of the two first."""
    ratios: dict[str, list[Clocks]] = {name: [] for name in sides}
    order = list(sides)
    for index in range(n_turns):
        order = [*order[1:], order[0]]
        for name in order:
            base, own = sides[name]
            first, second = (base, own)[:: (-1) ** index]
            pair = (first(), second())[:: (-1) ** index]
            ratios[name].append((pair[0][0] / pair[1][0], pair[0][1] / pair[1][1]))
    return ratios


def turn_of(tokens: Iterator[Any], clock: Callable[[], Clocks]) -> Clocks:
    """Seconds for TURN tokens, from a token's arrival to the arrival of the last.

    A process reads ahead what it has made; what one does so after its turn is over by then.
    """
    time.sleep(SETTLE_S)
    next(tokens)
    turns: list[Clocks] = []
    with timed(turns, clock):
        for _ in range(TURN):
            next(tokens)
    return turns[0]


def interval(pairs: list[Clocks], which: int) -> str:
    """The median and its 95 % interval."""
    values = sorted(pair[which] for pair in pairs)
    half = 0.98 * len(values) ** 0.5  # in ranks, by the normal distribution
    low = values[max(0, round(len(values) / 2 - half))]
    high = values[min(len(values) - 1, round(len(values) / 2 + half))]
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


def bare_loop(engine: Any, ids: list[int]) -> Iterator[int]:
    """llama_decode and llama_sampler_sample, and nothing else, with a kv_cache of its own."""
    from qwq_local.engines.gguf import GgufEngine, make_chain

    assert isinstance(engine, GgufEngine)
    llama = engine._llama
    context = llama.llama_init_from_model(engine._model, engine._context_params(None))
    chain = make_chain(
        llama, SAMPLING, seed=1, vocab_size=engine.vocab_size, n_window=CONTEXT, prompt=ids
    )
    prompt = (llama.llama_token * len(ids))(*ids)
    llama.llama_decode(context, llama.llama_batch_get_one(prompt, len(ids)))
    one = (llama.llama_token * 1)()
    try:
        while True:
            one[0] = llama.llama_sampler_sample(chain, context, -1)
            yield one[0]
            llama.llama_decode(context, llama.llama_batch_get_one(one, 1))
    finally:
        llama.llama_sampler_free(chain)
        llama.llama_free(context)


def reply_tokens(engine: Engine, path: Path) -> Iterator[None]:
    """Comes back once for each token of replies, when its event has come, or the next one's."""
    qwq = QwQ(LocalModel(engine, describe_gguf(path, read_header(path)), path))
    made: list[int] = []
    token_bytes = engine.token_bytes

    def counted(token_id: int) -> bytes:
        made.append(token_id)
        return token_bytes(token_id)

    setattr(engine, "token_bytes", counted)  # noqa: B010 - a method may not be assigned
    for seed in itertools.count(1):
        for _ in qwq.reply([{"role": "user", "content": QUESTION}], seed=seed):
            while made:
                del made[0]
                yield


def high_level(path: Path, n_threads: int) -> Any:
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=n_threads, n_threads_batch=n_threads, verbose=False
    )


def high_level_tokens(llama: Any, ids: list[int]) -> Iterator[int]:
    tokens: Iterator[int] = llama.generate(
        ids, temp=0.6, top_k=40, top_p=0.95, min_p=0.0, repeat_penalty=1.0
    )
    return tokens


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
        clock = clock_of(qwq.engine)
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
    return time.process_time(), time.perf_counter()


def clock_of(engine: Engine) -> Callable[[], Clocks]:
    """Processor seconds of this process and the engine's, and seconds by the clock."""
    assert isinstance(engine, IsolatedEngine)
    assert engine.pid is not None
    child = ~engine.pid << 3 | 2  # Linux's name for the processor time of a process

    def clock() -> Clocks:
        own_s, now = own_clock()
        return own_s + time.clock_gettime(child), now

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
