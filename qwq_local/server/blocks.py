"""A reply as blocks, each a thought, an answer or a call: what newer interfaces stream."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qwq_local import Answer, Reasoning, ToolCall
from qwq_local.reply import Event, Reply

Kind = Literal["reasoning", "answer", "call"]


@dataclass(frozen=True, slots=True)
class Block:
    """text: of a call its arguments, as JSON. call: of a call, what it is."""

    index: int
    kind: Kind
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    block: Block


@dataclass(frozen=True, slots=True)
class Grown:
    """text: what the block has grown by."""

    block: Block
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The block has all of its text."""

    block: Block


class BlockCutter:
    """Cuts the events of a reply into blocks. with_reasoning: whether thoughts are among them."""

    def __init__(self, *, with_reasoning: bool) -> None:
        self._with_reasoning = with_reasoning
        self._open: Block | None = None
        self.closed: list[Block] = []

    def feed(self, event: Event) -> Iterator[Opened | Grown | Closed]:
        match event:
            case Reasoning(text) if self._with_reasoning:
                yield from self._grow("reasoning", text)
            case Answer(text):
                yield from self._grow("answer", text)
            case ToolCall(arguments=arguments):
                yield from self.finish()
                yield from self._grow("call", json.dumps(arguments, ensure_ascii=False), event)
                yield from self.finish()

    def finish(self) -> Iterator[Closed]:
        """Close what is open."""
        if self._open is not None:
            self.closed.append(self._open)
            yield Closed(self._open)
        self._open = None

    def _grow(
        self, kind: Kind, text: str, call: ToolCall | None = None
    ) -> Iterator[Opened | Grown | Closed]:
        if self._open is None or self._open.kind != kind:
            yield from self.finish()
            self._open = Block(len(self.closed), kind, call=call)
            yield Opened(self._open)
        block = self._open
        self._open = Block(block.index, kind, block.text + text, call)
        yield Grown(block, text)


def blocks_of(reply: Reply, *, with_reasoning: bool) -> list[Block]:
    """The blocks of a whole reply."""
    cutter = BlockCutter(with_reasoning=with_reasoning)
    events: list[Event] = [Reasoning(reply.reasoning)] if reply.reasoning else []
    events += [Answer(reply.answer)] if reply.answer else []
    for event in [*events, *reply.tool_calls]:
        list(cutter.feed(event))
    list(cutter.finish())
    return cutter.closed
