"""Files that were just written, read back: their headers, and each tensor's bytes by its hash."""

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from convert.encode import n_cores
from convert.errors import GgufError
from convert.gguf_header import GgufTensor
from convert.gguf_parts import GgufPart, read_parts

_AT_ONCE_NBYTES = 1 << 20
_DISK = "check the disk and the memory, then convert again"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Written:
    """One output: all its parts in their order, under any names.

    sha256: of each tensor's bytes as they were written, by GGUF name.
    """

    paths: Sequence[Path]
    sha256: Mapping[str, str]


def check_written(
    outputs: Sequence[Written], *, threads: int | None = None, on_progress: Progress | None = None
) -> None:
    """Read outputs back, as many tensors at a time as there are threads.

    threads: all cores by default. on_progress: (bytes done, bytes in all), called in the threads,
    one call at a time.
    Raises GgufError naming the first tensor that is not what was written, and where the gguf
    package reads another header than we do.
    """
    tensors = [
        (part.path, tensor, output.sha256[tensor.name])
        for output in outputs
        for part in _checked_parts(output)
        for tensor in part.header.tensors.values()
    ]
    n_total, n_done = sum(tensor.nbytes for _, tensor, _ in tensors), 0
    lock = Lock()

    def count(nbytes: int) -> None:
        nonlocal n_done
        with lock:
            n_done += nbytes
            if on_progress is not None:
                on_progress(n_done, n_total)

    pool = ThreadPoolExecutor(threads or n_cores())
    try:
        hashes = [pool.submit(_sha256_of, path, tensor, count) for path, tensor, _ in tensors]
        for (path, tensor, wanted), found in zip(tensors, hashes, strict=True):
            if found.result() != wanted:
                raise GgufError(
                    f"{path}: {tensor.name} reads back with the SHA-256 {found.result()[:16]} and "
                    f"was written with {wanted[:16]}; {_DISK}"
                )
    finally:
        pool.shutdown(cancel_futures=True)


def _checked_parts(output: Written) -> tuple[GgufPart, ...]:
    model = read_parts(output.paths)
    odd = sorted(model.tensors.keys() ^ output.sha256.keys())
    if odd:
        raise GgufError(f"{model.path}: {odd[0]} was not to be written or is not there; {_DISK}")
    for part in model.parts:
        _hold_against_gguf_package(part)
    return model.parts


def _sha256_of(path: Path, tensor: GgufTensor, count: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    view = memoryview(bytearray(min(_AT_ONCE_NBYTES, tensor.nbytes)))
    left = tensor.nbytes
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            while left and (n_read := file.readinto(view[:left])):
                digest.update(view[:n_read])
                left -= n_read
                count(n_read)
    except OSError as error:
        raise GgufError(
            f"{path}: {tensor.name} cannot be read ({error.strerror}); check the disk"
        ) from error
    if left:
        raise GgufError(f"{path}: {tensor.name} ends {left:,} bytes early; {_DISK}")
    return digest.hexdigest()


def _hold_against_gguf_package(part: GgufPart) -> None:
    """Raise GgufError where the gguf package finds other tensors in the file, or elsewhere."""
    try:
        tensors = _LeanReader(part.path).tensors
    except (ValueError, KeyError, IndexError) as error:
        raise GgufError(
            f"{part.path}: the gguf package cannot read it ({error}); {_DISK}"
        ) from error
    theirs = {
        tensor.name: (
            tensor.tensor_type,
            tuple(int(n) for n in reversed(tensor.shape)),
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in tensors
    }
    ours = {
        tensor.name: (tensor.quant_type, tensor.shape, tensor.offset, tensor.nbytes)
        for tensor in part.header.tensors.values()
    }
    if theirs != ours:
        odd = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
        raise GgufError(
            f"{part.path}: {odd} is {ours.get(odd)} and the gguf package reads {theirs.get(odd)}; "
            f"{_DISK}"
        )


class _LeanReader(gguf.GGUFReader):
    """The gguf package's reader, which steps over arrays.

    It keeps two views for each string of an array: for QwQ's tokens and merges 600 MB and 20 s.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[gguf.GGUFValueType]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, n_items = struct.unpack_from("<IQ", self.data.data, orig_offs)
        end = orig_offs + 12
        if item_type == gguf.GGUFValueType.STRING:
            for _ in range(n_items):
                end += 8 + struct.unpack_from("<Q", self.data.data, end)[0]
        else:
            end += n_items * np.dtype(self.gguf_scalar_to_np[item_type]).itemsize
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]
