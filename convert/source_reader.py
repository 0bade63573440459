"""The shards of a checkpoint, each read once from its first byte to its last, and hashed so."""

import hashlib
import os
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np

from convert.checkpoint import (
    ITEM_NBYTES,
    Checkpoint,
    Float32Array,
    TensorInfo,
    check_finite,
    to_float32,
)
from convert.encode import ByteArray
from convert.errors import CheckpointError
from convert.provenance import shard_paths
from convert.qwen2 import tensor_specs

_N_SKIPPED_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows start to stop of one tensor; a vector is one row. `index` counts in reading order."""

    index: int
    info: TensorInfo
    start: int
    stop: int

    @property
    def n_in(self) -> int:
        return self.info.shape[-1]

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.stop == prod(self.info.shape[:-1])

    @property
    def row_nbytes(self) -> int:
        return self.n_in * ITEM_NBYTES[self.info.dtype]

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.row_nbytes


@dataclass(frozen=True, slots=True)
class RawSlice:
    """A slice's bytes, and what was read until its end: the SHA-256 of each complete shard, then
    that of the present one so far.
    """

    bytes: ByteArray
    sha256_until: tuple[str, ...]


def cut_into_slices(checkpoint: Checkpoint, n_weights: int) -> list[Slice]:
    """All of the model's tensors in slices of at most n_weights (but of one row at least).

    They come in the order of the shards and of the bytes in them, so that reading never seeks.
    """
    infos = [checkpoint.tensors[spec.name] for spec in tensor_specs(checkpoint.model)]
    slices: list[Slice] = []
    for info in sorted(infos, key=lambda info: (info.path, info.offset)):
        n_rows = prod(info.shape[:-1])
        n_at_once = max(1, n_weights // info.shape[-1])
        for start in range(0, n_rows, n_at_once):
            slices.append(Slice(len(slices), info, start, min(start + n_at_once, n_rows)))
    return slices


def widen(raw: ByteArray, piece: Slice, start: int, stop: int) -> Float32Array:
    """Rows start to stop of a raw slice as float32, counted from the slice's own first row.

    Raises CheckpointError where a weight is NaN or infinite, with its position.
    """
    part = raw[start * piece.row_nbytes : stop * piece.row_nbytes]
    values = to_float32(part, piece.info.dtype)
    check_finite(values, piece.info, (piece.start + start) * piece.n_in)
    return values.reshape(stop - start, piece.n_in)


class SourceReader:
    """Reads slices in their order; bytes between them are read and hashed too."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._shards = shard_paths(checkpoint)
        self._sha256: list[str] = []
        self._file: FileIO | None = None
        self._offset = 0
        self._hash = hashlib.sha256()

    def read(self, piece: Slice) -> RawSlice:
        """Read the next slice; raises CheckpointError where the disk fails or a shard changes."""
        while self._shards[len(self._sha256)] != piece.info.path:
            self._finish_shard()
        start = piece.info.offset + piece.start * piece.row_nbytes
        assert start >= self._offset, (piece, self._offset)
        while self._offset < start:
            self._read(min(_N_SKIPPED_AT_ONCE, start - self._offset), piece.info.name)
        raw = self._read(piece.nbytes, piece.info.name)
        return RawSlice(raw, (*self._sha256, self._hash.hexdigest()))

    def finish(self) -> tuple[str, ...]:
        """Read what follows the last slice; returns the SHA-256 of each shard."""
        while len(self._sha256) < len(self._shards):
            self._finish_shard()
        return tuple(self._sha256)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _finish_shard(self) -> None:
        file = self._open()
        end = os.fstat(file.fileno()).st_size
        while self._offset < end:
            self._read(min(_N_SKIPPED_AT_ONCE, end - self._offset), "the last tensor")
        file.close()
        self._sha256.append(self._hash.hexdigest())
        self._file, self._offset, self._hash = None, 0, hashlib.sha256()

    def _open(self) -> FileIO:
        if self._file is None:
            path = self._shards[len(self._sha256)]
            try:
                self._file = path.open("rb", buffering=0)
            except OSError as error:
                raise _unreadable(path, error) from error
        return self._file

    def _read(self, nbytes: int, name: str) -> ByteArray:
        file = self._open()
        path = self._shards[len(self._sha256)]
        buffer = np.empty(nbytes, dtype=np.uint8)
        n_read = 0
        try:
            while n_read < nbytes and (n_new := file.readinto(buffer.data[n_read:])):
                n_read += n_new
        except OSError as error:
            raise _unreadable(path, error) from error
        if n_read < nbytes:
            raise CheckpointError(
                f"{path}: {name} ends {nbytes - n_read:,} bytes early, the file changed while it "
                "was read; download the checkpoint again"
            )
        self._hash.update(buffer.data)
        self._offset += nbytes
        return buffer


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror}); check the disk")
