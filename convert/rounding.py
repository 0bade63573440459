"""Rows of K-quants that were rounded with their Hessians, for the exporter to write.

For each matrix the plain encoding with importance competes with GPTQ rounding at several dampings,
the best of which is refined; the one whose output errs least on held-out inputs wins, so that none
is worse than without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from threading import Lock
from typing import TYPE_CHECKING

from convert.calibrate import Calibration
from convert.checkpoint import Checkpoint
from convert.code_layout import LAYOUTS
from convert.decode import decode_rows
from convert.encode import ByteArray, Float32Array, QuantType, encode_rows
from convert.errors import NumericalError
from convert.estimate import Estimate, estimate_rounding
from convert.gptq import factor_inverse
from convert.gptq_rounding import refine_blocks, round_matrix
from convert.layer_stream import INPUT_SITES, threads_for

if TYPE_CHECKING:
    import torch

DAMPS = (0.02, 0.1, 0.5)
"""More damping trusts the Hessian less; which is best depends on how many tokens it saw."""
N_SWEEPS = 1
KEPT_SITES = 2  # slices of the next matrices are encoded while those of the last are written

_LINEAR = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_SITE_OF = {linear: site for site, linears in INPUT_SITES.items() for linear in linears}


@dataclass(frozen=True, slots=True)
class Choice:
    """How a matrix was encoded. damp: None where GPTQ rounding was no better on held-out inputs.

    relative_error: its squared output error there, as a part of the plain encoding's.
    """

    name: str
    quant_type: QuantType
    damp: float | None
    relative_error: float


class GptqRounding:
    """Encodes matrices by need, those that share their inputs together; thread-safe.

    wanted: quant types by matrix name; those without a code layout are left to the exporter.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Calibration,
        wanted: Mapping[str, frozenset[QuantType]],
        *,
        device: str = "cpu",
    ) -> None:
        self.choices: list[Choice] = []
        self._checkpoint = checkpoint
        self._calibration = calibration
        self._wanted = {
            name: types & LAYOUTS.keys() for name, types in wanted.items() if _LINEAR.match(name)
        }
        self._device = device
        self._lock = Lock()
        self._sites: dict[tuple[int, str], dict[tuple[str, QuantType], ByteArray]] = {}

    @property
    def description(self) -> str:
        """What decides the codes, beside the checkpoint and the quant types."""
        calibration = self._calibration
        return (
            f"gptq, {N_SWEEPS} sweep, {calibration.n_fitted} tokens of "
            f"{calibration.calibration_sha256}"
        )

    def estimate(self) -> Estimate:
        """What all of it takes on this machine's processor."""
        return estimate_rounding(
            self._checkpoint.model,
            n_types=len(frozenset().union(*self._wanted.values())),
            n_dampings=len(DAMPS),
            n_sweeps=N_SWEEPS,
            n_held_out=self._calibration.n_held_out,
        )

    def rows(self, name: str, quant_type: QuantType, start: int, stop: int) -> ByteArray | None:
        """Encoded rows start to stop of a matrix; None where it is not rounded here.

        Raises NumericalError for a Hessian that is zero or indefinite, OverflowError as
        encode_rows() does.
        """
        if quant_type not in self._wanted.get(name, ()):
            return None
        found = _LINEAR.fullmatch(name)
        assert found is not None
        key = int(found[1]), _SITE_OF[found[2]]
        with self._lock:
            if key not in self._sites:
                while len(self._sites) >= KEPT_SITES:
                    del self._sites[next(iter(self._sites))]
                self._sites[key] = self._encode_site(*key)
            return self._sites[key][name, quant_type][start:stop]

    def report(self) -> list[str]:
        """What was chosen, by quant type, on how many tokens, and whether those are too few."""
        lines = []
        for quant_type in sorted({choice.quant_type for choice in self.choices}):
            choices = [choice for choice in self.choices if choice.quant_type == quant_type]
            better = [choice for choice in choices if choice.damp is not None]
            error = median(choice.relative_error for choice in choices)
            lines.append(
                f"{quant_type.name}: {len(better)} of {len(choices)} matrices rounded with their "
                f"Hessians, the others as the imatrix has them; median squared error on held-out "
                f"inputs {error:.2f} of the imatrix encoding's"
            )
        n_fitted = self._calibration.n_fitted
        n_columns = self._checkpoint.model.intermediate_size
        lines.append(
            f"Hessians of {n_fitted:,} tokens, {n_fitted / n_columns:.1f} for each of up to "
            f"{n_columns:,} columns"
        )
        if n_fitted < n_columns:
            lines.append("fewer tokens than columns overfit; more --hessian-tokens would help")
        return lines

    def _encode_site(self, layer_index: int, site: str) -> dict[tuple[str, QuantType], ByteArray]:
        """All wanted encodings of the matrices that read from one site."""
        import torch

        names = [f"model.layers.{layer_index}.{linear}.weight" for linear in INPUT_SITES[site]]
        with torch.inference_mode(), threads_for(self._checkpoint.model):
            statistics = self._calibration.statistics(layer_index, site)
            held_out = statistics["held_out"].to(self._device)
            importance = statistics["importance"].numpy()
            candidates = [
                _Candidates(name, quant_type, self._checkpoint, held_out)
                for name in names
                for quant_type in sorted(self._wanted.get(name, ()))
            ]
            for one in candidates:
                one.offer_plain(importance)
            hessian = statistics["hessian"].to(self._device)
            order = hessian.diagonal().argsort(descending=True, stable=True)
            for damp in DAMPS:
                try:
                    inv_chol, used_damp = factor_inverse(hessian, damp, order)
                except NumericalError as error:
                    raise NumericalError(f"{names[0]}: {error}") from error
                for one in candidates:
                    blocks = round_matrix(
                        one.weight, one.plain, one.quant_type, inv_chol=inv_chol, order=order
                    )
                    one.offer(blocks, used_damp)
                del inv_chol
            for one in candidates:
                one.refine(hessian)
        self.choices += [one.choice() for one in candidates]
        return {(one.name, one.quant_type): one.blocks for one in candidates}


class _Candidates:
    """Encodings of one matrix as they are offered, of which the best is kept."""

    def __init__(
        self, name: str, quant_type: QuantType, checkpoint: Checkpoint, held_out: torch.Tensor
    ) -> None:
        import torch

        self.name = name
        self.quant_type = quant_type
        self.weight = torch.from_numpy(checkpoint.read(name)).to(held_out.device)
        self._held_out = held_out
        self._plain_error = self._error = float("inf")
        self._damp: float | None = None

    def offer_plain(self, importance: Float32Array) -> None:
        """Encode with importance alone; it comes first, and all others take its scales."""
        rows = self.weight.cpu().numpy()
        self.plain = encode_rows(rows, self.quant_type, importance=importance)
        self.offer(self.plain, None)

    def offer(self, blocks: ByteArray, damp: float | None) -> None:
        """Keep the encoding if its output errs less on held-out inputs; the plain one is first."""
        import torch

        decoded = torch.from_numpy(decode_rows(blocks, self.quant_type, self.weight.shape[1]))
        difference = self.weight - decoded.to(self.weight.device)
        error = float((self._held_out @ difference.T).square().sum())
        if damp is None:
            self._plain_error = error
        if damp is None or error < self._error:
            self.blocks, self._error, self._damp = blocks, error, damp

    def refine(self, hessian: torch.Tensor) -> None:
        """Offer better codes for the best encoding, unless that is the plain one."""
        if self._damp is not None:
            blocks = refine_blocks(
                self.weight,
                self.blocks,
                self.quant_type,
                hessian=hessian,
                damp=self._damp,
                n_sweeps=N_SWEEPS,
            )
            self.offer(blocks, self._damp)

    def choice(self) -> Choice:
        relative = self._error / self._plain_error if self._plain_error else 1.0
        return Choice(self.name, self.quant_type, self._damp, relative)
