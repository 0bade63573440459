"""What `make bench-calibrate` says of its figures: errors, and texts drawn anew."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.calibration import calibration_texts, clustered
from benchmarks.quantizers import REASONING
from convert.calibration import load_conversations
from quant_eval.nano.corpus import held_out_lines


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
