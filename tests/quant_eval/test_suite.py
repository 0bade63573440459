"""What is asked, how it is graded, and files that do not belong to the reference."""

from pathlib import Path

import pytest

from convert.calibration import load_conversations
from convert.errors import QwqError
from convert.passages import built_in_passages
from quant_eval import suite
from quant_eval.pipeline import CALIBRATION
from quant_eval.results import EvaluationSettings
from quant_eval.tasks import TASKS, Problem
from qwq_local import QwQ
from qwq_local.local import LocalModel
from tests.fakes import FakeEngine, describe_fake
from tests.synthetic import CHAT_TEMPLATE


def telling(*replies: str) -> QwQ:
    return QwQ(LocalModel(FakeEngine(*replies), describe_fake(CHAT_TEMPLATE), Path("fake")))


def test_the_built_in_texts_share_nothing() -> None:
    """Catches an evaluation on what GPTQ was calibrated on."""
    calibration = {one.digest for one in (*load_conversations(CALIBRATION), *built_in_passages())}
    evaluation = {one.digest for one in suite.read_evaluation_text(None, general=True)[0]}
    assert len(evaluation) > 160
    assert not calibration & evaluation


def test_the_text_for_other_models_is_broad() -> None:
    """Catches a judgement of QwQ by nano-qwq's sums alone, and of nano-qwq by what it never saw."""
    own, own_sha256 = suite.read_evaluation_text(None)
    conversations, sha256 = suite.read_evaluation_text(None, general=True)
    assert {one.kind for one in own} == set(TASKS)
    kinds = {one.kind for one in conversations[:24]}
    assert {"mathematics", "code", "reasoning", "tools", "prose", "chinese", "arabic"} <= kinds
    assert all(one.reasoning and one.answer for one in conversations)
    assert any(one.tools for one in conversations if one.kind == "tools")
    assert sha256 != own_sha256


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
    with pytest.raises(QwqError, match="holds no conversation"):
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
