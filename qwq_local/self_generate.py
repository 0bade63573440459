"""A model writes its own thoughts on given prompts, for calibration."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from convert.calibration import Conversation
from qwq_local.find import newest_model
from qwq_local.model import QwQ
from qwq_local.reply import collect

MAX_REPLY_TOKENS = 8192
"""Most of QwQ's thoughts on the built-in prompts end before; some hours of a CPU are saved."""


def self_generate(
    model: str | None, conversations: Sequence[Conversation], first_seed: int
) -> Iterator[Conversation]:
    """The same prompts with the model's replies, in its own sampling, one after the other.

    model: what QwQ.open takes; None is what was quantized last. first_seed: of the first
    conversation, one more for each further one. A reply that is longer than MAX_REPLY_TOKENS is cut
    there and says so, so that nobody takes its end for that of a thought.
    """
    with QwQ.open(newest_model().path if model is None else model) as qwq:
        for seed, one in enumerate(conversations, start=first_seed):
            stream = qwq.reply(one.messages, seed=seed, max_tokens=MAX_REPLY_TOKENS)
            reply = collect(stream)
            is_cut = reply.finish_reason not in ("stop", "tool_calls")
            yield replace(one, reasoning=reply.reasoning, answer=reply.answer, is_cut=is_cut)
