"""A GPTQ folder's headers held against its config.json, before any kernel reads its tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import ITEM_NBYTES, TensorInfo, locate_tensors, read_json_object
from convert.errors import CheckpointError
from convert.qwen2 import Qwen2Config, parse_config, tensor_specs

BITS = (2, 3, 4, 8)
_ITEM_NBYTES = ITEM_NBYTES | {"I32": 4, "I64": 8}
_MAX_GROUP_SIZE = 1 << 20
_FORMATS = ("gptq", "gptq_v2")
_WHAT_TO_DO = "make or download the folder again"


@dataclass(frozen=True, slots=True)
class GptqHeaders:
    """What a folder says of itself, checked: each linear is whole, or stored as it was."""

    model: Qwen2Config
    bits: int
    group_size: int
    tensors: dict[str, TensorInfo]


def read_gptq_headers(path: Path) -> GptqHeaders:
    """Check all of a GPTQ folder that can be checked without reading codes.

    group_size -1 is a whole row. Where `dynamic` gives some linears bits and groups of their own,
    these are told by the shapes. Raises CheckpointError naming the file or tensor that is wrong.
    """
    config_path = path / "config.json"
    config = read_json_object(config_path)
    quantization = config.pop("quantization_config", None)
    model = parse_config(config, str(config_path))
    bits, group_size = _sizes(quantization, config_path)
    tensors = locate_tensors(path, _ITEM_NBYTES)
    for spec in tensor_specs(model):
        base = spec.name.removesuffix(".weight")
        if spec.name in tensors:
            _check_shape(tensors[spec.name], spec.shape)
        elif f"{base}.qweight" in tensors:
            sizes = bits, group_size
            if quantization.get("dynamic"):
                sizes = _own_sizes(base, spec.shape, tensors) or sizes
            _check_linear(path, base, spec.shape, sizes, tensors)
        else:
            raise CheckpointError(
                f"{path}: {spec.name} is missing, of shape {list(spec.shape)}, and so is "
                f"{base}.qweight; {_WHAT_TO_DO}"
            )
    return GptqHeaders(model, bits, group_size, tensors)


def _sizes(quantization: Any, config_path: Path) -> tuple[int, int]:
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{config_path}: has no quantization_config; {_WHAT_TO_DO}")
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    pack = quantization.get("pack_dtype") or "int32"
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(
            f"{config_path}: bits is {bits!r} and must be one of {BITS}; {_WHAT_TO_DO}"
        )
    if type(group_size) is not int or not (group_size == -1 or 1 <= group_size <= _MAX_GROUP_SIZE):
        raise CheckpointError(
            f"{config_path}: group_size is {group_size!r} and must be -1 or 1 to "
            f"{_MAX_GROUP_SIZE:,}; {_WHAT_TO_DO}"
        )
    if form not in _FORMATS or pack != "int32":
        raise CheckpointError(
            f"{config_path}: its format is {form!r} in {pack!r} and must be one of "
            f"{', '.join(_FORMATS)} in 'int32'; {_WHAT_TO_DO}"
        )
    for key in ("desc_act", "sym"):
        if not isinstance(quantization.get(key, False), bool):
            raise CheckpointError(
                f"{config_path}: {key} is {quantization[key]!r}, neither true nor false; "
                f"{_WHAT_TO_DO}"
            )
    return bits, group_size


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


def _own_sizes(
    base: str, shape: tuple[int, ...], tensors: dict[str, TensorInfo]
) -> tuple[int, int] | None:
    """Bits and group size as the codes and scales of a linear have them, if they have any."""
    n_in = shape[1]
    n_words, *_ = tensors[f"{base}.qweight"].shape or (0,)
    scales = tensors.get(f"{base}.scales")
    n_groups, *_ = (scales.shape if scales is not None else ()) or (0,)
    if not 1 <= n_groups <= n_in or n_words * 32 % n_in or n_words * 32 // n_in not in BITS:
        return None
    return n_words * 32 // n_in, -(-n_in // n_groups)


def _check_linear(
    path: Path,
    base: str,
    shape: tuple[int, ...],
    sizes: tuple[int, int],
    tensors: dict[str, TensorInfo],
) -> None:
    """The four tensors that stand for one matrix of this shape; g_idx may be left out."""
    n_out, n_in = shape
    bits, group_size = sizes
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
    dtype = "<i4" if info.dtype == "I32" else "<i8"
    try:
        with info.path.open("rb") as file:
            file.seek(info.offset)
            group_of = np.frombuffer(file.read(info.nbytes), dtype)
    except OSError as error:
        raise CheckpointError(
            f"{info.path}: {info.name} cannot be read ({error.strerror}); check the disk"
        ) from error
    if len(group_of) != info.shape[0] or group_of.min() < 0 or group_of.max() >= n_groups:
        raise CheckpointError(
            f"{info.path}: {info.name} names groups {group_of.min(initial=0)} to "
            f"{group_of.max(initial=0)} of {n_groups}; {_WHAT_TO_DO}"
        )
