"""Importance files (imatrix): llama.cpp's GGUF format and its legacy .dat, read and written.

Source: llama.cpp, common/imatrix-loader.cpp, tools/imatrix/imatrix.cpp (save_imatrix) and
tools/quantize/quantize.cpp (load_imatrix), whose float32 arithmetic the reader repeats.
"""

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from convert.encode import QuantType
from convert.errors import QwqError
from convert.files import replacing_file, sha256_of
from convert.gguf_header import GgufTensor, MetadataValue, read_header
from convert.qwen2 import Qwen2Config, tensor_specs

Float32Array = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _N_CHUNKS = "imatrix.datasets", "imatrix.chunk_count"
_CHUNK_SIZE = "imatrix.chunk_size"
_EMBEDDINGS = "token_embd.weight"
CHUNK_SIZE = 512
"""Tokens a chunk in the files written here, as llama-imatrix has it, so that it can merge them."""

_MAX_LEGACY_NBYTES = 1 << 30
_WHAT_TO_DO = "make or fetch it again"


@dataclass(frozen=True, slots=True, eq=False)
class Imatrix:
    """What a file says of the input columns' importance, by GGUF tensor name.

    importance: (n_in,) float32 each, mean squared activation. counts: tokens that each mean is
    over, in the legacy format chunks. chunk_size: tokens, 0 where the file does not say it.
    digest: SHA-256 of the file.
    """

    importance: Mapping[str, Float32Array]
    counts: Mapping[str, int]
    n_chunks: int
    chunk_size: int
    datasets: tuple[str, ...]
    digest: str

    def importance_of(self, gguf_name: str, n_in: int) -> Float32Array | None:
        """The importance of one tensor, None where the file has none.

        Raises QwqError for one of another length, except the embeddings', which llama.cpp leaves
        out then too.
        """
        importance = self.importance.get(gguf_name)
        if importance is None or len(importance) == n_in:
            return importance
        if gguf_name == _EMBEDDINGS:
            return None
        raise QwqError(
            f"{gguf_name}: the imatrix has {len(importance):,} columns and the tensor {n_in:,}; "
            "give the imatrix of this model"
        )


@dataclass(frozen=True, slots=True)
class ImatrixMatch:
    """How an imatrix fits a model; tensors by GGUF name, in the model's order.

    missing: matrices without an entry. unused: entries that name no matrix of the model.
    zeros: columns of importance 0, which rounding then ignores. unusable: columns that are NaN,
    infinite or negative.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    zeros: Mapping[str, int]
    unusable: Mapping[str, int]

    def lines(self, limit: int | None = None) -> list[str]:
        """The same in words, for people, with at most `limit` tensors named of each kind."""
        zeros = [f"{name} ({n:,})" for name, n in self.zeros.items()]
        unusable = [f"{name} ({n:,})" for name, n in self.unusable.items()]
        findings = (
            ("no entry for", self.missing),
            ("entries that are not of this model:", self.unused),
            ("columns of importance 0, rounded without care, in", zeros),
            ("columns that are NaN, infinite or negative in", unusable),
        )
        return [f"imatrix: {len(self.matched)} entries match"] + [
            f"imatrix: {what} {_listed(names, limit)}" for what, names in findings if names
        ]


def match_imatrix(imatrix: Imatrix, model: Qwen2Config) -> ImatrixMatch:
    """Hold an imatrix against a model's matrices; raises QwqError for columns of another number."""
    matched: dict[str, Float32Array] = {}
    missing: list[str] = []
    for spec in tensor_specs(model):
        if len(spec.shape) == 1:
            continue
        importance = imatrix.importance_of(spec.gguf_name, spec.shape[-1])
        if importance is None:
            missing.append(spec.gguf_name)
        else:
            matched[spec.gguf_name] = importance
    n_zeros = {name: int((values == 0).sum()) for name, values in matched.items()}
    n_unusable = {name: count_unusable(values) for name, values in matched.items()}
    return ImatrixMatch(
        matched=tuple(matched),
        missing=tuple(missing),
        unused=tuple(sorted(imatrix.importance.keys() - matched.keys() - {_EMBEDDINGS})),
        zeros={name: n for name, n in n_zeros.items() if n},
        unusable={name: n for name, n in n_unusable.items() if n},
    )


def count_unusable(importance: Float32Array) -> int:
    """Columns that are NaN, infinite or negative."""
    return int((~np.isfinite(importance) | (importance < 0)).sum())


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance file of either format.

    Values that are NaN or negative are kept: match_imatrix names them.
    Raises QwqError, GgufError for a file that is cut, contradicts itself or is no imatrix.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        return _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as error:
        raise QwqError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def write_imatrix(
    path: Path,
    importance: Mapping[str, Float32Array],
    *,
    n_tokens: int,
    dataset: str,
    force: bool = False,
) -> None:
    """Write an importance file: GGUF, or the legacy format where the name ends in .dat.

    importance: (n_in,) float32 by GGUF tensor name, mean squared activation over n_tokens tokens.
    Read back, a value may differ by one rounding, since both formats hold sums.
    Raises OutputExistsError, DiskFullError.
    """
    assert n_tokens > 0
    with replacing_file(path, force=force) as file:
        if path.suffix == ".dat":
            _write_legacy(file, importance, n_tokens, dataset)
        else:
            _write_gguf(file, importance, n_tokens, dataset)


def _listed(names: Sequence[str], limit: int | None) -> str:
    n_hidden = 0 if limit is None else max(0, len(names) - limit)
    shown = ", ".join(names[: len(names) - n_hidden])
    return f"{shown} and {n_hidden} more" if n_hidden else shown


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    means: dict[str, Float32Array] = {}
    counts: dict[str, int] = {}
    with path.open("rb") as file:
        for name in sorted({_without_suffix(name) for name in header.tensors}):
            pair = header.tensors.get(name + _SUMS), header.tensors.get(name + _COUNTS)
            if pair[0] is None or pair[1] is None:
                raise QwqError(
                    f"{path}: {name} has not both sums and counts, so this is no imatrix; "
                    "give one made by qwq calibrate or llama-imatrix"
                )
            sums = _read_floats(file, pair[0], path)
            n_tokens = np.rint(_read_floats(file, pair[1], path))
            if sums.size % n_tokens.size or not np.isfinite(n_tokens).all():
                raise QwqError(f"{path}: {name} has odd counts; {_WHAT_TO_DO}")
            means[name] = _mean(sums.reshape(n_tokens.size, -1), n_tokens[:, None])
            counts[name] = int(n_tokens.max())
    if not means:
        raise QwqError(f"{path}: holds no importance; {_WHAT_TO_DO}")
    datasets = header.metadata.get(_DATASETS)
    return Imatrix(
        importance=means,
        counts=counts,
        n_chunks=_whole_number(header.metadata.get(_N_CHUNKS)),
        chunk_size=_whole_number(header.metadata.get(_CHUNK_SIZE)),
        datasets=tuple(datasets) if isinstance(datasets, list) else (),
        digest=sha256_of(path),
    )


def _mean(sums: Float32Array, n_tokens: Float32Array) -> Float32Array:
    """Sums over counts in float32; 1 where nothing was counted, as llama.cpp has it."""
    means = np.ones_like(sums)  # (n_matrices, n_in)
    np.divide(sums, n_tokens, out=means, where=n_tokens > 0)
    return means.reshape(-1)


def _without_suffix(name: str) -> str:
    return name.removesuffix(_SUMS).removesuffix(_COUNTS)


def _whole_number(value: MetadataValue | None) -> int:
    return value if type(value) is int else 0


def _read_floats(file: BinaryIO, tensor: GgufTensor, path: Path) -> Float32Array:
    if tensor.quant_type != QuantType.F32:
        raise QwqError(f"{path}: {tensor.name} is {tensor.quant_type.name}, not F32; {_WHAT_TO_DO}")
    file.seek(tensor.offset)
    return np.frombuffer(file.read(tensor.nbytes), dtype="<f4").astype(np.float32, copy=False)


def _read_legacy(path: Path) -> Imatrix:
    """int32 count of entries; each a name, calls, columns and float32 sums; then a tail."""
    nbytes = path.stat().st_size
    if nbytes > _MAX_LEGACY_NBYTES:
        raise QwqError(f"{path}: {nbytes:,} bytes are too many for an imatrix; {_WHAT_TO_DO}")
    reader = _LegacyReader(path.read_bytes(), path)
    means: dict[str, Float32Array] = {}
    counts: dict[str, int] = {}
    for _ in range(reader.number("entries", least=1)):
        name = reader.text("name")
        n_calls = reader.number("calls")
        sums = reader.floats(reader.number("columns", least=1))
        if name in means:
            raise reader.error(f"{name} occurs twice")
        means[name] = sums / np.float32(n_calls) if n_calls else sums
        counts[name] = n_calls
    n_chunks = 0 if reader.at_end else reader.number("chunks")
    dataset = "" if reader.at_end else reader.text("dataset")
    datasets = (dataset,) if dataset else ()
    return Imatrix(means, counts, n_chunks, 0, datasets, sha256_of(path))


class _LegacyReader:
    """Sequential reads of little-endian numbers that never ask for more than is there."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.offset = 0

    @property
    def at_end(self) -> bool:
        return self.offset == len(self.data)

    def error(self, problem: str) -> QwqError:
        return QwqError(
            f"{self.path}: at byte {self.offset:,} {problem}; give an imatrix that is whole"
        )

    def take(self, nbytes: int) -> bytes:
        left = len(self.data) - self.offset
        if nbytes > left:
            raise self.error(f"{nbytes:,} bytes are announced and {left:,} are left")
        self.offset += nbytes
        return self.data[self.offset - nbytes : self.offset]

    def number(self, what: str, *, least: int = 0) -> int:
        value: int = struct.unpack("<i", self.take(4))[0]
        if value < least:
            raise self.error(f"the number of {what} is {value:,}")
        return value

    def text(self, what: str) -> str:
        return self.take(self.number(f"bytes of a {what}")).decode("utf-8", "surrogateescape")

    def floats(self, n_values: int) -> Float32Array:
        return np.frombuffer(self.take(4 * n_values), dtype="<f4").astype(np.float32)


def _write_gguf(
    file: BinaryIO, importance: Mapping[str, Float32Array], n_tokens: int, dataset: str
) -> None:
    import gguf
    from gguf.gguf_writer import WriterState

    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # an imatrix names no architecture
    writer.add_type("imatrix")
    writer.add_array(_DATASETS, [dataset])
    writer.add_uint32(_N_CHUNKS, _n_chunks(n_tokens))
    writer.add_uint32(_CHUNK_SIZE, CHUNK_SIZE)
    for name, values in _sorted_by_name(importance):
        count = np.array([n_tokens], dtype=np.float32)
        writer.add_tensor(name + _SUMS, values * count)
        writer.add_tensor(name + _COUNTS, count)
    writer.fout = [cast("io.BufferedWriter", file)]
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _write_legacy(
    file: BinaryIO, importance: Mapping[str, Float32Array], n_tokens: int, dataset: str
) -> None:
    n_chunks = _n_chunks(n_tokens)
    file.write(struct.pack("<i", len(importance)))
    for name, values in _sorted_by_name(importance):
        file.write(_counted(name) + struct.pack("<2i", n_chunks, len(values)))
        file.write((values * np.float32(n_chunks)).astype("<f4").tobytes())
    file.write(struct.pack("<i", n_chunks) + _counted(dataset))


def _n_chunks(n_tokens: int) -> int:
    return -(-n_tokens // CHUNK_SIZE)


def _sorted_by_name(importance: Mapping[str, Float32Array]) -> Iterator[tuple[str, Float32Array]]:
    for name in sorted(importance):
        yield name, np.asarray(importance[name], dtype=np.float32)


def _counted(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<i", len(data)) + data
