"""The checkpoint's own template, rendered as transformers renders it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convert.errors import QwqError
from qwq_local.engine import Engine
from qwq_local.messages import Message, answer_start
from qwq_local.renderer import render

_PRIVATE_USE = range(0xE000, 0xF900)
_THOUGHT_CLOSE = "</think>"
_CLOSED_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation: pieces of text, and between them the template's control tokens.

    A control token's text inside a message is ordinary text within a piece.
    """

    pieces: tuple[tuple[str, bool], ...]  # (text, whether it is one control token)

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def opens_thought(self) -> bool:
        """Whether the reply starts inside its thought."""
        return self.text.endswith("<think>\n")

    def with_open_thought(self) -> Prompt | None:
        """The prompt with the <think> that its template forgot, or closed again at once.

        None where the prompt does not end in an assistant's turn.
        """
        *before, (last, is_control) = self.pieces or (("", True),)
        start = _CLOSED_THOUGHT.sub("", last)
        if is_control or not start.endswith("assistant\n"):
            return None
        return Prompt((*before, (start + "<think>\n", False)))

    def tokenize(self, engine: Engine) -> list[int]:
        """Ids of the prompt; what a message says never becomes a control token."""
        return self.ids(
            engine.control_tokens, lambda text: engine.tokenize(text, parse_special=False)
        )

    def ids(
        self, control_tokens: Mapping[str, int], tokenize: Callable[[str], Sequence[int]]
    ) -> list[int]:
        """The same, with each piece of text tokenized by a function of the caller's."""
        ids: list[int] = []
        for text, is_control in self.pieces:
            if is_control:
                ids.append(control_tokens[text])
            else:
                ids += tokenize(text)
        return ids


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A jinja2 template with what transformers hands to it.

    control_tokens: the tokenizer's special tokens, as text.
    variables: bos_token, eos_token and the like.
    """

    source: str
    control_tokens: Collection[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Render normalised messages.

        Raises QwqError where the template is broken, refuses the messages, asks for what its
        sandbox forbids, or takes too long.
        """
        marks = _marks((*self.control_tokens, _THOUGHT_CLOSE), (self.source, messages, tools))
        control_marks = {text: mark for text, mark in marks.items() if text != _THOUGHT_CLOSE}
        arguments = {
            "messages": [_mark_message(message, control_marks, marks) for message in messages],
            "tools": _replace_in(tools, control_marks) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = render(self.source, {**self.variables, **arguments})
        texts = {mark: text for text, mark in marks.items()}
        return Prompt(tuple(_pieces(rendered, self.control_tokens, texts)))


def _pieces(
    rendered: str, control_tokens: Collection[str], texts: Mapping[str, str]
) -> Iterator[tuple[str, bool]]:
    """Cut the template's own control tokens out, then put the text of each mark back."""
    parts = re.split(f"({any_of(control_tokens)})", rendered)
    for index, part in enumerate(parts):
        if part:
            yield _replace(part, texts), index % 2 == 1


def _mark_message(
    message: Message, control_marks: Mapping[str, str], marks: Mapping[str, str]
) -> Message:
    """Hide control tokens from tokenizer and template, and a </think> in an answer from the latter.

    The template drops what stands before the last </think>, which is meant for thoughts.
    """
    marked: Message = _replace_in(message, control_marks)
    if message["role"] == "assistant":
        content, start = message["content"], answer_start(message)
        marked["content"] = _replace(content[:start], control_marks) + _replace(
            content[start:], marks
        )
    return marked


def _marks(texts: Collection[str], used_in: object) -> dict[str, str]:
    """One private-use character for each text, none of which occurs in the messages or tools."""
    used = set(json.dumps(used_in, ensure_ascii=False, default=str))
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    marks = dict(zip(texts, free, strict=False))
    if len(marks) < len(texts):
        raise QwqError(
            "messages: they use nearly every private-use character (U+E000 to U+F8FF); "
            "leave those out"
        )
    return marks


def _replace_in(value: Any, table: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _replace(value, table)
    if isinstance(value, dict):
        return {_replace_in(key, table): _replace_in(item, table) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_in(item, table) for item in value]
    return value


def _replace(text: str, table: Mapping[str, str]) -> str:
    return re.sub(any_of(table), lambda match: table[match[0]], text)


def any_of(texts: Collection[str]) -> str:
    """A regular expression for one of the texts, the longest that fits."""
    longest_first = sorted(texts, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing
