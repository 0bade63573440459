"""The memory that `qwq convert gptq` says it will take, against what a process really takes."""

import json
import sys
from pathlib import Path

import pytest

from tests.processes import run_whole
from tests.synthetic import write_checkpoint

EXPORTS = """
import json, resource, sys
from pathlib import Path
import torch
from convert.checkpoint import Checkpoint
from convert.estimate import estimate_gptq
from convert.gptq import GptqSettings
from convert.gptq_export import export_gptq
from tests.synthetic import sums

torch.set_num_threads(1)
settings = GptqSettings(other_damps=(0.2,), clip_steps=0)
work, measured, counted = Path(sys.argv[1]), [], []
for name in ("narrow", "wide"):
    with Checkpoint.open(work / name) as source:
        out = work / f"{name}-gptq"
        export_gptq(source, out, settings=settings, calibration=sums(4), n_tokens=300)
        counted.append(estimate_gptq(source.model, settings, 300).peak_nbytes)
    measured.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
(work / "peaks.json").write_text(json.dumps([measured[1] - measured[0], counted[1] - counted[0]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts as Linux does, with glibc's malloc")
def test_the_peak_is_what_was_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a copy of the rows that is not counted, and one counted that is not made.

    A narrow checkpoint first, so that what Python and torch take cancels; then one whose rows are
    most of it. Its matrices are small enough for malloc to keep some when they are freed, which
    those of real models are not: the threshold makes it return them.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4000000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one_layer = {"num_hidden_layers": 1, "max_window_layers": 1}
    wide = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 16}
    write_checkpoint(tmp_path / "narrow", config=one_layer)
    write_checkpoint(tmp_path / "wide", config=one_layer | wide)
    run_whole([sys.executable, "-c", EXPORTS, str(tmp_path)], log=tmp_path / "log.txt")
    measured, counted = json.loads((tmp_path / "peaks.json").read_text())
    assert measured == pytest.approx(counted, rel=0.25)
