"""GPTQ rounding inside K-quants against its slow twin, and what must not change it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from convert import code_sweep, gptq_rounding
from convert.calibrate import Calibration, CalibrationSettings, calibrate, plan_calibration
from convert.checkpoint import Checkpoint
from convert.code_layout import LAYOUTS, code_values, read_codes, replace_codes
from convert.decode import decode_rows
from convert.encode import QuantType, block_size, encode_rows, row_nbytes
from convert.errors import QwqError
from convert.gptq import factor_inverse
from convert.gptq_rounding import refine_codes, round_matrix
from convert.passages import built_in_passages
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


def rounded(weight: torch.Tensor, quant_type: QuantType, hessian: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    return round_matrix(
        weight,
        quant_type,
        inv_chol=factor_inverse(hessian, 0.02)[0],
        importance=(hessian.diagonal() / 2).float().numpy(),
    )


@pytest.mark.parametrize("quant_type", TYPES)
def test_blocks_equal_the_slow_ones(quant_type: QuantType) -> None:
    """Catches errors spread wrongly, scales of another block, codes in another column's place."""
    weight, hessian, _ = problem(2)
    ours = rounded(weight, quant_type, hessian)
    twin = rounding_twin(
        weight.numpy(), quant_type, hessian.numpy(), 0.02, hessian.diagonal().numpy() / 2
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
            monkeypatch.setattr(gptq_rounding, "AT_ONCE", n)
            monkeypatch.setattr(code_sweep, "AT_ONCE", n)
            blocks = rounded(weight, quant_type, hessian)
            refined = refine_codes(
                weight, blocks, quant_type, hessian=hessian, damp=0.1, n_sweeps=2
            )
            found.append([decode_rows(one, quant_type, 512) for one in (blocks, refined)])
        for ours, other in zip(*found, strict=True):
            assert (ours == other).mean() > 0.999


@pytest.mark.parametrize("quant_type", TYPES)
def test_held_out_error_falls(quant_type: QuantType) -> None:
    """Catches a Hessian that is not used, or used the wrong way round."""
    weight, hessian, held_out = problem(24)
    importance = (hessian.diagonal() / 2).float().numpy()
    plain = encode_rows(weight.float().numpy(), quant_type, importance=importance)
    errors = [
        float(
            ((weight - torch.from_numpy(decode_rows(blocks, quant_type, 512))) @ held_out.T)
            .square()
            .sum()
        )
        for blocks in (rounded(weight, quant_type, hessian), plain)
    ]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("quant_type", TYPES)
def test_no_code_alone_errs_less_after_refining(quant_type: QuantType) -> None:
    """Catches a gradient that is not kept up, or of another column; every code is tried.

    And scales that changed with the codes, a type whose codes land elsewhere, damping left out.
    """
    weight, hessian, _ = problem(2)
    before = rounded(weight, quant_type, hessian)
    after = refine_codes(weight, before, quant_type, hessian=hessian, damp=0.5, n_sweeps=40)
    width = block_size(quant_type)
    rows = [one.reshape(-1, row_nbytes(quant_type, width)) for one in (before, after)]
    codes = [read_codes(one, quant_type) for one in rows]
    np.testing.assert_array_equal(replace_codes(rows[0], codes[1], quant_type), rows[1])

    damped = hessian + 0.5 * hessian.diagonal().mean() * torch.eye(512, dtype=torch.float64)
    errors = [
        weight - torch.from_numpy(decode_rows(one, quant_type, 512)).double()
        for one in (before, after)
    ]
    losses = [((one @ damped) * one).sum(dim=1) for one in errors]
    assert (losses[1] < 0.97 * losses[0]).all()
    layout = LAYOUTS[quant_type]
    values = code_values(rows[1], range(layout.lowest, layout.highest + 1), quant_type)
    values = values.reshape(len(values), 2, 512)  # (n_codes, n_out, n_in)
    moves = torch.from_numpy(values).double() - (weight - errors[1])
    gains = 2 * moves * (errors[1] @ damped) - moves.square() * damped.diagonal()
    assert float(gains.max()) < 1e-5 * float(losses[1].min())


def test_a_diagonal_hessian_changes_little() -> None:
    """Catches codes that are not the nearest: without correlation there is nothing to gain."""
    weight, hessian, _ = problem(8)
    blocks = rounded(weight, QuantType.Q4_K, torch.diag(hessian.diagonal()))
    importance = (hessian.diagonal() / 2).float().numpy()
    plain = encode_rows(weight.float().numpy(), QuantType.Q4_K, importance=importance)
    decoded = [decode_rows(one, QuantType.Q4_K, 512) for one in (blocks, plain)]
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
            passages=built_in_passages()[:40],
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
            passages=built_in_passages()[:10],
            settings=CalibrationSettings(),
        )
        name = "model.layers.0.mlp.up_proj.weight"
        rounding = GptqRounding(checkpoint, calibrate(plan), {name: frozenset({QuantType.Q4_K})})
        with pytest.raises(QwqError, match="--hessians"):
            rounding.rows(name, QuantType.Q4_K, 0, 1)
