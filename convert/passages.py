"""What a model is calibrated on: the built-in set or users' files, as sequences of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from convert.calibration import (
    Conversation,
    Passage,
    PlainText,
    load_conversations,
    load_tokenizer,
    parse_conversation,
    read_json_lines,
    take_tokens,
    tokenize_passage,
)
from convert.checkpoint import Checkpoint
from convert.errors import CheckpointError, QwqError
from convert.texts import TURNS, conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SEQUENCE_LENGTH = 2048
BATCH_TOKENS = 2048
PIECE_CHARACTERS = 4000  # some 1,000 tokens of English, 2,500 of Chinese
HELD_OUT_EVERY = 8
"""Of the sequences that Hessians are made of, every eighth is held out to judge them by."""
SMALL_VOCABULARY = 4096
N_GENERATED = 370
GENERATED_SIZES = (1, 2, 3, 2, 4, 1, 3, 2, 5, 1, 3)
BUILT_IN_TOKENS = 128 * MAX_SEQUENCE_LENGTH
"""What the built-in text holds at least in the tokens of Qwen's models."""


def built_in_passages(vocab_size: int) -> list[Passage]:
    """The text that comes with the package, evenly mixed, so that any first part has all kinds.

    Long thoughts on mathematics, code, puzzles, tools, prose and more, in several languages. For a
    vocabulary below SMALL_VOCABULARY, whose model has learnt little else, nano-qwq's kinds of
    problems with some general ones among them.
    """
    if vocab_size < SMALL_VOCABULARY:
        return _mixed(_built_in("calibration.jsonl"), _built_in("general.jsonl"))
    return _mixed(_built_in("general.jsonl"), _generated())


@cache
def _generated() -> tuple[Conversation, ...]:
    every = conversations("calibration", seed=0, sizes=GENERATED_SIZES, turns=TURNS)
    return tuple(islice(every, N_GENERATED))


def load_all_passages(paths: Sequence[Path] | None, vocab_size: int) -> list[Passage]:
    """The passages of all files, one after the other; without any, the built-in ones."""
    if not paths:
        return built_in_passages(vocab_size)
    return [passage for path in paths for passage in load_passages(path)]


def load_passages(path: Path) -> list[Passage]:
    """Read a file of calibration text, by its suffix.

    .jsonl and .parquet: conversations, or texts under the key `text`, a line or row each. Any other
    file is one plain text in UTF-8. Raises QwqError for a file that is missing, empty or odd.
    """
    if path.is_dir():
        raise QwqError(f"{path}: is a folder, not text; give a file of text, JSON Lines or Parquet")
    if not path.is_file():
        raise QwqError(f"{path}: no such file; give text, JSON Lines or Parquet")
    if path.suffix == ".jsonl":
        passages = [_parse(record, where) for record, where in read_json_lines(path)]
    elif path.suffix == ".parquet":
        passages = [_parse(record, where) for record, where in _parquet_rows(path)]
    else:
        passages = [PlainText(_read_text(path))]
    passages = [one for one in passages if not isinstance(one, PlainText) or one.text.strip()]
    if not passages:
        raise QwqError(f"{path}: holds no text; give at least one passage")
    return passages


def load_pieces(path: Path) -> list[Passage]:
    """The same for text to score: plain text in pieces of up to PIECE_CHARACTERS.

    Each piece is a passage of its own and ends with a line, or with a word where lines are longer.
    """
    return [piece for passage in load_passages(path) for piece in _pieces(passage)]


def _pieces(passage: Passage) -> Iterator[Passage]:
    if not isinstance(passage, PlainText):
        yield passage
        return
    rest = passage.text.strip()
    while len(rest) > PIECE_CHARACTERS:
        cuts = (rest.rfind(mark, 0, PIECE_CHARACTERS) for mark in ("\n", " "))
        cut = next((at for at in cuts if at > PIECE_CHARACTERS // 2), PIECE_CHARACTERS)
        yield PlainText(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    yield PlainText(rest)


def calibration_sequences(
    checkpoint: Checkpoint, passages: Sequence[Passage], *, n_tokens: int | None
) -> list[Sequence[int]]:
    """The first passages that hold n_tokens (None: all), each at most MAX_SEQUENCE_LENGTH long.

    Conversations are rendered by the checkpoint's own template. What is longer is split, and each
    further piece continues where the one before it ended.
    Raises CheckpointError for a tokenizer that does not belong to the weights.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    sequences = (ids for one in passages for ids in _sequences(one, tokenizer))
    taken = list(take_tokens(sequences, n_tokens, max_length=MAX_SEQUENCE_LENGTH))
    highest = max((max(ids) for ids in taken), default=0)
    if highest >= checkpoint.model.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer gives id {highest} and vocab_size is "
            f"{checkpoint.model.vocab_size}; use the tokenizer of this checkpoint"
        )
    return taken


def _built_in(name: str) -> list[Conversation]:
    with as_file(files("convert") / "data" / name) as path:
        return load_conversations(path)


def _mixed(*sets: Sequence[Passage]) -> list[Passage]:
    """All passages, those of each set in their order and spread over the whole."""
    places = [(i / len(one), number, i) for number, one in enumerate(sets) for i in range(len(one))]
    return [sets[number][i] for _, number, i in sorted(places)]


def _sequences(passage: Passage, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[int]]:
    ids = tokenize_passage(passage, tokenizer).ids
    for start in range(0, len(ids), MAX_SEQUENCE_LENGTH):
        yield ids[start : start + MAX_SEQUENCE_LENGTH]


def _parse(record: object, source: str) -> Passage:
    match record:
        case {"text": str(text)}:
            return PlainText(text)
        case _:
            return parse_conversation(record, source)


def _parquet_rows(path: Path) -> Iterator[tuple[object, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    present = {key: value for key, value in row.items() if value is not None}
                    yield present, f"{path}: row {number}"
    except pyarrow.ArrowException as error:
        raise QwqError(f"{path}: cannot be read as Parquet ({error}); make it again") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QwqError(f"{path}: is no UTF-8 text ({error.reason}); convert it first") from error
