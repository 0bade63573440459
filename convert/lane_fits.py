"""Searches for the scale, the minimum and the codes of one group of weights, in sixteen lanes.

Each lane takes libggml's operations in libggml's order, so that it finds the same scale, minimum
and codes. Source of every formula: ggml-quants.c of llama.cpp, under the names given below.

A group is 16 or 32 weights with a scale of their own. Arrays are (n, N_LANES): row i holds weight i
of sixteen groups, which lie in sixteen blocks; codes are uint8, counted from 0. `steps` are the
numerators of the inverse scales to try. Importing this module imports numba.
"""

import numpy as np

from convert.lane_formats import N_PER_BLOCK, ByteArray, Float32Array
from convert.lanes import (
    Lanes,
    absolute,
    any_lane,
    bits_of,
    compiled_part,
    floats,
    highest,
    ints,
    load,
    lowest,
    select,
    square_root,
    store,
)

TINY = np.float32(1e-15)
"""A group whose largest weight is smaller counts as zero."""


@compiled_part
def nearest(value: Lanes) -> Lanes:
    """Round to nearest even; beyond +-4,194,303 it returns what libggml's nearest_int does."""
    return (bits_of(value + 12582912.0) & 0x7FFFFF) - 0x400000


@compiled_part
def symmetric_code(value: Lanes, n_max: int) -> Lanes:
    return lowest(highest(nearest(value), -n_max), n_max - 1)


@compiled_part
def weigh(x: Float32Array, weight: Float32Array, spread: float) -> None:
    """Turn importance into weights: importance x sqrt(spread x mean square + x^2)."""
    total = floats(0.0)
    for i in range(N_PER_BLOCK):
        value = load(x, i)
        total += value * value
    variance = spread * total / 256.0
    for i in range(N_PER_BLOCK):
        value = load(x, i)
        store(weight, i, load(weight, i) * square_root(variance + value * value))


@compiled_part
def own_weights(x: Float32Array, absolute_error: bool, weight: Float32Array) -> None:
    """Weights without importance: |x|, or with squared errors the root mean square + |x|."""
    total = floats(0.0)
    for i in range(len(x)):
        value = load(x, i)
        total += value * value
    mean = square_root(total / np.float32(len(x)))
    for i in range(len(x)):
        size = absolute(load(x, i))
        store(weight, i, size if absolute_error else mean + size)


@compiled_part
def squares(x: Float32Array, weight: Float32Array) -> None:
    for i in range(N_PER_BLOCK):
        value = load(x, i)
        store(weight, i, value * value)


@compiled_part
def fit_affine(
    x: Float32Array,
    weight: Float32Array,
    steps: Float32Array,
    n_max: int,
    absolute_error: bool,
    trial: Float32Array,
    codes: ByteArray,
) -> tuple[Lanes, Lanes, Lanes]:
    """Search scale, minimum and codes of one group (make_qkx2_quants, make_qkx3_quants).

    The minimum moves while the search goes on, and later steps start from it.
    Returns scale, minimum (as it is subtracted) and the sum of the weights.
    """
    n = len(x)
    low = load(x, 0)
    high = low
    sum_w = load(weight, 0)
    sum_x = sum_w * low
    for i in range(1, n):
        value = load(x, i)
        w = load(weight, i)
        low = select(value < low, value, low)
        high = select(value > high, value, high)
        sum_w += w
        sum_x += w * value
    low = select(low > 0.0, 0.0, low)
    lowest_value = low
    flat = high == low
    inverse = np.float32(n_max) / (high - low)
    scale = 1.0 / inverse
    best = floats(0.0)
    for i in range(n):
        value = load(x, i)
        code = floats(lowest(highest(nearest(inverse * (value - low)), 0), n_max))
        difference = scale * code + low - value
        best += load(weight, i) * (
            absolute(difference) if absolute_error else difference * difference
        )
    best_inverse = inverse
    best_low = low
    for k in range(len(steps)):
        inverse = steps[k] / (high - low)
        sum_l = floats(0.0)
        sum_l2 = floats(0.0)
        sum_xl = floats(0.0)
        for i in range(n):
            value = load(x, i)
            code = floats(lowest(highest(nearest(inverse * (value - low)), 0), n_max))
            store(trial, i, code)
            wl = load(weight, i) * code
            sum_l += wl
            sum_l2 += wl * code
            sum_xl += wl * value
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0.0
        new_scale = select(above, sum_xl / sum_l2, new_scale)
        new_low = select(above, 0.0, new_low)
        error = floats(0.0)
        for i in range(n):
            difference = new_scale * load(trial, i) + new_low - load(x, i)
            error += load(weight, i) * (
                absolute(difference) if absolute_error else difference * difference
            )
        better = (determinant > 0.0) & (error < best)
        best = select(better, error, best)
        best_inverse = select(better, inverse, best_inverse)
        best_low = select(better, low, best_low)
        scale = select(better, new_scale, scale)
        low = select(better, new_low, low)
    for i in range(n):
        code = lowest(highest(nearest(best_inverse * (load(x, i) - best_low)), 0), n_max)
        store(codes, i, select(flat, 0, code))
    minimum = -0.0 - select(flat, lowest_value, low)
    return select(flat, 0.0, scale), minimum, sum_w


@compiled_part
def extreme_of(x: Float32Array) -> tuple[Lanes, Lanes]:
    """Return the first value of the largest magnitude, and that magnitude."""
    extreme = floats(0.0)
    magnitude = floats(0.0)
    for i in range(len(x)):
        value = load(x, i)
        larger = absolute(value) > magnitude
        magnitude = select(larger, absolute(value), magnitude)
        extreme = select(larger, value, extreme)
    return extreme, magnitude


@compiled_part
def moments(
    x: Float32Array, weight: Float32Array, inverse: Lanes, n_max: int
) -> tuple[Lanes, Lanes]:
    """Return the weighted sums of x times code and of code squared."""
    sum_lx = floats(0.0)
    sum_l2 = floats(0.0)
    for i in range(len(x)):
        value = load(x, i)
        w = load(weight, i)
        code = floats(symmetric_code(inverse * value, n_max))
        sum_lx += w * value * code
        sum_l2 += w * code * code
    return sum_lx, sum_l2


@compiled_part
def fit_symmetric(
    x: Float32Array, weight: Float32Array, steps: Float32Array, n_max: int, codes: ByteArray
) -> Lanes:
    """Search scale and codes, from 0 on, of one group (make_qx_quants); return the scale."""
    extreme, magnitude = extreme_of(x)
    empty = magnitude < TINY
    inverse = np.float32(-n_max) / extreme
    sum_lx, sum_l2 = moments(x, weight, inverse, n_max)
    scale = select(sum_l2 != 0.0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    best_inverse = inverse
    for k in range(len(steps)):
        inverse = steps[k] / extreme
        sum_lx, sum_l2 = moments(x, weight, inverse, n_max)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        scale = select(better, sum_lx / sum_l2, scale)
        best = select(better, scale * sum_lx, best)
        best_inverse = select(better, inverse, best_inverse)
    for i in range(len(x)):
        code = symmetric_code(best_inverse * load(x, i), n_max) + n_max
        store(codes, i, select(empty, 0, code))
    return select(empty, 0.0, scale)


@compiled_part
def descend(
    x: Float32Array,
    weight: Float32Array,
    codes: ByteArray,
    n_max: int,
    signed: bool,
    sum_lx: Lanes,
    sum_l2: Lanes,
) -> Lanes:
    """Improve codes one at a time, in at most five rounds, and return the best scale for them.

    signed: codes stand for -n_max to n_max - 1 and are stored from 0 on. A lane without a change
    in one round has none in the next, so the slowest lane may decide when to stop.
    """
    offset = n_max if signed else 0
    for _ in range(5):
        changed = ints(0) != 0
        for i in range(len(x)):
            value = load(x, i)
            w = load(weight, i)
            stored = load(codes, i) - offset
            old = floats(stored)
            new_lx = sum_lx - w * value * old
            new_l2 = sum_l2 - w * old * old
            rounded = lowest(nearest(value * new_l2 / new_lx), n_max - 1 if signed else n_max)
            if signed:
                better = new_lx > 0.0
                rounded = highest(rounded, -n_max)
            else:
                better = (new_lx > 0.0) & (new_l2 > 0.0)
            new = floats(rounded)
            new_lx += w * value * new
            new_l2 += w * new * new
            better = better & (rounded != stored) & (new_l2 > 0.0)
            better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
            sum_lx = select(better, new_lx, sum_lx)
            sum_l2 = select(better, new_l2, sum_l2)
            store(codes, i, select(better, rounded, stored) + offset)
            changed = changed | better
        if not any_lane(changed):
            break
    return select(sum_l2 > 0.0, sum_lx / sum_l2, 0.0)


@compiled_part
def fit_signed(x: Float32Array, weight: Float32Array, n_max: int, codes: ByteArray) -> Lanes:
    """Fit scale and codes, from 0 on, of one group (make_q3_quants); return the scale."""
    extreme, magnitude = extreme_of(x)
    inverse = np.float32(-n_max) / extreme
    for i in range(len(x)):
        store(codes, i, symmetric_code(inverse * load(x, i), n_max) + n_max)
    sum_lx, sum_l2 = moments(x, weight, inverse, n_max)
    scale = descend(x, weight, codes, n_max, True, sum_lx, sum_l2)
    empty = magnitude < TINY
    for i in range(len(x)):
        store(codes, i, select(empty, 0, load(codes, i)))
    return select(empty, 0.0, scale)


@compiled_part
def fit_positive(
    x: Float32Array, weight: Float32Array, steps: Float32Array, n_max: int, codes: ByteArray
) -> Lanes:
    """Fit a scale of scales and their codes (make_qp_quants); return the scale."""
    n = len(x)
    high = floats(0.0)
    for i in range(n):
        value = load(x, i)
        high = select(high > value, high, value)
    best_inverse = np.float32(n_max) / high
    scale = 1.0 / best_inverse
    best = floats(0.0)
    for i in range(n):
        value = load(x, i)
        difference = value - scale * floats(nearest(best_inverse * value) & 255)
        best += load(weight, i) * difference * difference
    for k in range(len(steps)):
        inverse = steps[k] / high
        scale = 1.0 / inverse
        error = floats(0.0)
        for i in range(n):
            value = load(x, i)
            difference = value - scale * floats(lowest(nearest(inverse * value), n_max))
            error += load(weight, i) * difference * difference
        better = error < best
        best = select(better, error, best)
        best_inverse = select(better, inverse, best_inverse)
    sum_lx = floats(0.0)
    sum_l2 = floats(0.0)
    for i in range(n):
        value = load(x, i)
        w = load(weight, i)
        rounded = lowest(nearest(best_inverse * value), n_max)
        store(codes, i, rounded)
        code = floats(rounded)
        sum_lx += w * value * code
        sum_l2 += w * code * code
    scale = descend(x, weight, codes, n_max, False, sum_lx, sum_l2)
    empty = high < TINY
    for i in range(n):
        store(codes, i, select(empty, 0, load(codes, i)))
    return select(empty, 0.0, scale)


@compiled_part
def round_scales(values: Float32Array, n_max: int, codes: ByteArray) -> Lanes:
    """Round scales or minimums to n_max parts of the largest of them; return one part."""
    high = floats(0.0)
    for j in range(len(values)):
        value = load(values, j)
        high = select(value > high, value, high)
    inverse = select(high > 0.0, np.float32(n_max) / high, 0.0)
    for j in range(len(values)):
        store(codes, j, nearest(inverse * load(values, j)))
    return high / np.float32(n_max)
