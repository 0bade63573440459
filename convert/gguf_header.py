"""What a GGUF file says of itself, every number checked before native code sees the file."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES

from convert.encode import QuantType
from convert.errors import GgufError

MetadataValue = int | float | bool | str | list[str] | npt.NDArray[np.generic]

MAX_HEADER_NBYTES = 1 << 26
"""Ten times the header of a model with 152,064 tokens; what a hostile file can make us read."""
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_KEY_NBYTES = (1 << 16) - 1
MAX_TENSOR_NAME_NBYTES = 63
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_WHAT_TO_DO = "fetch or make the file again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor; the last of `shape` is the row length, `offset` counts from the file's start."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header: every tensor lies inside the file, in order, without overlap."""

    version: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GgufTensor]
    data_offset: int
    file_nbytes: int


def read_header(path: Path) -> GgufHeader:
    """Read and check all that precedes the tensor data.

    Arrays of numbers come as numpy arrays, arrays of strings as lists; text that is not UTF-8
    keeps its bytes as surrogates. Memory stays within a few times MAX_HEADER_NBYTES.
    Raises GgufError naming the offset of what is wrong: no GGUF, a cut file, a number that
    contradicts the file's size or an earlier one.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    try:
        with path.open("rb") as file:
            return _parse(_Reader(file, path))
    except OSError as error:
        raise GgufError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _parse(reader: "_Reader") -> GgufHeader:
    version = _read_version(reader)
    n_tensors = reader.count("tensors", MAX_TENSORS, item_nbytes=24)
    n_keys = reader.count("keys", MAX_KEYS, item_nbytes=13)
    metadata: dict[str, MetadataValue] = {}
    for _ in range(n_keys):
        start = reader.offset
        key = reader.text("key", MAX_KEY_NBYTES)
        if not key or key in metadata:
            raise reader.error(start, f"the key {key[:80]!r} is empty or occurs twice")
        metadata[key] = _read_value(reader)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        type(alignment) is not int
        or not 1 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise reader.error(reader.offset, f"the alignment is {alignment!r}, not a power of two")
    entries = [_read_tensor_entry(reader) for _ in range(n_tensors)]
    data_offset = _aligned(reader.offset, alignment)
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for start, entry in entries:
        if entry.name in tensors:
            raise reader.error(start, f"the tensor {entry.name} occurs twice")
        if entry.offset != end:
            raise reader.error(
                start, f"{entry.name} is said to start at {entry.offset:,} and must at {end:,}"
            )
        offset = data_offset + entry.offset
        if offset + entry.nbytes > reader.file_nbytes:
            raise GgufError(
                f"{reader.path}: {entry.name} ends at byte {offset + entry.nbytes:,} and the file "
                f"at {reader.file_nbytes:,}, so it is cut; {_WHAT_TO_DO}"
            )
        tensors[entry.name] = GgufTensor(
            entry.name, entry.quant_type, entry.shape, offset, entry.nbytes
        )
        end = _aligned(end + entry.nbytes, alignment)
    return GgufHeader(version, metadata, tensors, data_offset, reader.file_nbytes)


def _read_version(reader: "_Reader") -> int:
    magic = reader.take(min(4, reader.file_nbytes))
    if magic != b"GGUF":
        raise GgufError(
            f"{reader.path}: starts with {magic!r} and a GGUF file with b'GGUF'; give a GGUF file"
        )
    version = reader.u32()
    if version not in (2, 3):
        raise reader.error(4, f"the version is {version} and 2 or 3 can be read")
    return version


def _read_value(reader: "_Reader") -> MetadataValue:
    start = reader.offset
    kind = reader.u32()
    if kind == _STRING:
        return reader.text("value", MAX_HEADER_NBYTES)
    if kind == _ARRAY:
        return _read_array(reader)
    if kind not in _SCALARS:
        raise reader.error(start, f"the value type {kind} is unknown")
    return _read_numbers(reader, kind, 1)[0].item()  # type: ignore[no-any-return]


def _read_array(reader: "_Reader") -> MetadataValue:
    start = reader.offset
    kind = reader.u32()
    if kind == _STRING:
        n_items = reader.count("strings", MAX_HEADER_NBYTES, item_nbytes=8)
        return [reader.text("array", MAX_HEADER_NBYTES) for _ in range(n_items)]
    if kind not in _SCALARS:
        raise reader.error(start, f"the array type {kind} is unknown")
    n_items = reader.count("numbers", MAX_HEADER_NBYTES, item_nbytes=_SCALARS[kind].itemsize)
    return _read_numbers(reader, kind, n_items)


def _read_numbers(reader: "_Reader", kind: int, n_items: int) -> npt.NDArray[np.generic]:
    dtype = _SCALARS[kind]
    start = reader.offset
    raw = reader.take(n_items * dtype.itemsize)
    if dtype.kind == "b" and raw.strip(b"\0\1"):
        raise reader.error(start, "a truth value is neither 0 nor 1")
    return np.frombuffer(raw, dtype=dtype)


def _read_tensor_entry(reader: "_Reader") -> tuple[int, GgufTensor]:
    """One entry and its own position; the tensor's offset is still relative to the data."""
    start = reader.offset
    name = reader.text("tensor name", MAX_TENSOR_NAME_NBYTES)
    n_dims = reader.u32()
    if not 1 <= n_dims <= MAX_DIMS:
        raise reader.error(start, f"{name} has {n_dims} dimensions and 1 to {MAX_DIMS} are known")
    shape = tuple(reversed([reader.u64() for _ in range(n_dims)]))
    kind = reader.u32()
    offset = reader.u64()
    if kind not in GGML_QUANT_SIZES:
        raise reader.error(start, f"{name} has the unknown type {kind}")
    quant_type = QuantType(kind)
    n_per_block, block_nbytes = GGML_QUANT_SIZES[quant_type]
    if shape[-1] % n_per_block:
        raise reader.error(
            start,
            f"{name} has rows of {shape[-1]:,} in blocks of {n_per_block} ({quant_type.name})",
        )
    nbytes = shape[-1] // n_per_block * block_nbytes
    for size in shape[:-1]:
        nbytes *= size
    if min(shape) < 1 or nbytes > reader.file_nbytes:
        raise reader.error(
            start,
            f"{name} of shape {list(shape)} takes {nbytes:,} bytes and the file has "
            f"{reader.file_nbytes:,}",
        )
    return start, GgufTensor(name, quant_type, shape, offset, nbytes)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Reader:
    """Sequential reads that never ask for more than is there, nor for more than the limit."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.file_nbytes = os.fstat(file.fileno()).st_size
        self.limit = min(self.file_nbytes, MAX_HEADER_NBYTES)
        self.offset = 0

    def error(self, offset: int, problem: str) -> GgufError:
        return GgufError(f"{self.path}: at byte {offset:,} {problem}; {_WHAT_TO_DO}")

    def take(self, nbytes: int) -> bytes:
        left = self.limit - self.offset
        if nbytes > left:
            limited = "the file" if self.limit == self.file_nbytes else "the largest header"
            raise self.error(
                self.offset, f"{nbytes:,} bytes are announced and {limited} has {left:,} more"
            )
        data = self.file.read(nbytes)
        if len(data) < nbytes:
            raise self.error(self.offset, "the file ended while it was read")
        self.offset += nbytes
        return data

    def u32(self) -> int:
        value: int = struct.unpack("<I", self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = struct.unpack("<Q", self.take(8))[0]
        return value

    def count(self, what: str, limit: int, *, item_nbytes: int) -> int:
        start = self.offset
        n_items = self.u64()
        possible = min(limit, (self.limit - self.offset) // item_nbytes)
        if n_items > possible:
            raise self.error(start, f"{n_items:,} {what} are announced and {possible:,} possible")
        return n_items

    def text(self, what: str, limit: int) -> str:
        start = self.offset
        nbytes = self.u64()
        if nbytes > limit:
            raise self.error(start, f"a {what} of {nbytes:,} bytes, of which {limit:,} are allowed")
        return self.take(nbytes).decode("utf-8", errors="surrogateescape")
