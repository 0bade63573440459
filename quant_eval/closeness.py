"""How near each tensor of a GGUF file or a GPTQ folder is to its checkpoint."""

from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gptq_check import check_gptq
from convert.gptq_folder import open_gptq
from convert.qwen2 import tensor_specs
from convert.verify import verify_model
from quant_eval.stored_weights import ALL, ReadWeights, Rows, open_weights

MATRIX_ROWS = 8192  # of a matrix with a row for each token of the vocabulary, at a time


@dataclass(frozen=True, slots=True)
class Closeness:
    """Of one tensor: RMS error over RMS weight, and by how much it is larger on the whole.

    scale: the sum of stored x source over that of source^2, near 1. It tells of scales that are
    off where the type's own error would hide them.
    """

    relative: float
    scale: float


def closeness_of(
    path: Path, source: Checkpoint, *, threads: int | None
) -> tuple[dict[str, Closeness], list[str]]:
    """By the names that the file has for its tensors, and in words what no sound file has.

    threads: for a GGUF file. Raises QwqError for one that cannot be read or is another model's.
    """
    if path.is_dir():
        return _of_folder(path, source)
    tensors = list(verify_model(path, source=source, threads=threads))
    found = {
        one.tensor.name: Closeness(one.error.relative, one.error.scale)
        for one in tensors
        if one.error is not None
    }
    return found, [f"{one.tensor.name} {one.problem}" for one in tensors if one.problem]


def check_sound(path: Path, source: Checkpoint, problems: list[str]) -> None:
    """Raise QwqError where a baseline cannot be made of a file with these problems."""
    if path.is_dir() and not problems:
        checks = check_gptq(open_gptq(path), source)
        problems = [f"{one.name} {one.problem}" for one in checks if one.problem]
    if problems:
        raise QwqError(f"{path}: {problems[0]}; a baseline is made of sound files")


def _of_folder(path: Path, source: Checkpoint) -> tuple[dict[str, Closeness], list[str]]:
    found: dict[str, Closeness] = {}
    problems = []
    try:
        read = open_weights(path, source)
    except QwqError as error:  # what is missing or does not fit together
        return {}, [str(error)]
    for spec in tensor_specs(source.model):
        n_rows = MATRIX_ROWS if spec.layer_index is None else spec.shape[0]
        try:
            found[spec.name] = _closeness(spec.name, spec.shape[0], n_rows, read, source)
        except QwqError as error:
            problems.append(str(error))
    return found, problems


def _closeness(
    name: str, n_all: int, n_rows: int, read: ReadWeights, source: Checkpoint
) -> Closeness:
    """Sums of up to a row in float32, of all rows in float64."""
    sums = np.zeros(3)
    for start in range(0, n_all, n_rows):
        rows: Rows = ALL if n_rows >= n_all else slice(start, start + n_rows)
        stored = np.atleast_2d(read(name, rows))
        exact = np.atleast_2d(source.rows(name, start, min(start + n_rows, n_all)))
        sums[0] += np.vecdot(exact, exact).sum(dtype=np.float64)
        sums[1] += np.vecdot(stored, exact).sum(dtype=np.float64)
        stored = stored - exact
        sums[2] += np.vecdot(stored, stored).sum(dtype=np.float64)
    size, product, error = map(float, sums)
    if not np.isfinite(error):
        raise QwqError(f"{name}: holds a weight that is no number; make the folder again")
    if size == 0:
        return Closeness(inf if error else 0.0, 1.0)
    return Closeness(sqrt(error / size), product / size)
