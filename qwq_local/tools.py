"""Tool calls as QwQ writes them: JSON between <tool_call> tags."""

import json
from typing import Any

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


def parse_call(body: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call, or None where the text between the tags is no call.

    Arguments that are themselves a JSON string are decoded once more; none at all are {}.
    """
    call = _json_object(body)
    if call is None:
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json_object(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return name, arguments


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
