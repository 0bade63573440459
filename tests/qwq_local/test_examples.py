"""The shortest programs work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("example", sorted(Path("examples").glob("*.py")), ids=lambda p: p.stem)
def test_it_runs(example: Path, bf16_gguf: Path) -> None:
    """Would catch an example that a change of the API left behind."""
    result = subprocess.run(
        [sys.executable, str(example), str(bf16_gguf)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
