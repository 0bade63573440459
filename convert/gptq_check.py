"""A GPTQ folder held against its checkpoint: every tensor, sizes and rope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convert.checkpoint import Checkpoint, Float32Array
from convert.gptq_folder import GptqFolder
from convert.qwen2 import EMBEDDINGS, HEAD, is_ignorable, tensor_specs

ROWS = 8192  # of an unquantized matrix at a time
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_MANTISSA = 0xFFFF  # what of a float32 bfloat16 leaves out


@dataclass(frozen=True, slots=True)
class GptqCheck:
    """What was found of a tensor, by the checkpoint's name.

    bits: of a quantized matrix; None where it is stored as it was. relative_error: RMS error over
    RMS weight; None where none was measured. problem: what no sound quantizer does; empty where all
    is well.
    """

    name: str
    bits: int | None = None
    relative_error: float | None = None
    problem: str = ""


def check_gptq(folder: GptqFolder, source: Checkpoint | None) -> Iterator[GptqCheck]:
    """Unpack every matrix and, where a source is given, hold every tensor against the checkpoint's.

    What is not quantized must be the checkpoint's to the bit, or rounded to the dtype it is in.
    """
    if source is None:
        for name, (bits, _) in folder.sizes.items():
            folder.weight(name)
            yield GptqCheck(name, bits)
        return
    names = {spec.name: spec.name for spec in tensor_specs(source.model)}
    if source.model.tied_embeddings and HEAD in folder.tensors:
        names[HEAD] = EMBEDDINGS
    for name, source_name in names.items():
        if name in folder.sizes:
            yield _check_linear(folder, source, name)
        elif name in folder.tensors:
            yield GptqCheck(name, problem=_kept_problem(folder, source, name, source_name))
        else:
            yield GptqCheck(name, problem="is missing, packed and unpacked")
    parts = {f"{name.removesuffix('.weight')}.{part}" for name in folder.sizes for part in _PARTS}
    for name in sorted((folder.tensors.keys() | folder.sizes.keys()) - names.keys() - parts):
        if not is_ignorable(name, source.model) and not _is_empty_bias(folder, name):
            yield GptqCheck(name, problem="has no source in the checkpoint")


def _check_linear(folder: GptqFolder, source: Checkpoint, name: str) -> GptqCheck:
    """Hold an unpacked matrix against the checkpoint's.

    A grid of step s leaves an RMS error of about s / sqrt(12) and no error on the mean; zeros read
    as the other version's shift every weight by a step.
    """
    bits, _ = folder.sizes[name]
    values, shape = folder.weight(name), source.tensors[name].shape
    if values.shape != shape:
        problem = f"has shape {list(values.shape)} and its source {list(shape)}"
        return GptqCheck(name, bits, problem=problem)
    weight = source.read(name)
    difference = np.subtract(values, weight, out=values)
    error = float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
    size = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64))))
    shift = abs(float(np.mean(difference, dtype=np.float64)))
    relative = error / size if size else float(error > 0)
    limit = min(0.95, 5 / 2**bits)
    problem = ""
    if shift > 0.5 * error and relative > 2**-bits:
        problem = f"is off by {shift / size:.0%} on the mean, as with the other version's zeros"
    elif not relative <= limit:
        problem = (
            f"differs from its source by {relative:.1%}, and {bits} bits keep within {limit:.1%}"
        )
    return GptqCheck(name, bits, relative, problem)


def _kept_problem(folder: GptqFolder, source: Checkpoint, name: str, source_name: str) -> str:
    """What is wrong with a tensor that is stored unquantized; empty where nothing is."""
    shape, dtype = folder.tensors[name].shape, folder.tensors[name].dtype
    expected_shape = source.tensors[source_name].shape
    if shape != expected_shape:
        return f"has shape {list(shape)} and its source {list(expected_shape)}"
    n_wrong = 0
    for start in range(0, shape[0], ROWS):
        found = folder.rows(name, start, start + ROWS)
        expected = source.rows(source_name, start, min(start + ROWS, shape[0]))
        # An infinity, of a number that float16 cannot hold, is no rounding.
        same = (found == _rounded(expected, dtype)) & np.isfinite(found)
        n_wrong += int(same.size - np.count_nonzero(same))
    if not n_wrong:
        return ""
    return (
        f"differs from its source in {n_wrong:,} of {int(np.prod(shape)):,} numbers, and is not "
        f"quantized: {dtype} holds them as they are or rounded"
    )


def _rounded(values: Float32Array, dtype: str) -> Float32Array:
    """The nearest numbers that a dtype holds, ties to even, as float32."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    patterns = np.ascontiguousarray(values).view(np.uint32)
    half = (_MANTISSA >> 1) + (patterns >> 16 & 1)
    rounded: Float32Array = ((patterns + half) & ~np.uint32(_MANTISSA)).view(np.float32)
    return rounded


def _is_empty_bias(folder: GptqFolder, name: str) -> bool:
    """Some tools give every linear a bias, of zeros where the model has none."""
    return name.endswith("_proj.bias") and not folder.rows(name).any()
