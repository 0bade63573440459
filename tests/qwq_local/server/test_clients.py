"""What the openai package makes of the server, with a model that thinks."""

import asyncio
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.qwq_local.server.running import QUESTION, Running


class Verdict(BaseModel):
    larger: Literal["9.9", "9.11"]


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
