"""Several clients at once, ours against llama-cpp-python's server on the same file.

    python benchmarks/serving.py [--rounds 3] [--tokens 48] [--threads 1] [-m FILE]

Serves nano-qwq, and a Qwen2 file of random weights whose token takes at least 10 ms of a core, both
made in a temporary folder, or FILE instead; with 8 replies at once here and as it comes there (one
reply at a time). Prints tokens/s of 1, 4 and 8 clients together, and the time to the first token of
a second turn where 4 conversations take turns. Both servers run all the time and are asked in turn;
ratios are of medians, by the clock and by the processor time of the server's processes.

llama-cpp-python's server needs packages that the project does not; they are installed beside it:

    python -m pip install --no-deps --target build/llama-server PINS

where that is not possible, ours is measured alone, and the output says so.
"""

import argparse
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.runtime import CONFIG, NANO, export
from tests.synthetic import write_checkpoint

PACKAGES = Path("build/llama-server")
PINS = ("sse-starlette==3.7.0", "pydantic-settings==2.16.3", "starlette-context==0.5.1")
CLIENTS = (1, 4, 8)
N_CONVERSATIONS = 4
CONTEXT = 2048
TICK_S = 0.01  # what processor time is counted in
STORY = "The {} of these stories begins where a river meets the sea and nobody is at home. "
Messages = list[dict[str, str]]
Values = dict[tuple[str, int], list[tuple[float, float]]]


@dataclass(frozen=True, slots=True)
class Side:
    """A server that runs."""

    name: str
    port: int
    process: psutil.Process

    def clocks(self) -> tuple[float, float]:
        """Seconds by the clock, and of the processor in the server and its children."""
        family = [self.process, *self.process.children(recursive=True)]
        times = [one.cpu_times() for one in family]
        return time.perf_counter(), sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is asked")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a reply")
    parser.add_argument("--threads", type=int, default=1, help="threads of each server")
    parser.add_argument("-m", "--model", type=Path, help="a GGUF file to serve instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = [options.model] if options.model else made_in(Path(folder))
        for model in models:
            print(f"\n{model.name}, {model.stat().st_size / 1e6:.1f} MB")
            compare(model, options)


def made_in(folder: Path) -> list[Path]:
    print("making models ...", file=sys.stderr)
    return [export(NANO, folder), export(write_checkpoint(folder / "model", config=CONFIG), folder)]


def compare(model: Path, options: argparse.Namespace) -> None:
    """All measurements on one file."""
    with ExitStack() as running:
        sides = [running.enter_context(ours(model, options.threads))]
        if have_packages():
            sides.append(running.enter_context(theirs(model, options.threads)))
        else:
            print(f"llama-cpp-python's server is left out: pip cannot install {' '.join(PINS)}")
        for side in sides:
            n_tokens_of(side.port, [{"role": "user", "content": "Hello."}], 8)  # starts all up
        throughput(sides, options.rounds, options.tokens)
        second_turns(sides, options.rounds)


def throughput(sides: list[Side], n_rounds: int, n_tokens: int) -> None:
    """Tokens of all replies over the time from the first request to the last reply."""
    speeds: Values = {}
    for round_index in range(n_rounds):
        for n_clients in CLIENTS:
            for side in sides:
                speed = ask_together(side, n_clients, n_tokens, round_index)
                speeds.setdefault((side.name, n_clients), []).append(speed)
    print(f"\ntokens/s of all clients together, {n_tokens} tokens a reply: median (range)")
    show(speeds, CLIENTS, "clients")


def ask_together(
    side: Side, n_clients: int, n_tokens: int, round_index: int
) -> tuple[float, float]:
    started = threading.Barrier(n_clients + 1)

    def one(index: int) -> int:
        started.wait()
        text = f"Tell me story {round_index}.{n_clients}.{index}."
        return n_tokens_of(side.port, [{"role": "user", "content": text}], n_tokens)

    with ThreadPoolExecutor(n_clients) as threads:
        counts = [threads.submit(one, index) for index in range(n_clients)]
        before = side.clocks()
        started.wait()
        n_made = sum(count.result() for count in counts)
        after = side.clocks()
    return n_made / (after[0] - before[0]), n_made / max(after[1] - before[1], TICK_S)


def second_turns(sides: list[Side], n_rounds: int) -> None:
    """Milliseconds to the first token of each conversation's second turn, after all first ones."""
    times: Values = {}
    for round_index in range(n_rounds):
        for side in sides:
            talks = [
                [{"role": "user", "content": STORY.format(f"{round_index}.{index}.") * 12}]
                for index in range(N_CONVERSATIONS)
            ]
            for talk in talks:
                n_tokens_of(side.port, talk, 2)
            for talk in talks:
                talk.append({"role": "assistant", "content": "That is a fine story."})
                talk.append({"role": "user", "content": "Go on."})
                before = side.clocks()
                read_first_token(side.port, talk)
                after = side.clocks()
                taken = 1000 * (after[0] - before[0]), 1000 * (after[1] - before[1])
                times.setdefault((side.name, N_CONVERSATIONS), []).append(taken)
    print("\nms to the first token of a second turn, conversations in turn: median (range)")
    show(times, (N_CONVERSATIONS,), "conversations")


def n_tokens_of(port: int, messages: Messages, n_tokens: int) -> int:
    """Ask for a whole reply of so many tokens, and count them."""
    with asking(port, messages, n_tokens, stream=False) as response:
        return int(json.loads(response.read())["usage"]["completion_tokens"])


def read_first_token(port: int, messages: Messages) -> None:
    """Ask for a streamed reply, and read until its first piece is there."""
    with asking(port, messages, 4, stream=True) as response:
        for line in response:
            if line.startswith(b"data: {"):
                delta = json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]
                if delta.get("reasoning_content") or delta.get("content"):
                    return


@contextmanager
def asking(
    port: int, messages: Messages, n_tokens: int, *, stream: bool
) -> Iterator[http.client.HTTPResponse]:
    body = {"messages": messages, "max_tokens": n_tokens, "temperature": 1.0, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    yield response
    connection.close()


@contextmanager
def ours(model: Path, n_threads: int) -> Iterator[Side]:
    port = free_port()
    command = [sys.executable, "-m", "qwq_local.cli", "serve", "-m", str(model), "--no-page"]
    command += ["--port", str(port), "--threads", str(n_threads), "--context", str(CONTEXT)]
    command += ["--parallel", str(max(CLIENTS))]
    with serving(command, port, "/health", {}) as process:
        yield Side("qwq serve", port, process)


@contextmanager
def theirs(model: Path, n_threads: int) -> Iterator[Side]:
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model)]
    command += ["--port", str(port), "--n_ctx", str(CONTEXT), "--n_threads", str(n_threads)]
    command += ["--n_threads_batch", str(n_threads), "--interrupt_requests", "False"]
    paths = {"PYTHONPATH": str(PACKAGES)}
    with serving(command, port, "/v1/models", paths) as process:
        yield Side("llama-cpp-python", port, process)


@contextmanager
def serving(
    command: list[str], port: int, path: str, environment: dict[str, str]
) -> Iterator[psutil.Process]:
    """A server while it is used, from when it says that it is there."""
    known = {name: value for name, value in os.environ.items() if name != "QWQ_API_KEY"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=known | environment) as process,
    ):
        try:
            while not answers(port, path):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command[:3])} ended:\n{log.read()[-2000:]}")
                time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def have_packages() -> bool:
    """Install what llama-cpp-python's server needs, beside the project's packages."""
    if PACKAGES.exists():
        return True
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    return subprocess.run([*command, str(PACKAGES), *PINS], check=False).returncode == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def show(values: Values, counts: tuple[int, ...], what: str) -> None:
    names = list(dict.fromkeys(name for name, _ in values))
    for count, (index, by) in itertools.product(counts, enumerate(("clock", "processor"))):
        medians, cells = [], []
        for name in names:
            runs = [one[index] for one in values[name, count]]
            medians.append(statistics.median(runs))
            cells.append(f"{name} {medians[-1]:.1f} ({min(runs):.1f} to {max(runs):.1f})")
        if len(names) > 1:
            cells.append(f"ratio {medians[0] / medians[1]:.2f}")
        print(f"{count} {what}, {by}: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
