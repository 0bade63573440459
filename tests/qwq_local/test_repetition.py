"""The loop detector: soon, and never on honest text."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
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


def test_it_speaks_up_at_the_very_token_that_counting_all_periods_would() -> None:
    """Would catch a period that is looked for too late, or counted from the wrong token."""
    random = np.random.default_rng(7)
    n_alarms = 0
    for _ in range(12):
        ids: list[int] = []
        for period in random.choice([1, 2, 5, 20, 33, 100, 511, 512, 513], 6):
            passage = random.integers(0, random.choice([2, 3, 1000]), period).tolist()
            ids += passage * int(random.choice([1, 2, 4, 30 if period < 40 else 5]))
        newest_first: NDArray[np.int64] = np.full(LONGEST_PERIOD, -1)
        n_matched = np.zeros(LONGEST_PERIOD, dtype=np.int64)  # by period - 1
        n_enough = np.maximum(3 * np.arange(1, LONGEST_PERIOD + 1), FEWEST_REPEATED)
        detector = LoopDetector()
        for token_id in ids:
            n_matched = (n_matched + 1) * (newest_first == token_id)
            newest_first = np.append(token_id, newest_first[:-1])
            expected = bool((n_matched >= n_enough).any())
            assert detector.add(token_id, b"a") == expected
            n_alarms += expected
    assert n_alarms > 500


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
