"""`Lanes`: 16 numbers, one a SIMD lane, as a type inside functions that numba compiles.

Operators and the functions below act lane by lane, and a plain number beside Lanes stands in every
lane. Each is one LLVM vector instruction without fast-math flags: float32 arithmetic rounds as
IEEE 754 says, multiplication and addition are never fused, and nothing is reordered, so each lane
computes what the same scalar program would. LLVM splits the vectors to fit the processor.

Importing this module imports numba: do so inside the function that needs it.
"""

from collections.abc import Callable
from itertools import product
from operator import add, and_, eq, gt, iadd, ior, lshift, lt, mul, ne, or_, rshift, sub, truediv
from typing import Any, TypeVar

import numba
from llvmlite import ir
from llvmlite.ir import IRBuilder
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import lower_builtin, models, register_model, type_callable

Lanes = Any
"""Stands for lanes in annotations: what they are is known to numba alone."""

N_LANES = 16

_Function = TypeVar("_Function", bound=Callable[..., Any])
_INDEX = ir.IntType(32)


def _jit(**options: bool) -> Callable[[_Function], _Function]:
    """numba.njit, whose annotations know some of its options only, and return another type."""
    njit: Any = numba.njit
    return njit(error_model="numpy", **options)  # type: ignore[no-any-return]


def compiled(function: _Function) -> _Function:
    """Compile at the first call, free of the interpreter's lock, and keep the machine code.

    Division by zero gives infinity or NaN, as everywhere in IEEE 754.
    """
    return _jit(nogil=True, cache=True)(function)


def compiled_part(function: _Function) -> _Function:
    """Compile what only compiled functions may call; it is kept inside theirs.

    A call from Python would crash: there is no code that translates its arguments.
    """
    return _jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


class LanesType(types.Type):
    """The type of N_LANES values of one scalar type."""

    def __init__(self, scalar: types.Type, element: ir.Type) -> None:
        self.scalar = scalar
        self.vector = ir.VectorType(element, N_LANES)
        super().__init__(f"Lanes({scalar})")


FLOATS = LanesType(types.float32, ir.FloatType())
INTS = LanesType(types.int32, ir.IntType(32))
MASK = LanesType(types.boolean, ir.IntType(1))
_ROWS = {types.float32: FLOATS, types.uint8: INTS}
"""What rows of an array are in lanes: bytes are widened, and narrowed to their low bits."""


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        super().__init__(manager, lanes, lanes.vector)  # type: ignore[no-untyped-call]


def _spread(builder: Any, value: Any) -> Any:
    """Return a vector with `value` in each lane."""
    undefined = ir.Constant(ir.VectorType(value.type, N_LANES), ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(_INDEX, 0))
    zeros = ir.Constant(ir.VectorType(_INDEX, N_LANES), [0] * N_LANES)
    return builder.shuffle_vector(single, undefined, zeros)


_Meanings = dict[tuple[LanesType, ...], tuple[Callable[..., Any], types.Type]]
"""Types of the operands -> (what builds the instruction from their vectors, type of the result)."""


def _define(function: Callable[..., Any], meanings: _Meanings) -> None:
    """Teach numba what a function of lanes, some of which may be plain numbers, means."""

    def meant(kinds: tuple[Any, ...]) -> tuple[LanesType, ...] | None:
        for operands in meanings:
            pairs = list(zip(operands, kinds, strict=True))
            fits = all(kind == lanes or isinstance(kind, types.Number) for lanes, kind in pairs)
            if fits and (len(pairs) == 1 or any(kind == lanes for lanes, kind in pairs[-2:])):
                return operands
        return None

    def resolve(*kinds: Any) -> Any:
        operands = meant(kinds)
        return operands and signature(meanings[operands][1], *kinds)

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        operands = meant(signature.args)
        assert operands is not None, signature
        vectors = [
            value
            if kind == lanes
            else _spread(builder, context.cast(builder, value, kind, lanes.scalar))
            for lanes, kind, value in zip(operands, signature.args, values, strict=True)
        ]
        return meanings[operands][0](builder, *vectors)

    n_operands = len(next(iter(meanings)))
    typers = (lambda a: resolve(a), lambda a, b: resolve(a, b), lambda a, b, c: resolve(a, b, c))
    type_callable(function)(lambda _context: typers[n_operands - 1])  # numba counts parameters
    for kinds in product((LanesType, types.Number), repeat=n_operands):
        if LanesType in kinds or n_operands == 1:
            lower_builtin(function, *kinds)(lower)


def _function(meanings: _Meanings, description: str) -> Callable[..., Lanes]:
    """Return a function that compiled functions can call."""

    def function(*_: Any) -> Lanes:
        raise TypeError(f"exists in compiled functions only: {description}")

    _define(function, meanings)
    return function


def _compared(sign: str) -> _Meanings:
    """With NaN only `!=` holds."""
    compare = IRBuilder.fcmp_unordered if sign == "!=" else IRBuilder.fcmp_ordered
    return {
        (FLOATS, FLOATS): (lambda builder, a, b: compare(builder, sign, a, b), MASK),
        (INTS, INTS): (lambda builder, a, b: builder.icmp_signed(sign, a, b), MASK),
    }


def _chosen(sign: str) -> _Meanings:
    def build(builder: Any, a: Any, b: Any) -> Any:
        return builder.select(builder.icmp_signed(sign, a, b), a, b)

    return {(INTS, INTS): (build, INTS)}


def _llvm(name: str) -> _Meanings:
    """Calls of LLVM's own function from floats to floats."""

    def build(builder: Any, lanes: Any) -> Any:
        kind = ir.FunctionType(FLOATS.vector, [FLOATS.vector])
        full_name = f"llvm.{name}.v{N_LANES}f32"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, kind, full_name), [lanes]
        )

    return {(FLOATS,): (build, FLOATS)}


def _greatest(builder: Any, lanes: Any) -> Any:
    kind = ir.FunctionType(ir.FloatType(), [FLOATS.vector])
    full_name = f"llvm.vector.reduce.fmax.v{N_LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, full_name), [lanes])


def _any(builder: Any, mask: Any) -> Any:
    whole = builder.bitcast(mask, ir.IntType(N_LANES))
    return builder.icmp_unsigned("!=", whole, ir.Constant(whole.type, 0))


_ADD: _Meanings = {
    (FLOATS, FLOATS): (IRBuilder.fadd, FLOATS),
    (INTS, INTS): (IRBuilder.add, INTS),
}
_OR: _Meanings = {(INTS, INTS): (IRBuilder.or_, INTS), (MASK, MASK): (IRBuilder.or_, MASK)}
_OPERATORS: dict[Callable[..., Any], _Meanings] = {
    add: _ADD,
    iadd: _ADD,
    sub: {(FLOATS, FLOATS): (IRBuilder.fsub, FLOATS), (INTS, INTS): (IRBuilder.sub, INTS)},
    mul: {(FLOATS, FLOATS): (IRBuilder.fmul, FLOATS)},
    truediv: {(FLOATS, FLOATS): (IRBuilder.fdiv, FLOATS)},
    and_: {(INTS, INTS): (IRBuilder.and_, INTS), (MASK, MASK): (IRBuilder.and_, MASK)},
    or_: _OR,
    ior: _OR,
    lshift: {(INTS, INTS): (IRBuilder.shl, INTS)},
    rshift: {(INTS, INTS): (IRBuilder.lshr, INTS)},
    lt: _compared("<"),
    gt: _compared(">"),
    eq: _compared("=="),
    ne: _compared("!="),
}
for _operator, _meanings in _OPERATORS.items():
    _define(_operator, _meanings)

floats = _function(
    {
        (FLOATS,): (lambda _builder, lanes: lanes, FLOATS),
        (INTS,): (lambda builder, lanes: builder.sitofp(lanes, FLOATS.vector), FLOATS),
    },
    "a number in all lanes, or integer lanes, as float32 rounded to nearest even",
)
ints = _function(
    {(INTS,): (lambda _builder, lanes: lanes, INTS)},
    "a number in all lanes as int32",
)
select = _function(
    {
        (MASK, FLOATS, FLOATS): (IRBuilder.select, FLOATS),
        (MASK, INTS, INTS): (IRBuilder.select, INTS),
    },
    "select(mask, a, b): a where the mask holds and b elsewhere",
)
lowest = _function(_chosen("<"), "the lesser of two integers")
highest = _function(_chosen(">"), "the greater of two integers")
absolute = _function(_llvm("fabs"), "absolute values of floats")
square_root = _function(_llvm("sqrt"), "square roots of floats, rounded to nearest even")
greatest_lane = _function(
    {(FLOATS,): (_greatest, types.float32)}, "the greatest of the floats that are not NaN"
)
any_lane = _function({(MASK,): (_any, types.boolean)}, "whether a mask holds in some lane")
bits_of = _function(
    {(FLOATS,): (lambda builder, lanes: builder.bitcast(lanes, INTS.vector), INTS)},
    "the bits of floats as int32",
)
from_bits = _function(
    {(INTS,): (lambda builder, lanes: builder.bitcast(lanes, FLOATS.vector), FLOATS)},
    "the floats that have these bits",
)


def load(_array: Any, _row: int) -> Lanes:
    """Return a row of a C-contiguous (n, N_LANES) array of float32 or uint8 as lanes."""
    raise TypeError("load() exists in compiled functions only")


def store(_array: Any, _row: int, _lanes: Lanes) -> None:
    """Put lanes into a row of a C-contiguous (n, N_LANES) array; uint8 takes their low bits."""
    raise TypeError("store() exists in compiled functions only")


def _address(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    """Return the address of a row, as a pointer to a vector of the array's elements."""
    array = context.make_array(signature.args[0])(context, builder, values[0])
    row = context.cast(builder, values[1], signature.args[1], types.intp)
    first = builder.gep(array.data, [builder.mul(row, ir.Constant(row.type, N_LANES))])
    vector = ir.VectorType(first.type.pointee, N_LANES)
    return builder.bitcast(first, vector.as_pointer())


def _type_of_load(array: Any, row: Any) -> Any:
    return signature(_ROWS[array.dtype], array, row)


def _build_load(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    address = _address(context, builder, signature, values)
    vector = builder.load(address, align=signature.args[0].dtype.bitwidth // 8)
    return vector if signature.return_type == FLOATS else builder.zext(vector, INTS.vector)


def _type_of_store(array: Any, row: Any, lanes: Any) -> Any:
    return signature(types.none, array, row, lanes) if _ROWS[array.dtype] == lanes else None


def _build_store(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    address = _address(context, builder, signature, values)
    vector = values[2]
    if signature.args[2] == INTS:
        vector = builder.trunc(vector, address.type.pointee)
    builder.store(vector, address, align=signature.args[0].dtype.bitwidth // 8)
    return context.get_dummy_value()


type_callable(load)(lambda _context: _type_of_load)
type_callable(store)(lambda _context: _type_of_store)
lower_builtin(load, types.Array, types.Integer)(_build_load)
lower_builtin(store, types.Array, types.Integer, LanesType)(_build_store)
