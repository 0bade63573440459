"""Reads a GPTQ folder, ours or not: codes, scales and zeros back to the weights they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from convert.checkpoint import (
    ITEM_NBYTES,
    Float32Array,
    TensorInfo,
    read_json_object,
    read_safetensors_header,
    to_float32,
)
from convert.errors import QwqError
from convert.gptq_format import CODES_PER_PACK, unpack
from convert.gptq_headers import (
    STORED_NBYTES,
    GptqConfig,
    check_linear,
    check_tensors,
    linear_sizes,
    parse_quantization,
    read_bytes,
    read_integers,
)
from convert.qwen2 import ARCHITECTURE, Qwen2Config, parse_config, tensor_specs

_WHAT_TO_DO = "make or download the folder again"
_QWEIGHT = ".qweight"


@dataclass(frozen=True, slots=True)
class GptqFolder:
    """A folder opened, all that its headers can tell checked.

    model: what its config.json says; None where it has none, or is of another architecture.
    sizes: of each quantized matrix, by its name in the checkpoint: bits, and columns in a group.
    """

    path: Path
    config: GptqConfig
    model: Qwen2Config | None
    tensors: dict[str, TensorInfo]
    sizes: dict[str, tuple[int, int]]

    @property
    def linears(self) -> list[str]:
        """Names of the quantized matrices, as the unquantized checkpoint has them."""
        return list(self.sizes)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        """Rows of a tensor stored as numbers, as float32, or the elements of a vector.

        Raises QwqError where it is missing or holds integers.
        """
        info = self.tensors.get(name)
        if info is None or info.dtype not in ITEM_NBYTES:
            found = "missing" if info is None else f"of dtype {info.dtype}, no number"
            raise QwqError(f"{self.path}: {name} is {found}; {_WHAT_TO_DO}")
        stop = info.shape[0] if stop is None else min(stop, info.shape[0])
        row_nbytes = prod(info.shape[1:]) * ITEM_NBYTES[info.dtype]
        stored = read_bytes(info, start * row_nbytes, (stop - start) * row_nbytes)
        return to_float32(stored, info.dtype).reshape(stop - start, *info.shape[1:])

    def weight(self, name: str) -> Float32Array:
        """A quantized matrix as numbers, (n_out, n_in): (code - zero) * scale of its group.

        Raises QwqError where a scale is no number.
        """
        base = name.removesuffix(".weight")
        bits, group_size = self.sizes[name]
        qweight, qzeros = (
            read_integers(self.tensors[f"{base}.{part}"]).astype(np.int32, copy=False)
            for part in ("qweight", "qzeros")
        )
        scales = self.rows(f"{base}.scales")  # (n_groups, n_out)
        if not np.isfinite(scales).all():
            raise QwqError(f"{name}: a scale is NaN or infinite; {_WHAT_TO_DO}")
        codes = unpack(np.ascontiguousarray(qweight.T), bits).astype(np.float32)
        zeros = unpack(qzeros, bits).astype(np.float32)
        if self.config.version == 1:
            zeros += 1
        if f"{base}.g_idx" in self.tensors:
            group_of = read_integers(self.tensors[f"{base}.g_idx"]).astype(np.int64)
        else:
            group_of = np.arange(codes.shape[1]) // group_size
        values: Float32Array = codes - zeros.T[:, group_of]
        values *= scales.T[:, group_of]
        return values


def open_gptq(path: Path) -> GptqFolder:
    """Read a folder's configs and shard headers; raises QwqError where it is no GPTQ folder.

    Whatever tool made it: the format's config in either file, shards of any name.
    """
    table = _read_table(path / "config.json")
    config_path, quantization = path / "config.json", table.pop("quantization_config", None)
    if not quantization:
        config_path = path / "quantize_config.json"
        quantization = _read_table(config_path)
    if not quantization:
        raise QwqError(f"{path}: has no GPTQ config; give a GPTQ folder")
    config = parse_quantization(quantization, config_path)
    tensors = _locate(path)
    model = None
    if table.get("architectures") == [ARCHITECTURE]:
        model = parse_config(table, str(path / "config.json"))
        check_tensors(path, model, config, tensors)
    shapes = {spec.name: spec.shape for spec in tensor_specs(model)} if model else {}
    sizes = {}
    for base in sorted(name[: -len(_QWEIGHT)] for name in tensors if name.endswith(_QWEIGHT)):
        shape = shapes.get(f"{base}.weight") or _shape(base, config, tensors)
        check_linear(path, base, shape, config, tensors)
        bits, group_size = linear_sizes(base, shape[1], config, tensors)
        sizes[f"{base}.weight"] = bits, shape[1] if group_size == -1 else group_size
    return GptqFolder(path, config, model, tensors, sizes)


def _read_table(path: Path) -> dict[str, object]:
    return read_json_object(path) if path.is_file() else {}


def _shape(base: str, config: GptqConfig, tensors: dict[str, TensorInfo]) -> tuple[int, int]:
    """Of a matrix of which the folder's parts alone are known; an odd one has none that fits."""
    n_words, n_out = (*tensors[base + _QWEIGHT].shape, 0, 0)[:2]
    groups = tensors.get(f"{base}.g_idx")
    n_in = groups.shape[0] if groups and groups.shape else n_words * CODES_PER_PACK // config.bits
    return n_out, max(n_in, 1)


def _locate(path: Path) -> dict[str, TensorInfo]:
    tensors = {
        info.name: info
        for shard in sorted(path.glob("*.safetensors"))
        for info in read_safetensors_header(shard, STORED_NBYTES)
    }
    index = path / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(read_json_object(index).get("weight_map", {})) - tensors.keys())
        if missing:
            raise QwqError(f"{index}: names {missing[0]}, which no shard holds; {_WHAT_TO_DO}")
    if not any(name.endswith(_QWEIGHT) for name in tensors):
        raise QwqError(f"{path}: holds no qweight; give a GPTQ folder")
    return tensors
