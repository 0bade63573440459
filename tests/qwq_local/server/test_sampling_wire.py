"""What a request may say of sampling, and be told of it: with the reference model and OpenAI's
client."""

import math
from typing import Any

import openai
import pytest

from qwq_local import QwQ
from tests.qwq_local.server.running import QUESTION, Running

PROMPT = "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n<think>\n"
GREEDY = {"model": "nano-qwq", "messages": QUESTION, "temperature": 0}


def test_logprobs_are_of_the_answer(nano_server: Running) -> None:
    """Whole and in chunks: each token of the content with its logprob, and the likeliest."""
    create = nano_server.openai().chat.completions.create
    whole = create(**GREEDY, logprobs=True, top_logprobs=2).choices[0]
    told = whole.logprobs.content
    assert "".join(one.token for one in told) == whole.message.content
    for one in told:
        assert bytes(one.bytes).decode() == one.token
        first, second = one.top_logprobs
        assert (first.token, first.logprob) == (one.token, one.logprob)  # it was greedy
        assert second.logprob <= first.logprob <= 0
        assert math.exp(first.logprob) + math.exp(second.logprob) < 1 + 1e-9
    chunks = list(create(**GREEDY, logprobs=True, top_logprobs=2, stream=True))
    streamed = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [one for part in streamed for one in part] == told
    assert create(**GREEDY).choices[0].logprobs is None
    assert create(**GREEDY, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_of_plain_completions(nano_server: Running) -> None:
    create = nano_server.openai().completions.create
    ask = {"model": "x", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    choice = create(**ask, logprobs=3).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [choice.text.find("".join(told.tokens[i:])) for i in range(8)]
    best = [max(top.values()) for top in told.top_logprobs]
    assert told.token_logprobs == best
    parts = [c.choices[0].logprobs for c in create(**ask, logprobs=3, stream=True)]
    streamed: dict[str, list[Any]] = {
        name: [one for part in parts if part for one in getattr(part, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    assert streamed == told.model_dump()


def test_a_bias_makes_and_unmakes_a_token(nano_server: Running, gguf_qwq: QwQ) -> None:
    create = nano_server.openai().completions.create
    ask = {"model": "x", "prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    [first, *_] = gguf_qwq.engine.tokenize(create(**ask).choices[0].text, parse_special=False)
    [wanted] = gguf_qwq.engine.tokenize("7", parse_special=False)
    assert create(**ask, logit_bias={str(wanted): 100}).choices[0].text == "7777"
    without = create(**ask, logit_bias={str(first): -100}).choices[0].text
    assert first not in gguf_qwq.engine.tokenize(without, parse_special=False)
    chat = nano_server.openai().chat.completions.create
    forced = chat(**GREEDY, max_tokens=5, logit_bias={str(wanted): 100})
    assert forced.choices[0].message.reasoning_content == "77777"
    for bias in ({"999999": 1}, {"seven": 1}, {"7": 101}):
        with pytest.raises(openai.BadRequestError) as caught:
            create(**ask, logit_bias=bias)
        assert str(caught.value.param).startswith("logit_bias")


def test_a_frequency_penalty_forbids_what_was_said_often(
    nano_server: Running, gguf_qwq: QwQ
) -> None:
    """Each repeat costs, where a presence penalty costs once."""
    create = nano_server.openai().completions.create
    [seven] = gguf_qwq.engine.tokenize("7", parse_special=False)
    ask = {"model": "x", "prompt": "7", "temperature": 0, "max_tokens": 90}
    bias = {str(seven): 100}

    def n_sevens(**options: float) -> int:
        return int(create(**ask, logit_bias=bias, **options).choices[0].text.count("7"))

    assert n_sevens() == n_sevens(presence_penalty=2) == 90
    assert 30 < n_sevens(frequency_penalty=2) < 90
