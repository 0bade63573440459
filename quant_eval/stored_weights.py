"""What a quantized model's tensors stand for, under the checkpoint's names: rows of float32."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import Checkpoint, Float32Array
from convert.decode import decode_rows
from convert.errors import QwqError
from convert.gguf_header import GgufTensor
from convert.gguf_parts import read_model
from convert.gptq_folder import open_gptq
from convert.qwen2 import tensor_specs

Rows = Sequence[int] | NDArray[np.int64] | slice
ReadWeights = Callable[[str, Rows], Float32Array]
"""(name, which rows) -> those rows of a matrix, or a whole vector; others are not decoded."""

ALL = slice(None)


def open_weights(path: Path, source: Checkpoint) -> ReadWeights:
    """The weights of a GGUF file or a GPTQ folder that was made from the checkpoint.

    Raises QwqError for a model that cannot be read; the reader raises it for a tensor that is not
    there or has another shape than the checkpoint's.
    """
    read = _open_gptq(path) if path.is_dir() else _open_gguf(path, source)

    def checked(name: str, rows: Rows) -> Float32Array:
        values = read(name, rows)
        shape = source.tensors[name].shape
        if values.shape[1:] != shape[1:] or (rows is ALL and values.shape != shape):
            raise QwqError(
                f"{path}: {name} has the shape {list(values.shape)} and its source {list(shape)}; "
                "give the checkpoint that it was made from"
            )
        return values

    return checked


def _open_gguf(path: Path, source: Checkpoint) -> ReadWeights:
    model = read_model(path)
    names = {spec.name: spec.gguf_name for spec in tensor_specs(source.model)}
    places = {
        name: (part.path, tensor)
        for part in model.parts
        for name, tensor in part.header.tensors.items()
    }

    def read(name: str, rows: Rows) -> Float32Array:
        if names[name] not in places:
            raise QwqError(
                f"{path}: lacks {names[name]}; give the checkpoint that it was made from"
            )
        return _read_gguf(*places[names[name]], rows)

    return read


def _read_gguf(path: Path, tensor: GgufTensor, rows: Rows) -> Float32Array:
    if len(tensor.shape) == 1:
        blocks = np.memmap(path, np.uint8, "r", tensor.offset, (1, tensor.nbytes))
        vector: Float32Array = decode_rows(blocks, tensor.quant_type, tensor.shape[0])[0]
        return vector
    n_rows, n_in = tensor.shape
    blocks = np.memmap(path, np.uint8, "r", tensor.offset, (n_rows, tensor.nbytes // n_rows))
    return decode_rows(blocks[rows], tensor.quant_type, n_in)


def _open_gptq(path: Path) -> ReadWeights:
    folder = open_gptq(path)
    weight = lru_cache(maxsize=1)(folder.weight)  # for what is read slice by slice

    def read(name: str, rows: Rows) -> Float32Array:
        if name in folder.sizes:
            return _chosen(weight(name), rows)
        if isinstance(rows, slice) and rows.step is None:
            return folder.rows(name, rows.start or 0, rows.stop)
        return _chosen(folder.rows(name), rows)

    return read


def _chosen(values: Float32Array, rows: Rows) -> Float32Array:
    chosen: Float32Array = values[rows]
    return chosen
