"""What is told of a reply whatever it says."""

import math
from dataclasses import replace

import numpy as np
import pytest

from quant_eval.behaviour import FLAGS, flags_of, summarize_behaviour, switches_language
from quant_eval.paired import Sample
from quant_eval.results import Accuracy, Attempt, share_of

SOUND = Attempt(
    problem="p",
    kind="arithmetic",
    question="What is 1 + 1?",
    correct=True,
    reasoning="1 + 1 is 2, with \u03bb and \u00b5 as in formulas.",
    answer="2",
    finish_reason="stop",
    notices=(),
    thought_tokens=10,
    elapsed_s=1.0,
    first_token_s=0.5,
    tokens_per_s=20.0,
)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"notices": ("unfinished_thought",), "finish_reason": "length"}, "unfinished_thoughts"),
        ({"reasoning": "\n "}, "empty_thoughts"),
        ({"notices": ("repetition",)}, "loops"),
        ({"finish_reason": "repetition"}, "loops"),
        ({"answer": "\u4e8c"}, "language_switches"),
        ({"reasoning": "\u0434\u0432\u0430"}, "language_switches"),
        ({"finish_reason": "length"}, "cut_replies"),
    ],
)
def test_each_fault_is_told(changes: dict[str, object], flag: str) -> None:
    """Catches a fault that is read off the wrong field, and a sound reply that is blamed."""
    assert not any(flags_of(SOUND).values())
    flags = flags_of(replace(SOUND, **changes))  # type: ignore[arg-type]
    assert flags[flag]
    assert set(flags) == set(FLAGS)


def test_a_reply_in_the_language_of_the_question_is_no_switch() -> None:
    """Catches every reply to a Chinese question counted as one."""
    assert not switches_language("1 \u52a0 1?", "\u4e8c, two")
    assert switches_language("1 + 1?", "\u4e8c")


def test_shares_have_n_and_an_error() -> None:
    """Catches a share of other than all replies, and certainty from a few."""
    cut = replace(SOUND, problem="q", finish_reason="length", thought_tokens=30, first_token_s=0.1)
    found = summarize_behaviour([SOUND, cut, cut, cut])
    assert found is not None
    assert found.n_replies == 4
    assert found.cut_replies.value == 0.75
    assert found.loops.value == 0.0
    assert found.loops.standard_error is not None
    assert found.loops.standard_error > 0.1
    assert found.thought_tokens.value == 25.0
    assert found.first_token_s.value == pytest.approx(0.1)
    assert found.first_token_s.n == 4
    assert summarize_behaviour([]) is None


def test_more_replies_to_the_same_problems_are_not_more_problems() -> None:
    """Catches errors that shrink with replies that all say the same."""
    once = [
        replace(
            SOUND,
            problem=str(i),
            first_token_s=0.1 + 0.01 * i,
            correct=i % 3 > 0,
            finish_reason="stop" if i % 3 else "length",
        )
        for i in range(12)
    ]
    single, fourfold = summarize_behaviour(once), summarize_behaviour(once * 4)
    assert single is not None
    assert fourfold is not None
    for name in (*FLAGS, "thought_tokens", "first_token_s"):
        one, four = getattr(single, name), getattr(fourfold, name)
        assert four.value == pytest.approx(one.value)
        assert four.n == 4 * one.n
        near = 0.2 if name == "first_token_s" else 1e-9  # quantiles fall between other replies
        assert four.standard_error == pytest.approx(one.standard_error, rel=near)
    few, many = Accuracy.of(once), Accuracy.of(once * 4)
    assert (many.n, many.n_problems, many.n_correct) == (48, 12, 32)
    assert many.standard_error == pytest.approx(few.standard_error)
    assert (many.low, many.high) == pytest.approx((few.low, few.high))


@pytest.mark.parametrize(("n", "n_with"), [(16, 16), (16, 0), (20, 7), (96, 48)])
def test_one_reply_a_problem_has_the_source_s_interval(n: int, n_with: int) -> None:
    """Catches a rule for clusters that is not Agresti and Coull's where clusters are single."""
    share = share_of(Sample.of((str(i), i < n_with) for i in range(n)))
    assert share is not None
    centre = (n_with + 2) / (n + 4)
    error = math.sqrt(centre * (1 - centre) / (n + 4))
    assert share.estimate.value == n_with / n
    assert share.estimate.standard_error == pytest.approx(error)
    assert share.low == pytest.approx(max(0, centre - 1.96 * error), abs=1e-4)
    assert share.high == pytest.approx(min(1, centre + 1.96 * error), abs=1e-4)


def test_intervals_of_several_replies_cover() -> None:
    """Catches an interval as if replies to one problem were independent.

    400 draws of 20 problems with 4 replies each, whose problems are solved always or never by
    chance 0.8; the interval must hold 0.8 in at least 365. It does in about 96 %, so the chance of
    a false alarm is below 1e-4; errors over replies would hold it in about 70 %.
    """
    rng = np.random.default_rng(3)
    n_held = 0
    for _ in range(400):
        solved = rng.random(20) < 0.8
        share = share_of(Sample.of((str(i), one) for i, one in enumerate(solved) for _ in "1234"))
        assert share is not None
        n_held += share.low <= 0.8 <= share.high
    assert n_held >= 365, n_held
