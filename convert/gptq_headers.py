"""A GPTQ folder's headers held against its config.json, before any kernel reads its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.checkpoint import ITEM_NBYTES, TensorInfo, locate_tensors, read_json_object
from convert.errors import CheckpointError
from convert.qwen2 import Qwen2Config, parse_config, tensor_specs

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
STORED_NBYTES = ITEM_NBYTES | {"I32": 4, "I64": 8}
_MAX_GROUP_SIZE = 1 << 20
_WHAT_TO_DO = "make or download the folder again"


@dataclass(frozen=True, slots=True)
class GptqConfig:
    """A quantization_config, checked.

    group_size: -1 is a whole row. version: of the format. is_mixed: linears may have bits and
    groups of their own, which their shapes tell.
    """

    bits: int
    group_size: int
    version: int
    is_mixed: bool


@dataclass(frozen=True, slots=True)
class GptqHeaders:
    """What a folder says of itself, checked: each linear is whole, or stored as it was."""

    model: Qwen2Config
    bits: int
    group_size: int
    tensors: dict[str, TensorInfo]


def read_gptq_headers(path: Path) -> GptqHeaders:
    """Check all of a GPTQ folder that can be checked without reading codes.

    Raises CheckpointError naming the file or tensor that is wrong.
    """
    config_path = path / "config.json"
    config = read_json_object(config_path)
    quantization = config.pop("quantization_config", None)
    model = parse_config(config, str(config_path))
    checked = parse_quantization(quantization, config_path)
    tensors = locate_tensors(path, STORED_NBYTES)
    check_tensors(path, model, checked, tensors)
    return GptqHeaders(model, checked.bits, checked.group_size, tensors)


def parse_quantization(quantization: Any, path: Path) -> GptqConfig:
    """Check what a folder says of its format; path: the file that says so, for messages.

    A format that is left out or null is version 1. Raises CheckpointError for another quantizer's
    format, and for a value that is missing, odd or out of range.
    """
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: has no quantization_config; {_WHAT_TO_DO}")
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    method = quantization.get("quant_method") or quantization.get("method") or "gptq"
    form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    pack = quantization.get("pack_dtype") or "int32"
    if method != "gptq":
        raise CheckpointError(f"{path}: is quantized by {method!r}, not gptq; give a GPTQ folder")
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(f"{path}: bits is {bits!r} and must be one of {BITS}; {_WHAT_TO_DO}")
    if type(group_size) is not int or not (group_size == -1 or 1 <= group_size <= _MAX_GROUP_SIZE):
        raise CheckpointError(
            f"{path}: group_size is {group_size!r} and must be -1 or 1 to "
            f"{_MAX_GROUP_SIZE:,}; {_WHAT_TO_DO}"
        )
    if form not in tuple(VERSIONS) or pack != "int32":
        raise CheckpointError(
            f"{path}: its format is {form!r} in {pack!r} and must be one of "
            f"{', '.join(VERSIONS)} in 'int32'; {_WHAT_TO_DO}"
        )
    for key in ("desc_act", "sym"):
        if not isinstance(quantization.get(key, False), bool):
            raise CheckpointError(
                f"{path}: {key} is {quantization[key]!r}, neither true nor false; {_WHAT_TO_DO}"
            )
    return GptqConfig(bits, group_size, VERSIONS[form], bool(quantization.get("dynamic")))


def check_tensors(
    path: Path, model: Qwen2Config, config: GptqConfig, tensors: Mapping[str, TensorInfo]
) -> None:
    """That a folder holds all of a model, each matrix whole: packed in its parts, or as it was."""
    for spec in tensor_specs(model):
        base = spec.name.removesuffix(".weight")
        if spec.name in tensors:
            _check_shape(tensors[spec.name], spec.shape)
        elif f"{base}.qweight" in tensors:
            check_linear(path, base, spec.shape, config, tensors)
        else:
            raise CheckpointError(
                f"{path}: {spec.name} is missing, of shape {list(spec.shape)}, and so is "
                f"{base}.qweight; {_WHAT_TO_DO}"
            )


def _check_shape(info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...] = ()) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.path}: {info.name} has shape {list(info.shape)} and config.json asks for "
            f"{list(shape)}; {_WHAT_TO_DO}"
        )
    dtypes = dtypes or tuple(ITEM_NBYTES)
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"{info.path}: {info.name} is of dtype {info.dtype} and must be one of "
            f"{', '.join(dtypes)}; {_WHAT_TO_DO}"
        )


def linear_sizes(
    base: str, n_in: int, config: GptqConfig, tensors: Mapping[str, TensorInfo]
) -> tuple[int, int]:
    """Bits and group size of a linear: config's or, in a mixed folder, its own."""
    n_words, *_ = tensors[f"{base}.qweight"].shape or (0,)
    scales = tensors.get(f"{base}.scales")
    n_groups, *_ = (scales.shape if scales is not None else ()) or (0,)
    if (
        not config.is_mixed
        or not 1 <= n_groups <= n_in
        or n_words * 32 % n_in
        or n_words * 32 // n_in not in BITS
    ):
        return config.bits, config.group_size
    return n_words * 32 // n_in, -(-n_in // n_groups)


def check_linear(
    path: Path,
    base: str,
    shape: tuple[int, ...],
    config: GptqConfig,
    tensors: Mapping[str, TensorInfo],
) -> None:
    """The four tensors that stand for one matrix of this shape; g_idx may be left out."""
    n_out, n_in = shape
    bits, group_size = linear_sizes(base, n_in, config, tensors)
    n_groups = 1 if group_size == -1 else -(-n_in // group_size)
    if n_in * bits % 32 or n_out * bits % 32:
        raise CheckpointError(
            f"{path}: {base} of shape {list(shape)} cannot be packed in {bits} bits; {_WHAT_TO_DO}"
        )
    for part, part_shape, dtypes in (
        ("qweight", (n_in * bits // 32, n_out), ("I32",)),
        ("qzeros", (n_groups, n_out * bits // 32), ("I32",)),
        ("scales", (n_groups, n_out), tuple(ITEM_NBYTES)),
        ("g_idx", (n_in,), ("I32", "I64")),
    ):
        info = tensors.get(f"{base}.{part}")
        if info is not None:
            _check_shape(info, part_shape, dtypes)
        elif part != "g_idx":
            raise CheckpointError(f"{path}: {base}.{part} is missing; {_WHAT_TO_DO}")
    groups = tensors.get(f"{base}.g_idx")
    if groups is not None:
        _check_groups(groups, n_groups)


def _check_groups(info: TensorInfo, n_groups: int) -> None:
    """A kernel reads scales at these indices, on a GPU without looking."""
    group_of = read_integers(info)
    if group_of.min(initial=0) < 0 or group_of.max(initial=0) >= n_groups:
        raise CheckpointError(
            f"{info.path}: {info.name} names groups {group_of.min(initial=0)} to "
            f"{group_of.max(initial=0)} of {n_groups}; {_WHAT_TO_DO}"
        )


def read_integers(info: TensorInfo) -> npt.NDArray[np.signedinteger[Any]]:
    """A whole tensor of I32 or I64, in its shape."""
    stored = read_bytes(info, 0, info.nbytes)
    return stored.view({"I32": "<i4", "I64": "<i8"}[info.dtype]).reshape(info.shape)


def read_bytes(info: TensorInfo, start: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Bytes of a tensor as they are stored; raises CheckpointError where they cannot be read."""
    try:
        with info.path.open("rb") as file:
            file.seek(info.offset + start)
            stored = np.fromfile(file, np.uint8, nbytes)
    except OSError as error:
        raise CheckpointError(
            f"{info.path}: {info.name} cannot be read ({error.strerror}); check the disk"
        ) from error
    if len(stored) < nbytes:
        raise CheckpointError(
            f"{info.path}: {info.name} ends {nbytes - len(stored):,} bytes early, the file changed "
            f"while it was read; {_WHAT_TO_DO}"
        )
    return stored
