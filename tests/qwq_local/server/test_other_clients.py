"""What LangChain and LiteLLM make of the server, with a model that thinks.

Their own warnings are theirs; openai's and anthropic's packages have test_clients.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.qwq_local.server.running import Running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SCOPED = ("test", "fixture")
TEXT = "Which is larger, 9.9 or 9.11?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


class Verdict(BaseModel):
    """Which of two numbers is larger."""

    larger: Literal["9.9", "9.11"]


@pytest.fixture(params=["ChatOpenAI", "ChatQwQ"])
def langchain(
    nano_server: Running, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Any:
    """Its classes for OpenAI's interface, which counts thoughts and shows none, and for QwQ's."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    from langchain_openai import ChatOpenAI
    from langchain_qwq import ChatQwQ

    # Any: fields go by aliases that their types do not know
    client: Any = {"ChatOpenAI": ChatOpenAI, "ChatQwQ": ChatQwQ}[request.param]

    def make(**options: Any) -> Any:
        url = f"{nano_server.url}/v1"
        return client(
            model="qwq-32b",
            base_url=url,
            api_key="any",
            max_retries=0,
            timeout=120,
            max_tokens=400,
            seed=1,
            extra_body={"thinking_budget": 64},
            **options,
        )

    return make


@pytest.fixture
def litellm(nano_server: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched
    import litellm

    def complete(**options: Any) -> Any:
        return litellm.completion(
            model="openai/qwq-32b",
            api_base=f"{nano_server.url}/v1",
            api_key="any",
            max_tokens=400,
            seed=1,
            extra_body={"thinking_budget": 64},
            num_retries=0,
            **options,
        )

    return complete


def is_qwqs(langchain: Any) -> bool:
    return type(langchain()).__name__ == "ChatQwQ"


def test_langchain_streams_chat_completions_with_their_usage(langchain: Any) -> None:
    whole = None
    for chunk in langchain(stream_usage=True).stream(TEXT):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.content
    assert "</think>" not in whole.content
    assert bool(whole.additional_kwargs.get("reasoning_content")) == is_qwqs(langchain)
    assert whole.usage_metadata["output_token_details"]["reasoning"] > 0


def test_langchain_calls_a_tool(langchain: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = langchain().bind_tools([WEATHER], tool_choice="weather")
    asked = HumanMessage("What is the weather in Rome?")
    called = model.invoke([asked])
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Rome", "Oslo")
    result = ToolMessage("sunny", tool_call_id=call["id"])
    assert langchain().invoke([asked, called, result]).response_metadata["finish_reason"]


def test_langchain_gets_a_structured_answer(langchain: Any) -> None:
    """ChatQwQ knows of no schema but as a tool that the model may leave uncalled: it is bound."""
    if is_qwqs(langchain):
        schema = {"name": "verdict", "schema": Verdict.model_json_schema()}
        model = langchain().bind(response_format={"type": "json_schema", "json_schema": schema})
        Verdict.model_validate_json(model.invoke(TEXT).content)
    else:
        model = langchain().with_structured_output(Verdict, method="json_schema")
        assert isinstance(model.invoke(TEXT), Verdict)


def test_langchain_is_told_what_is_wrong(langchain: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature"):
        langchain(temperature=99).invoke(TEXT)


def test_langchains_own_tests_of_a_chat_model(nano_server: Running, tmp_path: Path) -> None:
    """In a process of their own, where the plugins that they need change no other test's run."""
    loop_scopes = "".join(f"asyncio_default_{what}_loop_scope = session\n" for what in SCOPED)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nasyncio_mode = auto\n{loop_scopes}")
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(tmp_path / "pytest.ini")]
    command += ["--rootdir", str(tmp_path), "--noconftest", "-p", "no:cacheprovider"]
    for plugin in ("codspeed", "hypothesispytest", "langsmith_plugin", "schemathesis"):
        command += ["-p", f"no:{plugin}"]
    result = subprocess.run(
        [*command, "tests/qwq_local/server/standard_langchain.py"],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"QWQ_URL": f"{nano_server.url}/v1", "LANGSMITH_TRACING": "false"},
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout
    assert int(passed[1]) >= 30, result.stdout


def test_litellm_streams_a_thought_and_an_answer(litellm: Any) -> None:
    chunks = litellm(messages=[{"role": "user", "content": TEXT}], stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert "".join(delta.content or "" for delta in deltas)


def test_litellm_calls_a_tool(litellm: Any) -> None:
    asked = {"role": "user", "content": "What is the weather in Rome?"}
    choice = {"type": "function", "function": {"name": "weather"}}
    called = litellm(messages=[asked], tools=[WEATHER], tool_choice=choice).choices[0].message
    (call,) = called.tool_calls
    assert call.function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    reply = litellm(messages=[asked, called.model_dump(), result], tools=[WEATHER])
    assert reply.choices[0].finish_reason
    assert reply.usage.prompt_tokens > 0


def test_litellm_gets_a_structured_answer(litellm: Any) -> None:
    schema = {"name": "verdict", "schema": Verdict.model_json_schema()}
    reply = litellm(
        messages=[{"role": "user", "content": TEXT}],
        response_format={"type": "json_schema", "json_schema": schema},
    )
    verdict = Verdict.model_validate_json(reply.choices[0].message.content)
    assert verdict.larger in ("9.9", "9.11")


def test_litellm_is_told_what_is_wrong(litellm: Any) -> None:
    from litellm.exceptions import BadRequestError

    with pytest.raises(BadRequestError, match="temperature"):
        litellm(messages=[{"role": "user", "content": TEXT}], temperature=99)
