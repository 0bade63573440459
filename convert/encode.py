"""Rows of float32 -> blocks of a quant type, by our encoders or libggml's own.

Both give the same bytes. Ours exist where they are at least twice as fast; libggml's do everything
else, and judge ours in the tests.
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from convert.libggml import libggml

_LOGGER = logging.getLogger(__name__)

QuantType = GGMLQuantizationType
Float32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

NEEDS_IMPORTANCE = frozenset(
    {QuantType.IQ1_S, QuantType.IQ1_M, QuantType.IQ2_XXS, QuantType.IQ2_XS}
)
"""Types whose encoders cannot work without importance."""

LANE_TYPES = frozenset(
    {QuantType.Q2_K, QuantType.Q3_K, QuantType.Q4_K, QuantType.Q5_K, QuantType.Q6_K, QuantType.Q8_0}
)
"""Types that lane_encoders.py can encode."""

_QUICK = frozenset({QuantType.Q8_0})
"""Those that libggml, too, encodes faster than disks read: alone they are not worth loading it."""

Encoder = Callable[[Float32Array, QuantType, Float32Array | None, ByteArray], None]
"""rows (n_rows, n_in), type, importance (n_in,) or None -> blocks (n_rows, row bytes), written.

All arrays are C-contiguous.
"""

_N_WORTH_LOADING = 1 << 17
"""Arrays with more weights than this are worth the second that loading numba takes."""


def block_size(quant_type: QuantType) -> int:
    return GGML_QUANT_SIZES[quant_type][0]


def row_nbytes(quant_type: QuantType, n_per_row: int) -> int:
    """Bytes of one encoded row; n_per_row must be a multiple of the type's block size."""
    n_per_block, block_nbytes = GGML_QUANT_SIZES[quant_type]
    assert n_per_row % n_per_block == 0, (quant_type, n_per_row)
    return n_per_row // n_per_block * block_nbytes


def encode_rows(
    rows: Float32Array,
    quant_type: QuantType,
    *,
    importance: Float32Array | None = None,
) -> ByteArray:
    """Encode rows just as llama.cpp does, on the calling thread; several may do so at once.

    rows: (n_rows, n_in) finite float32. importance: (n_in,), mean squared activation.
    Returns (n_rows, row_nbytes) uint8. Raises OverflowError where a block's scale or a weight does
    not fit the type's 16-bit floats. How rows are cut into calls changes no byte.
    """
    n_rows, n_in = rows.shape
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    blocks = np.empty((n_rows, row_nbytes(quant_type, n_in)), dtype=np.uint8)
    if importance is not None:
        assert importance.shape == (n_in,), (importance.shape, n_in)
        importance = np.ascontiguousarray(importance, dtype=np.float32)
    if quant_type == QuantType.F32:
        blocks[:] = rows.astype("<f4", copy=False).view(np.uint8)
        return blocks
    assert importance is not None or quant_type not in NEEDS_IMPORTANCE, quant_type
    choose_encoder(quant_type, rows.size)(rows, quant_type, importance, blocks)
    if not libggml().ggml_validate_row_data(int(quant_type), blocks.ctypes.data, blocks.nbytes):
        raise OverflowError(f"weights are too large for {quant_type.name}")
    return blocks


def choose_encoder(quant_type: QuantType, n_weights: int) -> Encoder:
    """Return our encoder where there is one that is loaded or worth loading, else libggml's."""
    loaded = "convert.lane_encoders" in sys.modules
    worth_loading = n_weights > _N_WORTH_LOADING and quant_type not in _QUICK
    if quant_type in LANE_TYPES and (loaded or worth_loading):
        return _lane_encoder() or encode_with_libggml
    return encode_with_libggml


def encode_with_libggml(
    rows: Float32Array,
    quant_type: QuantType,
    importance: Float32Array | None,
    blocks: ByteArray,
) -> None:
    """Encode by libggml, which knows every type; an Encoder."""
    library = libggml()
    library.ggml_quantize_init(int(quant_type))
    n_written = library.ggml_quantize_chunk(
        int(quant_type),
        rows.ctypes.data,
        blocks.ctypes.data,
        0,
        *rows.shape,
        None if importance is None else importance.ctypes.data,
    )
    assert n_written == blocks.nbytes, (quant_type, n_written, blocks.nbytes)


@cache
def _lane_encoder() -> Encoder | None:
    """Load our encoders; None, with a warning, where numba does not run.

    It raises RuntimeError where there is no folder in which it may keep machine code.
    """
    try:
        from convert import lane_encoders
    except (ImportError, RuntimeError) as error:
        _LOGGER.warning("numba does not load (%s): encoding by libggml, same bytes, slower", error)
        return None
    lane_encoders.forget_stale_code()
    return lane_encoders.encode


def n_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
