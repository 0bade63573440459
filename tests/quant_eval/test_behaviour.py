"""What is told of a reply whatever it says."""

from dataclasses import replace

import pytest

from quant_eval.behaviour import FLAGS, flags_of, summarize_behaviour, switches_language
from quant_eval.results import Attempt

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
    assert found.first_token_s == pytest.approx(0.1)
    assert summarize_behaviour([]) is None
