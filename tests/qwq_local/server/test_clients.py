"""What the packages of OpenAI and Anthropic make of the server, with a model that thinks."""

import asyncio
import json
from typing import Any, Literal

import anthropic
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.qwq_local.server.running import QUESTION, Running

CITIES = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
}
ASKED = [{"role": "user", "content": "What is the weather in Rome?"}]
THINKING = {"type": "enabled", "budget_tokens": 64}


class Verdict(BaseModel):
    larger: Literal["9.9", "9.11"]


def claude(server: Running) -> Any:
    client = anthropic.Anthropic(api_key="any", base_url=server.url, max_retries=0, timeout=120)
    return server.keep(client).messages


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_answers(nano_server: Running, *, stream: bool) -> None:
    create = nano_server.openai().chat.completions.create
    options: dict[str, Any] = {
        "model": "qwq-32b",
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": CITIES}}],
        "max_tokens": 400,
        "extra_body": {"thinking_budget": 64},
    }
    choice = {"type": "function", "function": {"name": "weather"}}
    called = create(messages=ASKED, tool_choice=choice, stream=stream, **options)
    messages = (
        [chunk.choices[0].delta for chunk in called] if stream else [called.choices[0].message]
    )
    (call,) = [call for message in messages for call in message.tool_calls or ()]
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    asked_back = {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    reply = create(messages=[*ASKED, asked_back, result], tool_choice="none", **options)
    assert reply.choices[0].message.reasoning_content


def test_a_streamed_response_shows_its_thought(nano_server: Running) -> None:
    with nano_server.openai().responses.stream(model="qwq-32b", input=QUESTION) as stream:
        thought = "".join(e.delta for e in stream if e.type == "response.reasoning_text.delta")
        response = stream.get_final_response()
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert thought.strip() == response.output[0].content[0].text.strip() != ""
    assert response.output_text


def test_a_responses_tool_is_called_and_answers(nano_server: Running) -> None:
    create = nano_server.openai().responses.create
    tools = [{"type": "function", "name": "weather", "parameters": CITIES}]
    options: dict[str, Any] = {"model": "qwq-32b", "tools": tools, "max_output_tokens": 400}
    response = create(input=ASKED, tool_choice="required", reasoning={"max_tokens": 64}, **options)
    call = response.output[-1]
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history = [*ASKED, *[item.model_dump() for item in response.output], result]
    assert create(input=history, **options).output
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(input=ASKED, temperature=99, **options)


def test_a_streamed_message_shows_its_thought(nano_server: Running) -> None:
    body: dict[str, Any] = {"model": "qwq-32b", "max_tokens": 400, "messages": QUESTION}
    with claude(nano_server).stream(**body, thinking=THINKING) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_message()
    assert {"thinking", "text"} <= kinds
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking
    assert message.content[1].text


def test_a_messages_tool_is_called_and_answers(nano_server: Running) -> None:
    create = claude(nano_server).create
    options: dict[str, Any] = {
        "model": "qwq-32b",
        "tools": [{"name": "weather", "input_schema": CITIES}],
        "thinking": THINKING,
        "max_tokens": 400,
    }
    message = create(messages=ASKED, tool_choice={"type": "tool", "name": "weather"}, **options)
    call = message.content[-1]
    assert (message.stop_reason, call.type) == ("tool_use", "tool_use")
    assert call.input["city"] in ("Rome", "Oslo")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    answered = {"role": "assistant", "content": message.content}
    assert create(
        messages=[*ASKED, answered, {"role": "user", "content": [result]}],
        tool_choice={"type": "none"},
        **options,
    ).content
    with pytest.raises(anthropic.BadRequestError, match="messages: "):
        create(**options | {"messages": []})


def test_a_structured_message(nano_server: Running) -> None:
    """Would catch an output_config that nobody reads, and a schema that it names without effect."""
    body: dict[str, Any] = {"model": "qwq-32b", "max_tokens": 400, "messages": QUESTION}
    message = claude(nano_server).parse(**body, output_format=Verdict, thinking=THINKING)
    assert message.parsed_output.larger in ("9.9", "9.11")
    at_once = claude(nano_server).parse(
        **body, output_format=Verdict, output_config={"effort": "low"}
    )
    assert at_once.parsed_output.larger in ("9.9", "9.11")


def test_a_structured_answer(nano_server: Running) -> None:
    """The schema that the package makes of a class is one that the grammar can hold to."""
    completion = nano_server.openai().chat.completions.parse(
        model="qwq-32b",
        messages=QUESTION,
        response_format=Verdict,
        max_tokens=400,
        extra_body={"thinking_budget": 64},
    )
    message = completion.choices[0].message
    assert message.parsed.larger in ("9.9", "9.11")
    assert message.reasoning_content


def test_a_structured_response(nano_server: Running) -> None:
    """The same through /v1/responses."""
    response = nano_server.openai().responses.parse(
        model="qwq-32b", input=QUESTION, text_format=Verdict, reasoning={"effort": "none"}
    )
    assert response.output_parsed.larger in ("9.9", "9.11")
    assert [item.type for item in response.output] == ["message"]


def test_conversations_side_by_side(nano_server: Running) -> None:
    """Asyncio's client, streaming, several at once: each gets its own reply, whole."""

    async def ask(client: AsyncOpenAI, seed: int) -> tuple[str, str]:
        stream: Any = await client.chat.completions.create(
            model="qwq-32b",
            messages=QUESTION,  # type: ignore[arg-type]
            stream=True,
            seed=seed,
            max_tokens=60,
        )
        deltas = [chunk.choices[0].delta async for chunk in stream]
        thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        return thought, "".join(d.content or "" for d in deltas)

    async def ask_all() -> list[tuple[str, str]]:
        async with AsyncOpenAI(api_key="x", base_url=f"{nano_server.url}/v1") as client:
            return await asyncio.gather(*(ask(client, seed) for seed in (1, 2, 1, 2)))

    replies = asyncio.run(ask_all())
    assert replies[0] == replies[2]
    assert replies[1] == replies[3]
    assert all(thought for thought, _ in replies)


def test_the_second_turn_finds_the_first_in_the_cache(nano_server: Running) -> None:
    """The thought that goes back with the answer is left out, and what is left is found."""
    client = nano_server.openai().chat.completions
    options: dict[str, Any] = {"model": "qwq-32b", "max_tokens": 200, "seed": 1}
    question = [{"role": "user", "content": "Which is larger, 9.9 or 9.11? " * 20}]
    first = client.create(messages=question, **options)
    answer = first.choices[0].message.model_dump(exclude_none=True)
    messages = [*question, answer, {"role": "user", "content": "What is 2 + 2?"}]
    second = client.create(messages=messages, **options)
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens // 2


def test_an_error_has_its_field(nano_server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        nano_server.openai().chat.completions.create(
            model="qwq-32b", messages=QUESTION, presence_penalty=9
        )
    assert (caught.value.param, caught.value.code) == ("presence_penalty", "invalid_value")
