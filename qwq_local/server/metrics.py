"""Counters for Prometheus. Source: its text format, version 0.0.4."""

import threading

from qwq_local import Done
from qwq_local.server.engine_room import EngineRoom

_HELP = {
    "requests_total": "Replies that were made to their end.",
    "prompt_tokens_total": "Tokens of prompts.",
    "cached_tokens_total": "Tokens of prompts that were found in the cache.",
    "completion_tokens_total": "Tokens of replies.",
    "reasoning_tokens_total": "Tokens of replies that were thought.",
    "prefill_seconds_total": "Time until the first token, from a reply's beginning.",
    "decode_seconds_total": "Time from the first token to the last.",
}


class Metrics:
    """Sums over all replies; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = dict.fromkeys(_HELP, 0)

    def add(self, done: Done) -> None:
        usage, timings = done.usage, done.timings
        values = (
            1,
            usage.prompt_tokens,
            timings.n_cached,
            usage.completion_tokens,
            usage.reasoning_tokens,
            timings.prefill_s,
            timings.decode_s,
        )
        with self._lock:
            for name, value in zip(_HELP, values, strict=True):
                self._sums[name] += value

    def text(self, room: EngineRoom) -> str:
        with self._lock:
            sums = dict(self._sums)
        lines = [
            f"# HELP qwq_{name} {_HELP[name]}\n# TYPE qwq_{name} counter\nqwq_{name} {value}"
            for name, value in sums.items()
        ]
        gauges = {
            "requests_waiting": ("Requests in the queue.", room.n_waiting),
            "requests_running": ("Replies that are being made.", room.n_running),
            "engine_ready": ("1 while the engine can be asked.", int(room.state == "ready")),
        }
        lines += [
            f"# HELP qwq_{name} {text}\n# TYPE qwq_{name} gauge\nqwq_{name} {value}"
            for name, (text, value) in gauges.items()
        ]
        return "\n".join(lines) + "\n"
