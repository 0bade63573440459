"""Conversations -> token ids, rendered with the checkpoint's own template, thoughts included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import QwqError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

THINK_OPENING = "<think>\n"
THINK_CLOSING = "\n</think>"
TURN_END = "<|im_end|>"
SET_DIGEST = "calibration_sha256"
"""As what files of statistics hold the digest of the set that they were made with."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One prompt in OpenAI's form with the reply to it, thought and answer apart.

    is_cut: the reply ends in the middle, in the thought where there is no answer.
    """

    kind: str
    messages: tuple[dict[str, Any], ...]
    reasoning: str
    answer: str
    tools: tuple[dict[str, Any], ...] | None = None
    is_cut: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of what is rendered; two sets are disjoint where they share no digest."""
        record: list[object] = [self.messages, self.tools, self.reasoning, self.answer]
        record += [True] if self.is_cut else []
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that the model reads as it is, without a template."""

    text: str

    @property
    def kind(self) -> str:
        return "text"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


Passage = Conversation | PlainText


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """Prompt and reply as token ids.

    n_prompt: index of the first reply token. answer_start: index of the first token after the
    thought's closing tag; None for plain text, which is all reply behind its first token. stop: one
    past the token that ends the reply.
    """

    ids: tuple[int, ...]
    n_prompt: int
    answer_start: int | None
    stop: int


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of similar length, padded on the right, where causal attention never looks.

    ids: (n_sequences, n_positions) int64. is_token: the same shape, False on padding.
    """

    ids: torch.Tensor
    is_token: torch.Tensor


def load_conversations(path: Path | str) -> list[Conversation]:
    """Read JSON Lines, one conversation a line; see parse_conversation() for what a line holds.

    Raises QwqError naming the line that is no conversation, and where the file holds none.
    """
    path = Path(path)
    conversations = [parse_conversation(record, where) for record, where in read_json_lines(path)]
    if not conversations:
        raise QwqError(f"{path}: holds no conversation; give at least one line")
    return conversations


def read_json_lines(path: Path) -> Iterator[tuple[object, str]]:
    """The values of a JSON Lines file, each with its file and line for messages."""
    if not path.is_file():
        raise QwqError(f"{path}: no such file; give JSON Lines with one conversation a line")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    yield json.loads(line), where
                except (ValueError, RecursionError) as error:
                    raise QwqError(
                        f"{where}: no valid JSON ({error}); mend or remove the line"
                    ) from error


def set_digest(passages: Iterable[Passage]) -> str:
    """SHA-256 of a set of passages in their order, whatever file they came from."""
    digests = "\n".join(passage.digest for passage in passages)
    return hashlib.sha256(digests.encode()).hexdigest()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer with its chat template, from its own files alone.

    Raises QwqError where the folder has no readable tokenizer or no template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise QwqError(
            f"{folder}: its tokenizer cannot be read ({error}); download the checkpoint again"
        ) from error
    if not tokenizer.chat_template:
        raise QwqError(f"{folder}: has no chat template; add the checkpoint's chat_template.jinja")
    return tokenizer


def tokenize_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> TokenizedConversation:
    """Render and tokenize one conversation as the model meets it.

    Prompt, thought and answer are tokenized apart: the prompt's last newline never merges with the
    thought's first, which generation cannot do either. A template that does not open the thought
    itself leaves the opening tag to the reply.
    """
    prompt = tokenizer.apply_chat_template(
        list(conversation.messages),
        tools=list(conversation.tools) if conversation.tools else None,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert isinstance(prompt, str)
    opening = "" if prompt.endswith(THINK_OPENING) else THINK_OPENING
    thought = opening + conversation.reasoning
    if not conversation.is_cut:
        parts = (prompt, thought + THINK_CLOSING, f"\n\n{conversation.answer}{TURN_END}", "\n")
    elif conversation.answer:
        parts = (prompt, thought + THINK_CLOSING, f"\n\n{conversation.answer}", "")
    else:
        parts = (prompt, thought, "", "")
    ids: list[int] = []
    starts: list[int] = []
    for part in parts:
        starts.append(len(ids))
        ids += tokenizer.encode(part, add_special_tokens=False)
    return TokenizedConversation(
        tuple(ids), n_prompt=starts[1], answer_start=starts[2], stop=starts[3]
    )


def tokenize_passage(passage: Passage, tokenizer: PreTrainedTokenizerBase) -> TokenizedConversation:
    """The same for any passage; plain text is scored from its second token on."""
    if not isinstance(passage, PlainText):
        return tokenize_conversation(passage, tokenizer)
    ids = tokenizer.encode(passage.text, add_special_tokens=False)
    return TokenizedConversation(tuple(ids), n_prompt=1, answer_start=None, stop=len(ids))


def take_tokens(
    sequences: Iterable[Sequence[int]], n_tokens: int | None, *, max_length: int
) -> Iterator[Sequence[int]]:
    """Sequences cut at max_length, the first ones that together hold n_tokens; None: all."""
    n_left = n_tokens
    for sequence in sequences:
        if n_left is not None and n_left <= 0:
            return
        cut = sequence[: max_length if n_left is None else min(max_length, n_left)]
        if n_left is not None:
            n_left -= len(cut)
        if cut:
            yield cut


def token_batches(sequences: Sequence[Sequence[int]], *, batch_tokens: int) -> list[TokenBatch]:
    """Pack sequences of similar length together, at most batch_tokens a batch with padding.

    A longer sequence is a batch of its own. The batches are in order of length.
    """
    batches: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len):
        if not batches or (len(batches[-1]) + 1) * len(sequence) > batch_tokens:
            batches.append([])
        batches[-1].append(sequence)
    return [_pad(batch) for batch in batches]


def _pad(sequences: Sequence[Sequence[int]]) -> TokenBatch:
    import torch

    n_positions = max(map(len, sequences))
    ids = torch.zeros(len(sequences), n_positions, dtype=torch.int64)
    is_token = torch.zeros(len(sequences), n_positions, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        is_token[row, : len(sequence)] = True
    return TokenBatch(ids, is_token)


def parse_conversation(record: object, source: str) -> Conversation:
    """A conversation from its JSON: messages (the prompt, in OpenAI's form), reasoning, answer.

    kind and tools may be there too. Without reasoning and answer the last message is the reply, the
    thought in its reasoning_content or before `</think>` in its content.
    Raises QwqError, naming the source, for anything else.
    """
    match record:
        case {"messages": [_, *_] as messages, "reasoning": str(reasoning), "answer": str(answer)}:
            pass
        case {"messages": [*messages, {"role": "assistant", "content": str(content)} as last]} if (
            messages
        ):
            thought, closing, after = content.rpartition(THINK_CLOSING.strip())
            answer = (after if closing else content).lstrip("\n")
            reasoning = str(last.get("reasoning_content") or thought)
            reasoning = reasoning.removeprefix(THINK_OPENING.strip()).strip("\n")
        case _:
            raise QwqError(
                f"{source}: lacks messages, reasoning or answer; mend or remove the line"
            )
    assert isinstance(record, dict)
    tools = record.get("tools")
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        raise QwqError(f"{source}: a message has no role; mend or remove the line")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise QwqError(f"{source}: tools is no list of objects; mend or remove the line")
    return Conversation(
        kind=str(record.get("kind", "conversation")),
        messages=tuple(messages),
        reasoning=reasoning,
        answer=answer,
        tools=tuple(tools) if tools else None,
        is_cut=record.get("is_cut") is True,
    )
