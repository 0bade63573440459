"""One file measured: what is asked and graded, what is kept, and what does not belong."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from convert.calibration import load_conversations
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gguf_export import export_gguf
from quant_eval import suite
from quant_eval.kept import Kept
from quant_eval.measurement import Known, Measured, measure_file, solve
from quant_eval.results import Attempt, EvaluationSettings
from quant_eval.rows import file_result
from quant_eval.tasks import TASKS
from qwq_local import QwQ
from tests.fakes import FakeEngine
from tests.quant_eval.measuring import (
    SETTINGS,
    no_progress,
    problems_alone,
    telling,
    text_alone,
    worked,
)
from tests.synthetic import write_checkpoint


def ask(qwq: QwQ, exam: suite.Exam, kept: Kept) -> tuple[Attempt, ...]:
    return solve("fake", lambda: qwq, exam, Known(kept, "conditions"), no_progress)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "kept.jsonl")


def test_worked_replies_solve_every_kind(kept: Kept) -> None:
    """Catches a grader that meets the answer in another form than the runtime gives it."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=2))
    settings = replace(SETTINGS, max_tokens=2000)
    attempts = ask(telling(*map(worked, problems)), problems_alone(problems, settings), kept)
    assert {one.kind for one in attempts} == set(TASKS)
    assert [one.correct for one in attempts] == [True] * len(problems)
    assert {one.finish_reason for one in attempts} <= {"stop", "tool_calls"}


def test_wrong_and_cut_replies_count_against(kept: Kept) -> None:
    """Catches a reply that is cut and yet passes, and cuts that nobody counts."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))[:2]
    qwq = telling("It is so.\n</think>\n\nNo idea.", " ".join(map(str, range(300))))
    wrong, cut = ask(qwq, problems_alone(problems), kept)
    assert (wrong.correct, wrong.finish_reason) == (False, "stop")
    assert (cut.correct, cut.finish_reason) == (False, "length")


def test_every_reply_has_its_own_seed(kept: Kept) -> None:
    """Catches one stream of random numbers for all replies, and seeds that change by chance."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))[:3]
    qwq = telling(*map(worked, problems + problems))
    settings = replace(SETTINGS, seed=7, n_replies=2)
    attempts = ask(qwq, problems_alone(problems, settings), kept)
    assert isinstance(qwq.engine, FakeEngine)
    assert qwq.engine.seeds == list(range(7, 13))
    assert [one.problem for one in attempts[:3]] == [one.problem for one in attempts[3:]]
    other = telling(*map(worked, problems))
    ask(other, problems_alone(problems, replace(SETTINGS, seed=7, reply_seed=900)), kept)
    assert isinstance(other.engine, FakeEngine)
    assert other.engine.seeds == [900, 901, 902]


def test_time_ends_the_tasks(kept: Kept) -> None:
    """Catches a slow engine that is waited for without end."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))
    exam = problems_alone(problems, replace(SETTINGS, task_seconds=-1.0))
    assert ask(telling(), exam, kept) == ()


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    """Catches replies that are asked for twice, and a half-written line that spoils the rest.

    The model knows the rest of the replies only: asked again it would have nothing to say.
    """
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))
    exam = problems_alone(problems, replace(SETTINGS, max_tokens=2000))
    path = tmp_path / "kept.jsonl"
    whole = ask(telling(*map(worked, problems)), exam, Kept(path))
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:6]) + "\n" + lines[7][:40])  # three are whole
    rest = telling(*map(worked, problems[3:]))
    again = ask(rest, exam, Kept(path))
    assert isinstance(rest.engine, FakeEngine)
    assert len(rest.engine.seeds) == len(problems) - 3
    assert [(one.problem, one.answer) for one in again] == [
        (one.problem, one.answer) for one in whole
    ]
    assert ask(telling(), exam, Kept(path)) == again  # now all is known, timings included


def test_what_is_kept_is_of_these_conditions(tmp_path: Path) -> None:
    """Catches a reply with another limit, seed or model that is taken for this one's."""
    problems = suite.choose_problems(EvaluationSettings(n_problems=1))[:1]
    kept = Kept(tmp_path / "kept.jsonl")
    exam = problems_alone(problems)
    ask(telling(worked(problems[0])), exam, kept)
    for other in (replace(SETTINGS, max_tokens=100), replace(SETTINGS, seed=1)):
        qwq = telling("No.\n</think>\n\nNo.")
        assert ask(qwq, problems_alone(problems, other), kept)[0].answer == "No."
    known = Known(kept, "another file")
    no = telling("No.\n</think>\n\nNo.")
    assert solve("fake", lambda: no, exam, known, no_progress)[0].answer == "No."


@pytest.mark.parametrize("text", ["", "\x00\xff", "[]\n{}\nnull\n3", '{"key": 1, "value": {}}'])
def test_a_damaged_memory_is_an_empty_one(tmp_path: Path, text: str) -> None:
    """Catches a crash on lines that are none of ours."""
    path = tmp_path / "kept.jsonl"
    path.write_text(text, encoding="latin-1")
    kept = Kept(path)
    assert kept.get("key") is None
    kept.put("key", {"a": 1})
    assert Kept(path).get("key") == {"a": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", config={"num_hidden_layers": 2}
    )


@pytest.fixture(scope="module")
def exam(folder: Path) -> Iterator[suite.Exam]:
    short = sorted(load_conversations(suite.EVALUATION_TEXT), key=lambda one: len(one.reasoning))[
        :3
    ]
    settings = replace(SETTINGS, max_tokens=4)
    with Checkpoint.open(folder) as checkpoint:
        yield text_alone(checkpoint, short, settings)


LONG = replace(SETTINGS, n_tokens=100_000)


def measure(path: Path, exam: suite.Exam, kept: Kept) -> Measured:
    return measure_file(path, exam, kept, sha256="", threads=1, on_progress=no_progress)


def test_bf16_is_the_floor_and_2_bits_are_not(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches logits of the wrong row, of the wrong passage or of the wrong model.

    And a measurement that opens a file, or asks it anything, when all is known.
    """
    results = {}
    for name in ("BF16", "Q2_K"):
        path = tmp_path / f"tiny-{name}.gguf"
        export_gguf(exam.reference.checkpoint, name, path, threads=1)
        memory = tmp_path / f"{name}.jsonl"
        first = measure(path, exam, Kept(memory))
        results[name] = file_result(first)
        path.write_bytes(path.read_bytes()[:-1000])  # it could not be opened any more
        again = measure(path, exam, Kept(memory))
        assert again.attempts == first.attempts
        assert again.questions == first.questions
        for name_of_passage, scores in first.scores.items():
            assert (again.scores[name_of_passage].kl_nats == scores.kl_nats).all()
    floor = results["BF16"].divergence["reply"]
    assert floor.kl_nats.value < 1e-5
    assert floor.perplexity.value == pytest.approx(floor.reference_perplexity.value, rel=0.003)
    assert results["Q2_K"].divergence["reply"].kl_nats.value > 20 * floor.kl_nats.value
    bf16 = results["BF16"]
    assert [example.question for example in bf16.examples] == list(suite.QUESTIONS)
    assert bf16.behaviour is None
    assert bf16.engine == "llama.cpp"
    assert json.loads((tmp_path / "BF16.jsonl").read_text().split("\n")[1])["value"]["elapsed_s"]


def test_plain_text_is_scored_and_has_no_parts(folder: Path, tmp_path: Path) -> None:
    """Catches text forced through a template, a first token scored, and thoughts out of nothing.

    And what is kept of it read back as a thought.
    """
    book, lines = tmp_path / "book.txt", tmp_path / "lines.jsonl"
    book.write_text("Ropes creak against iron rings, and the tide slaps at the steps.\n" * 120)
    talk = {"messages": [{"role": "user", "content": "Hm?"}], "reasoning": "Oh.", "answer": "Yes."}
    lines.write_text('{"text": "One line of its own."}\n{"text": "x"}\n' + json.dumps(talk))
    path = tmp_path / "model.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "BF16", path, threads=1)
        exams = {
            text.name: text_alone(checkpoint, suite.read_evaluation_text(text)[0], LONG)
            for text in (book, lines)
        }
        pieces = exams["book.txt"].tokens
        assert len(pieces.passages) > 1
        assert set(pieces.kinds) == {"text"}
        for again in range(2):  # measured, and then read back
            measured = measure(path, exams["book.txt"], Kept(tmp_path / "kept.jsonl"))
            parts = file_result(measured).divergence
            assert not {"thought", "answer"} & set(parts), again
            assert parts["reply"].n_tokens == sum(len(one.ids) - 1 for one in pieces.passages)
            assert parts["kind text"].n_tokens == parts["reply"].n_tokens
            assert parts["reply"].kl_nats.value < 1e-3
        mixed = file_result(
            measure(path, exams["lines.jsonl"], Kept(tmp_path / "mixed"))
        ).divergence
    assert mixed["thought"].n_passages == mixed["answer"].n_passages == 1
    assert mixed["thought"].n_tokens + mixed["answer"].n_tokens < mixed["reply"].n_tokens


def test_files_of_another_model_are_refused(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches a divergence between tokens that do not mean the same, and a file that is cut."""
    path = tmp_path / "other.gguf"
    other = write_checkpoint(tmp_path / "other", config={"vocab_size": 384, "num_hidden_layers": 1})
    with Checkpoint.open(other) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
    with pytest.raises(QwqError, match="has a vocabulary of 384 tokens"):
        measure(path, exam, Kept(tmp_path / "kept.jsonl"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(QwqError, match="it is cut"):
        measure(path, exam, Kept(tmp_path / "kept.jsonl"))
