"""Where a model lies on the disk, and of which kind it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convert.errors import QwqError

DEFAULT_FOLDER = Path("models")
_BEST_FIRST = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q4_K_S", "Q3_K_M", "BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class ModelPath:
    """kind: "gguf" for a file, "folder" for a checkpoint, quantized by GPTQ or not."""

    path: Path
    kind: str


def find_model(path: Path) -> ModelPath:
    """The model at a path: the file or checkpoint itself, or the best of those in a folder.

    The best is the first there is of: a GGUF file in the order Q4_K_M (most people's balance of
    size and quality), Q5_K_M, Q6_K, Q8_0, Q4_K_S, Q3_K_M, BF16, F16, F32, any other by name; a
    checkpoint's folder, by name. Raises QwqError where there is none.
    """
    if path.is_file():
        return ModelPath(path, "gguf")
    if not path.exists():
        raise QwqError(f"{path}: there is no such file or folder; check the path")
    if (path / "config.json").exists():
        return ModelPath(path, "folder")
    models = sorted(_models_in(path), key=_rank)
    if not models:
        raise QwqError(
            f"{path}: holds no model, neither a GGUF file nor a folder with config.json; "
            "make one with `make quantize`"
        )
    return models[0]


def newest_model(folder: Path = DEFAULT_FOLDER) -> ModelPath:
    """What was quantized last: the best model of the newest folder in ./models."""
    if not folder.is_dir():
        candidates = []
    else:
        candidates = [
            child
            for child in folder.iterdir()
            if child.suffix == ".gguf" or (child.is_dir() and any(_models_at(child)))
        ]
    if not candidates:
        raise QwqError(
            f"{folder}: no model was found there; make one with `make quantize`, "
            "or name one with -m"
        )
    return find_model(max(candidates, key=lambda child: (child.stat().st_mtime, child.name)))


def _models_at(path: Path) -> Iterator[ModelPath]:
    if (path / "config.json").exists():
        yield ModelPath(path, "folder")
    else:
        yield from _models_in(path)


def _models_in(folder: Path) -> Iterator[ModelPath]:
    for child in folder.iterdir():
        if child.is_file() and child.suffix == ".gguf":
            yield ModelPath(child, "gguf")
        elif (child / "config.json").exists():
            yield ModelPath(child, "folder")


def _rank(model: ModelPath) -> tuple[int, int, str]:
    name = model.path.name
    place = next((i for i, recipe in enumerate(_BEST_FIRST) if recipe in name), len(_BEST_FIRST))
    return (0 if model.kind == "gguf" else 1, place if model.kind == "gguf" else 0, name)
