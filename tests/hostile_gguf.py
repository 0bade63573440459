"""Damaged GGUF files: a whole one taken apart, changed in one place, and put together again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_NUMBERS = (0, 1, 2, 3, 7, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_LARGE = (0, 1, 3, 1 << 31, 1 << 32, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_TEXTS = (
    *(b"", b" ", b"\0", b"a\0b", b"\xff\xfe\xc3", "\N{SNOWMAN}".encode(), b"x" * 70_000, b"llama"),
    *(b"qwen2", b"bert", b"none", b"gpt2", b"rwkv", b"default", b"{{", b"{% for x in y %}"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A key and its value's bytes; of an array `item` is its type and `items` are its members."""

    key: bytes
    kind: int
    value: bytes = b""
    item: int = 0
    items: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """What the header says of one tensor."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Parts:
    """A GGUF file in its parts."""

    pairs: tuple[Pair, ...]
    entries: tuple[Entry, ...]
    data: bytes


def take_apart(file: bytes) -> Parts:
    """The parts of a whole file."""
    at = 24

    def take(nbytes: int) -> bytes:
        nonlocal at
        at += nbytes
        return file[at - nbytes : at]

    def number(form: str) -> int:
        value: int = struct.unpack(form, take(struct.calcsize(form)))[0]
        return value

    def text() -> bytes:
        return take(number("<Q"))

    def pair() -> Pair:
        key, kind = text(), number("<I")
        if kind != _ARRAY:
            return Pair(key, kind, text() if kind == _STRING else take(_WIDTHS[kind]))
        item, n = number("<I"), number("<Q")
        items = tuple(text() if item == _STRING else take(_WIDTHS[item]) for _ in range(n))
        return Pair(key, kind, b"", item, items)

    def entry() -> Entry:
        name, n_dims = text(), number("<I")
        dims = tuple(number("<Q") for _ in range(n_dims))
        return Entry(name, dims, number("<I"), number("<Q"))

    n_tensors, n_pairs = struct.unpack_from("<QQ", file, 8)
    pairs = tuple(pair() for _ in range(n_pairs))
    entries = tuple(entry() for _ in range(n_tensors))
    return Parts(pairs, entries, file[-(-at // _ALIGNMENT) * _ALIGNMENT :])


def put_together(parts: Parts) -> bytes:
    """The file of these parts, whatever sense they make."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    out = [b"GGUF", struct.pack("<IQQ", 3, len(parts.entries), len(parts.pairs))]
    for pair in parts.pairs:
        out += [text(pair.key), struct.pack("<I", pair.kind)]
        if pair.kind == _ARRAY:
            out.append(struct.pack("<IQ", pair.item, len(pair.items)))
            out += [text(item) if pair.item == _STRING else item for item in pair.items]
        else:
            out.append(text(pair.value) if pair.kind == _STRING else pair.value)
    for entry in parts.entries:
        out += [text(entry.name), struct.pack("<I", len(entry.dims))]
        out += [struct.pack("<Q", dim % (1 << 64)) for dim in entry.dims]
        out.append(struct.pack("<IQ", entry.kind, entry.offset % (1 << 64)))
    header = b"".join(out)
    return header + bytes(-len(header) % _ALIGNMENT) + parts.data


def damaged(file: bytes, n: int, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """n damaged files and in words what was done to each."""
    rng = random.Random(seed)
    parts = take_apart(file)
    n_header = len(file) - len(parts.data)
    kinds: tuple[Callable[[], tuple[str, bytes]], ...] = (
        lambda: _flipped(file, n_header, rng),
        lambda: _cut(file, rng),
        lambda: _with_number(file, n_header, rng),
        lambda: _with_pair(parts, rng),
        lambda: _with_pair(parts, rng),
        lambda: _with_array(parts, rng),
        lambda: _with_array(parts, rng),
        lambda: _with_entry(parts, rng),
    )
    for _ in range(n):
        yield rng.choice(kinds)()


def _flipped(file: bytes, n_header: int, rng: random.Random) -> tuple[str, bytes]:
    changed = bytearray(file)
    places = [rng.randrange(n_header) for _ in range(rng.randint(1, 4))]
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return f"bits flipped at {places}", bytes(changed)


def _cut(file: bytes, rng: random.Random) -> tuple[str, bytes]:
    n_kept = rng.randrange(len(file))
    return f"cut to {n_kept} bytes", file[:n_kept]


def _with_number(file: bytes, n_header: int, rng: random.Random) -> tuple[str, bytes]:
    place, number = rng.randrange(4, n_header - 8), rng.choice(_LARGE)
    width = rng.choice((4, 8))
    data = (number % (1 << 8 * width)).to_bytes(width, "little")
    return f"{number} at byte {place}", file[:place] + data + file[place + width :]


def _with_pair(parts: Parts, rng: random.Random) -> tuple[str, bytes]:
    index = rng.randrange(len(parts.pairs))
    pair = parts.pairs[index]
    what = rng.choice(("left out", "twice", "renamed", "of another type", "changed", "changed"))
    key = pair.key.decode()
    if what == "left out":
        new: tuple[Pair, ...] = ()
    elif what == "twice":
        new = (pair, pair)
    elif what == "renamed":
        new = (replace(pair, key=rng.choice(_TEXTS)),)
    elif what == "of another type" and pair.kind in _WIDTHS:
        kind = rng.choice([*_WIDTHS, _STRING, 13, 99])
        new = (replace(pair, kind=kind, value=rng.randbytes(_WIDTHS.get(kind, 4))),)
    elif pair.kind == _ARRAY:
        new = (Pair(pair.key, _STRING, rng.choice(_TEXTS)),)
    elif pair.kind == _STRING:
        new = (replace(pair, value=rng.choice(_TEXTS)),)
    else:
        width = _WIDTHS[pair.kind]
        number = rng.choice(_NUMBERS) % (1 << 8 * width)
        new = (replace(pair, value=number.to_bytes(width, "little")),)
        what = f"changed to {number}"
    pairs = (*parts.pairs[:index], *new, *parts.pairs[index + 1 :])
    return f"{key} {what}", put_together(replace(parts, pairs=pairs))


def _with_array(parts: Parts, rng: random.Random) -> tuple[str, bytes]:
    index = rng.choice([i for i, pair in enumerate(parts.pairs) if pair.kind == _ARRAY])
    pair = parts.pairs[index]
    items = list(pair.items)
    what = rng.choice(("shorter", "longer", "empty", "all the same", "changed", "shuffled"))
    some = [rng.randrange(len(items)) for _ in range(rng.choice((1, 3, 100)))]
    if what == "shorter":
        del items[rng.randrange(len(items)) :]
    elif what == "longer":
        items += [items[place] for place in some]
    elif what == "empty":
        items = []
    elif what == "all the same":
        items = [items[some[0]]] * len(items)
    elif what == "shuffled":
        rng.shuffle(items)
    else:
        width = _WIDTHS.get(pair.item)
        for place in some:
            items[place] = rng.choice(_TEXTS) if width is None else rng.randbytes(width)
    pairs = (*parts.pairs[:index], replace(pair, items=tuple(items)), *parts.pairs[index + 1 :])
    return f"{pair.key.decode()} {what}", put_together(replace(parts, pairs=pairs))


def _with_entry(parts: Parts, rng: random.Random) -> tuple[str, bytes]:
    index = rng.randrange(len(parts.entries))
    entry = parts.entries[index]
    other = rng.choice(parts.entries)
    dims = list(entry.dims)
    dims[rng.randrange(len(dims))] = rng.choice((*_LARGE, dims[0] // 2, dims[0] * 2))
    changes: dict[str, dict[str, Any]] = {
        "renamed": {"name": rng.choice(_TEXTS)},
        "named as another": {"name": other.name},
        "turned": {"dims": entry.dims[::-1]},
        "as a vector": {"dims": (entry.dims[0] * (entry.dims[-1] if len(entry.dims) > 1 else 1),)},
        "without dimensions": {"dims": ()},
        "of many dimensions": {"dims": entry.dims + (1,) * rng.choice((1, 2, 3, 90))},
        "of another size": {"dims": tuple(dims)},
        "of another type": {"kind": rng.choice((*range(42), 255, 1 << 31))},
        "elsewhere": {"offset": rng.choice((*_LARGE, 32, other.offset, entry.offset + 1))},
    }
    what = rng.choice(list(changes))
    new: tuple[Entry, ...] = (replace(entry, **changes[what]),)
    if rng.random() < 0.1:
        what, new = "left out", ()
    entries = (*parts.entries[:index], *new, *parts.entries[index + 1 :])
    return f"{entry.name.decode()} {what}", put_together(replace(parts, entries=entries))
