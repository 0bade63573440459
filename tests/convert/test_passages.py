"""Users' calibration text in each form that is taken, and the program that reads it."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from convert.calibrate import open_calibration
from convert.calibration import (
    Conversation,
    PlainText,
    load_conversations,
    load_tokenizer,
    tokenize_passage,
)
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.imatrix import read_imatrix
from convert.passages import (
    BUILT_IN_TOKENS,
    MAX_SEQUENCE_LENGTH,
    PIECE_CHARACTERS,
    SMALL_VOCABULARY,
    built_in_passages,
    calibration_sequences,
    load_passages,
    load_pieces,
)
from quant_eval.suite import EVALUATION_TEXT
from qwq_local.cli import main
from tests.tokens import n_tokens_at_least

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


QWEN = 152_064


def built_in(vocab_size: int) -> list[Conversation]:
    return [one for one in built_in_passages(vocab_size) if isinstance(one, Conversation)]


def test_the_built_in_set_has_all_kinds_from_early_on() -> None:
    """Catches a package built without its data, and a set whose first part is of one kind."""
    passages = built_in(QWEN)
    assert len({one.digest for one in passages}) == len(passages)
    kinds = {"mathematics", "code", "choice", "puzzles", "planning", "tables", "worksheets"}
    kinds |= {"tools", "prose", "science", "chinese", "german", "arabic", "korean"}
    assert kinds <= {one.kind for one in passages}
    assert len({one.kind for one in passages[:40]}) >= 12
    assert all(one.reasoning and one.answer for one in passages)


def test_the_built_in_set_fills_the_default() -> None:
    """Catches a default that cannot be had, and thoughts all shorter than a sequence."""
    passages = built_in(QWEN)
    lengths = [n_tokens_at_least(one.reasoning) for one in passages]
    total = sum(lengths) + sum(n_tokens_at_least(one.answer) for one in passages)
    total += sum(n_tokens_at_least(str(m["content"])) for one in passages for m in one.messages)
    assert total >= BUILT_IN_TOKENS
    assert sum(n > MAX_SEQUENCE_LENGTH for n in lengths) >= 10
    assert max(lengths) > 2 * MAX_SEQUENCE_LENGTH


def test_a_small_vocabulary_means_small_problems() -> None:
    """Catches nano-qwq calibrated on what it never learnt."""
    small = built_in(SMALL_VOCABULARY - 1)
    assert {"arithmetic", "compare", "letters"} <= {one.kind for one in small}
    n = [len(one.reasoning) + len(one.answer) for one in small]
    assert max(n) < 2000
    assert len(small) > 200


def test_nothing_is_both_calibrated_and_evaluated_on() -> None:
    """Catches a score that says how well the calibration text is remembered."""
    evaluated = load_conversations(EVALUATION_TEXT)
    for vocab_size in (SMALL_VOCABULARY - 1, QWEN):
        passages = built_in(vocab_size)
        assert {one.digest for one in passages}.isdisjoint(one.digest for one in evaluated)
        prompts = {str(one.messages) for one in passages}
        assert prompts.isdisjoint(str(one.messages) for one in evaluated)


def test_what_is_longer_than_a_sequence_goes_on_in_the_next(small: Path) -> None:
    """Catches the end of long thoughts dropped, or said twice."""
    number = "".join(f"{n}, " for n in range(1500))
    long = Conversation("long", (PROMPT,), f"Count: {number}", "Done.")
    with Checkpoint.open(small) as checkpoint:
        pieces = calibration_sequences(checkpoint, [long], n_tokens=None)
        whole = tokenize_passage(long, load_tokenizer(small)).ids
        some = calibration_sequences(checkpoint, [long, long], n_tokens=3000)
    assert len(whole) > 2 * MAX_SEQUENCE_LENGTH
    assert [one for piece in pieces for one in piece] == list(whole)
    assert {len(piece) for piece in pieces[:-1]} == {MAX_SEQUENCE_LENGTH}
    assert [len(piece) for piece in some] == [MAX_SEQUENCE_LENGTH, 3000 - MAX_SEQUENCE_LENGTH]


def test_a_reply_that_was_cut_has_no_end(small: Path) -> None:
    """Catches a thought that was stopped at a limit and looks as if it had come to its end."""
    tokenizer = load_tokenizer(small)

    def reply(answer: str) -> str:
        one = Conversation("cut", (PROMPT,), "2 and 3", answer, is_cut=True)
        tokenized = tokenize_passage(one, tokenizer)
        assert tokenized.stop == len(tokenized.ids)
        return str(tokenizer.decode(list(tokenized.ids[tokenized.n_prompt :])))

    assert reply("") == "2 and 3"
    assert reply("It is") == "2 and 3\n</think>\n\nIt is"
    whole = Conversation("cut", (PROMPT,), "2 and 3", "")
    assert whole.digest != replace(whole, is_cut=True).digest


def test_pieces_lose_nothing_and_end_with_words(tmp_path: Path) -> None:
    """Catches a text that is scored in part, or cut in the middle of a word."""
    words = [f"word{n}" for n in range(3000)]
    path = tmp_path / "book.txt"
    path.write_text(" ".join(words[:2000]) + "\n" + "\n".join(words[2000:]))
    pieces = [one.text for one in load_pieces(path) if isinstance(one, PlainText)]
    assert len(pieces) > 2
    assert all(len(one) <= PIECE_CHARACTERS for one in pieces)
    assert " ".join(pieces).split() == words
    path.write_text("x" * (2 * PIECE_CHARACTERS + 1))
    assert [len(one.text) for one in load_pieces(path) if isinstance(one, PlainText)] == [
        PIECE_CHARACTERS,
        PIECE_CHARACTERS,
        1,
    ]
