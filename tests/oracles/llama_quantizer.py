"""llama.cpp's own quantizer, through llama-cpp-python: its choice of types, and its files."""

import ctypes
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.encode import Float32Array
from convert.gguf_header import read_header
from convert.recipe import Recipe

_TENSOR_LINE = re.compile(
    r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), size = +[\d.]+ MiB"
    r"(?: -> +[\d.]+ MiB \((\w+)\))?\n"
)


class StoredTensor(NamedTuple):
    quant_type: str
    shape: tuple[int, ...]
    sha256: str


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file with the hash of its bytes."""
    data = path.read_bytes()
    return {
        tensor.name: StoredTensor(
            tensor.quant_type.name,
            tensor.shape,
            hashlib.sha256(data[tensor.offset : tensor.offset + tensor.nbytes]).hexdigest(),
        )
        for tensor in read_header(path).tensors.values()
    }


def quantize_with_llama_cpp(
    source: Path,
    recipe: Recipe,
    path: Path,
    *,
    importance: Mapping[str, Float32Array] | None = None,
) -> bool:
    """Let llama_model_quantize make a file; False where it refuses."""
    import llama_cpp

    settings, _keep_alive = _settings(recipe, importance)
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(settings)
    )
    return not failed


def types_by_llama_cpp(
    source: Path, recipe: Recipe, *, importance: Mapping[str, Float32Array] | None = None
) -> dict[str, str]:
    """The types that llama_model_quantize would give, by tensor, from the log of its dry run."""
    import llama_cpp

    settings, _keep_alive = _settings(recipe, importance)
    settings.dry_run = True
    with _logged() as lines:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), b"", ctypes.byref(settings))
    assert not failed, "".join(lines)
    found = _TENSOR_LINE.findall("".join(lines))
    return {name: (after or before).upper() for name, before, after in found}


def _settings(
    recipe: Recipe, importance: Mapping[str, Float32Array] | None
) -> tuple[Any, list[object]]:
    """llama_model_quantize_params of a recipe, and what must live as long as they do."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(recipe.file_type)
    settings.nthread = 2
    if recipe.token_embedding_type is not None:
        settings.token_embedding_type = int(recipe.token_embedding_type)
    if recipe.output_type is not None:
        settings.output_tensor_type = int(recipe.output_type)
    overrides = (llama_cpp.llama_model_tensor_override * (len(recipe.overrides) + 1))()
    for entry, override in zip(overrides, recipe.overrides, strict=False):
        entry.pattern, entry.type = override.pattern.encode(), int(override.quant_type)
    settings.tt_overrides = overrides
    keep_alive: list[object] = [overrides]
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            values = np.ascontiguousarray(values, dtype=np.float32)
            entry.name, entry.size = name.encode(), len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            keep_alive.append(values)
        settings.imatrix = entries
        keep_alive.append(entries)
    return settings, keep_alive


@contextmanager
def _logged() -> Iterator[list[str]]:
    """What llama.cpp logs meanwhile; afterwards it logs where it did before."""
    import llama_cpp

    lines: list[str] = []

    def keep(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        lines.append(text.decode())

    callback = llama_cpp.llama_log_callback(keep)
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, data)
