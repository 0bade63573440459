"""The mix of types that fits a size with the least predicted divergence.

What each type would cost in each matrix follows from the matrix's sensitivity and from the errors
that the type leaves in its weights, with the imatrix; the costs of matrices add up. Which type each
gets is then a knapsack with a few choices for each matrix, which HiGHS solves.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.checkpoint import Checkpoint, Float32Array
from convert.decode import decode_rows
from convert.encode import QuantType, block_size, encode_rows, row_nbytes
from convert.errors import QwqError
from convert.files import format_nbytes
from convert.imatrix import Imatrix
from convert.plan import aligned, plan_tensors
from convert.qwen2 import Qwen2Config, TensorSpec, tensor_specs
from convert.recipe import RECIPES, Override, Recipe
from convert.sensitivity import Sensitivity, load_sensitivities

CHOICES = (
    QuantType.Q2_K,
    QuantType.Q3_K,
    QuantType.IQ4_XS,
    QuantType.Q4_K,
    QuantType.Q5_K,
    QuantType.Q6_K,
    QuantType.Q8_0,
)
"""Types that run fast everywhere, one for each half bit or bit."""
SMALL_BLOCK_CHOICES = (QuantType.IQ4_NL, QuantType.Q5_0, QuantType.Q8_0)
"""For rows that do not divide into blocks of 256."""
LOSS_SCALE = 1000
"""HiGHS ends where a millionth is left to gain: then a billionth of what cannot be avoided."""
SAMPLE_N_WEIGHTS = 1 << 19
"""Weights of a matrix that are encoded to know a type's error, in rows spread over all of it."""

Costs = Mapping[str, Mapping[QuantType, float]]
"""By matrix and type: nats a token that the type is predicted to cost."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A type for each matrix, by GGUF name. nbytes: of all tensors. divergence: predicted, nats."""

    name: str
    types: Mapping[str, QuantType]
    nbytes: int
    divergence: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The mix for a size, and what choosing gains: against the largest stock mix that fits.

    of_stock_size: the best mix of no more bytes than the stock mix; both None where none fits.
    """

    mix: Mix
    stock: Mix | None
    of_stock_size: Mix | None

    @property
    def share(self) -> float | None:
        """The divergence predicted of the best mix, as a part of the stock mix's of its size."""
        if self.stock is None or self.of_stock_size is None or not self.stock.divergence:
            return None
        return self.of_stock_size.divergence / self.stock.divergence


def fit(model: Qwen2Config, costs: Costs, max_nbytes: int, imatrix: Imatrix, *, name: str) -> Fit:
    """The best mix of at most max_nbytes, beside llama.cpp's own; raises as best_mix() does."""
    mix = best_mix(model, costs, max_nbytes, name=name)
    stock = stock_mix(model, costs, max_nbytes, imatrix)
    if stock is None:
        return Fit(mix, None, None)
    return Fit(mix, stock, best_mix(model, costs, stock.nbytes, name=name))


def measure_costs(
    checkpoint: Checkpoint,
    calibration: Path,
    imatrix: Imatrix,
    *,
    n_threads: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Costs:
    """What every choice would cost in every matrix, by GGUF name.

    calibration: a folder with sensitivities. Of large matrices a sample of the rows is encoded.
    Raises QwqError where the folder holds no sensitivities, or none of a matrix.
    """
    sensitivities = load_sensitivities(calibration, checkpoint)
    specs = _matrices(checkpoint.model)
    for spec in specs:
        if spec.name not in sensitivities:
            raise QwqError(f"{calibration}: holds no sensitivity of {spec.name}; calibrate again")

    def measure(spec: TensorSpec) -> dict[QuantType, float]:
        importance = imatrix.importance_of(spec.gguf_name, spec.shape[-1])
        return _costs_of(checkpoint, spec, sensitivities[spec.name], importance)

    costs = {}
    with ThreadPoolExecutor(n_threads) as pool:
        for spec, found in zip(specs, pool.map(measure, specs), strict=True):
            costs[spec.gguf_name] = found
            if on_progress is not None:
                on_progress(len(costs), len(specs))
    return costs


def best_mix(model: Qwen2Config, costs: Costs, max_nbytes: int, *, name: str) -> Mix:
    """The mix of least predicted divergence whose tensors take at most max_nbytes.

    Raises QwqError where even the smallest types take more.
    """
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import coo_array, vstack

    specs = _matrices(model)
    options = [(row, spec, one) for row, spec in enumerate(specs) for one in costs[spec.gguf_name]]
    nbytes = np.array([_nbytes(spec, one) for _, spec, one in options])
    losses = np.array([costs[spec.gguf_name][one] for _, spec, one in options])
    room = max_nbytes - _vectors_nbytes(model)
    smallest = sum(min(_nbytes(spec, one) for one in costs[spec.gguf_name]) for spec in specs)
    if smallest > room:
        needed = smallest + _vectors_nbytes(model)
        raise QwqError(
            f"{name}: the smallest types take {format_nbytes(needed)} and "
            f"{format_nbytes(max(0, max_nbytes))} are left for weights; give more, or a smaller "
            "--context or --kv q8_0"
        )
    unit = int(np.gcd.reduce(nbytes))  # small whole numbers, which no tolerance can break
    columns = np.arange(len(options))
    one_each = coo_array((np.ones(len(options)), ([row for row, _, _ in options], columns)))
    sizes = coo_array((nbytes // unit, (np.zeros(len(options), dtype=int), columns)))
    upper = np.append(np.ones(len(specs)), room // unit)
    lower = np.append(np.ones(len(specs)), 0)
    # In units of what cannot be avoided, so that the solver's tolerance is small beside all.
    least = max(
        sum(min(costs[spec.gguf_name].values()) for spec in specs), np.finfo(np.float64).tiny
    )
    found = milp(
        losses / least * LOSS_SCALE,
        constraints=LinearConstraint(vstack([one_each, sizes]).tocsr(), lower, upper),
        integrality=np.ones(len(options)),
        bounds=(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message
    chosen = found.x > 0.5
    types = {spec.gguf_name: one for (_, spec, one), on in zip(options, chosen, strict=True) if on}
    mix = _mix(model, costs, types, name=name)
    assert len(types) == len(specs)
    assert mix.nbytes <= max_nbytes, (mix.nbytes, max_nbytes)
    return mix


def stock_mix(model: Qwen2Config, costs: Costs, max_nbytes: int, imatrix: Imatrix) -> Mix | None:
    """The largest of llama.cpp's own mixes that fits, of those that the choices can express."""
    fitting = []
    for recipe in RECIPES.values():
        types = {
            tensor.gguf_name: tensor.quant_type
            for tensor in plan_tensors(model, recipe, imatrix=imatrix)
            if len(tensor.shape) > 1
        }
        if all(one in costs[name] for name, one in types.items()):
            mix = _mix(model, costs, types, name=recipe.name)
            if mix.nbytes <= max_nbytes:
                fitting.append(mix)
    return max(fitting, key=lambda mix: mix.nbytes, default=None)


def recipe_of(mix: Mix, base: Recipe, *, about: str = "") -> Recipe:
    """The mix as a recipe whose overrides take every matrix; base: whose file type it carries."""
    layers: dict[tuple[str, QuantType], list[str]] = defaultdict(list)
    overrides = []
    for gguf_name, quant_type in mix.types.items():
        in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
        if in_layer is None:
            overrides.append(Override(f"^{re.escape(gguf_name)}$", quant_type))
        else:
            layers[in_layer[2], quant_type].append(in_layer[1])
    for (role, quant_type), indices in sorted(layers.items()):
        pattern = rf"^blk\.({'|'.join(indices)})\.{role}\.weight$"
        overrides.append(Override(pattern, quant_type))
    return replace(base, name=mix.name, overrides=tuple(overrides), about=about)


def _costs_of(
    checkpoint: Checkpoint,
    spec: TensorSpec,
    sensitivities: Iterable[Sensitivity],
    importance: Float32Array | None,
) -> dict[QuantType, float]:
    rows, taken = _sample(checkpoint, spec)
    weights: list[tuple[npt.NDArray[np.float64], Float32Array]] = []
    for one in sensitivities:
        columns = importance if one.columns is None else one.columns
        if columns is None:
            raise QwqError(f"{spec.gguf_name}: the imatrix has no entry for it; calibrate again")
        of_sample = one.rows[taken].astype(np.float64)
        # Rows that were left out err as those that were taken.
        scale = one.rows.sum(dtype=np.float64) / max(of_sample.sum(), np.finfo(np.float64).tiny)
        weights.append((0.5 * scale * of_sample, columns))
    costs = {}
    for quant_type in choices_for(spec):
        blocks = encode_rows(rows, quant_type, importance=importance)
        squares = np.square(decode_rows(blocks, quant_type, spec.shape[-1]) - rows)
        costs[quant_type] = sum(
            float(of_rows @ (squares @ columns)) for of_rows, columns in weights
        )
    return costs


def choices_for(spec: TensorSpec) -> tuple[QuantType, ...]:
    """The types that may be chosen for a matrix; raises QwqError where its rows fit none."""
    n_in = spec.shape[-1]
    for choices in (CHOICES, SMALL_BLOCK_CHOICES):
        if all(n_in % block_size(one) == 0 for one in choices):
            return choices
    raise QwqError(
        f"{spec.gguf_name}: its rows of {n_in} do not divide into blocks of 32, so no type fits; "
        "give --type in place of --fit"
    )


def _sample(checkpoint: Checkpoint, spec: TensorSpec) -> tuple[Float32Array, npt.NDArray[np.int64]]:
    """Rows spread evenly over a matrix, all of a small one, and which they are."""
    n_rows = spec.shape[0]
    step = -(-prod(spec.shape) // SAMPLE_N_WEIGHTS)
    if step == 1:
        return checkpoint.read(spec.name), np.arange(n_rows)
    taken = np.arange(step // 2, n_rows, step)
    rows = [checkpoint.rows(spec.name, row, row + 1) for row in taken.tolist()]
    return np.concatenate(rows), taken


def _mix(model: Qwen2Config, costs: Costs, types: Mapping[str, QuantType], *, name: str) -> Mix:
    nbytes = sum(_nbytes(spec, types[spec.gguf_name]) for spec in _matrices(model))
    divergence = sum(costs[gguf_name][one] for gguf_name, one in types.items())
    return Mix(name, types, nbytes + _vectors_nbytes(model), divergence)


def _matrices(model: Qwen2Config) -> list[TensorSpec]:
    return [spec for spec in tensor_specs(model) if len(spec.shape) > 1]


def _nbytes(spec: TensorSpec, quant_type: QuantType) -> int:
    return aligned(prod(spec.shape[:-1]) * row_nbytes(quant_type, spec.shape[-1]))


def _vectors_nbytes(model: Qwen2Config) -> int:
    vectors = (spec for spec in tensor_specs(model) if len(spec.shape) == 1)
    return sum(_nbytes(spec, QuantType.F32) for spec in vectors)
