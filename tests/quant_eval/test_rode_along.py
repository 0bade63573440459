"""`qwq eval reference --calibration`: one pass over the layers serves both commands."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from convert.layer_stream import LayerStream
from qwq_local.cli import main
from tests.synthetic import sums, write_checkpoint


def qwq(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the program in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["qwq", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_reference_comes_from_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches layers run again in secret, other states than a run gives, and another text's."""
    folder = write_checkpoint(tmp_path / "model", config={"num_hidden_layers": 2})
    text, other = tmp_path / "text.jsonl", tmp_path / "other.jsonl"
    lines = [json.dumps(asdict(one) | {"tools": []}) for one in sums(8)]
    text.write_text("\n".join(lines[:5]))
    other.write_text("\n".join(lines[3:]))
    made, kept, run = (tmp_path / name for name in ("calibration", "kept", "run"))
    read = ("--text", other, "--evaluation", text)
    assert qwq(monkeypatch, "calibrate", folder, *read, "--device", "cpu", "-o", made) == 0
    reference = ("eval", "reference", folder, "--tokens", "1000")
    assert qwq(monkeypatch, *reference, "--text", text, "-o", run) == 0

    with monkeypatch.context() as without_layers:
        without_layers.delattr(LayerStream, "layers")
        rode = (*reference, "--calibration", made)
        assert qwq(without_layers, *rode, "--text", text, "-o", kept) == 0
        capsys.readouterr()
        assert qwq(without_layers, *rode, "--text", other, "-o", tmp_path / "none") == 1
    assert "lacks 3 of 5 passages" in capsys.readouterr().err

    assert (kept / "reference.json").read_bytes() == (run / "reference.json").read_bytes()
    # float16 keeps 11 bits, and batches of other sizes add up in another order.
    states = [np.load(path / "states.npy") for path in (kept, run)]
    np.testing.assert_allclose(states[0], states[1], rtol=0, atol=2e-3)
