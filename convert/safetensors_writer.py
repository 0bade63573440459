"""Safetensors shards written as the tensors come: the header is known before the first byte."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

MAX_SHARD_NBYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to be written; dtype is safetensors' name of it ("BF16", "F16", "F32", "I32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def split_into_shards(
    tensors: Iterable[OutputTensor], max_nbytes: int = MAX_SHARD_NBYTES
) -> list[list[OutputTensor]]:
    """Tensors in their order, a new shard wherever the next one would pass max_nbytes."""
    shards: list[list[OutputTensor]] = [[]]
    for tensor in tensors:
        shard_nbytes = sum(one.nbytes for one in shards[-1])
        if shards[-1] and shard_nbytes + tensor.nbytes > max_nbytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[OutputTensor]],
    chunks: Iterable[tuple[str, npt.NDArray[Any]]],
) -> None:
    """Write the shards, and the index where there are several.

    chunks: (name, rows) in the shards' order; a tensor may come in several.
    Source: https://github.com/huggingface/safetensors, section Format.
    """
    stream = iter(chunks)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        _write_shard(folder / file_name, shard, stream)
        weight_map |= {tensor.name: file_name for tensor in shard}
    assert next(stream, None) is None, "more tensors than planned"
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_shard(
    path: Path, tensors: Sequence[OutputTensor], stream: Iterator[tuple[str, npt.NDArray[Any]]]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        assert offset % 4 == 0, f"{tensor.name} would not be aligned"
        offsets = [offset, offset + tensor.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            n_written = 0
            while n_written < tensor.nbytes:
                name, rows = next(stream)
                assert name == tensor.name, (name, tensor.name)
                n_written += file.write(rows.data.cast("B"))
            assert n_written == tensor.nbytes, (tensor, n_written)
