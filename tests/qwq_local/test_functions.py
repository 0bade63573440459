"""Python functions as tools."""

from collections.abc import Callable
from typing import Any, Literal

import pytest

from convert.errors import UsageError
from qwq_local.functions import as_text, call_function, describe_function


def weather(
    place: str,
    days: int = 1,
    *,
    unit: Literal["C", "F"] = "C",
    fields: list[str] | None = None,
    anything: Any = None,
    more: dict[str, float] | None = None,
) -> str:
    """The weather.

    In a place.
    """
    return f"{place} {days} {unit} {fields} {anything} {more}"


def test_a_function_describes_itself() -> None:
    described = describe_function(weather)
    assert described == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.\n\nIn a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"enum": ["C", "F"]},
                    "fields": {
                        "anyOf": [
                            {"type": "array", "items": {"type": "string"}},
                            {"type": "null"},
                        ]
                    },
                    "anything": {},
                    "more": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                },
                "required": ["place"],
            },
        },
    }


def test_it_is_called_with_what_the_model_gave() -> None:
    assert call_function(weather, {"place": "Ulm", "unit": "F"}) == "Ulm 1 F None None None"
    assert call_function(weather, {"days": 2}) == {"error": "missing a required argument: 'place'"}


def _set(value: set[int]) -> None: ...
def _rest(*values: int) -> None: ...
def _unknown(value: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "error"),
    [(_set, "has the type set"), (_rest, "has no name"), (_unknown, "hints cannot be read")],
)
def test_what_cannot_be_described_is_refused(function: Callable[..., object], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        describe_function(function)


def test_results_are_text() -> None:
    assert as_text("é") == "é"
    assert as_text({"é": [1, None]}) == '{"é": [1, null]}'
    with pytest.raises(UsageError, match="not JSON serializable; return text"):
        as_text(object())
