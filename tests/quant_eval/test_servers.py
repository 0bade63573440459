"""Tasks through our own server with nano-qwq, several at once, and benchmarks from files."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from convert.calibration import load_tokenizer
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.gguf_export import export_gguf
from quant_eval.behaviour import summarize_behaviour
from quant_eval.kept import Kept
from quant_eval.manifest import Manifest
from quant_eval.measurement import Known, measure_server, solve
from quant_eval.nano import CHECKPOINT
from quant_eval.options import UNLIMITED_S
from quant_eval.pipeline import Ask, Server, make_report, measure_servers
from quant_eval.report import caption_of, summary_of, write_html
from quant_eval.results import EvaluationSettings, Report
from quant_eval.rows import file_result
from quant_eval.suite import QUESTIONS, Exam, choose_problems, longest_prompt, rough_count
from quant_eval.tasks import TASKS
from qwq_local import QwQ
from qwq_local.rope import NATIVE_LENGTH, plan_rope
from tests.fakes import FakeEngine
from tests.quant_eval.measuring import no_progress, problems_alone, telling
from tests.quant_eval.test_verdict_cli import run
from tests.qwq_local.server.running import Running, running
from tests.qwq_local.test_remote import Scripted, chunk, playing
from tests.synthetic import write_checkpoint

SETTINGS = EvaluationSettings(n_problems=1, max_tokens=200)


@pytest.fixture(scope="module")
def served_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "nano-qwq-Q8_0.gguf"
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
    return path


@pytest.fixture(scope="module")
def server(served_file: Path) -> Iterator[Running]:
    with running(lambda: QwQ.open(served_file, context=2048, threads=1)) as served:
        yield served


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with playing() as server:
        yield server


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    path = tmp_path / "gsm8k.jsonl"
    rows = ({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(10, 16))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def ask_server(
    url: str, exam: Exam, memory: Path, at_once: int
) -> dict[str, tuple[str, bool | None]]:
    measured = measure_server(url, exam, Kept(memory), at_once=at_once, on_progress=no_progress)
    assert measured.path is None
    return {one.problem: (one.reasoning + one.answer, one.correct) for one in measured.attempts}


def test_replies_do_not_depend_on_how_many_come_at_once(server: Running, tmp_path: Path) -> None:
    """Catches seeds or answers that go to another problem, and replies asked for twice."""
    problems = choose_problems(SETTINGS)
    exam = problems_alone(problems, SETTINGS)
    url = f"{server.url}/v1"
    one = ask_server(url, exam, tmp_path / "one.jsonl", 1)
    four = ask_server(url, exam, tmp_path / "four.jsonl", 4)
    assert len(one) == len(problems) == 7
    assert four == one
    lines = (tmp_path / "four.jsonl").read_text().split("\n")
    (tmp_path / "half.jsonl").write_text("\n".join(lines[:9]))
    assert ask_server(url, exam, tmp_path / "half.jsonl", 4) == one
    late = replace(exam, settings=replace(SETTINGS, task_seconds=-1.0))
    assert len(ask_server(url, late, tmp_path / "half.jsonl", 4)) == 7  # all are kept
    assert ask_server(url, late, tmp_path / "none.jsonl", 4) == {}


def test_a_report_of_a_server(
    server: Running,
    gsm8k: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a size or a KL made up for a server, and a run that needs a checkpoint for it."""
    options = ("--base-url", f"{server.url}/v1", "--at-once", "3", "-o", tmp_path / "out")
    few = ("--problems", "1", "--task", gsm8k, "--task-problems", "2", "--max-tokens", "200")
    assert run(monkeypatch, "run", *options, *few) == 0
    assert "gsm8k" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = report["files"]
    assert row["engine"] == "server"
    assert not {"nbytes", "bits_per_weight"} & row.keys()
    assert "checkpoint_sha256" not in report
    assert row["accuracy"]["mathematics/gsm8k"]["n"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a server shows no KL" in page
    assert "mathematics/gsm8k" in page
    assert run(monkeypatch, "run") == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert run(monkeypatch, "run", "a.gguf") == 2
    assert "give --reference" in capsys.readouterr().err


def test_a_server_is_compared_by_its_tasks(
    server: Running,
    served_file: Path,
    gsm8k: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches problems or sides that are not the same on both, and a KL made up for a server.

    A server of the file itself makes the same replies with the same seeds.
    """
    url = ("--base-url", f"{server.url}/v1")
    few = ("--problems", "1", "--task", gsm8k, "--task-problems", "3", "--max-tokens", "200")
    options = (*few, "--reference", CHECKPOINT, "--tokens", "50", "-o", tmp_path / "out")
    assert run(monkeypatch, "compare", served_file, *url, *options, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["first"] == served_file.name
    assert document["second"].endswith(f" at {urlsplit(server.url).netloc}")
    rows = {row["name"]: row for row in document["differences"]}
    assert not {"kl", "nll", "top1"} & rows.keys()
    assert not any("floor" in row for row in rows.values())
    assert (rows["solved"]["n"], rows["solved_mathematics/gsm8k"]["n"]) == (10, 3)
    assert {row["difference"] for row in rows.values()} == {0.0}
    assert run(monkeypatch, "compare", *url, *url, *few, "-o", tmp_path / "out") == 0
    assert "solved: mathematics/gsm8k" in capsys.readouterr().out
    for arguments, words in (
        ((served_file, *options), "1 files and 0 servers"),
        ((served_file, *url), "give --reference"),
        ((*url, *url, "--floor", served_file), "is for numbers that a server does not show"),
        ((*url, *url, "--problems", "0", "-o", tmp_path), "give --problems or --task"),
    ):
        assert run(monkeypatch, "compare", *arguments) == 2
        assert words in capsys.readouterr().err
    assert run(monkeypatch, "gate", server.url, "--reference", CHECKPOINT, "--limits") == 2
    assert "unmeasured is not passed" in capsys.readouterr().err


def reply_of(*chunks: Any) -> list[Any]:
    return [*chunks, "[DONE]"]


THOUGHT = "So. " * 20


@pytest.mark.parametrize("field", ["reasoning_content", "content"])
def test_thoughts_that_a_server_cut_are_counted(
    scripted: Scripted, tmp_path: Path, field: str
) -> None:
    """Catches a share of 0 % for a server that says nothing of them, or leaves thoughts in."""
    settings = replace(SETTINGS, max_tokens=7)
    problems = choose_problems(settings)[:4]
    close = {} if field == "reasoning_content" else {"content": "</think>"}
    whole = reply_of(
        chunk(**{field: THOUGHT}), chunk(**close), chunk(content="\n\nYes."), chunk("stop")
    )
    cut = reply_of(chunk(**{field: THOUGHT}), chunk("length"))
    scripted.scripts += [whole, cut, cut, whole, *[whole] * 2]
    measured = measure_server(
        scripted.url,
        problems_alone(problems, settings),
        Kept(tmp_path / "k"),
        at_once=1,
        on_progress=no_progress,
    )
    behaviour = summarize_behaviour(measured.attempts)
    assert behaviour is not None
    shares = (behaviour.unfinished_thoughts, behaviour.cut_replies, behaviour.empty_thoughts)
    assert [share.value for share in shares] == [0.5, 0.5, 0.0]
    assert {one.reasoning for one in measured.attempts} == {THOUGHT}
    assert {one.answer for one in measured.attempts} == {"Yes.", ""}
    assert behaviour.thought_tokens.value >= 1


def test_servers_are_sampled_with_the_checkpoints_defaults(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches QwQ's numbers for another checkpoint, thoughts cut short, and a reference made."""
    source = shutil.copytree(CHECKPOINT, tmp_path / "nano")
    generation = source / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"temperature": 0.9}))
    few = ("--base-url", scripted.url, "--at-once", "1", "--problems", "1")
    n_replies = len(TASKS) + len(QUESTIONS)
    for options, temperature in (((), 0.6), (("--reference", source), 0.9)):
        scripted.bodies.clear()
        scripted.scripts += [
            reply_of(chunk(reasoning="So."), chunk("stop", content="4"))
        ] * n_replies
        out = tmp_path / str(temperature)
        assert run(monkeypatch, "run", *few, *options, "-o", out) == 0
        assert {body["temperature"] for body in scripted.bodies} == {temperature}
        assert {body["max_tokens"] for body in scripted.bodies} == {32_768}
        assert len(scripted.bodies) == n_replies
        assert not (out / "reference").exists()
        report = json.loads((out / "report.json").read_text())
        assert report["settings"]["task_seconds"] == UNLIMITED_S


def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Catches one dead server that takes the others' results with it."""
    servers = [Server("http://127.0.0.1:9/v1", 2)]
    measured, failures = measure_servers(
        servers, Manifest(tmp_path), Ask(SETTINGS), on_progress=no_progress
    )
    assert measured == []
    assert all(isinstance(failure, QwqError) for failure in failures)
    assert len(failures) == 1


def test_ungraded_replies_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    """Catches a reply that no rule was known for counted as a pass or a failure."""
    path = tmp_path / "ifeval.jsonl"
    known = {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    unknown = {"prompt": "b", "instruction_id_list": ["language:other"], "kwargs": [{}]}
    path.write_text(f"{json.dumps(known)}\n{json.dumps(unknown)}")
    settings = replace(SETTINGS, n_problems=0)
    exam = problems_alone(choose_problems(settings, [path]), settings)
    qwq = telling(*["So.\n</think>\n\nFine."] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwQ, "open", lambda *_, **__: qwq)
        measured = measure_server(
            "http://x/v1", exam, Kept(tmp_path / "k"), at_once=1, on_progress=no_progress
        )
    row = file_result(measured)
    assert row.accuracy["instructions/ifeval"].n == 1
    assert row.accuracy["instructions/ifeval"].n_ungraded == 1
    report = make_report(None, Manifest(tmp_path), Ask(settings), [measured])
    assert isinstance(report, Report)
    assert "1 replies of instructions/ifeval" in caption_of(report)
    write_html(tmp_path / "report.html", report)
    assert "Not graded, for no rule is known" in (tmp_path / "report.html").read_text()
    assert "a server shows no KL" in summary_of(report)[0]


@pytest.mark.parametrize("n_tokens", [20_000, 60_000])
def test_needles_lie_on_both_sides_of_the_switch(n_tokens: int, tmp_path: Path) -> None:
    """Catches texts that are too short for YaRN, and a context that has no room for them."""
    settings = replace(SETTINGS, n_problems=0, needles=(n_tokens,))
    problems = choose_problems(settings, (), len)[:2]
    assert longest_prompt(problems, len) > n_tokens
    qwq = telling(*(f"So.\n</think>\n\n{one.expected}" for one in problems), *["</think>"] * 2)
    engine = qwq.engine
    assert isinstance(engine, FakeEngine)
    engine.rope_plan = plan_rope("auto", 131_072)
    exam = problems_alone(problems, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwQ, "open", lambda *_, **__: qwq)
        measured = measure_server(
            "http://x/v1", exam, Kept(tmp_path / "k"), at_once=1, on_progress=no_progress
        )
    assert [one.correct for one in measured.attempts] == [True, True]
    above = n_tokens > NATIVE_LENGTH
    assert [rope is not None for rope in engine.ropes[:2]] == [above, above]


@pytest.mark.slow
def test_a_needle_above_the_switch_is_read_with_yarn(tmp_path: Path) -> None:
    """Catches a long prompt that an engine cuts, refuses or reads with native rope.

    The model is narrow and cannot know the number: that its reply is graded is what counts.
    """
    config = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 40_960,
        "vocab_size": 832,
    }
    folder = write_checkpoint(tmp_path / "narrow", config=config)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    path = tmp_path / "narrow.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "BF16", path, threads=1)
        tokenizer = load_tokenizer(checkpoint.path)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    settings = replace(SETTINGS, n_problems=0, needles=(NATIVE_LENGTH + 128,), max_tokens=4)
    problems = choose_problems(settings, (), count)[:1]
    exam = problems_alone(problems, settings)
    context = longest_prompt(problems, count) + settings.max_tokens
    with QwQ.open(path, context=context, threads=1) as qwq:
        known = Known(Kept(tmp_path / "k"), "these")
        (attempt,) = solve("narrow", lambda: qwq, exam, known, no_progress)
        assert qwq.engine.rope_plan.native_length == NATIVE_LENGTH
    assert "rope" in attempt.notices
    assert attempt.correct is False


def test_the_draw_is_the_seeds(gsm8k: Path) -> None:
    """Catches other problems on another day, and a draw that is always the first ones."""
    settings = replace(SETTINGS, n_problems=0, n_task_problems=3)
    draws = [
        [one.key for one in choose_problems(replace(settings, seed=seed), [gsm8k])]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) > 1
    assert all(len(draw) == 3 for draw in draws)
    assert rough_count("abcdefgh") == 2
