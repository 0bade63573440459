"""What is asked, how it is graded, and files that do not belong to the reference."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from convert.calibration import load_conversations
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gguf_export import export_gguf
from quant_eval import suite
from quant_eval.pipeline import CALIBRATION, NANO_CHECKPOINT
from quant_eval.results import EvaluationSettings
from quant_eval.tasks import TASKS, Problem
from qwq_local import QwQ
from tests.fakes import FakeEngine, describe_fake
from tests.synthetic import CHAT_TEMPLATE, write_checkpoint

SETTINGS = EvaluationSettings(n_tokens=150, n_problems=1, max_tokens=400)


def no_progress(_stage: str, _done: int, _total: int) -> None:
    pass


def telling(*replies: str) -> QwQ:
    return QwQ(FakeEngine(*replies), describe_fake(CHAT_TEMPLATE), Path("fake"))


def worked(problem: Problem) -> str:
    return f"{problem.reasoning}\n</think>\n\n{problem.answer}"


def test_the_built_in_texts_share_nothing() -> None:
    """Catches an evaluation on what GPTQ was calibrated on."""
    calibration = {one.digest for one in load_conversations(CALIBRATION)}
    evaluation = {one.digest for one in load_conversations(suite.EVALUATION_TEXT)}
    assert not calibration & evaluation


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
    first = suite.choose_problems(EvaluationSettings(n_problems=2))
    other = suite.choose_problems(EvaluationSettings(n_problems=2, seed=1))
    assert suite.problems_digest(first) == suite.problems_digest(first)
    assert suite.problems_digest(first) != suite.problems_digest(other)


def test_evaluation_text_may_not_be_empty(tmp_path: Path) -> None:
    """Catches a mean over nothing."""
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(QwqError, match="holds no conversation"):
        suite.read_evaluation_text(path)
    with pytest.raises(QwqError, match="no such file"):
        suite.read_evaluation_text(tmp_path / "none.jsonl")


def test_worked_replies_solve_every_kind() -> None:
    """Catches a grader that meets the answer in another form than the runtime gives it."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=2))
    qwq = telling(*map(worked, problems))
    settings = replace(SETTINGS, max_tokens=2000)
    accuracy, replies = suite.solve(qwq, problems, settings, on_progress=no_progress)
    assert set(accuracy) == set(TASKS)
    assert {kind: (one.n, one.n_correct, one.n_cut) for kind, one in accuracy.items()} == (
        dict.fromkeys(TASKS, (2, 2, 0))
    )
    assert len(replies) == len(problems)


def test_wrong_and_cut_replies_count_against() -> None:
    """Catches a reply that is cut and yet passes, and cuts that nobody counts."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))[:2]
    qwq = telling("It is so.\n</think>\n\nNo idea.", "x" * 500)
    accuracy, _ = suite.solve(qwq, problems, SETTINGS, on_progress=no_progress)
    first, second = (accuracy[problem.kind] for problem in problems)
    assert (first.n, first.n_correct, first.n_cut) == (1, 0, 0)
    assert (second.n, second.n_correct, second.n_cut) == (1, 0, 1)


def test_every_problem_has_its_own_seed() -> None:
    """Catches one stream of random numbers for all replies, and seeds that change by chance."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))
    qwq = telling(*map(worked, problems))
    suite.solve(qwq, problems, replace(SETTINGS, seed=7), on_progress=no_progress)
    assert isinstance(qwq.engine, FakeEngine)
    assert qwq.engine.seeds == list(range(7, 7 + len(problems)))


def test_time_ends_the_tasks() -> None:
    """Catches a slow engine that is waited for without end."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))
    settings = replace(SETTINGS, task_seconds=-1.0)
    accuracy, replies = suite.solve(telling(), problems, settings, on_progress=no_progress)
    assert accuracy == {}
    assert replies == []


def test_a_mute_model_fails_the_check() -> None:
    """Catches a file that loads and says nothing."""
    suite.check_model(telling("Some thought"))
    with pytest.raises(QwqError, match="its reply is empty"):
        suite.check_model(telling(""))


def test_large_models_are_measured_in_part() -> None:
    """Catches hours of sampling that nobody asked for."""
    assert suite.default_settings(4_000_000).n_problems > 0
    large = suite.default_settings(32_000_000_000)
    assert large.n_problems == 0
    assert large.n_tokens <= 4096


@pytest.fixture(scope="module")
def exam() -> Iterator[suite.Exam]:
    conversations, _ = suite.read_evaluation_text(None)
    with Checkpoint.open(NANO_CHECKPOINT) as checkpoint:
        yield suite.prepare(
            checkpoint,
            conversations,
            suite.choose_problems(SETTINGS)[:2],
            settings=SETTINGS,
            on_progress=no_progress,
        )


@pytest.mark.slow
def test_the_exam_is_bounded(exam: suite.Exam) -> None:
    """Catches a bound that is not kept, or passages cut in the middle."""
    n_scored = [passage.stop - passage.n_prompt for passage in exam.passages]
    assert sum(n_scored[:-1]) < SETTINGS.n_tokens <= sum(n_scored)
    assert len(exam.reference.hidden) == len(exam.passages)


@pytest.mark.slow
def test_bf16_is_the_floor_and_2_bits_are_not(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches logits of the wrong row, of the wrong passage or of the wrong model."""
    results = {}
    for name in ("BF16", "Q2_K"):
        path = tmp_path / f"nano-{name}.gguf"
        export_gguf(exam.reference.checkpoint, name, path)
        results[name] = suite.evaluate(path, exam, sha256="", threads=1, on_progress=no_progress)
    floor = results["BF16"].divergence["reply"]
    assert floor.kl_nats.value < 1e-4
    assert floor.perplexity.value == pytest.approx(floor.reference_perplexity.value, rel=0.01)
    assert results["Q2_K"].divergence["reply"].kl_nats.value > 20 * floor.kl_nats.value
    bf16 = results["BF16"]
    assert [example.question for example in bf16.examples] == list(suite.QUESTIONS)
    assert sum(one.n for one in bf16.accuracy.values()) == 2
    assert bf16.speed is not None
    assert bf16.engine == "llama.cpp"


@pytest.mark.slow
def test_files_of_another_model_are_refused(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches a divergence between tokens that do not mean the same."""
    vocab_size = exam.reference.checkpoint.model.vocab_size
    for config, reason in (
        ({}, "has a vocabulary of 320 tokens"),
        ({"vocab_size": vocab_size}, "its tokenizer gives other ids"),
    ):
        path = tmp_path / f"{len(config)}.gguf"
        with Checkpoint.open(write_checkpoint(tmp_path / str(len(config)), config=config)) as other:
            export_gguf(other, "Q8_0", path)
        with pytest.raises(QwqError, match=reason):
            suite.evaluate(path, exam, sha256="", threads=1, on_progress=no_progress)


@pytest.mark.slow
def test_a_cut_file_is_refused(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches a damaged file that reaches native code."""
    path = tmp_path / "nano.gguf"
    export_gguf(exam.reference.checkpoint, "Q8_0", path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(QwqError, match="it is cut"):
        suite.evaluate(path, exam, sha256="", threads=1, on_progress=no_progress)
