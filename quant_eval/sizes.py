"""How large a model is on the disk, and how many bits a weight takes in it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoint import parse_json_object, read_json_object
from convert.errors import CheckpointError, QwqError, UsageError
from convert.gguf_parts import read_model
from quant_eval.results import UNQUANTIZED_BITS

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors format itself
SIDE_TENSORS = (".qzeros", ".scales", ".g_idx")  # of GPTQ: they describe weights and are none


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Bytes of all parts of the file or all files of the folder, and what its tensors take."""

    nbytes: int
    tensor_nbytes: int
    n_weights: int

    @property
    def bits_per_weight(self) -> float:
        """8 x tensor bytes / weights, embeddings included."""
        return 8 * self.tensor_nbytes / self.n_weights


def model_size(path: Path) -> ModelSize:
    """Measure a GGUF file with its parts, a GPTQ folder or a checkpoint by headers alone.

    Raises GgufError or CheckpointError where a header is damaged, QwqError where there is no model.
    """
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        tensors = list(_folder_tensors(path))
    elif path.is_file():
        model = read_model(path)
        files = [part.path for part in model.parts]
        tensors = [(one.nbytes, math.prod(one.shape)) for one in model.tensors.values()]
    else:
        raise QwqError(f"{path}: does not exist; give a GGUF file or a folder with *.safetensors")
    size = ModelSize(
        nbytes=sum(file.stat().st_size for file in files),
        tensor_nbytes=sum(nbytes for nbytes, _ in tensors),
        n_weights=sum(n_weights for _, n_weights in tensors),
    )
    if not size.n_weights:
        raise QwqError(f"{path}: holds no weights; give a GGUF file or a folder with *.safetensors")
    return size


def check_unquantized(path: Path) -> None:
    """Raise QwqError where there is no model, UsageError where its weights are quantized."""
    if not path.exists():
        raise QwqError(f"{path}: no such file or folder; check the path")
    bits = model_size(path).bits_per_weight
    if bits < UNQUANTIZED_BITS:
        raise UsageError(
            f"--floor {path}: has {bits:.2f} bits per weight and the noise of the path shows where "
            f"there are {UNQUANTIZED_BITS}; give the BF16 file"
        )


def _folder_tensors(folder: Path) -> Iterator[tuple[int, int]]:
    """Bytes and number of weights of each tensor of a folder."""
    n_bits = _gptq_bits(folder)
    for shard in sorted(folder.glob("*.safetensors")):
        for name, entry in _safetensors_entries(shard).items():
            match entry:
                case {"shape": list(shape), "data_offsets": [int(start), int(stop)]}:
                    n_items = math.prod(shape)
                case _:
                    raise CheckpointError(
                        f"{shard}: {name} has no shape or byte range; fetch or make the file again"
                    )
            if name.endswith(".qweight"):
                if n_bits is None:
                    raise CheckpointError(
                        f"{folder}: holds {name} and config.json says no bits; make it again"
                    )
                n_items = n_items * 32 // n_bits
            yield stop - start, 0 if name.endswith(SIDE_TENSORS) else n_items


def _gptq_bits(folder: Path) -> int | None:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: holds no config.json, so it is no model folder")
    bits = (read_json_object(config_path).get("quantization_config") or {}).get("bits")
    return bits if isinstance(bits, int) and 0 < bits <= 32 else None


def _safetensors_entries(shard: Path) -> dict[str, Any]:
    """The entries of a safetensors header, whatever their dtype."""
    file_nbytes = shard.stat().st_size
    with shard.open("rb") as file:
        header_nbytes = int.from_bytes(file.read(8), "little")
        if file_nbytes < 8 or header_nbytes > min(MAX_HEADER_NBYTES, file_nbytes - 8):
            raise CheckpointError(
                f"{shard}: the header claims {header_nbytes:,} bytes and the file has "
                f"{file_nbytes:,}; fetch or make the file again"
            )
        header = parse_json_object(file.read(header_nbytes), f"{shard} (header)")
    header.pop("__metadata__", None)
    return header
