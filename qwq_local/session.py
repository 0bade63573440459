"""A conversation that remembers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convert.errors import UsageError
from qwq_local.messages import Message
from qwq_local.reply import Answer, Done, Event, Reasoning, Reply, ToolCall, collect
from qwq_local.sampling import MAX_SEED, Sampling, choose_seed

if TYPE_CHECKING:
    from qwq_local.model import QwQ


class Session:
    """Messages so far, and what each further reply is made with.

    A turn whose reply was not read to its end, or failed, leaves no trace in the messages.
    Thoughts are kept beside the answers as `reasoning_content`; the template leaves those of
    earlier turns out.
    """

    def __init__(
        self,
        qwq: QwQ,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> None:
        self._qwq = qwq
        self._tools = tools
        self._sampling = sampling
        self._seed = choose_seed(seed)
        self._messages: list[Message] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    @property
    def messages(self) -> list[Message]:
        """A copy of the conversation, in OpenAI's form."""
        return copy.deepcopy(self._messages)

    def send(self, text: str | None = None, *, max_tokens: int | None = None) -> Iterator[Event]:
        """Stream the reply to a text; without one, to the results of the tools it called."""
        turn: list[Message] = [] if text is None else [{"role": "user", "content": text}]
        messages = self._messages + turn
        if not turn and (not messages or messages[-1]["role"] != "tool"):
            raise UsageError("send: there is no text and no tool result to reply to; give a text")
        reasoning: list[str] = []
        answer: list[str] = []
        calls: list[Message] = []
        seed = (self._seed + len(messages)) % (MAX_SEED + 1)  # each turn its own, all of them fixed
        for event in self._qwq.reply(
            messages,
            tools=self._tools,
            sampling=self._sampling,
            seed=seed,
            max_tokens=max_tokens,
        ):
            match event:
                case Reasoning(piece):
                    reasoning.append(piece)
                case Answer(piece):
                    answer.append(piece)
                case ToolCall(call_id, name, arguments):
                    function = {"name": name, "arguments": arguments}
                    calls.append({"id": call_id, "type": "function", "function": function})
                case Done():
                    reply: Message = {
                        "role": "assistant",
                        "content": "".join(answer),
                        "reasoning_content": "".join(reasoning),
                    }
                    self._messages = [*messages, reply | ({"tool_calls": calls} if calls else {})]
            yield event

    def ask(self, text: str | None = None, *, max_tokens: int | None = None) -> Reply:
        """Like send, with the whole reply at once."""
        return collect(self.send(text, max_tokens=max_tokens))

    def tool_result(self, call_id: str, result: object) -> None:
        """Add what a tool returned; anything but a string is given as JSON.

        Raises UsageError where no call of that id waits for a result.
        """
        if call_id not in self._open_calls():
            raise UsageError(f"tool_result: no call {call_id!r} waits for a result; check the id")
        content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _open_calls(self) -> set[str]:
        calls = {call["id"] for m in self._messages for call in m.get("tool_calls", ())}
        return calls - {m.get("tool_call_id") for m in self._messages if m["role"] == "tool"}
