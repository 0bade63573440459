"""Damaged checkpoint folders: one JSON file or one safetensors header changed in one place."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2, 3, 5, 7, 1 << 31, 1 << 40, 1 << 70, -0.5, 1e308, float("nan")),
    *("", "x", "gptq", "gptq_v2", "int8", "float32", "F64", "I64", "\0", "a" * 9000),
    *([], [None], [1 << 62], {}, {"x": 1}),
)
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


def damaged_folders(whole: Path, work: Path, n: int, *, seed: int) -> Iterator[tuple[str, Path]]:
    """n damaged copies, each at the same place as the one before it, and what was done to each."""
    rng = random.Random(seed)
    for _ in range(n):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        kind = rng.randrange(4)
        if kind == 0:
            path = work / rng.choice(_FILES)
            text = path.read_bytes()
            start = rng.randrange(len(text))
            path.write_bytes(
                text[:start] + rng.randbytes(rng.choice((0, 1, 8))) + text[start + 4 :]
            )
            what = f"{path.name} changed at byte {start}"
        elif kind == 1:
            what = _damage_header(work / "model.safetensors", rng)
        else:
            path = work / rng.choice((*_FILES[:3], "config.json"))
            document = json.loads(path.read_text())
            what = f"{path.name}: {_damage(document, rng)}"
            path.write_text(json.dumps(document))
        yield what, work


def _damage(document: Any, rng: random.Random) -> str:
    """Change one value somewhere in a document."""
    holder, place = document, ""
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        place += f"/{key}"
        value = holder[key]
        if not (isinstance(value, dict | list) and value) or rng.random() < 0.2:
            break
        holder = value
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
        return f"{place} left out"
    holder[key] = rng.choice(_VALUES)
    return f"{place} is {str(holder[key])[:30]!r}"


def _damage_header(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    n_header = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        cut = rng.randrange(len(data))
        path.write_bytes(data[:cut])
        return f"cut to {cut} bytes"
    if rng.random() < 0.2:
        number = rng.choice((0, 1, n_header + 1, 1 << 31, (1 << 63) + 5, (1 << 64) - 1))
        path.write_bytes(number.to_bytes(8, "little") + data[8:])
        return f"a header of {number} bytes"
    header = json.loads(data[8 : 8 + n_header])
    what = _damage(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n_header :])
    return f"header: {what}"
