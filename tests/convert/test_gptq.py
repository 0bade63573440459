"""The solver against the paper's own equations and against changes that must not matter."""

import numpy as np
import pytest
import torch

from convert import gptq
from convert.errors import NumericalError, UsageError
from convert.gptq import (
    ORDERS,
    GptqSettings,
    GptqSolution,
    dequantize,
    quantize_matrix,
    refine_solution,
    round_to_codes,
)
from tests.oracles.gptq_twin import Twin, column_groups, gptq_twin, sweep_twin
from tests.pretended_device import real_or_pretended


def problem(
    n_out: int = 6, n_in: int = 128, *, seed: int = 0, n_tokens: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of strongly correlated inputs, float64."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=rng, dtype=torch.float64) * 0.05
    mixing = torch.randn(n_in, n_in, generator=rng, dtype=torch.float64)
    mixing *= torch.logspace(0, -2, n_in, dtype=torch.float64)[:, None]
    inputs = torch.randn(n_tokens, n_in, generator=rng, dtype=torch.float64) @ mixing
    return weight, 2 * inputs.T @ inputs / n_tokens


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, settings: GptqSettings | None = None
) -> GptqSolution:
    """As the exporter does it."""
    settings = settings or GptqSettings()
    solution = quantize_matrix(weight, hessian, settings)
    return refine_solution(weight, hessian, solution, settings)


def twin_of(weight: torch.Tensor, hessian: torch.Tensor, settings: GptqSettings) -> Twin:
    return gptq_twin(
        weight.numpy(),
        hessian.numpy(),
        bits=settings.bits,
        group_size=settings.columns_per_group(weight.shape[1]),
        damp=settings.damp,
        clip_steps=settings.clip_steps,
        symmetric=settings.symmetric,
        order=settings.order,
    )


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = weight - rounded.to(weight.dtype)
    return float(((difference @ hessian) * difference).sum())


def round_to_nearest(weight: torch.Tensor, settings: GptqSettings) -> torch.Tensor:
    """What the solver does without a Hessian to speak of: every column stands alone."""
    identity = torch.eye(weight.shape[1], dtype=weight.dtype)
    return dequantize(quantize_matrix(weight, identity, settings))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("clip_steps", [0, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_codes_equal_the_papers(
    bits: int, group_size: int, clip_steps: int, symmetric: bool, order: str
) -> None:
    """Catches any slip in the algebra: a wrong factor, a transposed update, a stale group."""
    weight, hessian = problem(n_out=3)
    settings = GptqSettings(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        order=order,
        damp=0.02,
        clip_steps=clip_steps,
        column_chunk=48,
    )
    solution = quantize_matrix(weight, hessian, settings)
    twin = twin_of(weight, hessian, settings)
    np.testing.assert_array_equal(solution.group_of.numpy(), twin.group_of)
    np.testing.assert_array_equal(solution.scales.numpy(), twin.scales.astype(np.float16))
    np.testing.assert_array_equal(solution.zeros.numpy(), twin.zeros)
    np.testing.assert_array_equal(solution.codes.numpy(), twin.codes)


@pytest.mark.parametrize("n_sweeps", [0, 1, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_refined_codes_equal_those_of_trying_all(
    n_sweeps: int, symmetric: bool, order: str
) -> None:
    """Catches a gradient not kept up, another column's grid, and a damping that is left out."""
    weight, hessian = problem(n_out=3)
    settings = GptqSettings(
        bits=3,
        group_size=32,
        symmetric=symmetric,
        order=order,
        damp=0.2,
        n_sweeps=n_sweeps,
        column_chunk=48,
    )
    solution = quantize_matrix(weight, hessian, settings)
    refined = refine_solution(weight, hessian, solution, settings)
    twin = twin_of(weight, hessian, settings)
    expected = sweep_twin(
        weight.numpy(), hessian.numpy(), twin, bits=3, damp=0.2, n_sweeps=n_sweeps
    )
    np.testing.assert_array_equal(refined.codes.numpy(), expected)
    assert refined.scales is solution.scales
    n_changed = (refined.codes != solution.codes).sum()
    assert n_changed > 0 if n_sweeps else n_changed == 0


def test_orders_agree_where_activity_falls() -> None:
    """Catches columns or groups that do not return to their places."""
    weight, hessian = problem()
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    plain, *others = (
        quantize_matrix(weight, hessian, GptqSettings(group_size=32, order=order))
        for order in ORDERS
    )
    for other in others:
        assert torch.equal(other.codes, plain.codes)
        assert torch.equal(other.scales, plain.scales)
        assert torch.equal(other.group_of, plain.group_of)


def test_an_asymmetric_grid_follows_the_weights() -> None:
    """Catches zeros that stay in the middle: weights of one sign need half the range only."""
    weight, hessian = problem()
    weight = weight.abs() - 0.01
    errors = []
    for symmetric in (True, False):
        settings = GptqSettings(symmetric=symmetric)
        solved = dequantize(quantize_matrix(weight, hessian, settings))
        errors.append(output_error(weight, solved, hessian))
    assert errors[1] < 0.5 * errors[0]


def test_zeros_are_what_version_1_can_store() -> None:
    """Catches a zero of 0, stored as -1: weights of one sign ask for it."""
    weight, hessian = problem()
    solution = quantize_matrix(weight.abs(), hessian, GptqSettings(symmetric=False))
    assert int(solution.zeros.min()) == 1


@pytest.mark.parametrize("column_chunk", [1, 7, 32, 100, 256])
def test_column_chunk_does_not_matter(column_chunk: int) -> None:
    """Catches global and local column indices mixed up, and groups that a chunk cuts."""
    weight, hessian = problem(n_in=256)
    whole = solve(weight, hessian, GptqSettings(group_size=64, column_chunk=128))
    other = solve(weight, hessian, GptqSettings(group_size=64, column_chunk=column_chunk))
    assert torch.equal(whole.scales, other.scales)
    assert torch.equal(whole.codes, other.codes)


def test_rows_are_independent() -> None:
    """Catches anything shared between outputs."""
    weight, hessian = problem()
    together = solve(weight, hessian)
    for row in range(len(weight)):
        alone = solve(weight[row : row + 1], hessian)
        assert torch.equal(alone.codes[0], together.codes[row])


@pytest.mark.parametrize("order", ORDERS)
def test_rows_at_once_do_not_matter(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that end up in another's place, or are left out at the end."""
    weight, hessian = problem()
    whole = solve(weight, hessian, GptqSettings(order=order))
    monkeypatch.setattr(gptq, "CACHED_ROWS", 4)
    parts = solve(weight, hessian, GptqSettings(order=order))
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)


def test_the_hessians_scale_does_not_matter() -> None:
    """Catches damping that is absolute, not a fraction of the mean diagonal."""
    weight, hessian = problem()
    one = solve(weight, hessian)
    other = solve(weight, hessian * 2.0**20)
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("n_out", [1, 6])
def test_inputs_are_not_changed(n_out: int) -> None:
    """Catches damping or updates done in the caller's arrays; one row transposes without a copy."""
    weight, hessian = problem(n_out)
    before = weight.clone(), hessian.clone()
    solve(weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


TIE = 0.002  # of a step, about the noise of float32 in these problems


def assert_ties(
    weight: torch.Tensor, hessian: torch.Tensor, one: GptqSolution, other: GptqSolution
) -> None:
    """That in each row the first choice that differs was as good as even, in float64.

    What follows it in the row is another problem, and free. settings: those of GptqSettings().
    """
    settings = GptqSettings()
    groups = column_groups(hessian.diagonal().numpy(), settings.group_size, settings.order)
    order = [column for _, group in groups for column in group]
    damped = hessian[order][:, order]
    damped.diagonal().add_(settings.damp * hessian.diagonal().mean())
    inv_chol = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    differs = (one.codes != other.codes).any(dim=1) | (one.scales != other.scales).any(dim=1)
    assert differs.double().mean() < 0.1
    for row in differs.nonzero().flatten().tolist():
        left = weight[row, order]
        for place, column in enumerate(order):
            group = int(one.group_of[column])
            scales = [float(one.scales[row, group]), float(other.scales[row, group])]
            if scales[0] != scales[1]:
                values = left[place : place + settings.group_size, None]
                errors = [grid_error(values, scale, settings) for scale in scales]
                assert abs(scales[0] - scales[1]) < 1e-3 * scales[0] or errors[0] == pytest.approx(
                    errors[1], rel=1e-4
                ), (row, column)
                break
            codes = [int(one.codes[row, column]), int(other.codes[row, column])]
            if codes[0] != codes[1]:
                wanted = float(left[place]) / scales[0] + settings.middle
                assert abs(codes[0] - codes[1]) == 1, (row, column)
                assert wanted == pytest.approx(sum(codes) / 2, abs=TIE), (row, column)
                break
            rounded = (codes[0] - settings.middle) * scales[0]
            error = (left[place] - rounded) / inv_chol[place, place]
            left[place:] -= inv_chol[place, place:] * error


def grid_error(values: torch.Tensor, scale: float, settings: GptqSettings) -> float:
    grid = torch.tensor(scale, dtype=values.dtype), torch.tensor(float(settings.middle))
    rounded = (round_to_codes(values, *grid, settings) - grid[1]) * grid[0]
    return float((values - rounded).square().sum())


def assert_sweep_ties(
    weight: torch.Tensor, hessian: torch.Tensor, solution: GptqSolution, codes: list[torch.Tensor]
) -> None:
    """The same of the two codes that a sweep over one solution chose."""
    added = solution.damp * hessian.diagonal().mean()
    differs = (codes[0] != codes[1]).any(dim=1)
    assert differs.double().mean() < 0.1
    for row in differs.nonzero().flatten().tolist():
        column = int((codes[0][row] != codes[1][row]).nonzero()[0])
        scales = solution.scales[row].double()[solution.group_of]
        now = torch.cat([codes[0][row, :column], solution.codes[row, column:]]).double()
        errors = weight[row] - (now - 8) * scales
        pull = hessian[column] @ errors + added * errors[column]
        wanted = now[column] + pull / (hessian[column, column] + added) / scales[column]
        middle = float(codes[0][row, column]) + float(codes[1][row, column])
        assert float(wanted) == pytest.approx(middle / 2, abs=TIE), (row, column)


@pytest.mark.parametrize(
    ("device", "n_threads", "column_chunk"),
    [
        ("cpu", 2, 128),
        ("cpu", 1, 1),
        ("cpu", 2, 48),
        ("cpu", 1, 256),
        ("cuda", 1, 128),
        ("cuda", 1, 48),
        ("mps", 1, 128),
        ("mps", 1, 48),
    ],
)
def test_float32_threads_chunks_and_devices_change_ties_alone(
    device: str, n_threads: int, column_chunk: int
) -> None:
    """Catches an index that a chunk shifts, and arithmetic that needs float64 or one thread.

    A share of equal codes would not: a wrong update moves few codes by much. Here every row's
    first difference has to be a value that lies midway between the two codes. A device that is not
    here is pretended.
    """
    weight, hessian = problem(n_out=512, n_in=256)
    exact = quantize_matrix(weight, hessian, GptqSettings())
    given = weight.float(), hessian.float()
    other_settings = GptqSettings(column_chunk=column_chunk)
    n_before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        base = quantize_matrix(*given, GptqSettings())
        refined = refine_solution(*given, base, GptqSettings())
        torch.set_num_threads(n_threads)
        with real_or_pretended(device):
            moved = [tensor.to(device) for tensor in given]
            other = on("cpu", quantize_matrix(moved[0], moved[1], other_settings))
            refined_there = refine_solution(moved[0], moved[1], on(device, base), other_settings)
            again = on("cpu", refined_there)
    finally:
        torch.set_num_threads(n_before)
    assert_ties(weight, hessian, base, exact)
    assert_ties(weight, hessian, base, other)
    assert_sweep_ties(weight, hessian, base, [refined.codes, again.codes])


def on(device: str, solution: GptqSolution) -> GptqSolution:
    return GptqSolution(
        codes=solution.codes.to(device),
        scales=solution.scales.to(device),
        zeros=solution.zeros.to(device),
        group_of=solution.group_of.to(device),
        damp=solution.damp,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_below_rounding_to_nearest(bits: int) -> None:
    """Catches a solver that ignores the Hessian: correlated inputs leave it much to gain."""
    weight, hessian = problem(n_in=256)
    settings = GptqSettings(bits=bits)
    solved = dequantize(quantize_matrix(weight, hessian, settings))
    nearest = round_to_nearest(weight, settings)
    ours = output_error(weight, solved, hessian)
    assert ours < 0.5 * output_error(weight, nearest, hessian)


def test_clipping_lowers_the_error_of_weights_with_outliers() -> None:
    """Catches a search that never leaves the full range, or picks the worst."""
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 128, generator=rng, dtype=torch.float64).pow(3)
    plain = round_to_nearest(weight, GptqSettings(clip_steps=0))
    clipped = round_to_nearest(weight, GptqSettings())
    assert (weight - clipped).square().sum() < 0.95 * (weight - plain).square().sum()


def test_dead_columns_disturb_nothing() -> None:
    """Catches a division by a dead column's zero, and errors spread from or into it."""
    weight, hessian = problem()
    dead = [0, 5, 127]
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    settings = GptqSettings(clip_steps=0)
    solution = quantize_matrix(weight, hessian, settings)
    scale = solution.scales.double()
    nearest = round_to_codes(weight[:, dead], scale, solution.zeros.double(), settings)
    assert torch.equal(solution.codes[:, dead].double(), nearest)
    flipped = weight.clone()
    flipped[:, dead] *= -1
    alive = [column for column in range(128) if column not in dead]
    other = quantize_matrix(flipped, hessian, settings)
    assert torch.equal(other.codes[:, alive], solution.codes[:, alive])


def test_damping_rises_where_it_must() -> None:
    """Catches a Cholesky failure that ends the run, or goes unreported."""
    weight, hessian = problem()
    assert quantize_matrix(weight, hessian, GptqSettings()).damp == GptqSettings().damp
    mean = hessian.diagonal().mean()
    lowest = torch.linalg.eigvalsh(hessian)[0]
    indefinite = hessian - (lowest + 0.1 * mean) * torch.eye(128, dtype=torch.float64)
    solution = quantize_matrix(weight, indefinite, GptqSettings(damp=0.01))
    assert solution.damp == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(128, 128), "zero"),
        (torch.full((128, 128), torch.nan), "NaN"),
        (torch.eye(128) - 4 * torch.ones(128, 128) / 128, "indefinite"),
    ],
)
def test_hopeless_hessians_are_errors(hessian: torch.Tensor, message: str) -> None:
    """Catches codes made of NaN, and a loop that raises damping for ever."""
    with pytest.raises(NumericalError, match=message):
        quantize_matrix(torch.ones(4, 128), hessian, GptqSettings())


@pytest.mark.parametrize("magnitude", [0.0, 1e-9, 1e-6, 1e3, 4e5])
def test_weights_of_any_size(magnitude: float) -> None:
    """Catches scales that underflow to 0 or lose their digits in float16."""
    weight, hessian = problem()
    weight *= magnitude
    solution: GptqSolution = quantize_matrix(weight, hessian, GptqSettings(clip_steps=0))
    values = dequantize(solution)
    assert values.isfinite().all()
    assert (solution.scales > 0).all()
    step = max(magnitude * 0.05, 2.0**-24)
    assert (values - weight).abs().max() < 3 * step


def test_weights_beyond_float16_are_errors() -> None:
    """Catches an infinite scale written to the file."""
    weight, hessian = problem()
    with pytest.raises(NumericalError, match="float16"):
        quantize_matrix(weight * 1e8, hessian, GptqSettings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 5},
        {"group_size": 100},
        {"sampled_rows": 0},
        {"damp": 0.0},
        {"damp": 2.0},
        {"order": "rows"},
        {"version": 3},
    ],
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    """Catches a wish that no reader of the format could follow."""
    with pytest.raises(UsageError, match=r"choose|usual"):
        GptqSettings(**wrong)  # type: ignore[arg-type]
