"""Run QwQ on this machine: open a model, start a session, read its reply as events."""

from qwq_local.model import QwQ
from qwq_local.reply import Answer, Done, Notice, Reasoning, Reply, Timings, ToolCall, Usage
from qwq_local.sampling import Sampling
from qwq_local.session import Session

__all__ = [
    "Answer",
    "Done",
    "Notice",
    "QwQ",
    "Reasoning",
    "Reply",
    "Sampling",
    "Session",
    "Timings",
    "ToolCall",
    "Usage",
]
