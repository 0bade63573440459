"""The loop detector: soon, and never on honest text."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from qwq_local.repetition import FEWEST_REPEATED, LONGEST_PERIOD, MOST_PUNCTUATION, LoopDetector

HONEST = ("quant_eval/data/evaluation.jsonl", "convert/data/calibration.jsonl")


def noticed_after(ids: list[int], piece: bytes = b"a") -> int | None:
    """How many ids it took."""
    detector = LoopDetector()
    return next((i + 1 for i, token in enumerate(ids) if detector.add(token, piece)), None)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 21, 22, 100, 300, LONGEST_PERIOD])
def test_every_period_is_noticed_after_three_repeats(period: int) -> None:
    """Would catch a period that is off by one, or missed."""
    start = [-2, -3, -4]
    loop = list(range(period)) * (2 + FEWEST_REPEATED)
    expected = len(start) + period + max(3 * period, FEWEST_REPEATED)
    assert noticed_after(start + loop) == expected


def test_two_repeats_and_near_repeats_are_no_loop() -> None:
    passage = list(range(100))
    assert noticed_after(passage * 3 + [-1]) is None
    changing = [token for i in range(50) for token in (*range(20), 1000 + i)]
    assert noticed_after(changing) is None


def test_signs_without_end_are_a_loop() -> None:
    signs = [int(i) for i in np.random.default_rng(0).integers(0, 97, 1000)]
    assert noticed_after(signs, b"a") is None
    assert noticed_after(signs, b"!? ") == MOST_PUNCTUATION
    assert noticed_after(signs, "é".encode()) is None


def test_honest_text_draws_no_alarm() -> None:
    """Measured on all conversations of the calibration and the evaluation: no false alarm."""
    tokenizer = Tokenizer.from_file("quant_eval/nano/checkpoint/tokenizer.json")
    n_texts = 0
    for name in HONEST:
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            conversation = json.loads(line)
            for text in (conversation.get("reasoning"), conversation.get("answer")):
                if not text:
                    continue
                encoding = tokenizer.encode(text, add_special_tokens=False)
                detector = LoopDetector()
                alarms = [
                    detector.add(token_id, token.encode())
                    for token_id, token in zip(encoding.ids, encoding.tokens, strict=True)
                ]
                assert not any(alarms), text
                n_texts += 1
    assert n_texts > 300
