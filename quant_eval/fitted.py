"""`qwq quantize --fit`: calibrate where that was not done yet, then choose the types that fit."""

from pathlib import Path
from typing import TYPE_CHECKING

from convert.budget_cli import FitOptions, fit_recipe
from convert.calibrate import (
    Calibration,
    CalibrationSettings,
    calibrate,
    open_calibration,
    plan_calibration,
)
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.files import check_disk_space
from convert.imatrix import read_imatrix
from convert.layer_stream import find_device
from convert.plan import plan_file
from quant_eval.manifest import Manifest
from quant_eval.pipeline import Output, Plan, Progress, calibration_passages, model_name

if TYPE_CHECKING:
    from rich.console import Console

SETTINGS = CalibrationSettings(sensitivities=True)


def plan_fitted(
    checkpoint: Checkpoint,
    manifest: Manifest,
    options: FitOptions,
    *,
    threads: int,
    console: "Console",
    on_progress: Progress,
) -> Plan:
    """A plan of the one file, after saying what is in it; it is always written anew.

    The calibration stays in the manifest's folder for the next size.
    """
    folder = manifest.folder / "calibration"
    _calibrate(checkpoint, folder, on_progress=on_progress)
    imatrix = read_imatrix(folder / "imatrix.gguf")
    recipe, _ = fit_recipe(checkpoint, folder, imatrix, options, console=console, n_threads=threads)
    path = manifest.folder / f"{model_name(checkpoint)}-{recipe.name}.gguf"
    file = plan_file(checkpoint, recipe, path, imatrix=imatrix)
    check_disk_space(manifest.folder, file.nbytes)
    output = Output(recipe.name, path, False, file.nbytes, file.bits_per_weight)
    return Plan(checkpoint, (output,), (file,))


def _calibrate(checkpoint: Checkpoint, folder: Path, *, on_progress: Progress) -> None:
    """Calibrate, but for a folder of the same text and settings; one with Hessians too will do.

    Raises QwqError for any other.
    """
    plan = plan_calibration(
        checkpoint,
        folder,
        passages=calibration_passages(checkpoint),
        settings=SETTINGS,
    )
    if folder.exists():
        there, wanted = map(_what_decides, (open_calibration(folder, checkpoint), plan.result))
        if there != wanted:
            raise QwqError(
                f"{folder}: is of {there}, and {wanted} would be taken now; move it away to "
                "calibrate anew, or use it as it is: `qwq convert gguf --fit --calibration`"
            )
        return
    calibrate(
        plan,
        device=find_device(None),
        on_progress=lambda done, total: on_progress("calibrating, tokens", done, total),
        on_sensitivities=lambda done, total: on_progress("sensitivities, steps", done, total),
    )


def _what_decides(calibration: Calibration) -> str:
    """All that types are chosen by, beside the checkpoint."""
    return (
        f"{calibration.n_tokens:,} tokens of set {calibration.calibration_sha256[:12]}, "
        f"{calibration.n_sampled:,} for sensitivities"
    )
