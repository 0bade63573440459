"""The ggml library inside llama-cpp-python: its encoders and decoders, through ctypes."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from convert.errors import QwqError

ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
"""(blocks, float32 out, number of weights)."""


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_nbytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def libggml() -> ctypes.CDLL:
    """The library, found without importing llama_cpp; raises QwqError where it is not there."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise QwqError("llama-cpp-python: is not installed; run `make setup`")
    folder = Path(spec.origin).parent / "lib"
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise QwqError(f"{folder}: holds no ggml-base library; install llama-cpp-python again")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    return library
