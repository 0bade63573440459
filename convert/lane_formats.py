"""Q2_K to Q6_K as tables: what the searches try, and where in a block each bit goes.

Arithmetic is float32, in the order of ggml-quants.c of llama.cpp, since the last bit counts.
"""

from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QuantType

Float32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

N_PER_BLOCK = 256
AS_IT_COMES = 255
"""No limit for codes of scales, which are bytes: what wrapped below zero stays."""


def steps_from(n_max: int, first: float, step: float, n_steps: int) -> Float32Array:
    """Return n_max + first + i x step for i from 0 to n_steps."""
    counts = np.arange(n_steps + 1, dtype=np.float32)
    return np.float32(first) + np.float32(step) * counts + np.float32(n_max)


def steps_around(n_max: int, reach: int) -> Float32Array:
    """Return n_max + i / 10 for i from -reach to reach, without n_max itself."""
    counts = np.arange(-reach, reach + 1, dtype=np.float32)
    steps = np.float32(0.1) * counts[counts != 0] + np.float32(n_max)
    return cast("Float32Array", steps)  # numpy types what a mask selects as Any


def planes(*rows: tuple[int, int, int, int]) -> IntArray:
    """Where bits of codes go: rows of (first byte, lowest bit, number of bits, stride).

    A byte takes these bits of codes that are `stride` apart, the first code in the lowest bits.
    """
    return np.array(rows, dtype=np.int64)


class AffineFormat(NamedTuple):
    """A type whose groups have a scale and a minimum; a named tuple, since numba reads those.

    n_max, n_max_scale: largest code of a weight; of a group's scale or minimum.
    absolute_error: without importance, the error is absolute and weighs |w|.
    plain_steps, weighted_steps: numerators of the inverse scales tried, without and with
    importance; scale_steps: those for the scale of scales.
    spread: how much of the block's mean square is added to each weight's own square.
    plain_limit, weighted_limit: of codes of scales, without and with importance.
    scales_at, steps_at: first byte of these codes; of the two float16 they are multiplied by.
    """

    n_per_group: int
    n_max: int
    n_max_scale: int
    absolute_error: bool
    plain_steps: Float32Array
    weighted_steps: Float32Array
    scale_steps: Float32Array
    spread: float
    plain_limit: int
    weighted_limit: int
    scales_at: int
    steps_at: int
    code_planes: IntArray


AFFINE_FORMATS = {
    QuantType.Q2_K: AffineFormat(
        n_per_group=16,
        n_max=3,
        n_max_scale=15,
        absolute_error=True,
        plain_steps=steps_from(3, -0.5, 0.1, 15),
        weighted_steps=steps_from(3, -0.9, 0.05, 36),
        scale_steps=steps_around(15, 4),
        spread=1.0,
        plain_limit=AS_IT_COMES,
        weighted_limit=AS_IT_COMES,
        scales_at=0,
        steps_at=80,
        code_planes=planes((16, 0, 2, 32)),
    ),
    QuantType.Q4_K: AffineFormat(
        n_per_group=32,
        n_max=15,
        n_max_scale=63,
        absolute_error=False,
        plain_steps=steps_from(15, -1.0, 0.1, 20),
        weighted_steps=steps_from(15, -0.9, 0.05, 36),
        scale_steps=steps_around(63, 4),
        spread=2.0,
        plain_limit=63,
        weighted_limit=AS_IT_COMES,
        scales_at=4,
        steps_at=0,
        code_planes=planes((16, 0, 4, 32)),
    ),
    QuantType.Q5_K: AffineFormat(
        n_per_group=32,
        n_max=31,
        n_max_scale=63,
        absolute_error=False,
        plain_steps=steps_from(31, -0.5, 0.1, 15),
        weighted_steps=steps_from(31, -0.9, 0.05, 36),
        scale_steps=steps_around(63, 4),
        spread=2.0,
        plain_limit=63,
        weighted_limit=63,
        scales_at=4,
        steps_at=0,
        code_planes=planes((48, 0, 4, 32), (16, 4, 1, 32)),
    ),
}

N_PER_GROUP = 16
"""Of Q3_K and Q6_K."""

Q3_K_STEPS = -steps_around(4, 9)
Q3_K_SCALE_STEPS = -steps_around(32, 9)
Q3_K_CODE_PLANES = planes((32, 0, 2, 32), (0, 2, 1, 32))
Q3_K_SCALE_PLANES = planes((96, 0, 4, 8), (104, 4, 2, 4))
Q3_K_STEP_AT = 108

Q6_K_STEPS = -steps_around(32, 9)
Q6_K_CODE_PLANES = planes((0, 0, 4, 64), (128, 4, 2, 32))
Q6_K_SCALES_AT = 192
Q6_K_STEP_AT = 208
