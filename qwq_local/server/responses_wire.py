"""OpenAI's /v1/responses: what is asked becomes a chat request, replies become its items."""

import json
from typing import Any

from qwq_local import Done
from qwq_local.reply import Event, Reply
from qwq_local.server.asking import chat_request
from qwq_local.server.blocks import Block, BlockCutter, Closed, Grown, Opened, blocks_of
from qwq_local.server.chat_wire import Heading, done_of
from qwq_local.server.errors import ApiError
from qwq_local.server.schema import (
    ChatRequest,
    Content,
    ResponsesItem,
    ResponsesRequest,
    ResponsesToolChoice,
)

_PARTS = {"reasoning": "reasoning_text", "answer": "output_text"}


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The same as a chat request. Raises ApiError naming what cannot be."""
    if body.previous_response_id is not None:
        raise ApiError(
            400,
            "previous_response_id: nothing is kept between requests; send the items again",
            param="previous_response_id",
            code="unsupported_parameter",
        )
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for index, item in enumerate(body.input):
            _add_item(messages, item, f"input[{index}]")
    fields: dict[str, Any] = {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "reasoning": body.reasoning,
        "response_format": _format(body),
        "temperature": body.temperature,
        "top_p": body.top_p,
    }
    if body.tools:
        fields["tools"] = [{"function": tool.model_dump(exclude={"type"})} for tool in body.tools]
    choice = body.tool_choice
    if isinstance(choice, ResponsesToolChoice):
        fields["tool_choice"] = {"function": {"name": choice.name}}
    else:
        fields["tool_choice"] = choice
    return chat_request(fields)


def response_of(heading: Heading, reply: Reply, *, with_reasoning: bool) -> dict[str, Any]:
    """A whole reply."""
    blocks = blocks_of(reply, with_reasoning=with_reasoning)
    items = [_item(heading, block, is_done=True) for block in blocks]
    return _response(heading, items, done_of(reply))


class ResponsesWriter:
    """Writes a reply as the events of responses."""

    def __init__(self, heading: Heading, *, with_reasoning: bool) -> None:
        self._heading = heading
        self._cutter = BlockCutter(with_reasoning=with_reasoning)
        self._items: list[dict[str, Any]] = []
        self._n_sent = 0

    def begin(self) -> str:
        response = _response(self._heading, [], None)
        return self._sse("response.created", response=response) + self._sse(
            "response.in_progress", response=response
        )

    def write(self, event: Event) -> str:
        lines = [self._line(change) for change in self._cutter.feed(event)]
        if isinstance(event, Done):
            lines += [self._line(change) for change in self._cutter.finish()]
            response = _response(self._heading, self._items, event)
            lines.append(self._sse(f"response.{response['status']}", response=response))
        return "".join(lines)

    def end(self) -> str:
        return ""

    def fail(self, error: ApiError) -> str:
        response = _response(self._heading, self._items, None) | {
            "status": "failed",
            "error": {"code": error.code or "server_error", "message": error.message},
        }
        return self._sse("response.failed", response=response)

    def _line(self, change: Opened | Grown | Closed) -> str:
        block = change.block
        place = {"item_id": _item_id(self._heading, block), "output_index": block.index}
        kind = f"response.{_PARTS.get(block.kind, 'function_call_arguments')}"
        within = {} if block.kind == "call" else {"content_index": 0}
        match change:
            case Opened():
                item = _item(self._heading, block, is_done=False)
                added = self._sse("response.output_item.added", output_index=block.index, item=item)
                return added + self._part("added", block, place)
            case Grown(text=text):
                logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "answer" else {}
                return self._sse(f"{kind}.delta", **place, **within, **logprobs, delta=text)
            case Closed():
                item = _item(self._heading, block, is_done=True)
                self._items.append(item)
                whole: dict[str, Any] = {"text": block.text}
                if block.call is not None:
                    whole = {"arguments": block.text, "name": block.call.name}
                elif block.kind == "answer":
                    whole["logprobs"] = []
                return (
                    self._sse(f"{kind}.done", **place, **within, **whole)
                    + self._part("done", block, place)
                    + self._sse("response.output_item.done", output_index=block.index, item=item)
                )

    def _part(self, what: str, block: Block, place: dict[str, Any]) -> str:
        if block.kind == "call":
            return ""
        name = f"response.content_part.{what}"
        return self._sse(name, **place, content_index=0, part=_part(block))

    def _sse(self, event: str, **fields: Any) -> str:
        data = {"type": event, "sequence_number": self._n_sent} | fields
        self._n_sent += 1
        return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _add_item(messages: list[dict[str, Any]], item: ResponsesItem, where: str) -> None:
    """Thought, answer and calls are items of their own, and one message of the chat."""
    if item.type == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        return
    if item.type == "message" and item.role != "assistant":
        messages.append({"role": item.role or "user", "content": item.content})
        return
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if item.type == "message":
        if last is None or last["content"] or "tool_calls" in last:
            messages.append({"role": "assistant", "content": item.content})
        else:
            last["content"] = item.content
    elif item.type == "reasoning":
        messages.append(
            {"role": "assistant", "content": "", "reasoning_content": _thought(item.content, item)}
        )
    elif item.type == "function_call":
        if last is None:
            last = {"role": "assistant", "content": ""}
            messages.append(last)
        function = {"name": item.name or "", "arguments": item.arguments or "{}"}
        last.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
    else:
        raise ApiError(
            400,
            f"{where}.type: {item.type[:40]!r} cannot be read; give messages, calls and results",
            param=f"{where}.type",
            code="invalid_value",
        )


def _thought(content: Content, item: ResponsesItem) -> str:
    if isinstance(content, str):
        return content
    parts = content or item.summary or []
    return "\n".join(part if isinstance(part, str) else part.text or "" for part in parts)


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return None
    schema = {"name": wanted.name or "answer", "schema": wanted.schema_}
    return {"type": wanted.type, "json_schema": schema}


def _response(heading: Heading, items: list[dict[str, Any]], done: Done | None) -> dict[str, Any]:
    is_cut = done is not None and done.finish_reason in ("length", "repetition")
    response: dict[str, Any] = {
        "id": heading.id,
        "object": "response",
        "created_at": heading.created,
        "status": "in_progress" if done is None else "incomplete" if is_cut else "completed",
        "model": heading.model,
        "output": items,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "store": False,
    }
    return response | ({} if done is None else {"usage": _usage(done)})


def _usage(done: Done) -> dict[str, Any]:
    usage = done.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.timings.n_cached},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _item_id(heading: Heading, block: Block) -> str:
    prefix = {"reasoning": "rs", "answer": "msg", "call": "fc"}[block.kind]
    return f"{prefix}_{heading.id.removeprefix('resp_')}_{block.index}"


def _item(heading: Heading, block: Block, *, is_done: bool) -> dict[str, Any]:
    item: dict[str, Any] = {
        "id": _item_id(heading, block),
        "status": "completed" if is_done else "in_progress",
    }
    if block.call is not None:
        call = {"call_id": block.call.id, "name": block.call.name}
        return item | {"type": "function_call", "arguments": block.text} | call
    content = [_part(block)] if is_done else []
    if block.kind == "reasoning":
        return item | {"type": "reasoning", "summary": [], "content": content}
    return item | {"type": "message", "role": "assistant", "content": content}


def _part(block: Block) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PARTS[block.kind], "text": block.text}
    return part | ({"annotations": [], "logprobs": []} if block.kind == "answer" else {})
