"""What the wire format allows becomes what the template can render."""

from typing import Any

import pytest

from convert.errors import UsageError
from qwq_local.messages import normalise


def one(message: dict[str, Any]) -> dict[str, Any]:
    (normal,) = normalise([message])
    return normal


def test_contents_become_one_string() -> None:
    assert one({"role": "assistant", "content": None})["content"] == ""
    assert one({"role": "user"})["content"] == ""
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert one({"role": "user", "content": parts})["content"] == "a\nb\nc"


def test_roles_and_reasoning_have_one_name() -> None:
    assert one({"role": "developer", "content": "x"}) == {"role": "system", "content": "x"}
    for name in ("reasoning_content", "reasoning", "thinking"):
        message = {"role": "assistant", "content": "a", name: "hm"}
        assert one(message)["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("given", "expected"),
    [('{"a": "é"}', {"a": "é"}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("{}", {})],
)
def test_arguments_become_objects(given: Any, expected: dict[str, Any]) -> None:
    """Would catch arguments that are encoded twice in the prompt."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    message = one({"role": "assistant", "content": None, "tool_calls": [call]})
    function = {"name": "f", "arguments": expected}
    assert message["tool_calls"] == [{"type": "function", "function": function, "id": "1"}]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "bot", "content": ""}, r"messages\[0\]: role 'bot' is unknown; use"),
        ({"content": ""}, r"role None is unknown"),
        ({"role": "user", "content": 5}, r"content is a int; give"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            r"messages\[0\]\.content\[0\]: a part of type 'image_url'; QwQ reads text",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"a part of type 'text'"),
        ({"role": "user", "content": [3]}, r"a part of type 'int'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]: .* no name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            r"arguments are not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            r"arguments are a list; give a JSON object",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_rendered_is_refused_by_place(message: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        normalise([message])


def test_no_messages_are_refused() -> None:
    with pytest.raises(UsageError, match="the list is empty"):
        normalise([])
