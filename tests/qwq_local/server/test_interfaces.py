"""/v1/messages through the anthropic package, /v1/responses through the openai package."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import numpy as np
import openai
import pytest

from qwq_local import QwQ
from tests.fakes import FakeEngine
from tests.qwq_local.server.running import QUESTION, THOUGHT, Repeating, Running, fake_qwq, running

CALL = 'x\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture
def engine() -> FakeEngine:
    return Repeating(THOUGHT)


@pytest.fixture
def calling() -> FakeEngine:
    return Repeating(CALL, THOUGHT)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(lambda: fake_qwq(engine=engine)) as server:
        yield server


@pytest.fixture
def calling_server(calling: FakeEngine) -> Iterator[Running]:
    with running(lambda: fake_qwq(engine=calling)) as server:
        yield server


def claude(server: Running) -> Any:
    client = anthropic.Anthropic(api_key="any", base_url=server.url, max_retries=0, timeout=120)
    return server.keep(client).messages


def prompt_of(engine: FakeEngine) -> str:
    return bytes(i for i in engine.prompts[-1] if i < 256).decode()


THINKING = {"type": "enabled", "budget_tokens": 1024}


def test_a_message_with_its_thought(server: Running, engine: FakeEngine) -> None:
    message = claude(server).create(
        model="any",
        max_tokens=500,
        system=[{"type": "text", "text": "Be brief."}],
        messages=QUESTION,
        thinking=THINKING,
    )
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "9>1"
    assert message.content[1].text == "9.9 is larger."
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len(THOUGHT) + 1
    assert prompt_of(engine).startswith("system\nBe brief.")


@pytest.mark.parametrize("stops", [[" larger"], ["never", " is", " larger"]])
def test_a_message_says_which_stop_text_ended_it(server: Running, stops: list[str]) -> None:
    """Catches a client that goes on where it should not, since it takes the end for the model's."""
    body: dict[str, Any] = {
        "model": "any",
        "max_tokens": 500,
        "messages": QUESTION,
        "stop_sequences": stops,
    }
    message = claude(server).create(**body)
    ended = (message.stop_reason, message.stop_sequence, message.content[-1].text)
    assert ended == ("stop_sequence", stops[-2:][0], "9.9 is larger.".partition(stops[-2:][0])[0])
    with claude(server).stream(**body) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ended[:2]
    whole = claude(server).create(**body | {"stop_sequences": ["never"]})
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)


def test_who_asks_for_no_thought_gets_none(server: Running) -> None:
    """Programs that read content[0].text would trip on it."""
    message = claude(server).create(model="any", max_tokens=500, messages=QUESTION)
    assert [block.text for block in message.content] == ["9.9 is larger."]


def test_a_streamed_message(server: Running) -> None:
    """The package's own accumulator puts the events together."""
    with claude(server).stream(
        model="any", max_tokens=500, messages=QUESTION, thinking=THINKING
    ) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "9.9 is larger."
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "9>1"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len(THOUGHT) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_of_messages(calling_server: Running, calling: FakeEngine, *, stream: bool) -> None:
    """There and back, with the thought."""
    body: dict[str, Any] = {
        "model": "any",
        "max_tokens": 500,
        "tools": [{"name": "add", "input_schema": PARAMETERS}],
        "thinking": THINKING,
    }
    messages = claude(calling_server)
    if stream:
        with messages.stream(messages=QUESTION, **body) as events:
            message = events.get_final_message()
    else:
        message = messages.create(messages=QUESTION, **body)
    assert message.stop_reason == "tool_use"
    call = message.content[1]
    assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 1})
    content = [{"type": "tool_result", "tool_use_id": call.id, "content": "three"}]
    history = [*QUESTION, {"role": "assistant", "content": message.content}]
    reply = messages.create(messages=[*history, {"role": "user", "content": content}], **body)
    assert reply.content[-1].text == "9.9 is larger."
    prompt = prompt_of(calling)
    assert '"name": "add"' in prompt
    assert "tool\nthree" in prompt


def test_errors_of_messages(server: Running) -> None:
    """In Anthropic's form, which its package makes exceptions of."""
    with pytest.raises(anthropic.BadRequestError, match="temperature") as caught:
        claude(server).create(
            model="x", max_tokens=9, messages=QUESTION, extra_body={"temperature": 11}
        )
    assert '"type": "error"' in json.dumps(caught.value.body)
    image = [{"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].type"):
        claude(server).create(
            model="x", max_tokens=9, messages=[{"role": "user", "content": image}]
        )


def test_a_response_with_its_reasoning(server: Running, engine: FakeEngine) -> None:
    response = server.openai().responses.create(
        model="any", instructions="Be brief.", input="Which is larger?"
    )
    assert response.output_text == "9.9 is larger."
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "9>1"
    assert response.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == len("9>1\n</think>")
    assert prompt_of(engine).startswith("system\nBe brief.")


def test_a_streamed_response(server: Running) -> None:
    """Numbered events, whose pieces add up to the whole that comes last."""
    events = list(server.openai().responses.create(model="any", input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    thought = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    answer = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert ("".join(thought), "".join(answer)) == ("9>1", "9.9 is larger.")
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert events[-1].response.output_text == "9.9 is larger."


def test_the_packages_own_accumulator_understands_the_stream(server: Running) -> None:
    with server.openai().responses.stream(model="any", input="Hi") as stream:
        response = stream.get_final_response()
    assert response.output_text == "9.9 is larger."


def test_a_cut_response_says_so(server: Running) -> None:
    response = server.openai().responses.create(model="any", input="Hi", max_output_tokens=5)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_of_responses(calling_server: Running, calling: FakeEngine, *, stream: bool) -> None:
    responses = calling_server.openai().responses
    tools = [{"type": "function", "name": "add", "parameters": PARAMETERS}]
    result = responses.create(model="any", input=QUESTION, tools=tools, stream=stream)
    response = list(result)[-1].response if stream else result
    call = response.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 1})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "three"}
    history = [*QUESTION, *[item.model_dump() for item in response.output], output]
    assert responses.create(model="any", input=history, tools=tools).output_text
    prompt = prompt_of(calling)
    assert prompt.count("assistant\n") == 2  # thought and call are one message, then the next
    assert "tool\nthree" in prompt


def test_errors_of_responses(server: Running) -> None:
    responses = server.openai().responses
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        responses.create(model="any", input="Hi", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="cannot be read") as caught:
        responses.create(model="any", input=[{"type": "computer_call"}])
    assert caught.value.param == "input[0].type"


def test_plain_text_is_gone_on_from(server: Running, engine: FakeEngine) -> None:
    """Nothing is laid around it; special tokens in it are what they say."""
    completions = server.openai().completions
    body = {"model": "any", "prompt": "<|im_start|>x", "max_tokens": 99, "stop": [" larger"]}
    reply = completions.create(**body, n=2)
    assert [choice.text for choice in reply.choices] == ["9>1\n</think>\n\n9.9 is"] * 2
    assert reply.choices[0].finish_reason == "stop"
    assert engine.prompts[-1] == [257, ord("x")]
    assert reply.usage.prompt_tokens == 2
    *chunks, last = completions.create(**body, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    assert last.usage.prompt_tokens == 2


def test_ids_are_gone_on_from(server: Running, engine: FakeEngine) -> None:
    """Programs that tokenize themselves, as harnesses for evaluation do."""
    completions = server.openai().completions
    reply = completions.create(model="any", prompt=[257, ord("x")], max_tokens=3)
    assert (engine.prompts[-1], reply.choices[0].text) == ([257, ord("x")], "9>1")
    both = completions.create(model="any", prompt=[[ord("x")], [ord("y"), 257]], max_tokens=3)
    assert engine.prompts[-2:] == [[ord("x")], [ord("y"), 257]]
    assert (len(both.choices), both.usage.prompt_tokens) == (2, 3)
    echoed = completions.create(model="any", prompt=[ord("é"), ord("x")], echo=True, max_tokens=3)
    assert echoed.choices[0].text == "\ufffdx9>1"
    bad: tuple[Any, ...] = ([258, 259], [-1], [[]], [], [["x"]], [1.5], [1, "x"])
    for prompt in bad:
        with pytest.raises(openai.BadRequestError) as caught:
            completions.create(model="any", prompt=prompt)
        assert str(caught.value.param).startswith("prompt"), prompt
    with pytest.raises(openai.BadRequestError, match="there is no id 259, for the model has 259"):
        completions.create(model="any", prompt=[258, 259], stream=True)


def test_each_prompt_counts_once(server: Running) -> None:
    reply = server.openai().completions.create(model="any", prompt=["x", "yy"], n=2, max_tokens=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 12)


def test_plain_text_is_cut_at_its_length(server: Running) -> None:
    completions = server.openai().completions
    reply = completions.create(model="any", prompt="x", max_tokens=3)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("9>1", "length")
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        completions.create(model="any", prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="suffix"):
        completions.create(model="any", prompt="x", suffix="y")


def test_a_text_is_echoed(server: Running) -> None:
    """Before what follows it, whatever the stop texts are; streamed too."""
    completions = server.openai().completions
    body = {"model": "any", "prompt": "go: 9", "echo": True, "max_tokens": 3, "stop": ["go"]}
    reply = completions.create(**body)
    assert (reply.choices[0].text, reply.usage.completion_tokens) == ("go: 99>1", 3)
    chunks = completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "go: 99>1"


def test_nano_goes_on_from_plain_text(nano_server: Running) -> None:
    prompt = "<|im_start|>user\nWhat is 417 + 58?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    reply = nano_server.openai().completions.create(model="any", prompt=prompt, max_tokens=20)
    assert reply.choices[0].text
    assert reply.usage.prompt_tokens > 10


def test_how_likely_a_text_is(nano_server: Running, gguf_qwq: QwQ) -> None:
    """As the model's own logits say; nothing is added to the text."""
    prompt = "<|im_start|>user\nWhat is 417 + 58?<|im_end|>\n"
    completions = nano_server.openai().completions
    body = {"model": "any", "prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 2}
    choice = completions.create(**body).choices[0]
    assert choice.text == prompt
    engine = gguf_qwq.engine
    ids = engine.tokenize(prompt, parse_special=True)
    logits = np.concatenate(list(engine.logits(ids))).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [logprobs[i, token_id] for i, token_id in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert "".join(choice.logprobs.tokens) == prompt
    assert [prompt[i] for i in choice.logprobs.text_offset] == [
        t[0] for t in choice.logprobs.tokens
    ]
