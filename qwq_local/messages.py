"""What the OpenAI wire format allows, brought into the form that QwQ's template can render."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from convert.errors import UsageError

Message = dict[str, Any]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT_END = re.compile(r"(?:\A|(?<=\n))</think>(?=\n|\Z)")


def normalise(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Messages with a known role, content as one string and arguments as objects.

    `developer` becomes `system`, null content "", a list of text parts their lines, and
    arguments given as a JSON string the object they hold. A thought, under whichever of its
    names, becomes `reasoning_content`. Raises UsageError naming the message.
    """
    normal = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not normal:
        raise UsageError("messages: the list is empty; give at least one message")
    return normal


def answer_start(message: Message) -> int:
    """Where the answer begins in an assistant's content, which may hold the thought before it.

    With `reasoning_content` beside it the content is the answer. Else a thought is what stands
    before the first `</think>` on a line of its own, or before any `</think>` where the content
    starts with `<think>`; a tag within a line is part of the answer.
    """
    content: str = message["content"]
    if "reasoning_content" in message:
        return 0
    if content.lstrip().startswith("<think>"):
        end = content.find("</think>")
        return end + len("</think>") if end >= 0 else 0
    match = _THOUGHT_END.search(content)
    return match.end() if match else 0


def _message(message: Mapping[str, Any], where: str) -> Message:
    role = message.get("role")
    if role not in _ROLES:
        raise UsageError(f"{where}: role {role!r} is unknown; use one of {', '.join(_ROLES)}")
    normal: Message = {"role": _ROLES[role], "content": _content(message.get("content"), where)}
    reasoning = next((message[k] for k in _REASONING_KEYS if message.get(k) is not None), None)
    if reasoning is not None:
        normal["reasoning_content"] = _content(reasoning, f"{where}.reasoning_content")
    if calls := message.get("tool_calls"):
        normal["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            normal[key] = message[key]
    return normal


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UsageError(
            f"{where}: content is a {type(content).__name__}; give a string or a list of text parts"
        )
    return "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise UsageError(f"{where}: a part of type {kind!r}; QwQ reads text parts only")
    return text


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: the call has no name; give function.name")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise UsageError(
                f"{where}: arguments are not JSON ({error}); send the object that was received"
            ) from error
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise UsageError(f"{where}: arguments are a {type(arguments).__name__}; give a JSON object")
    normal = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return normal | ({"id": call["id"]} if call.get("id") is not None else {})
