"""Checkpoint: config.json, index and safetensors shards -> float32 rows, a slice at a time.

Shards are read with seek and read, not through a mapping: a shard that shrinks while it is read is
then an error and not a crash of the process, and read pages never count as its memory.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from convert.errors import CheckpointError
from convert.qwen2 import (
    EMBEDDINGS,
    HEAD,
    Qwen2Config,
    TensorSpec,
    is_ignorable,
    parse_config,
    tensor_specs,
)

Float32Array = npt.NDArray[np.float32]

MAX_HEADER_NBYTES = 100_000_000
"""The limit of the safetensors format itself."""
MAX_JSON_NBYTES = 100_000_000
ITEM_NBYTES = {"BF16": 2, "F16": 2, "F32": 4}

_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_LORA_NAME = re.compile(r"(^|\.)(lora_|base_layer\.|modules_to_save\.)")
_WHAT_TO_DO = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts from the start of the shard `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class Checkpoint:
    """A folder with a Qwen2 checkpoint, opened and checked; use as a context manager.

    rows() and read() may be called from several threads.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: dict[str, Any],
        model: Qwen2Config,
        tensors: dict[str, TensorInfo],
    ) -> None:
        self.path = path
        self.config = config
        self.model = model
        self.tensors = tensors
        self._closing = ExitStack()
        self._shards = {
            shard: (self._closing.enter_context(shard.open("rb", buffering=0)), Lock())
            for shard in sorted({info.path for info in tensors.values()})
        }

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Check all that can be checked without reading weights, and open the shards.

        Raises CheckpointError naming the file or tensor that is wrong.
        """
        path = Path(path)
        config_path = path / "config.json"
        adapter = next((name for name in _ADAPTER_FILES if (path / name).exists()), None)
        if adapter is not None:
            raise CheckpointError(
                f"{path}: holds {adapter}, a LoRA adapter; merge it into its model, or move it away"
            )
        if not config_path.is_file():
            raise CheckpointError(
                f"{path}: holds no config.json, so it is no checkpoint; "
                "give the folder with config.json and *.safetensors"
            )
        config = read_json_object(config_path)
        model = parse_config(config, str(config_path))
        tensors = locate_tensors(path)
        _check_tensors(path, tensors, model)
        opened = cls(path, config=config, model=model, tensors=tensors)
        try:
            opened._check_tied_head()
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def name(self) -> str:
        """The model's name: the folder's, or what the hub's cache is told its name is."""
        path = self.path.resolve()
        if path.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
            return path.parents[1].name.rpartition("--")[2]
        return path.name

    def rows(
        self, name: str, start: int, stop: int, *, out: Float32Array | None = None
    ) -> Float32Array:
        """Rows start to stop of a matrix, or those elements of a vector, as float32.

        out: where they go, contiguous; a new array by default. Raises CheckpointError where a
        weight is NaN or infinite, with its position, and where the shard ends early.
        """
        info = self.tensors[name]
        assert 0 <= start <= stop <= info.shape[0], (name, start, stop, info.shape)
        assert out is None or out.flags.c_contiguous, name
        row_shape = info.shape[1:]
        n_per_row = int(np.prod(row_shape, dtype=np.int64))
        row_nbytes = n_per_row * ITEM_NBYTES[info.dtype]
        raw = self._read_bytes(info, start * row_nbytes, (stop - start) * row_nbytes)
        values = to_float32(raw, info.dtype, None if out is None else out.reshape(-1))
        check_finite(values, info, start * n_per_row)
        return values.reshape((stop - start, *row_shape))

    def read(self, name: str) -> Float32Array:
        """One whole tensor as float32; raises as rows() does."""
        return self.rows(name, 0, self.tensors[name].shape[0])

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_tied_head(self) -> None:
        """Where config.json ties the head, one that is stored anyway must be the embeddings."""
        info = self.tensors.get(HEAD)
        if info is None or not self.model.tied_embeddings:
            return
        embeddings = self.tensors[EMBEDDINGS]
        n_rows = min(16, *info.shape[:1], embeddings.shape[0])
        if info.shape != embeddings.shape or not np.array_equal(
            self.rows(HEAD, 0, n_rows), self.rows(EMBEDDINGS, 0, n_rows)
        ):
            raise CheckpointError(
                f"{info.path}: {HEAD} is not {EMBEDDINGS}, and config.json ties the two; "
                "set tie_word_embeddings to false, or remove the head"
            )

    def _read_bytes(self, info: TensorInfo, start: int, nbytes: int) -> npt.NDArray[np.uint8]:
        buffer = np.empty(nbytes, dtype=np.uint8)
        view = buffer.data
        file, lock = self._shards[info.path]
        n_read = 0
        try:
            with lock:
                file.seek(info.offset + start)
                while n_read < nbytes and (n_new := file.readinto(view[n_read:])):
                    n_read += n_new
        except OSError as error:
            raise CheckpointError(
                f"{info.path}: {info.name} cannot be read ({error.strerror}); check the disk"
            ) from error
        if n_read < nbytes:
            raise CheckpointError(
                f"{info.path}: {info.name} ends {nbytes - n_read:,} bytes early, the file changed "
                f"while it was read; {_WHAT_TO_DO}"
            )
        return buffer


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object; raises CheckpointError for anything else."""
    nbytes = path.stat().st_size
    if nbytes > MAX_JSON_NBYTES:
        raise CheckpointError(
            f"{path}: {nbytes:,} bytes are more than the {MAX_JSON_NBYTES:,} expected at most; "
            f"{_WHAT_TO_DO}"
        )
    return parse_json_object(path.read_bytes(), str(path))


def parse_json_object(text: bytes, source: str) -> dict[str, Any]:
    """Parse one JSON object in which no key occurs twice; raises CheckpointError naming source."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: no valid JSON ({error}); {_WHAT_TO_DO}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: no JSON object; {_WHAT_TO_DO}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key occurs twice")
    return table


def read_safetensors_header(
    path: Path, item_nbytes: Mapping[str, int] = ITEM_NBYTES
) -> Iterator[TensorInfo]:
    """The tensors of one shard, every number checked against the file's size.

    item_nbytes: the dtypes that may occur. Raises CheckpointError for a cut file, a malformed
    header, an unknown dtype, byte ranges that overlap, leave holes or pass the end, and shapes that
    do not match their range.
    Source: https://github.com/huggingface/safetensors, section Format.
    """
    try:
        with path.open("rb") as file:
            file_nbytes = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file, file_nbytes, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the shard is missing; {_WHAT_TO_DO}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the file and its rights"
        ) from error
    header.pop("__metadata__", None)
    infos = [
        _parse_entry(path, name, entry, data_start, item_nbytes) for name, entry in header.items()
    ]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = data_start
    for info in infos:
        if info.offset != end:
            raise CheckpointError(
                f"{path}: {info.name} starts at byte {info.offset:,} and the tensor before it ends "
                f"at {end:,}; {_WHAT_TO_DO}"
            )
        end += info.nbytes
    if end != file_nbytes:
        raise CheckpointError(
            f"{path}: its tensors end at byte {end:,} and the file at {file_nbytes:,}; "
            f"{_WHAT_TO_DO}"
        )
    yield from infos


def _read_header(file: BinaryIO, file_nbytes: int, path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path}: {len(prefix)} bytes are no safetensors file, which has at least 8; "
            f"{_WHAT_TO_DO}"
        )
    header_nbytes = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_NBYTES, file_nbytes - 8)
    if header_nbytes > limit:
        raise CheckpointError(
            f"{path}: the header claims {header_nbytes:,} bytes and {limit:,} are possible; "
            f"{_WHAT_TO_DO}"
        )
    text = file.read(header_nbytes)
    return parse_json_object(text, f"{path} (header)"), 8 + header_nbytes


def _parse_entry(
    path: Path, name: str, entry: object, data_start: int, item_nbytes: Mapping[str, int]
) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]}:
            pass
        case _:
            raise CheckpointError(
                f"{path}: {name} lacks dtype, shape or data_offsets; {_WHAT_TO_DO}"
            )
    if dtype not in item_nbytes:
        raise CheckpointError(
            f"{path}: {name} is of dtype {dtype[:20]} and one of {', '.join(item_nbytes)} is "
            "needed; give the unquantized checkpoint"
        )
    numbers = [*shape, start, stop]
    if len(shape) > 8 or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
        raise CheckpointError(
            f"{path}: {name} has a shape or byte range that is none; {_WHAT_TO_DO}"
        )
    expected_nbytes = item_nbytes[dtype]
    for size in shape:
        expected_nbytes *= size
    if stop - start != expected_nbytes:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} in {dtype} takes {expected_nbytes:,} bytes and its "
            f"range has {stop - start:,}; {_WHAT_TO_DO}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, expected_nbytes)


def locate_tensors(
    path: Path, item_nbytes: Mapping[str, int] = ITEM_NBYTES
) -> dict[str, TensorInfo]:
    """Where each tensor of a folder lies, by the headers of its shards.

    item_nbytes: the dtypes that may occur. Raises CheckpointError where index and shards do not
    fit together, and as read_safetensors_header does.
    """
    index_path = path / _INDEX_FILE
    if not index_path.is_file():
        if not (path / _SINGLE_FILE).is_file():
            remedy = _WHAT_TO_DO
            if any(path.glob("pytorch_model*.bin")):
                remedy = "fetch it as safetensors: reading its *.bin files would run code in them"
            raise CheckpointError(
                f"{path}: holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; {remedy}"
            )
        return {
            info.name: info for info in read_safetensors_header(path / _SINGLE_FILE, item_nbytes)
        }
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: has no weight_map; {_WHAT_TO_DO}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index_path}: {name} is said to be in {shard!r}, which names no shard; "
                f"{_WHAT_TO_DO}"
            )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for info in read_safetensors_header(path / shard, item_nbytes):
            said = weight_map.get(info.name)
            if said != shard:
                raise CheckpointError(
                    f"{path / shard}: holds {info.name}, which the index places in {said}; "
                    f"{_WHAT_TO_DO}"
                )
            tensors[info.name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{path / shard}: lacks {name}, which the index places there; {_WHAT_TO_DO}"
            )
    return tensors


def _check_tensors(path: Path, tensors: dict[str, TensorInfo], model: Qwen2Config) -> None:
    adapters = sorted(name for name in tensors if _LORA_NAME.search(name))
    if adapters:
        raise CheckpointError(
            f"{path}: {len(adapters)} tensors are left over from a LoRA adapter "
            f"({_first_names(adapters)}); merge it into the model first"
        )
    specs: dict[str, TensorSpec] = {}
    for spec in tensor_specs(model):
        specs[spec.name] = spec
        info = tensors.get(spec.name)
        if info is None:
            raise CheckpointError(
                f"{path}: {spec.name} is missing, of shape {list(spec.shape)}; {_WHAT_TO_DO}"
            )
        if info.shape != spec.shape:
            raise CheckpointError(
                f"{info.path}: {spec.name} has shape {list(info.shape)} and config.json asks for "
                f"{list(spec.shape)}; {_WHAT_TO_DO}"
            )
    extra = sorted(name for name in tensors if name not in specs and not is_ignorable(name, model))
    if extra:
        raise CheckpointError(
            f"{path}: {len(extra)} tensors do not belong to {model.n_layers} Qwen2 layers "
            f"({_first_names(extra)}); remove them, or give the checkpoint they are of"
        )


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def to_float32(
    raw: npt.NDArray[np.uint8], dtype: str, out: Float32Array | None = None
) -> Float32Array:
    """Exact widening; little-endian bytes in, native float32 out, a new array by default."""
    if dtype == "BF16":
        out = np.empty(len(raw) // 2, dtype=np.float32) if out is None else out
        np.left_shift(raw.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)
        return out
    values = raw.view("<f2" if dtype == "F16" else "<f4")
    if out is None:
        return values.astype(np.float32, copy=False)
    np.copyto(out, values)
    return out


def check_finite(values: Float32Array, info: TensorInfo, first: int) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    flat = int(np.argmin(finite))
    position = [int(n) for n in np.unravel_index(first + flat, info.shape)]
    raise CheckpointError(
        f"{info.path}: {info.name} holds {values[flat]} at {position}; the weights are damaged, "
        f"{_WHAT_TO_DO}"
    )
