"""Run QwQ on this machine: open a model, start a session, read its reply as events."""

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
