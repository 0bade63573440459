"""Anthropic's /v1/messages: what is asked becomes a chat request, replies become its blocks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwq_local import Done
from qwq_local.reply import Event, Reply
from qwq_local.server.asking import chat_request
from qwq_local.server.blocks import Block, BlockCutter, Closed, Grown, Opened, blocks_of
from qwq_local.server.chat_wire import Heading, done_of
from qwq_local.server.errors import ApiError
from qwq_local.server.schema import Blocks, ChatRequest, MessageBlock, MessagesRequest

_STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "repetition": "max_tokens",
    "cancelled": "end_turn",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_of(body: MessagesRequest) -> ChatRequest:
    """The same as a chat request. Raises ApiError naming what cannot be."""
    messages = [{"role": "system", "content": _text(body.system, "system")}] if body.system else []
    for index, message in enumerate(body.messages):
        messages += _chat_messages(message.role, message.content, f"messages[{index}].content")
    fields: dict[str, Any] = {
        "messages": messages,
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "thinking": body.thinking,
    }
    fields |= {name: getattr(body, name) for name in ("temperature", "top_k", "top_p")}
    if body.tools:
        fields["tools"] = [
            {
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                }
            }
            for tool in body.tools
        ]
    if (output := body.output_config) is not None:
        fields["reasoning_effort"] = output.effort
        if output.format is not None:
            schema = {"schema": output.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    choice = body.tool_choice
    if choice is not None:
        named = {"function": {"name": choice.name}}
        fields["tool_choice"] = _CHOICES.get(choice.type, named)
    return chat_request(fields)


def wants_thinking(body: MessagesRequest) -> bool:
    """Whether blocks of thought are sent: to whom asked for them, for others may trip on them."""
    return body.thinking is not None and body.thinking.type != "disabled"


def message_of(heading: Heading, reply: Reply, *, with_thinking: bool) -> dict[str, Any]:
    """A whole reply."""
    blocks = blocks_of(reply, with_reasoning=with_thinking)
    return _message(heading) | {
        "content": [_whole_block(block) for block in blocks],
        **_end(done_of(reply)),
        "usage": _usage(done_of(reply)),
    }


class MessagesWriter:
    """Writes a reply as Anthropic's events."""

    def __init__(self, heading: Heading, *, with_thinking: bool) -> None:
        self._heading = heading
        self._cutter = BlockCutter(with_reasoning=with_thinking)

    def begin(self) -> str:
        return _sse("message_start", message=_message(self._heading))

    def write(self, event: Event) -> str:
        lines = [self._line(change) for change in self._cutter.feed(event)]
        if isinstance(event, Done):
            lines += [self._line(change) for change in self._cutter.finish()]
            lines.append(_sse("message_delta", delta=_end(event), usage=_usage(event)))
        return "".join(lines)

    def end(self) -> str:
        return _sse("message_stop")

    def fail(self, error: ApiError) -> str:
        return _sse("error", **error.anthropic_body)

    def _line(self, change: Opened | Grown | Closed) -> str:
        block = change.block
        match change:
            case Opened():
                return _sse(
                    "content_block_start", index=block.index, content_block=_empty_block(block)
                )
            case Grown(text=text):
                return _sse("content_block_delta", index=block.index, delta=_delta(block, text))
            case Closed():
                return _sse("content_block_stop", index=block.index)


def _end(done: Done) -> dict[str, str | None]:
    """Why a message ended."""
    if done.finish_reason == "stop" and done.stop_text:
        return {"stop_reason": "stop_sequence", "stop_sequence": done.stop_text}
    return {"stop_reason": _STOP_REASONS[done.finish_reason], "stop_sequence": None}


def _chat_messages(role: str, content: Blocks, where: str) -> Iterator[dict[str, Any]]:
    """The results of tools are messages of their own, before what the user says to them."""
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    results = [block for block in content if block.type == "tool_result"]
    for block in results:
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.content}
    others = [block for block in content if block.type != "tool_result"]
    if not others and results:
        return
    message: dict[str, Any] = {"role": role, "content": _text(others, where)}
    thoughts = [block.thinking or "" for block in others if block.type == "thinking"]
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    calls = [block for block in others if block.type == "tool_use"]
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name or "", "arguments": call.input or {}}}
            for call in calls
        ]
    yield message


def _text(content: Blocks | Sequence[MessageBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    for index, block in enumerate(content):
        if block.type not in ("text", "thinking", "redacted_thinking", "tool_use"):
            raise ApiError(
                400,
                f"{where}[{index}].type: {block.type[:40]!r} cannot be read; QwQ reads text only",
                param=f"{where}[{index}].type",
                code="invalid_value",
            )
    return "\n".join(block.text or "" for block in content if block.type == "text")


def _message(heading: Heading) -> dict[str, Any]:
    return {
        "id": heading.id,
        "type": "message",
        "role": "assistant",
        "model": heading.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _empty_block(block: Block) -> dict[str, Any]:
    if block.call is not None:
        return {"type": "tool_use", "id": block.call.id, "name": block.call.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _whole_block(block: Block) -> dict[str, Any]:
    if block.call is not None:
        return _empty_block(block) | {"input": block.call.arguments}
    return _empty_block(block) | {"thinking" if block.kind == "reasoning" else "text": block.text}


def _delta(block: Block, text: str) -> dict[str, str]:
    if block.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


def _usage(done: Done) -> dict[str, int]:
    """Tokens from the cache are counted apart, as Anthropic does."""
    n_cached = done.timings.n_cached
    return {
        "input_tokens": done.usage.prompt_tokens - n_cached,
        "cache_read_input_tokens": n_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": done.usage.completion_tokens,
    }


def _sse(event: str, **fields: Any) -> str:
    data: Mapping[str, Any] = {"type": event} | fields
    return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
