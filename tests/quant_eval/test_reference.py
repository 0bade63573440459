"""The streamed reference against transformers' whole model in float32."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.calibrate import CalibrationSettings, calibrate, plan_calibration
from convert.calibration import load_tokenizer, tokenize_conversation
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.layer_work import passing_work
from quant_eval import reference
from quant_eval.reference import Reference, final_hidden_states, kept_hidden_states
from tests.synthetic import sums, write_checkpoint

PASSAGES = [[7, 70, 200, 12, 90, 33, 61], [101, 102, 3], [5], [88, 250, 17], [9, 8, 7]]


def streamed(
    checkpoint: Checkpoint,
    folder: Path,
    passages: Sequence[Sequence[int]] = PASSAGES,
    *,
    batch_tokens: int = 8,
) -> Reference:
    """folder: where the layers are kept while they are run."""
    with passing_work(folder / "layers", {}) as work:
        return final_hidden_states(checkpoint, passages, work, batch_tokens=batch_tokens)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_logits_equal_transformers(
    tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches passages swapped, a norm left out, the wrong matrix, and slices that miss rows."""
    from transformers import Qwen2ForCausalLM

    config: dict[str, object] = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
    folder = write_checkpoint(tmp_path / "model", config=config, dtype=dtype)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    monkeypatch.setattr(reference, "MATRIX_ROWS", 100)
    monkeypatch.setattr(reference, "READ_ROWS", 30)
    monkeypatch.setattr(reference, "MAX_CHUNK_ELEMENTS", 2 * 320)
    with Checkpoint.open(folder) as checkpoint:
        finished = streamed(checkpoint, tmp_path)
        spans = [(i, 0, len(ids)) for i, ids in enumerate(PASSAGES)]
        parts = [(0, 1, 6), (3, 2, 3), (1, 0, 2)]
        found = [list(rows) for rows in finished.logits(spans + parts)]
    for (i, start, stop), chunks in zip(spans + parts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([PASSAGES[i]])).logits[0, start:stop].numpy()
        assert all(len(chunk) <= 2 for chunk in chunks)
        np.testing.assert_allclose(np.concatenate(chunks), expected, rtol=0, atol=2e-3)


def test_rows_that_nobody_takes_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a passage that is scored against what was left of the one before it."""
    folder = write_checkpoint(tmp_path / "model", config={"num_hidden_layers": 1})
    monkeypatch.setattr(reference, "MAX_CHUNK_ELEMENTS", 3 * 320)
    with Checkpoint.open(folder) as checkpoint:
        finished = streamed(checkpoint, tmp_path)
        spans = [(i, 0, len(ids)) for i, ids in enumerate(PASSAGES)]
        whole = [list(rows) for rows in finished.logits(spans)]
        firsts = []
        for rows in finished.logits(spans):
            firsts.append(next(rows))
            rows.close()
    for chunks, first in zip(whole, firsts, strict=True):
        np.testing.assert_array_equal(first, chunks[0])


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_batches_do_not_matter(batch_tokens: int, tmp_path: Path) -> None:
    """Catches padding that is looked at, and hidden states that end up at another passage."""
    folder = write_checkpoint(tmp_path / "model", config={"num_hidden_layers": 2})
    with Checkpoint.open(folder) as checkpoint:
        one = streamed(checkpoint, tmp_path)
        other = streamed(checkpoint, tmp_path, batch_tokens=batch_tokens)
    for a, b in zip(one.hidden, other.hidden, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)  # the last of float16's 11 bits


def test_states_that_rode_along_are_the_same(tmp_path: Path) -> None:
    """Catches states of calibration text taken for the evaluation's, and passages swapped.

    And an evaluation text that counts in the imatrix, or another text's states used.
    """
    folder = write_checkpoint(tmp_path / "model", config={"num_hidden_layers": 2})
    text, evaluation = sums(6), sums(9)[6:]
    settings = CalibrationSettings(hessians=False, batch_tokens=200)
    with Checkpoint.open(folder) as checkpoint:
        for out, riders in (("plain", []), ("riding", evaluation)):
            plan = plan_calibration(
                checkpoint, tmp_path / out, passages=text, settings=settings, evaluation=riders
            )
            calibrate(plan)
        tokenizer = load_tokenizer(folder)
        passages = [tokenize_conversation(one, tokenizer).ids for one in evaluation]
        expected = streamed(checkpoint, tmp_path, passages)
        kept = kept_hidden_states(checkpoint, passages, tmp_path / "riding")
        for ours, theirs in zip(kept.hidden, expected.hidden, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3)
        with pytest.raises(QwqError, match="lacks 1 of 1 passages"):
            kept_hidden_states(checkpoint, [[1, 2, 3]], tmp_path / "riding")
        with pytest.raises(QwqError, match="--evaluation TEXT"):
            kept_hidden_states(checkpoint, passages, tmp_path / "plain")
    for name in ("imatrix.gguf", "calibration.json"):
        plain, riding = ((tmp_path / out / name).read_bytes() for out in ("plain", "riding"))
        assert plain == riding
