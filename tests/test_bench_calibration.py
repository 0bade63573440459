"""What `make bench-calibrate` says of its figures: errors, and texts drawn anew."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks.calibration import (
    NANO,
    Judge,
    Table,
    calibration_texts,
    clustered,
    evaluation_texts,
    gptq_settings,
)
from benchmarks.quantizers import REASONING, export_gptq
from convert.calibration import load_conversations
from quant_eval.nano.corpus import held_out_lines
from tests.processes import Cost


@pytest.mark.parametrize("n_draws", [1, 8])
def test_errors_cover_what_passages_and_draws_add(n_draws: int) -> None:
    """Catches an error that takes tokens, passages or draws for independent where they are not.

    The mean is 2; passages of few and many tokens and whole draws lie off it, each by its own.
    """
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 40, size=150)
    n_covered = n_naive = 0
    for _ in range(400):
        by_passage = rng.normal(0, 1, size=150)
        by_draw = rng.normal(0, 0.2, size=(n_draws, 1)) if n_draws > 1 else 0.0
        both = rng.normal(0, 0.5, size=(n_draws, 150))
        sums = (2 + by_passage + by_draw + both) * n_tokens
        mean, error = clustered(sums, n_tokens)
        assert mean == pytest.approx(sums.sum() / (n_draws * n_tokens.sum()))
        n_covered += abs(mean - 2) < 2 * error
        n_naive += abs(mean - 2) < 2 * sums.std() / np.sqrt(sums.size) / n_tokens.mean()
    assert n_covered > 350
    assert n_draws == 1 or n_naive < 330  # else this could not tell


def test_texts_of_all_draws_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one text drawn twice, passages that are scored, and others where a text is given."""
    monkeypatch.setattr("benchmarks.calibration.WORK", tmp_path)
    first, *drawn = calibration_texts(REASONING, 3, is_nano=True)
    assert first == REASONING
    lines = [set(path.read_text(encoding="utf-8").splitlines()) for path in drawn]
    assert len(lines[0] & lines[1]) < len(lines[0]) / 10
    assert not (lines[0] | lines[1]) & set(held_out_lines(150, seed=1))
    assert len(load_conversations(drawn[0])) > len(load_conversations(REASONING))
    first, *drawn = calibration_texts(REASONING, 3, is_nano=False)
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (first, *drawn)]
    assert sorted(texts[0]) == sorted(texts[1]) == sorted(texts[2])
    assert texts[0] != texts[1] != texts[2]


def test_each_text_has_columns_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a text that is scored with another's passages or held against another's base."""
    judges = {"nano-qwq": Judge(NANO, None, 2), "first": Judge(NANO, None, 1)}
    table = Table(judges)
    cost = Cost(wall_s=1, cpu_s=2, peak_nbytes=3 * 2**20)
    weighed = "model.layers.0.self_attn.o_proj.weight"
    [shard] = NANO.glob("*.safetensors")
    weight = load_file(shard)[weighed]
    table.line("halved", [({weighed: weight / 2}, cost)] * 2, is_base=True)
    table.line("once more", [({weighed: weight / 2}, cost)] * 2)
    table.cost("no divergence", [cost])
    head, _, base, same, other = capsys.readouterr().out.splitlines()
    assert head.count("|") == base.count("|") == same.count("|") == other.count("|") == 8
    assert "| nano-qwq: KL, nats | of the base's | first: KL, nats | of the base's |" in head
    cells = base.split("|")
    for i, name in ((2, "nano-qwq"), (4, "first")):
        Table({name: judges[name]}).line("halved", [({weighed: weight / 2}, cost)] * 2)
        assert capsys.readouterr().out.splitlines()[-1].split("|")[2] == cells[i]
    assert cells[2] != cells[4]
    assert same.count("1.00 ± 0.00") == 2
    for line in (base, same, other):
        assert line.endswith("| 2 | 3 |")


def test_texts_to_score_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches nano-qwq's conversations scored where a file was meant, and the reverse."""
    monkeypatch.setattr("benchmarks.calibration.WORK", tmp_path)
    [(name, path)] = evaluation_texts(None, n_per_kind=3, is_nano=True)
    assert name == "nano-qwq"
    assert path is not None
    assert path.read_text(encoding="utf-8").splitlines() == held_out_lines(3, seed=1)
    assert list(evaluation_texts(None, n_per_kind=3, is_nano=False)) == [("built-in", None)]
    asked = [Path("nano-qwq"), Path("some/code.jsonl")]
    found = evaluation_texts(asked, n_per_kind=3, is_nano=False)
    assert list(found) == [(name, path), ("code", asked[1])]


def test_gptq_takes_settings_that_no_option_has(tmp_path: Path) -> None:
    """Catches a comparison of settings in which all are the shipped ones."""
    out = tmp_path / "made"
    settings = {"bits": 8, "order": "columns", "damp": 0.4, "other_damps": [], "n_sweeps": 0}
    export_gptq(out, NANO, REASONING, n_tokens=256, settings=settings)
    told = json.loads((out / "quantize_config.json").read_text(encoding="utf-8"))
    assert (told["bits"], told["damp_percent"]) == (8, 0.4)


@pytest.mark.parametrize("text", ['{"order', "[1]", '{"dmp": 0.01}', '{"damp": 0}'])
def test_odd_settings_are_refused_at_once(text: str) -> None:
    """Catches settings that fail, or are ignored, after everything else was made."""
    assert gptq_settings('{"damp": 0.01}') == {"damp": 0.01}
    with pytest.raises(argparse.ArgumentTypeError, match="give JSON such as"):
        gptq_settings(text)
