"""Answers of a given form, whatever the model would rather say."""

import json
from typing import Any

import pytest

from qwq_local import QwQ, Sampling


def eager_for(qwq: QwQ, text: str) -> Sampling:
    """Sampling that says a text of one token wherever it may."""
    (token_id,) = qwq.engine.tokenize(text, parse_special=True)
    return Sampling(temperature=0, logit_bias=((token_id, 100.0),))


@pytest.mark.parametrize("said", ["\n", '"', "\\"])
@pytest.mark.parametrize(
    "string", [{"maxLength": 9}, {"pattern": "^[^x-]{3}$"}, {"pattern": "^.{3}$"}]
)
def test_a_string_holds_what_json_can(gguf_qwq: QwQ, string: dict[str, Any], said: str) -> None:
    """Would catch a raw newline or a quote within it, which the grammars of schemas let through."""
    schema = {"type": "object", "properties": {"x": {"type": "string"} | string}, "required": ["x"]}
    session = gguf_qwq.session(sampling=eager_for(gguf_qwq, said))
    reply = session.ask("?", answer_format=schema, reasoning_tokens=0, max_tokens=200)
    assert isinstance(json.loads(reply.answer)["x"], str)
    assert reply.finish_reason == "stop"


def test_a_thought_that_ends_the_reply_is_followed_by_the_answer(gguf_qwq: QwQ) -> None:
    """Would catch a call that was required and is not made, since nothing was said at all."""
    session = gguf_qwq.session(sampling=eager_for(gguf_qwq, "<|im_end|>"))
    reply = session.ask("?", answer_format='root ::= "so be it"')
    assert reply.answer == "so be it"
    assert reply.finish_reason == "stop"
    assert session.ask("?").answer == ""
