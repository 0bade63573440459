"""The memory that `qwq calibrate` says it will take, against what a process really takes."""

import json
import sys
from pathlib import Path

import pytest

from tests.processes import run_whole
from tests.synthetic import write_checkpoint

CALIBRATIONS = """
import json, resource, sys
from pathlib import Path
import torch
from convert.calibrate import CalibrationSettings, calibrate, plan_calibration
from convert.checkpoint import Checkpoint
from tests.synthetic import sums

torch.set_num_threads(1)
settings = CalibrationSettings(hessians=True, batch_tokens=256)
work, measured, counted = Path(sys.argv[1]), [], []
for name in ("narrow", "wide"):
    with Checkpoint.open(work / name) as source:
        plan = plan_calibration(source, work / "out", passages=sums(9), settings=settings)
        calibrate(plan, force=True)
        counted.append(plan.estimate().peak_nbytes)
    measured.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
(work / "peaks.json").write_text(json.dumps([measured[1] - measured[0], counted[1] - counted[0]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts as Linux does, with glibc's malloc")
def test_the_peak_is_what_was_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the Hessians of a layer that stay while the next one fills its own.

    A narrow checkpoint first, so that what Python and torch take cancels; then one whose Hessians
    are half of it. It has layers enough for all that may pile up.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4000000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    layers = {"num_hidden_layers": 3}
    write_checkpoint(tmp_path / "narrow", config=layers)
    write_checkpoint(
        tmp_path / "wide", config=layers | {"hidden_size": 512, "intermediate_size": 4096}
    )
    run_whole([sys.executable, "-c", CALIBRATIONS, str(tmp_path)], log=tmp_path / "log.txt")
    measured, counted = json.loads((tmp_path / "peaks.json").read_text())
    assert measured == pytest.approx(counted, rel=0.2)
