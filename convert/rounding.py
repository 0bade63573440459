"""Rows of K-quants that were rounded with their Hessians, for the exporter to write.

For each matrix the plain encoding with importance competes with GPTQ rounding at several dampings,
the best of which is refined; the one whose output errs least on held-out inputs wins, so that none
is worse than without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING

from convert.calibrate import IMATRIX_NAMES, Calibration
from convert.checkpoint import Checkpoint, Float32Array
from convert.code_feedback import factor
from convert.code_layout import LAYOUTS
from convert.decode import decode_rows
from convert.encode import ByteArray, QuantType, encode_rows, row_nbytes
from convert.errors import NumericalError, QwqError
from convert.estimate import Estimate, estimate_rounding, sites
from convert.gguf_export import SLICE_N_WEIGHTS
from convert.gptq_rounding import refine_blocks, round_matrix
from convert.hessian import too_few_tokens
from convert.imatrix import read_imatrix
from convert.layer_stream import INPUT_SITES, threads_for
from convert.qwen2 import tensor_specs
from convert.rounding_report import Choice
from convert.source_reader import cut_into_slices
from convert.tensor_error import measure_error

if TYPE_CHECKING:
    import torch

DAMPS = (0.02, 0.1, 0.5)
"""More damping trusts the Hessian less; which is best depends on how many tokens it saw."""
N_SWEEPS = 1

_LINEAR = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_SITE_OF = {linear: site for site, linears in INPUT_SITES.items() for linear in linears}


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
        self._checkpoint = checkpoint
        self._calibration = calibration
        self._device = device
        self._imatrix = read_imatrix(calibration.path / IMATRIX_NAMES[0])
        self._gguf_names = {spec.name: spec.gguf_name for spec in tensor_specs(checkpoint.model)}
        self._lock = Lock()
        self._encoded: dict[tuple[str, QuantType], ByteArray] = {}
        self._choices: dict[tuple[str, QuantType], Choice] = {}
        self.expect(wanted)

    @property
    def description(self) -> str:
        """What decides the codes, beside the checkpoint and the quant types."""
        calibration = self._calibration
        return (
            f"gptq by activity, {N_SWEEPS} sweep over codes and scales, "
            f"{calibration.n_fitted} tokens of {calibration.calibration_sha256}"
        )

    def estimate(self, *, n_ahead: int) -> Estimate:
        """What all of it takes on this machine's processor, with n_ahead slices at a time."""
        work = estimate_rounding(
            self._checkpoint.model,
            n_types=len(frozenset().union(*self._wanted.values())),
            n_dampings=len(DAMPS),
            n_sweeps=N_SWEEPS,
            n_held_out=self._calibration.n_held_out,
        )
        return replace(work, peak_nbytes=work.peak_nbytes + self.kept_nbytes(n_ahead=n_ahead))

    def token_lines(self) -> list[str]:
        """On how many tokens its Hessians are, and whether those are too few."""
        n_fitted, n_columns = self._calibration.n_fitted, self._n_columns
        line = (
            f"Hessians of {n_fitted:,} tokens, {n_fitted / n_columns:.1f} for each of up to "
            f"{n_columns:,} columns, judged by {self._calibration.n_held_out:,} held out"
        )
        warning = too_few_tokens(n_fitted, n_columns)
        return [line] if warning is None else [line, warning]

    def token_document(self) -> dict[str, object]:
        """The same as JSON values."""
        n_fitted, n_columns = self._calibration.n_fitted, self._n_columns
        return {
            "calibration_sha256": self._calibration.calibration_sha256,
            "n_tokens": n_fitted,
            "n_held_out": self._calibration.n_held_out,
            "tokens_per_column": round(n_fitted / n_columns, 2),
            "warning": too_few_tokens(n_fitted, n_columns),
        }

    @property
    def _n_columns(self) -> int:
        """Of the widest matrix."""
        return max(n_in for n_in, _ in sites(self._checkpoint.model))

    def kept_nbytes(self, *, n_ahead: int) -> int:
        """Most bytes of encoded matrices at a time.

        n_ahead: slices between reading and writing. A matrix is there from the first slice of any
        that shares its inputs to its own last one, far apart where a shard ends between them.
        """
        slices = cut_into_slices(self._checkpoint, SLICE_N_WEIGHTS)
        last = {piece.info.name: piece.index for piece in slices}
        first: dict[tuple[int, str], int] = {}
        change = [0] * (len(slices) + n_ahead + 1)
        for piece in slices:
            if self._wanted.get(piece.info.name) and piece.start == 0:
                begun = first.setdefault(_site_of(piece.info.name), piece.index)
                n_out, n_in = piece.info.shape
                types = self._wanted[piece.info.name]
                nbytes = n_out * sum(row_nbytes(one, n_in) for one in types)
                change[begun] += nbytes
                change[last[piece.info.name] + n_ahead] -= nbytes
        return max(accumulate(change))

    def expect(self, wanted: Mapping[str, frozenset[QuantType]]) -> None:
        """From now on rows will be asked for of these matrices in these types alone."""
        self._wanted = {
            name: types & LAYOUTS.keys() for name, types in wanted.items() if _LINEAR.match(name)
        }
        self._released: set[str] = set()
        self._encoded.clear()

    def rows(self, name: str, quant_type: QuantType, start: int, stop: int) -> ByteArray | None:
        """Encoded rows start to stop of a matrix; None where it is not rounded here.

        Raises NumericalError for a Hessian that is zero or indefinite, OverflowError as
        encode_rows() does.
        """
        if quant_type not in self._wanted.get(name, ()):
            return None
        assert name not in self._released, name
        with self._lock:
            if (name, quant_type) not in self._encoded:
                self._encode_site(*_site_of(name))
            return self._encoded[name, quant_type][start:stop]

    def release(self, name: str) -> None:
        """Let a matrix go whose last row is written; others of its site stay for as long as needed.

        It does not wait for another site that is being encoded.
        """
        self._released.add(name)
        for quant_type in self._wanted.get(name, ()):
            self._encoded.pop((name, quant_type), None)

    def choice(self, name: str, quant_type: QuantType) -> Choice | None:
        """How a matrix was encoded, once any of its rows was asked for; None: not here."""
        return self._choices.get((name, quant_type))

    def _importance_of(self, name: str, n_in: int) -> Float32Array:
        """As the imatrix file has it, so that the plain encoding is the one without Hessians."""
        importance = self._imatrix.importance_of(self._gguf_names[name], n_in)
        if importance is None:
            raise QwqError(
                f"{name}: the calibration's imatrix has no entry for it; calibrate again"
            )
        return importance

    def _encode_site(self, layer_index: int, site: str) -> None:
        """Make all wanted encodings of the matrices that read from one site."""
        import torch

        names = [f"model.layers.{layer_index}.{linear}.weight" for linear in INPUT_SITES[site]]
        with torch.inference_mode(), threads_for(self._checkpoint.model):
            statistics = self._calibration.statistics(layer_index, site)
            held_out = statistics["held_out"].to(self._device)
            importance = self._importance_of(names[0], len(statistics["importance"]))
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
                    upper, used_damp = factor(hessian, damp, order)
                except NumericalError as error:
                    raise NumericalError(f"{names[0]}: {error}") from error
                for one in candidates:
                    blocks = round_matrix(
                        one.weight, one.plain, one.quant_type, upper=upper, order=order
                    )
                    one.offer(blocks, used_damp)
                    if used_damp != damp:
                        one.raised += ((damp, used_damp),)
                del upper
            for one in candidates:
                one.refine(hessian)
        for one in candidates:
            self._choices[one.name, one.quant_type] = one.choice()
            self._encoded[one.name, one.quant_type] = one.blocks


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
        self._least_error = float("inf")  # of any encoding, fit or not
        self.raised: tuple[tuple[float, float], ...] = ()

    def offer_plain(self, importance: Float32Array) -> None:
        """Encode with importance alone; it comes first, and all others take its scales."""
        rows = self.weight.cpu().numpy()
        self.plain = encode_rows(rows, self.quant_type, importance=importance)
        self.offer(self.plain, None)

    def offer(self, blocks: ByteArray, damp: float | None) -> None:
        """Keep the encoding if its output errs less on held-out inputs; the plain one is first.

        But for the plain one, its weights have to keep within the type's limits too.
        """
        import torch

        decoded = torch.from_numpy(decode_rows(blocks, self.quant_type, self.weight.shape[1]))
        difference = self.weight - decoded.to(self.weight.device)
        error = float((self._held_out @ difference.T).square().sum())
        self._least_error = min(self._least_error, error)
        if damp is None:
            self._plain_error = error
        elif error >= self._error or self._is_spoiled(blocks):
            return
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
        return Choice(
            self.name,
            self.quant_type,
            self._damp,
            relative_error=self._error / self._plain_error if self._plain_error else 1.0,
            raised=self.raised,
            spoiled=self._least_error < self._error,
        )

    def _is_spoiled(self, blocks: ByteArray) -> bool:
        """Whether an exporter would refuse it, which judges weights and knows no inputs."""
        rows = self.weight.cpu().numpy()
        return bool(measure_error(rows, blocks, self.quant_type).problem(self.quant_type))


def _site_of(name: str) -> tuple[int, str]:
    """Layer and input site of a linear's matrix."""
    found = _LINEAR.fullmatch(name)
    assert found is not None, name
    return int(found[1]), _SITE_OF[found[2]]
