"""Reads a GPTQ folder, ours or not: codes, scales and zeros back to the weights they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.checkpoint import Checkpoint, Float32Array, read_json_object
from convert.errors import QwqError
from convert.gptq_format import CODES_PER_PACK, unpack

if TYPE_CHECKING:
    import torch

VERSIONS = {"gptq": 1, "gptq_v2": 2}
_WHAT_TO_DO = "make or download the folder again"


@dataclass(frozen=True, slots=True)
class GptqFolder:
    """A folder opened: bits, format version, group size (-1: a row), and each tensor's shard."""

    path: Path
    bits: int
    version: int
    group_size: int
    shards: dict[str, Path]

    @property
    def linears(self) -> list[str]:
        """Names of the quantized matrices, as the unquantized checkpoint has them."""
        suffix = ".qweight"
        bases = sorted(name.removesuffix(suffix) for name in self.shards if name.endswith(suffix))
        return [f"{base}.weight" for base in bases]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is stored; raises QwqError where it is missing or unreadable."""
        from safetensors import SafetensorError, safe_open

        if name not in self.shards:
            raise QwqError(f"{self.path}: {name} is missing; {_WHAT_TO_DO}")
        try:
            with safe_open(self.shards[name], "pt") as tensors:
                stored: torch.Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise QwqError(
                f"{self.shards[name]}: cannot be read ({error}); {_WHAT_TO_DO}"
            ) from error
        return stored

    def weight(self, name: str) -> Float32Array:
        """A quantized matrix as numbers, (n_out, n_in): (code - zero) * scale of its group.

        Raises QwqError where its parts do not fit together, or hold what is no number.
        """
        base = name.removesuffix(".weight")
        qweight, qzeros, scales = (
            self.tensor(f"{base}.{part}").numpy() for part in ("qweight", "qzeros", "scales")
        )
        n_groups, n_out = scales.shape
        n_in = qweight.shape[0] * CODES_PER_PACK // self.bits
        if qweight.shape[1] != n_out or qzeros.shape != (n_groups, n_out * self.bits // 32):
            raise QwqError(
                f"{name}: qweight {qweight.shape}, qzeros {qzeros.shape} and scales {scales.shape} "
                f"do not fit together at {self.bits} bits; {_WHAT_TO_DO}"
            )
        group_of = self._groups(base, n_in)
        if group_of.shape != (n_in,) or group_of.min() < 0 or group_of.max() >= n_groups:
            raise QwqError(
                f"{name}: g_idx of shape {group_of.shape} from {group_of.min()} to "
                f"{group_of.max()} does not fit {n_in} columns in {n_groups} groups; {_WHAT_TO_DO}"
            )
        if not np.isfinite(scales).all():
            raise QwqError(f"{name}: a scale is NaN or infinite; {_WHAT_TO_DO}")
        codes = unpack(np.ascontiguousarray(qweight.T), self.bits).astype(np.float32)
        zeros = unpack(np.ascontiguousarray(qzeros), self.bits).astype(np.float32)
        if self.version == 1:
            zeros += 1
        values: Float32Array = codes - zeros.T[:, group_of]
        values *= scales.astype(np.float32).T[:, group_of]
        return values

    def _groups(self, base: str, n_in: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if f"{base}.g_idx" in self.shards:
            return self.tensor(f"{base}.g_idx").numpy().astype(np.int64)
        return np.arange(n_in) // (n_in if self.group_size == -1 else self.group_size)


@dataclass(frozen=True, slots=True)
class LinearCheck:
    """How far a matrix is from its source. relative_error: RMS error over RMS weight.

    problem: in words what no sound quantizer does, empty where all is well.
    """

    name: str
    relative_error: float | None
    problem: str = ""


def open_gptq(path: Path) -> GptqFolder:
    """Read a folder's configs and shard headers; raises QwqError where it is no GPTQ folder."""
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = read_json_object(path / "config.json").get("quantization_config", {})
    if not config and (path / "quantize_config.json").is_file():
        config = read_json_object(path / "quantize_config.json")
    match config:
        case {"bits": (2 | 3 | 4 | 8) as bits, "group_size": int(group_size)}:
            pass
        case _:
            raise QwqError(f"{path}: has no GPTQ config of 2, 3, 4 or 8 bits; give a GPTQ folder")
    form = config.get("checkpoint_format", config.get("format", "gptq"))
    if form not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise QwqError(f"{path}: its format is {form!r}, not one of {known}; give a GPTQ folder")
    return GptqFolder(path, bits, VERSIONS[form], group_size, _locate(path))


def check_gptq(folder: GptqFolder, source: Checkpoint | None) -> Iterator[LinearCheck]:
    """Unpack every matrix and, where a source is given, hold it against the checkpoint's.

    A grid of step s leaves an RMS error of about s / sqrt(12) and no error on the mean; zeros read
    as the other version's shift every weight by a step.
    """
    for name in folder.linears:
        values = folder.weight(name)
        if source is None:
            yield LinearCheck(name, None)
            continue
        info = source.tensors.get(name)
        if info is None or info.shape != values.shape:
            shape = None if info is None else list(info.shape)
            yield LinearCheck(name, None, f"has shape {list(values.shape)} and its source {shape}")
            continue
        weight = source.read(name)
        difference = values - weight
        error = float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
        size = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64))))
        shift = abs(float(np.mean(difference, dtype=np.float64)))
        relative = error / size if size else float(error > 0)
        limit = min(0.95, 5 / 2**folder.bits)
        problem = ""
        if shift > 0.5 * error and relative > 2**-folder.bits:
            problem = f"is off by {shift / size:.0%} on the mean, as with the other version's zeros"
        elif not relative <= limit:
            problem = (
                f"differs from its source by {relative:.1%}, "
                f"and {folder.bits} bits keep within {limit:.1%}"
            )
        yield LinearCheck(name, relative, problem)


def _locate(path: Path) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open

    shards: dict[str, Path] = {}
    for shard in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(shard, "pt") as tensors:
                shards |= dict.fromkeys(tensors.keys(), shard)
        except (OSError, SafetensorError) as error:
            raise QwqError(f"{shard}: cannot be read ({error}); {_WHAT_TO_DO}") from error
    index = path / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(read_json_object(index).get("weight_map", {})) - shards.keys())
        if missing:
            raise QwqError(f"{index}: names {missing[0]}, which no shard holds; {_WHAT_TO_DO}")
    if not any(name.endswith(".qweight") for name in shards):
        raise QwqError(f"{path}: holds no qweight; give a GPTQ folder")
    return shards
