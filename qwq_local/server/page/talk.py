"""A reply of the page while it is made: gathered here, whoever looks, and kept at its end."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwq_local import Done, QwQ, QwqError, Stream
from qwq_local.engine import OnProgress
from qwq_local.messages import Message, normalise
from qwq_local.reply import Answer, Event, Notice, Reasoning, ToolCall
from qwq_local.server.engine_room import EngineRoom, Job, QueueFullError
from qwq_local.server.page.shelf import Conversation, Settings

CLIENT = "page"
"""Whose turn it is when the page's requests wait among others'."""
_MESSAGE_TOKENS = 8
"""What the template adds to a message, about."""


class Talk:
    """The reply to a conversation's last message.

    It goes on while nobody looks, and ends with `finish`, which is called with the message. What
    it knows so far may be read at any time. n_thought and n_answered count pieces: tokens, about.
    """

    def __init__(
        self, room: EngineRoom, conversation: Conversation, finish: Callable[[Message], None]
    ) -> None:
        """Raises QwqError where the queue is full or the engine gone."""
        self.settings = conversation.settings
        self.reasoning = ""
        self.answer = ""
        self.calls: list[ToolCall] = []
        self.notices: list[Notice] = []
        self.n_thought = self.n_answered = 0
        self.thought_s = 0.0
        self._thought_began_s: float | None = None
        self._finish = finish
        try:
            self._job: Job = room.submit(asking(conversation.messages, self.settings), CLIENT)
        except QueueFullError:
            raise QwqError("queue: too many requests wait already; ask again later") from None
        self._task = asyncio.create_task(self._follow())

    @property
    def thinking(self) -> bool:
        return self.n_thought > 0 and not (self.answer or self.calls)

    @property
    def progress(self) -> tuple[int, int] | None:
        """Tokens of the prompt that are read, and all of them; None where that is not known."""
        return self._job.progress

    def stop(self) -> None:
        """End the reply; what there is of it is kept."""
        self._job.leave()

    def answer_now(self) -> None:
        self._job.answer_now()

    def steer(self, hint: str) -> None:
        """Raises UsageError where the hint is none."""
        self._job.steer(hint)

    async def ended(self) -> None:
        """Return when the reply is kept."""
        await self._task

    async def _follow(self) -> None:
        figures: dict[str, Any] = {"finish_reason": "cancelled"}
        try:
            while (event := await self._job.next()) is not None:
                if isinstance(event, Done):
                    figures = _figures(event)
                    break
                self._gather(event)
        except QwqError as error:
            figures = {"finish_reason": "error", "error": str(error)}
        finally:
            self._note_thought()
            figures["thought_s"] = round(self.thought_s, 1)
            figures["notices"] = [notice.text for notice in self.notices]
            self._finish(self._message(figures))

    def _gather(self, event: Event) -> None:
        match event:
            case Reasoning(text):
                self.reasoning += text
                self.n_thought += 1
                if self._thought_began_s is None:
                    self._thought_began_s = time.monotonic()
            case Answer(text):
                self.answer += text
                self.n_answered += 1
            case ToolCall():
                self.calls.append(event)
            case Notice():
                self.notices.append(event)
        if not (self.answer or self.calls):
            self._note_thought()

    def _note_thought(self) -> None:
        if self._thought_began_s is not None and not (self.answer or self.calls):
            self.thought_s = time.monotonic() - self._thought_began_s

    def _message(self, figures: dict[str, Any]) -> Message:
        message: Message = {
            "role": "assistant",
            "content": self.answer,
            "reasoning_content": self.reasoning,
            "figures": figures,
        }
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.calls
        ]
        return message | ({"tool_calls": calls} if calls else {})


def asking(messages: Sequence[Message], settings: Settings) -> Callable[[QwQ, OnProgress], Stream]:
    """How the reply to a conversation is begun, in the engine's thread."""
    kept = [message for message in messages if message.get("figures", {}).get("error") is None]

    def ask(qwq: QwQ, on_progress: OnProgress) -> Stream:
        shown: Sequence[Message] = kept
        if settings.context is not None:
            engine = qwq.engine
            shown = recent(
                kept,
                settings.context - settings.context // 4,
                lambda text: len(engine.tokenize(text, parse_special=False)),
            )
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        return qwq.reply(
            normalise([*system, *shown]),
            tools=settings.parsed_tools(),
            sampling=settings.sampling(qwq.sampling),
            limits=settings.limits,
            on_progress=on_progress,
        )

    return ask


def recent(
    messages: Sequence[Message], n_tokens: int, count: Callable[[str], int]
) -> Sequence[Message]:
    """The newest turns that take no more tokens together, and the newest of all in any case.

    A turn begins with a user's message. count: tokens of a text. Thoughts of earlier turns are not
    counted, since the template leaves them out.
    """
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    cut = len(messages)
    for start in reversed(starts):
        n_tokens -= sum(count(m["content"]) + _MESSAGE_TOKENS for m in messages[start:cut])
        if n_tokens < 0 and cut < len(messages):
            break
        cut = start
    return messages[cut:]


def _figures(done: Done) -> dict[str, Any]:
    usage, timings = done.usage, done.timings
    speed = timings.tokens_per_s
    return {
        "finish_reason": done.finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "n_cached": timings.n_cached,
        "prefill_s": round(timings.prefill_s, 3),
        "tokens_per_s": None if speed is None else round(speed, 1),
    }
