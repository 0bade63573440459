"""Rows of float32 -> blocks of Q2_K to Q6_K and Q8_0 in lanes, byte for byte as libggml does.

Block by block these encoders are bound by sums that must be taken in order. Sixteen blocks, one a
SIMD lane, are sixteen independent sums, each with libggml's operations in libggml's order. Q8_0 has
no sums: there lanes are weights of one block. Source: ggml-quants.c of llama.cpp, under the names
given below.

Scratch arrays are (n, N_LANES): row i holds weight, code or byte i of sixteen blocks. Importing
this module imports numba.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QuantType

from convert import lane_fits, lane_formats, lanes
from convert.lane_fits import (
    TINY,
    extreme_of,
    fit_affine,
    fit_positive,
    fit_signed,
    fit_symmetric,
    nearest,
    own_weights,
    round_scales,
    squares,
    symmetric_code,
    weigh,
)
from convert.lane_formats import (
    AFFINE_FORMATS,
    N_PER_BLOCK,
    N_PER_GROUP,
    Q3_K_CODE_PLANES,
    Q3_K_SCALE_PLANES,
    Q3_K_SCALE_STEPS,
    Q3_K_STEP_AT,
    Q3_K_STEPS,
    Q6_K_CODE_PLANES,
    Q6_K_SCALES_AT,
    Q6_K_STEP_AT,
    Q6_K_STEPS,
    AffineFormat,
    ByteArray,
    Float32Array,
    IntArray,
)
from convert.lanes import (
    N_LANES,
    Lanes,
    absolute,
    bits_of,
    compiled,
    compiled_part,
    floats,
    from_bits,
    greatest_lane,
    highest,
    ints,
    load,
    lowest,
    select,
    store,
)


@compiled_part
def half_bits(value: Lanes) -> Lanes:
    """Return the bits of float32 rounded to float16, to nearest even."""
    magnitude = absolute(value)
    bits = bits_of(magnitude)
    normal = ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) - (112 << 10)
    subnormal = bits_of(magnitude + 0.5) - 0x3F000000
    rounded = select(magnitude < 2.0**-14, subnormal, lowest(normal, ints(0x7C00)))
    return select(value == value, rounded, ints(0x7E00)) | ((bits_of(value) >> 16) & 0x8000)


@compiled_part
def half_value(bits: Lanes) -> Lanes:
    """Return float16 bits as float32."""
    shifted = (bits & 0x7FFF) << 13
    finite = bits_of(from_bits(shifted) * 2.0**112)
    magnitude = select((bits & 0x7C00) == 0x7C00, shifted | 0x7F800000, finite)
    return from_bits(magnitude | ((bits & 0x8000) << 16))


@compiled_part
def gather(source: Float32Array, first: int, target: Float32Array) -> None:
    """Transpose 16 blocks from block `first` on; after the last one it begins anew."""
    for lane in range(N_LANES):
        block = source[(first + lane) % len(source)]
        for i in range(N_PER_BLOCK):
            target[i, lane] = block[i]


@compiled_part
def scatter(source: ByteArray, first: int, blocks: ByteArray) -> None:
    """Transpose bytes back into the 16 blocks from `first` on, as many as there are."""
    for lane in range(min(N_LANES, len(blocks) - first)):
        block = blocks[first + lane]
        for i in range(len(block)):
            block[i] = source[i, lane]


@compiled_part
def pack(codes: ByteArray, planes: IntArray, out: ByteArray) -> None:
    """Put some bits of all codes side by side, as planes() says."""
    for at, low_bit, n_bits, stride in planes:
        n_per_byte = 8 // n_bits
        for start in range(0, len(codes), n_per_byte * stride):
            for i in range(stride):
                byte = ints(0)
                for k in range(n_per_byte):
                    code = load(codes, start + i + k * stride) >> low_bit
                    byte |= (code & ((1 << n_bits) - 1)) << (k * n_bits)
                store(out, at + start // n_per_byte + i, byte)


@compiled_part
def store_half(out: ByteArray, at: int, bits: Lanes) -> None:
    store(out, at, bits)
    store(out, at + 1, bits >> 8)


@compiled_part
def pack_affine_scales(scales: ByteArray, minimums: ByteArray, at: int, out: ByteArray) -> None:
    """Write codes of scales and minimums, and leave in their place what a reader will see.

    Sixteen groups have 4 bits each (Q2_K), eight have 6 bits (Q4_K, Q5_K).
    """
    if len(scales) == 16:
        for j in range(16):
            store(out, at + j, load(scales, j) | (load(minimums, j) << 4))
            byte = load(out, at + j)
            store(scales, j, byte & 15)
            store(minimums, j, byte >> 4)
        return
    for j in range(4):
        late_scale = load(scales, j + 4)
        late_minimum = load(minimums, j + 4)
        store(out, at + j, load(scales, j) | ((late_scale >> 4) << 6))
        store(out, at + j + 4, load(minimums, j) | ((late_minimum >> 4) << 6))
        store(out, at + j + 8, (late_scale & 15) | ((late_minimum & 15) << 4))
        scale_byte = load(out, at + j)
        minimum_byte = load(out, at + j + 4)
        low_bits = load(out, at + j + 8)
        store(scales, j, scale_byte & 63)
        store(minimums, j, minimum_byte & 63)
        store(scales, j + 4, (low_bits & 15) | ((scale_byte >> 6) << 4))
        store(minimums, j + 4, (low_bits >> 4) | ((minimum_byte >> 6) << 4))


@compiled
def encode_affine(
    rows: Float32Array,
    importance: Float32Array,
    blocks: ByteArray,
    form: AffineFormat,
) -> None:
    """Encode Q2_K, Q4_K or Q5_K (quantize_row_q4_K_ref, quantize_row_q4_K_impl and their kin)."""
    weighted = len(importance) > 0
    absolute_error = form.absolute_error and not weighted
    steps = form.weighted_steps if weighted else form.plain_steps
    limit = form.weighted_limit if weighted else form.plain_limit
    n = form.n_per_group
    n_groups = N_PER_BLOCK // n
    x = np.empty((N_PER_BLOCK, N_LANES), np.float32)
    weight = np.empty((N_PER_BLOCK, N_LANES), np.float32)
    trial = np.empty((n, N_LANES), np.float32)
    codes = np.empty((N_PER_BLOCK, N_LANES), np.uint8)
    scales = np.empty((n_groups, N_LANES), np.float32)
    minimums = np.empty((n_groups, N_LANES), np.float32)
    totals = np.empty((n_groups, N_LANES), np.float32)
    scale_codes = np.empty((n_groups, N_LANES), np.uint8)
    minimum_codes = np.empty((n_groups, N_LANES), np.uint8)
    out = np.empty((blocks.shape[1], N_LANES), np.uint8)
    for first in range(0, len(rows), N_LANES):
        gather(rows, first, x)
        if weighted:
            gather(importance, first, weight)
            weigh(x, weight, form.spread)
        for j in range(n_groups):
            own = slice(n * j, n * j + n)
            if not weighted:
                own_weights(x[own], absolute_error, weight[own])
            scale, minimum, total = fit_affine(
                x[own], weight[own], steps, form.n_max, absolute_error, trial, codes[own]
            )
            store(scales, j, scale)
            store(minimums, j, minimum)
            store(totals, j, total)
        if weighted:
            step = fit_positive(scales, totals, form.scale_steps, form.n_max_scale, scale_codes)
            minimum_step = fit_positive(
                minimums, totals, form.scale_steps, form.n_max_scale, minimum_codes
            )
        else:
            step = round_scales(scales, form.n_max_scale, scale_codes)
            minimum_step = round_scales(minimums, form.n_max_scale, minimum_codes)
        for j in range(n_groups):
            store(scale_codes, j, lowest(load(scale_codes, j), limit))
            store(minimum_codes, j, lowest(load(minimum_codes, j), limit))
        step_bits = half_bits(step)
        minimum_step_bits = half_bits(minimum_step)
        store_half(out, form.steps_at, step_bits)
        store_half(out, form.steps_at + 2, minimum_step_bits)
        pack_affine_scales(scale_codes, minimum_codes, form.scales_at, out)
        for j in range(n_groups):
            scale = half_value(step_bits) * floats(load(scale_codes, j))
            minimum = half_value(minimum_step_bits) * floats(load(minimum_codes, j))
            for i in range(n * j, n * j + n):
                code = nearest((load(x, i) + minimum) / scale)
                code = lowest(highest(code, 0), form.n_max)
                store(codes, i, select(scale != 0.0, code, load(codes, i)))
        pack(codes, form.code_planes, out)
        scatter(out, first, blocks)


@compiled_part
def requantize(x: Float32Array, scale: Lanes, n_max: int, codes: ByteArray) -> None:
    """Round again by the scale as it is stored; where that is zero the searched codes stay."""
    for i in range(len(x)):
        code = symmetric_code(load(x, i) / scale, n_max) + n_max
        store(codes, i, select(scale != 0.0, code, load(codes, i)))


@compiled_part
def as_int8(value: Lanes) -> Lanes:
    """Return what an int8 makes of an int32."""
    return ((value + 128) & 255) - 128


@compiled
def encode_q3_k(
    rows: Float32Array,
    importance: Float32Array,
    blocks: ByteArray,
) -> None:
    """Encode Q3_K (quantize_row_q3_K_ref, quantize_row_q3_K_impl)."""
    weighted = len(importance) > 0
    n = N_PER_GROUP
    x = np.empty((N_PER_BLOCK, N_LANES), np.float32)
    weight = np.empty((N_PER_BLOCK, N_LANES), np.float32)
    codes = np.empty((N_PER_BLOCK, N_LANES), np.uint8)
    scales = np.empty((16, N_LANES), np.float32)
    totals = np.empty((16, N_LANES), np.float32)
    scale_codes = np.empty((16, N_LANES), np.uint8)
    out = np.empty((blocks.shape[1], N_LANES), np.uint8)
    for first in range(0, len(rows), N_LANES):
        gather(rows, first, x)
        if weighted:
            gather(importance, first, weight)
            weigh(x, weight, 2.0)
        else:
            squares(x, weight)
        for j in range(16):
            own = slice(n * j, n * j + n)
            if weighted:
                scale = fit_symmetric(x[own], weight[own], Q3_K_STEPS, 4, codes[own])
            else:
                scale = fit_signed(x[own], weight[own], 4, codes[own])
            store(scales, j, scale)
            total = floats(0.0)
            for i in range(n * j, n * j + n):
                total += load(weight, i)
            store(totals, j, total)
        if weighted:
            step = fit_symmetric(scales, totals, Q3_K_SCALE_STEPS, 32, scale_codes)
        else:
            extreme, _ = extreme_of(scales)
            inverse = np.float32(-32.0) / extreme
            for j in range(16):
                code = as_int8(nearest(inverse * load(scales, j)))
                code = lowest(highest(code, -32), 31) + 32
                store(scale_codes, j, select(extreme != 0.0, code, 0))
            step = select(extreme != 0.0, 1.0 / inverse, 0.0)
        step_bits = half_bits(step)
        store_half(out, Q3_K_STEP_AT, step_bits)
        pack(scale_codes, Q3_K_SCALE_PLANES, out)
        for j in range(16):
            own = slice(n * j, n * j + n)
            scale = half_value(step_bits) * floats(load(scale_codes, j) - 32)
            requantize(x[own], scale, 4, codes[own])
        pack(codes, Q3_K_CODE_PLANES, out)
        scatter(out, first, blocks)


@compiled
def encode_q6_k(
    rows: Float32Array,
    importance: Float32Array,
    blocks: ByteArray,
) -> None:
    """Encode Q6_K (quantize_row_q6_K_ref, quantize_row_q6_K_impl)."""
    n = N_PER_GROUP
    x = np.empty((N_PER_BLOCK, N_LANES), np.float32)
    weight = np.empty((N_PER_BLOCK, N_LANES), np.float32)
    codes = np.empty((N_PER_BLOCK, N_LANES), np.uint8)
    scales = np.empty((16, N_LANES), np.float32)
    out = np.empty((blocks.shape[1], N_LANES), np.uint8)
    for first in range(0, len(rows), N_LANES):
        gather(rows, first, x)
        if len(importance) > 0:
            gather(importance, first, weight)
        else:
            squares(x, weight)
        for j in range(16):
            own = slice(n * j, n * j + n)
            store(scales, j, fit_symmetric(x[own], weight[own], Q6_K_STEPS, 32, codes[own]))
        extreme, magnitude = extreme_of(scales)
        empty = magnitude < TINY
        inverse = np.float32(-128.0) / extreme
        step_bits = select(empty, 0, half_bits(1.0 / inverse))
        store_half(out, Q6_K_STEP_AT, step_bits)
        for j in range(16):
            own = slice(n * j, n * j + n)
            code = select(empty, 0, lowest(nearest(inverse * load(scales, j)), 127))
            store(out, Q6_K_SCALES_AT + j, code)
            requantize(x[own], half_value(step_bits) * floats(as_int8(code)), 32, codes[own])
        for i in range(N_PER_BLOCK):
            store(codes, i, select(empty, 0, load(codes, i)))
        pack(codes, Q6_K_CODE_PLANES, out)
        scatter(out, first, blocks)


@compiled_part
def away_from_zero(value: Lanes) -> Lanes:
    """Round to nearest, ties away from zero (roundf); the low byte of infinities and NaN is 0."""
    even = nearest(value)
    rest = value - floats(even)
    up = select((rest == 0.5) & (value > 0.0), 1, ints(0))
    return even + up - select((rest == -0.5) & (value < 0.0), 1, ints(0))


@compiled
def encode_q8_0(rows: Float32Array, blocks: ByteArray) -> None:
    """Encode Q8_0 (quantize_row_q8_0_ref); a block is two rows of 16 weights."""
    peaks = np.zeros((1, N_LANES), np.float32)
    inverses = np.empty((1, N_LANES), np.float32)
    halves = np.empty((2, N_LANES), np.uint8)
    codes = np.empty((2, N_LANES), np.uint8)
    for first in range(0, len(blocks), N_LANES):
        n_blocks = min(N_LANES, len(blocks) - first)
        for k in range(n_blocks):
            low = absolute(load(rows, 2 * (first + k)))
            high = absolute(load(rows, 2 * (first + k) + 1))
            peaks[0, k] = greatest_lane(select(low > high, low, high))
        step = load(peaks, 0) / 127.0
        store(inverses, 0, select(step != 0.0, 1.0 / step, 0.0))
        store_half(halves, 0, half_bits(step))
        for k in range(n_blocks):
            block = blocks[first + k]
            block[0] = halves[0, k]
            block[1] = halves[1, k]
            for half in range(2):
                value = load(rows, 2 * (first + k) + half) * inverses[0, k]
                store(codes, half, away_from_zero(value))
            for i in range(N_LANES):
                block[2 + i] = codes[0, i]
                block[2 + N_LANES + i] = codes[1, i]


def encode(
    rows: Float32Array,
    quant_type: QuantType,
    importance: Float32Array | None,
    blocks: ByteArray,
) -> None:
    """Encode rows of a type of encode.LANE_TYPES; an encode.Encoder."""
    targets = blocks.reshape(-1, GGML_QUANT_SIZES[quant_type][1])
    if quant_type == QuantType.Q8_0:
        encode_q8_0(rows.reshape(-1, N_LANES), targets)
        return
    given = np.empty(0, np.float32) if importance is None else importance
    sources, weights = rows.reshape(-1, N_PER_BLOCK), given.reshape(-1, N_PER_BLOCK)
    if quant_type == QuantType.Q3_K:
        encode_q3_k(sources, weights, targets)
    elif quant_type == QuantType.Q6_K:
        encode_q6_k(sources, weights, targets)
    else:
        encode_affine(sources, weights, targets, AFFINE_FORMATS[quant_type])


def forget_stale_code() -> None:
    """Remove kept machine code that is older than one of its sources; numba looks at this file."""
    sources = (__file__, lane_fits.__file__, lane_formats.__file__, lanes.__file__)
    changed_s = max(Path(source).stat().st_mtime for source in sources)
    encoder: Any = encode_affine
    for index in Path(encoder.stats.cache_path).glob("lane_encoders.*.nbi"):
        if index.stat().st_mtime < changed_s:
            index.unlink(missing_ok=True)
