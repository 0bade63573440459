"""Mixed, cancelled and malformed requests for a while: does memory stay flat, is a reply lost?

    .venv/bin/python benchmarks/soak_server.py [--seconds 900] [--clients 4] [--parallel 2]

It starts `qwq serve` and watches the resident memory of the server and of its engine's process.
Exits with 1 where a reply was lost, a status was not what it should be, or memory grew by more than
a tenth in the second half.
"""

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil

QUESTIONS = ("Which is larger, 9.9 or 9.11?", "What is 478 + 356?", "Say hello. " * 60)
MALFORMED = (b"{", b"[]", b'{"messages": 5}', b'{"messages": [{"role": "x"}]}', b"\xff")


@dataclass
class Tally:
    """What happened, from all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, problem: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            if problem:
                self.problems.append(f"{what}: {problem}")


def post(port: int, body: bytes) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    return connection


def question(draw: random.Random, **options: Any) -> bytes:
    messages = [{"role": "user", "content": draw.choice(QUESTIONS)}]
    body = {"messages": messages, "max_tokens": draw.randrange(1, 80)} | options
    return json.dumps(body).encode()


def whole(port: int, draw: random.Random, tally: Tally) -> None:
    connection = post(port, question(draw))
    response = connection.getresponse()
    reply = json.loads(response.read())
    lost = response.status != 200 or not reply["choices"][0]["finish_reason"]
    tally.add("whole", f"status {response.status}: {reply}" if lost else "")
    connection.close()


def streamed(port: int, draw: random.Random, tally: Tally) -> None:
    connection = post(port, question(draw, stream=True))
    text = connection.getresponse().read()
    tally.add("streamed", "" if text.endswith(b"data: [DONE]\n\n") else f"ended in {text[-80:]!r}")
    connection.close()


def cancelled(port: int, draw: random.Random, tally: Tally) -> None:
    connection = post(port, question(draw, stream=draw.random() < 0.5))
    time.sleep(draw.random() / 4)
    connection.close()
    tally.add("cancelled")


def malformed(port: int, draw: random.Random, tally: Tally) -> None:
    connection = post(port, draw.choice(MALFORMED))
    status = connection.getresponse().status
    tally.add("malformed", "" if status == 400 else f"status {status}")
    connection.close()


def ask_until(port: int, deadline: float, seed: int, tally: Tally) -> None:
    draw = random.Random(seed)
    while time.monotonic() < deadline:
        kind = draw.choice((whole, streamed, cancelled, malformed))
        try:
            kind(port, draw, tally)
        except (OSError, http.client.HTTPException) as error:
            tally.add("lost", f"{kind.__name__}: {error!r}")


def resident_mib(process: psutil.Process) -> float:
    family = [process, *process.children(recursive=True)]
    return float(sum(one.memory_info().rss for one in family)) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--parallel", type=int, default=2, help="replies at once")
    parser.add_argument("--model", default="models/nano-qwq/nano-qwq-Q4_K_M.gguf")
    options = parser.parse_args()
    command = [sys.executable, "-m", "qwq_local.cli", "serve", "-m", options.model, "--port", "0"]
    command += ["--parallel", str(options.parallel), "--no-page"]
    environment = {name: value for name, value in os.environ.items() if name != "QWQ_API_KEY"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stderr is not None
    found = re.search(r"http://127.0.0.1:(\d+)", server.stderr.readline())
    assert found is not None, "the server says where it listens"
    port = int(found[1])
    tally = Tally()
    while http_status(port) != 200:
        time.sleep(0.2)
    deadline = time.monotonic() + options.seconds
    threads = [
        threading.Thread(target=ask_until, args=(port, deadline, seed, tally))
        for seed in range(options.clients)
    ]
    for thread in threads:
        thread.start()
    process = psutil.Process(server.pid)
    memory: list[float] = []
    while time.monotonic() < deadline:
        time.sleep(options.seconds / 20)
        memory.append(resident_mib(process))
    for thread in threads:
        thread.join()
    server.terminate()
    server.wait()
    middle, end = memory[len(memory) // 2], memory[-1]
    print(dict(tally.counts))
    print("resident, MiB:", *(f"{mib:.0f}" for mib in memory))
    print(*tally.problems[:10], sep="\n")
    return int(bool(tally.problems) or end > 1.1 * middle)


def http_status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
