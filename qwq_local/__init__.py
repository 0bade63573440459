"""Run QwQ on this machine: open a model, start a session, read its reply as events.

What `__all__` names is imported when it is first asked for, so that a command of the program loads
no more than it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.errors import ContextError, EngineError, QwqError, UsageError
    from qwq_local.model import QwQ
    from qwq_local.reply import Answer, Done, Notice, Reasoning, Reply, Timings, ToolCall, Usage
    from qwq_local.sampling import Sampling
    from qwq_local.session import Session
    from qwq_local.stream import AsyncStream, Stream
    from qwq_local.turn import Limits

__all__ = [
    "Answer",
    "AsyncStream",
    "ContextError",
    "Done",
    "EngineError",
    "Limits",
    "Notice",
    "QwQ",
    "QwqError",
    "Reasoning",
    "Reply",
    "Sampling",
    "Session",
    "Stream",
    "Timings",
    "ToolCall",
    "Usage",
    "UsageError",
]

_HOMES = {
    "convert.errors": ("ContextError", "EngineError", "QwqError", "UsageError"),
    "qwq_local.model": ("QwQ",),
    "qwq_local.reply": (
        "Answer",
        "Done",
        "Notice",
        "Reasoning",
        "Reply",
        "Timings",
        "ToolCall",
        "Usage",
    ),
    "qwq_local.sampling": ("Sampling",),
    "qwq_local.session": ("Session",),
    "qwq_local.stream": ("AsyncStream", "Stream"),
    "qwq_local.turn": ("Limits",),
}


def __getattr__(name: str) -> Any:
    """Import one of `__all__`; called where the package does not hold it yet."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(home), name)
    return value
