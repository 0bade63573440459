"""Safetensors shards written as the tensors come: the header is known before the first byte.

The library's own writer takes whole tensors, writes under a name that it makes up, which a killed
process leaves behind, and hides why a disk refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to be written; dtype is safetensors' name of it ("BF16", "F16", "F32", "I32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write_index(folder: Path, shards: Mapping[str, Sequence[OutputTensor]]) -> None:
    """Write the index of shards by file name; readers begin with it, so it goes last."""
    index = {
        "metadata": {
            "total_size": sum(tensor.nbytes for shard in shards.values() for tensor in shard)
        },
        "weight_map": {tensor.name: name for name, shard in shards.items() for tensor in shard},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float32 tensors that are all there, on the host."""
    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    planned = [OutputTensor(name, "F32", one.shape, one.nbytes) for name, one in arrays.items()]
    write_shard(path, planned, ((name, one) for name, one in arrays.items() if one.size), metadata)


def write_shard(
    path: Path,
    tensors: Sequence[OutputTensor],
    stream: Iterator[tuple[str, npt.NDArray[Any]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one shard.

    stream: (name, rows) in the tensors' order; a tensor may come in several. metadata: for the
    header, beside what says that the file is for torch.
    Source: https://github.com/huggingface/safetensors, section Format.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
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
    left = next(stream, None)
    assert left is None, f"{left[0]} is more than was planned"
