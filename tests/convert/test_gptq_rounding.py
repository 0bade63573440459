"""GPTQ rounding inside K-quants against its slow twin, and what must not change it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from convert import code_feedback, code_sweep
from convert.calibrate import Calibration, CalibrationSettings, calibrate, plan_calibration
from convert.checkpoint import Checkpoint
from convert.code_feedback import factor
from convert.code_layout import LAYOUTS, read_unit, replace_unit
from convert.decode import decode_rows
from convert.encode import ByteArray, QuantType, block_size, encode_rows, row_nbytes
from convert.errors import QwqError
from convert.gptq_rounding import refine_blocks, round_matrix
from convert.passages import SMALL_VOCABULARY, built_in_passages
from convert.rounding import GptqRounding
from convert.rounding_report import rounding_lines
from tests.oracles.rounding_twin import rounding_twin
from tests.synthetic import write_checkpoint

TYPES = sorted(LAYOUTS)


def problem(n_out: int, n_in: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the Hessian of correlated inputs, and other inputs of the same kind."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(n_out, n_in, generator=rng, dtype=torch.float64) * 0.05
    mixing = torch.randn(n_in, n_in, generator=rng, dtype=torch.float64)
    mixing *= torch.logspace(0, -2, n_in, dtype=torch.float64)[:, None]
    inputs = torch.randn(4096, n_in, generator=rng, dtype=torch.float64) @ mixing
    fitted, held_out = inputs[:3072], inputs[3072:]
    return weight, 2 * fitted.T @ fitted / len(fitted), held_out


def plain(weight: torch.Tensor, quant_type: QuantType, hessian: torch.Tensor) -> ByteArray:
    importance = (hessian.diagonal() / 2).float().numpy()
    return encode_rows(weight.float().numpy(), quant_type, importance=importance)


def rounded(weight: torch.Tensor, quant_type: QuantType, hessian: torch.Tensor) -> ByteArray:
    order = hessian.diagonal().argsort(descending=True)
    return round_matrix(
        weight,
        plain(weight, quant_type, hessian),
        quant_type,
        upper=factor(hessian, 0.02, order)[0],
        order=order,
    )


@pytest.mark.parametrize("quant_type", TYPES)
def test_blocks_equal_the_slow_ones(quant_type: QuantType) -> None:
    """Catches errors spread wrongly, codes in another column's place, another order."""
    weight, hessian, _ = problem(2)
    ours = rounded(weight, quant_type, hessian)
    twin = rounding_twin(
        weight.numpy(),
        plain(weight, quant_type, hessian),
        quant_type,
        hessian.numpy(),
        0.02,
        hessian.diagonal().argsort(descending=True).tolist(),
    )
    # A value that lies in the middle of two codes may fall to either side.
    decoded = [decode_rows(blocks, quant_type, 512) for blocks in (ours, twin)]
    assert (decoded[0] == decoded[1]).mean() > 0.99


@pytest.mark.parametrize("n_at_once", [1, 7, 256])
def test_columns_at_once_do_not_matter(n_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that is spread twice over some columns, or not at all."""
    weight, hessian, _ = problem(6)
    for quant_type in (QuantType.Q4_K, QuantType.Q6_K, QuantType.IQ4_XS):
        found = []
        for n in (code_sweep.AT_ONCE, n_at_once):
            monkeypatch.setattr(code_feedback, "AT_ONCE", n)
            monkeypatch.setattr(code_sweep, "AT_ONCE", n)
            blocks = rounded(weight, quant_type, hessian)
            refined = refine_blocks(
                weight, blocks, quant_type, hessian=hessian, damp=0.1, n_sweeps=2
            )
            found.append([decode_rows(one, quant_type, 512) for one in (blocks, refined)])
        for ours, other in zip(*found, strict=True):
            assert (ours == other).mean() > 0.999


@pytest.mark.parametrize("quant_type", TYPES)
def test_held_out_error_falls(quant_type: QuantType) -> None:
    """Catches a Hessian that is not used, or used the wrong way round."""
    weight, hessian, held_out = problem(24)
    errors = [
        float(
            ((weight - torch.from_numpy(decode_rows(blocks, quant_type, 512))) @ held_out.T)
            .square()
            .sum()
        )
        for blocks in (
            rounded(weight, quant_type, hessian),
            plain(weight, quant_type, hessian),
        )
    ]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("quant_type", TYPES)
def test_no_number_alone_errs_less_after_refining(quant_type: QuantType) -> None:
    """Catches a gradient that is not kept up, or of another column; every number is tried.

    And scales or units of other columns, numbers that land elsewhere, damping left out.
    """
    weight, hessian, _ = problem(2)
    before = rounded(weight, quant_type, hessian)
    after = refine_blocks(weight, before, quant_type, hessian=hessian, damp=0.5, n_sweeps=30)
    damped = hessian + 0.5 * hessian.diagonal().mean() * torch.eye(512, dtype=torch.float64)

    def losses(blocks: ByteArray) -> torch.Tensor:
        decoded = torch.from_numpy(decode_rows(blocks, quant_type, 512)).double()
        error = weight.repeat(len(decoded) // len(weight), 1) - decoded
        return ((error @ damped) * error).sum(dim=1)

    reached = losses(after)
    assert (reached < 0.97 * losses(before)).all()
    others = np.concatenate([one.reshape(after.shape) for one in neighbours(after, quant_type)])
    moved = losses(others).reshape(-1, 2)
    assert (moved > reached * (1 - 1e-5)).all()


def neighbours(rows: ByteArray, quant_type: QuantType) -> Iterator[ByteArray]:
    """The same rows with one number of one block a step away, for each of the block's numbers."""
    layout = LAYOUTS[quant_type]
    blocks = rows.reshape(-1, row_nbytes(quant_type, block_size(quant_type)))
    n_blocks = len(blocks) // len(rows)
    for block in range(min(n_blocks, 2)):
        for packed in (layout.codes, *layout.scales):
            numbers = packed.read(blocks).astype(np.int64)
            for index in range(packed.n):
                for step in (-1, 1):
                    other = numbers.copy()
                    other[block::n_blocks, index] += step
                    other = other.clip(packed.lowest, packed.highest)
                    yield packed.replace(blocks, other.astype(np.uint8))
        for offset in layout.units:
            for towards in (-np.inf, np.inf):
                units = read_unit(blocks, offset).copy()
                units[block::n_blocks] = np.nextafter(units[block::n_blocks], np.float16(towards))
                yield replace_unit(blocks, offset, units)


def test_a_diagonal_hessian_changes_little() -> None:
    """Catches codes that are not the nearest: without correlation there is nothing to gain."""
    weight, hessian, _ = problem(8)
    diagonal = torch.diag(hessian.diagonal())
    made = (rounded(weight, QuantType.Q4_K, diagonal), plain(weight, QuantType.Q4_K, diagonal))
    decoded = [decode_rows(one, QuantType.Q4_K, 512) for one in made]
    assert (decoded[0] == decoded[1]).mean() > 0.99


def test_rows_are_independent() -> None:
    """Catches anything shared between outputs."""
    weight, hessian, _ = problem(4)
    together = rounded(weight, QuantType.Q3_K, hessian)
    for row in range(4):
        alone = rounded(weight[row : row + 1], QuantType.Q3_K, hessian)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration]:
    config: dict[str, object] = {"num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("rounding")
    source = write_checkpoint(folder / "source", config=config)
    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(
            checkpoint,
            folder / "calibration",
            passages=built_in_passages(SMALL_VOCABULARY - 1)[:40],
            settings=CalibrationSettings(hessians=True),
        )
        return source, calibrate(plan)


def test_every_matrix_is_rounded_and_none_is_worse(calibrated: tuple[Path, Calibration]) -> None:
    """Catches a matrix forgotten or given another's blocks, and a choice by the wrong measure."""
    source, calibration = calibrated
    types = frozenset({QuantType.Q2_K, QuantType.Q4_K, QuantType.Q5_1})
    with Checkpoint.open(source) as checkpoint:
        names = [name for name in checkpoint.tensors if name.endswith("_proj.weight")]
        rounding = GptqRounding(checkpoint, calibration, dict.fromkeys(names, types))
        for name in names:
            weight = checkpoint.read(name)
            site = name.split(".", 3)[3].removesuffix(".weight")
            for quant_type in (QuantType.Q2_K, QuantType.Q4_K):
                blocks = rounding.rows(name, quant_type, 0, len(weight))
                assert blocks is not None
                decoded = decode_rows(blocks, quant_type, weight.shape[1])
                limit = {QuantType.Q2_K: 0.3, QuantType.Q4_K: 0.02}[quant_type]
                assert np.mean((decoded - weight) ** 2) < limit * np.mean(weight**2), site
                part = rounding.rows(name, quant_type, 3, 7)
                assert part is not None
                np.testing.assert_array_equal(part, blocks[3:7])
            assert rounding.rows(name, QuantType.Q5_1, 0, 1) is None
        assert rounding.rows("model.embed_tokens.weight", QuantType.Q2_K, 0, 1) is None
    found = [
        rounding.choice(name, quant_type) for name in names for quant_type in types & LAYOUTS.keys()
    ]
    choices = [choice for choice in found if choice is not None]
    assert len(choices) == 2 * len(names) == 14
    assert all(choice.relative_error <= 1 for choice in choices)
    assert any(choice.damp is not None for choice in choices)
    assert len(rounding_lines(choices)) == 2


def test_a_calibration_without_hessians_is_an_error(
    calibrated: tuple[Path, Calibration], tmp_path: Path
) -> None:
    """Catches plain rounding passed off as GPTQ's."""
    source, _ = calibrated
    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(
            checkpoint,
            tmp_path / "plain",
            passages=built_in_passages(SMALL_VOCABULARY - 1)[:10],
            settings=CalibrationSettings(),
        )
        name = "model.layers.0.mlp.up_proj.weight"
        rounding = GptqRounding(checkpoint, calibrate(plan), {name: frozenset({QuantType.Q4_K})})
        with pytest.raises(QwqError, match="--hessians"):
            rounding.rows(name, QuantType.Q4_K, 0, 1)
