"""What is asked, how it is graded, and files that do not belong to the reference."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest

from convert.calibration import Conversation, Passage, load_conversations
from convert.errors import QwqError
from convert.passages import built_in_passages
from convert.texts import MAKERS, Half, conversations
from quant_eval import suite
from quant_eval.pipeline import CALIBRATION
from quant_eval.results import EvaluationSettings
from quant_eval.tasks import TASKS, Problem
from qwq_local import QwQ
from qwq_local.local import LocalModel
from tests.fakes import FakeEngine, describe_fake
from tests.synthetic import CHAT_TEMPLATE
from tests.tokens import n_tokens_at_least

QWEN = 152_064


def telling(*replies: str) -> QwQ:
    return QwQ(LocalModel(FakeEngine(*replies), describe_fake(CHAT_TEMPLATE), Path("fake")))


def test_the_built_in_texts_share_nothing() -> None:
    """Catches an evaluation on what was calibrated on, in prompts or in replies."""
    calibration: list[Passage] = [*load_conversations(CALIBRATION), *built_in_passages(QWEN)]
    evaluation = suite.read_evaluation_text(None, general=True)[0]
    assert len(evaluation) > 160
    assert not {one.digest for one in calibration} & {one.digest for one in evaluation}
    for said in ("reasoning", "answer"):
        known = {getattr(one, said) for one in calibration}
        both = {getattr(one, said) for one in evaluation} & known
        both = {one for one in both if not one.startswith("<tool_call>")}
        assert all(len(one) < 40 for one in both), both  # a letter or a number


@pytest.mark.parametrize("seed", range(3))
def test_halves_share_nothing_whatever_the_seed(seed: int) -> None:
    """Catches two sets that are disjoint by the luck of their seeds."""
    n = 4 * len(MAKERS)
    mine, other = (
        list(islice(conversations(half, seed=seed, sizes=(1, 2)), n)) for half in get_args(Half)
    )
    assert not {str(one.messages) for one in mine} & {str(one.messages) for one in other}
    assert not {one.reasoning for one in mine} & {one.reasoning for one in other}
    assert len({str(one.messages) for one in mine}) == n


def test_the_text_for_other_models_is_broad_and_long() -> None:
    """Catches a judgement of QwQ by nano-qwq's sums, by short thoughts, or by a passage a kind.

    And of nano-qwq by what it never saw.
    """
    own, own_sha256 = suite.read_evaluation_text(None)
    text, sha256 = suite.read_evaluation_text(None, general=True)
    assert {one.kind for one in own} == set(TASKS)
    assert sha256 != own_sha256
    general = [one for one in text if isinstance(one, Conversation)]
    assert all(one.reasoning and one.answer for one in general)
    assert any(one.tools for one in general if one.kind == "tools")
    n_of_kind = Counter(one.kind for one in general)
    assert min(n_of_kind.values()) >= 8
    assert set(n_of_kind) >= {"mathematics", "code", "puzzles", "chinese", "arabic", "worksheets"}
    n_tokens = 0
    longest = 0
    kinds = set()
    for one in general:
        n = n_tokens_at_least(one.reasoning) + n_tokens_at_least(one.answer)
        if n_tokens < 16_384:
            longest = max(longest, n)
            kinds.add(one.kind)
        n_tokens += n
    assert n_tokens > 4 * 16_384
    assert longest > 4096
    assert kinds == set(n_of_kind)


def test_kinds_take_turns() -> None:
    """Catches a bounded evaluation that sees the first kind alone."""
    conversations, sha256 = suite.read_evaluation_text(None)
    n_kinds = len({one.kind for one in conversations})
    assert len({one.kind for one in conversations[:n_kinds]}) == n_kinds
    assert len(sha256) == 64
    problems = suite.choose_problems(EvaluationSettings(n_problems=3))
    assert [problem.kind for problem in problems] == [*TASKS] * 3
    assert suite.choose_problems(EvaluationSettings(n_problems=0)) == ()


def test_problems_are_known_by_what_they_ask() -> None:
    """Catches a stored result that is taken for one of other problems."""

    def names(problems: tuple[Problem, ...]) -> list[str]:
        return [suite.problem_name(problem) for problem in problems]

    first = suite.choose_problems(EvaluationSettings(n_problems=2))
    other = suite.choose_problems(EvaluationSettings(n_problems=2, seed=1))
    assert names(first) == names(first)
    assert not set(names(first)) & set(names(other))


def test_evaluation_text_may_not_be_empty(tmp_path: Path) -> None:
    """Catches a mean over nothing."""
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(QwqError, match="holds no text"):
        suite.read_evaluation_text(path)
    with pytest.raises(QwqError, match="no such file"):
        suite.read_evaluation_text(tmp_path / "none.jsonl")


def test_a_mute_model_fails_the_check() -> None:
    """Catches a file that loads and says nothing."""
    suite.check_model(telling("Some thought"))
    with pytest.raises(QwqError, match="its reply is empty"):
        suite.check_model(telling("</think>"))


def test_large_models_are_measured_in_part() -> None:
    """Catches hours of sampling that nobody asked for."""
    assert suite.default_settings(is_small=True).n_problems > 0
    large = suite.default_settings(is_small=False)
    assert large.n_problems == 0
    assert large.n_tokens <= 4096
