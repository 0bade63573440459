"""What numbers depend on beside files and settings: versions, and the packages' own code."""

import shutil
from pathlib import Path

import pytest

import quant_eval
from quant_eval import pipeline
from quant_eval.environment import modules_sha256, sources_sha256


def test_the_hash_follows_what_makes_numbers(tmp_path: Path) -> None:
    """Catches results kept under changed graders, and all measured again for a word of the page."""
    folder = tmp_path / "quant_eval"
    shutil.copytree(quant_eval.__path__[0], folder, ignore=shutil.ignore_patterns("nano", "data"))
    (folder / "nano").mkdir()
    before = modules_sha256([folder])
    for shown in ("report.py", "plot.py", "run_cli.py"):
        (folder / shown).write_text((folder / shown).read_text() + "# said otherwise\n")
    assert modules_sha256([folder]) == before
    seen = {before}
    for made in ("divergence.py", "measurement.py", "tasks/choice.py", "benchmarks/runner.py"):
        (folder / made).write_text((folder / made).read_text() + "# made otherwise\n")
        seen.add(modules_sha256([folder]))
    assert len(seen) == 5
    (folder / "tasks" / "choice.py").rename(folder / "tasks" / "chosen.py")
    assert modules_sha256([folder]) not in seen


def test_what_is_kept_is_of_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches conditions of kept results that leave the code out."""
    before = pipeline._conditions("checkpoint")
    assert pipeline._conditions("checkpoint") == before
    monkeypatch.setattr(pipeline, "sources_sha256", lambda: "other code")
    assert pipeline._conditions("checkpoint") != before
    assert len(sources_sha256()) == 64
