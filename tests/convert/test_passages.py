"""Users' calibration text in each form that is taken, and the program that reads it."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from convert.calibrate import open_calibration
from convert.calibration import Conversation, PlainText, load_conversations
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.imatrix import read_imatrix
from convert.passages import built_in_passages, load_passages
from quant_eval.suite import read_evaluation_text
from qwq_local.cli import main

PROMPT = {"role": "user", "content": "What is 2 + 3?"}
EXPECTED = Conversation("conversation", (PROMPT,), "2 and 3 make 5.", "5")
RECORDS = (
    {"messages": [PROMPT], "reasoning": "2 and 3 make 5.", "answer": "5"},
    {
        "messages": [
            PROMPT,
            {"role": "assistant", "content": "5", "reasoning_content": "2 and 3 make 5."},
        ]
    },
    {
        "messages": [
            PROMPT,
            {"role": "assistant", "content": "<think>\n2 and 3 make 5.\n</think>\n\n5"},
        ]
    },
)


@pytest.mark.parametrize("record", RECORDS)
def test_a_reply_in_any_of_its_forms(tmp_path: Path, record: dict[str, object]) -> None:
    """Catches thoughts left inside the answer, or the reply left in the prompt."""
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert load_passages(path) == load_conversations(path) == [EXPECTED]


def test_plain_lines_and_files(tmp_path: Path) -> None:
    """Catches texts forced through a template, and blank lines counted."""
    lines, book = tmp_path / "lines.jsonl", tmp_path / "book.md"
    lines.write_text('{"text": "one"}\n{"text": "  "}\n\n{"text": "two"}\n')
    book.write_text("Once upon a time.\nThe end.")
    assert load_passages(lines) == [PlainText("one"), PlainText("two")]
    assert load_passages(book) == [PlainText("Once upon a time.\nThe end.")]


def test_parquet_rows(tmp_path: Path) -> None:
    """Catches columns that Parquet fills with nulls taken for values."""
    path = tmp_path / "text.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "text": ["one", None],
                "messages": [None, [PROMPT]],
                "reasoning": [None, "2 and 3 make 5."],
                "answer": [None, "5"],
                "kind": pyarrow.array([None, None], pyarrow.string()),
            }
        ),
        path,
    )
    assert load_passages(path) == [PlainText("one"), EXPECTED]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.jsonl", b'{"messages": []}\n', r"no\.jsonl:1: lacks messages"),
        ("no.jsonl", b"\n", "holds no text"),
        ("no.parquet", b"PAR1", "cannot be read as Parquet"),
        ("no.txt", b"\xff\xfe\x00", "no UTF-8"),
        ("no.txt", b" \n", "holds no text"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Catches a reader's own exception, and an empty calibration."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QwqError, match=message):
        load_passages(tmp_path / name)
    with pytest.raises(QwqError, match="no such file"):
        load_passages(tmp_path / "absent.txt")


def test_the_program(
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a plan that differs from the work, and paths or digests lost on the way."""
    out = tmp_path / "out"
    book = tmp_path / "book.txt"
    book.write_text("What is left when all is said? " * 40)
    arguments = ["qwq", "calibrate", small, "-o", out, "--text", book, "--device", "cpu", "--json"]

    def run(*more: str) -> tuple[dict[str, object], str]:
        monkeypatch.setattr("sys.argv", [*map(str, arguments), *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    planned, _ = run("--dry-run")
    assert not out.exists()
    done, shown = run()
    assert "memory:" in shown
    assert done.pop("elapsed_s") is not None
    assert done == planned
    with Checkpoint.open(small) as checkpoint:
        calibration = open_calibration(out, checkpoint)
    assert calibration.calibration_sha256 == done["calibration_sha256"]
    imatrix = read_imatrix(out / "imatrix.gguf")
    assert len(imatrix.importance) == 7
    assert set(imatrix.counts.values()) == {calibration.n_tokens}


def test_the_built_in_set_has_all_kinds_from_early_on() -> None:
    """Catches a package built without its data, and a set whose first part is of one kind."""
    passages = [one for one in built_in_passages() if isinstance(one, Conversation)]
    assert len({one.digest for one in passages}) > 200
    kinds = {"arithmetic", "mathematics", "code", "choice", "tools", "prose", "chinese", "german"}
    assert kinds <= {one.kind for one in passages}
    assert len({one.kind for one in passages[:40]}) >= 8
    assert all(one.reasoning and one.answer for one in passages)


def test_nothing_is_both_calibrated_and_evaluated_on() -> None:
    """Catches a score that says how well the calibration text is remembered."""
    evaluated, _ = read_evaluation_text(None)
    digests = {one.digest for one in built_in_passages()}
    assert digests.isdisjoint(one.digest for one in evaluated)
    prompts = {str(one.messages) for one in built_in_passages() if isinstance(one, Conversation)}
    assert prompts.isdisjoint(str(one.messages) for one in evaluated)
