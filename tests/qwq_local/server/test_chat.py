"""/v1/chat/completions, through the openai package where it can be said with it."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes import FakeEngine
from tests.qwq_local.server.running import QUESTION, THOUGHT, Repeating, Running, fake_qwq, running

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return Repeating(THOUGHT)


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(lambda: fake_qwq(engine=engine)) as server:
        yield server


def ask(server: Running, **body: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a plain request."""
    data = json.dumps({"messages": QUESTION} | body).encode()
    return post(server, data)


def post(server: Running, data: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_program_of_the_model_card(nano_server: Running) -> None:
    """With nothing but its address changed, and with a model that thinks."""
    result = subprocess.run(
        [sys.executable, "examples/clients/openai_stream.py", f"{nano_server.url}/v1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    thought, _, rest = result.stdout.partition("\n" + "=" * 20 + " answer")
    answer, _, usage = rest.partition("\n" + "=" * 20 + " usage")
    assert thought.strip()
    assert answer.strip("= \n")
    assert "reasoning_tokens=" in usage
    assert "None" not in thought + answer


def test_a_whole_reply(server: Running) -> None:
    """Thought and answer apart, and what they took."""
    completion = server.openai().chat.completions.create(model="any", messages=QUESTION)
    choice = completion.choices[0]
    assert choice.message.content == "9.9 is larger."
    assert choice.message.reasoning_content == "9>1"
    assert choice.finish_reason == "stop"
    usage = completion.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == len(THOUGHT) + 1
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == len("9>1\n</think>")
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert completion.model == "nano-qwq"


def test_a_streamed_reply_is_the_whole_one_in_pieces(server: Running) -> None:
    stream = server.openai().chat.completions.create(
        model="any",
        messages=QUESTION,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(d.content or "" for d in deltas) == "9.9 is larger."
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "9>1"
    assert deltas[0].role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(THOUGHT) + 1
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_without_include_usage_every_chunk_has_a_choice(server: Running) -> None:
    """Clients that index choices[0] would fail on the usage's chunk."""
    stream = server.openai().chat.completions.create(
        model="any",
        messages=QUESTION,
        stream=True,
    )
    assert all(chunk.choices for chunk in stream)


@pytest.mark.parametrize(
    ("form", "content", "fields"),
    [
        ("both", "9.9 is larger.", {"reasoning_content": "9>1", "reasoning": "9>1"}),
        ("inline", "<think>\n9>1\n</think>\n\n9.9 is larger.", {}),
    ],
)
def test_where_thoughts_go(form: Any, content: str, fields: dict[str, str]) -> None:
    """Whole and streamed alike."""
    names = ("reasoning_content", "reasoning")
    with running(lambda: fake_qwq(THOUGHT, THOUGHT), reasoning=form) as server:
        message = ask(server)[1]["choices"][0]["message"]
        stream = server.openai().chat.completions.create(
            model="any",
            messages=QUESTION,
            stream=True,
        )
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert message == {"role": "assistant", "content": content} | fields
    assert "".join(delta.content or "" for delta in deltas) == content
    for name in names:
        assert "".join(getattr(d, name, None) or "" for d in deltas) == fields.get(name, "")


def test_tool_calls_go_out_and_results_come_back() -> None:
    replies = [f"x\n</think>\n\nSo:\n{CALL}\n{CALL}", THOUGHT, f"x\n</think>\n\n{CALL}"]
    engine = FakeEngine(*replies)
    with running(lambda: fake_qwq(engine=engine)) as server:
        client = server.openai().chat.completions
        reply = client.create(model="any", messages=QUESTION, tools=[TOOL])
        message = reply.choices[0].message
        assert reply.choices[0].finish_reason == "tool_calls"
        assert [c.function.name for c in message.tool_calls] == ["add", "add"]
        assert json.loads(message.tool_calls[0].function.arguments) == {"a": 1, "b": 2}
        assert len({call.id for call in message.tool_calls}) == 2
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "three"}
            for call in message.tool_calls
        ]
        client.create(model="any", messages=[*QUESTION, message, *results], tools=[TOOL])
        prompt = bytes(i for i in engine.prompts[1] if i < 256).decode()
        assert prompt.count("three") == 2
        assert '"arguments": {"a": 1, "b": 2}' in prompt
        stream = client.create(model="any", messages=QUESTION, tools=[TOOL], stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(c.index, c.function.name) for c in calls] == [(0, "add")]
    assert json.loads(calls[0].function.arguments) == {"a": 1, "b": 2}
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"function": {"name": "add"}}])
def test_a_call_can_be_required(nano_server: Running, choice: Any) -> None:
    """The grammar leaves nothing else, whatever the model would say."""
    body = {"tools": [TOOL], "tool_choice": choice, "thinking_budget": 4, "max_tokens": 200}
    status, reply = ask(nano_server, **body)
    assert status == 200, reply
    calls = reply["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["add"]


def test_an_answer_obeys_its_schema(nano_server: Running) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    status, reply = ask(
        nano_server,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        reasoning_effort="none",
        max_tokens=100,
    )
    assert status == 200, reply
    message = reply["choices"][0]["message"]
    assert json.loads(message["content"])["x"] in (1, 2)
    assert "reasoning_content" not in message


def test_a_schema_without_a_grammar_is_the_requests_fault(nano_server: Running) -> None:
    """In the request's own words, wherever it stands."""
    schema = {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("response_format", {"response_format": form}),
        ("tools", {"tools": [tool], "tool_choice": "required"}),
    ]
    for name, body in wrong:
        status, reply = ask(nano_server, **body)
        assert status == 400, reply
        assert reply["error"]["param"] == name
        assert reply["error"]["message"].startswith(f"{name}: the JSON schema cannot be turned")


@pytest.mark.parametrize("field", ["model", "chat_template", "grammar", "lora", "user"])
def test_nothing_that_is_sent_is_a_path_or_a_template(
    server: Running, engine: FakeEngine, tmp_path: Path, field: str
) -> None:
    """Would catch a template that is rendered, or a file that is opened, as a client says."""
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    plain = ask(server)
    for said in (str(secret), f"{{{{ open({str(secret)!r}).read() }}}}{{{{ 7 * 191 }}}}"):
        options = {"enable_thinking": True, field: said}
        status, reply = ask(server, **{field: said}, chat_template_kwargs=options)
        assert status == 200, reply
        assert engine.prompts[-1] == engine.prompts[-2]
        assert reply["choices"] == plain[1]["choices"]
        told = json.dumps(ask(server, messages=[{"role": said, "content": "x"}])[1])
        assert "the secret" not in told
        assert "1337" not in told


@pytest.mark.parametrize(
    "asked",
    [
        {"thinking_budget": 5},
        {"chat_template_kwargs": {"thinking_budget": 5}},
        {"reasoning": {"max_tokens": 5}},
        {"reasoning_effort": "high", "thinking_budget": 5},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
    ],
)
def test_a_budget_in_every_spelling(asked: dict[str, Any]) -> None:
    with running(lambda: fake_qwq("a b c d e f g h\n</think>\n\nyes")) as server:
        status, reply = ask(server, **asked)
    assert status == 200
    message = reply["choices"][0]["message"]
    assert message["reasoning_content"].startswith("a b c\n")
    assert message["content"] == "yes"
    assert [notice["kind"] for notice in reply["notices"]] == ["budget"]


@pytest.mark.parametrize(
    "asked",
    [
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning": {"enabled": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"thinking_budget": 0},
    ],
)
def test_thinking_is_switched_off_in_every_spelling(server: Running, asked: dict[str, Any]) -> None:
    """Would catch a thought that is shown to who wanted none."""
    status, reply = ask(server, **asked)
    assert status == 200
    message = {"role": "assistant", "content": "9.9 is larger."}
    assert reply["choices"][0]["message"] == message
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] < 200


def test_choices_stops_and_seeds(server: Running, engine: FakeEngine) -> None:
    """n replies, each with a seed of its own, each cut at the stop text."""
    status, reply = ask(server, n=2, seed=2**40, stop=[" larger"], max_completion_tokens=50)
    assert status == 200
    assert [c["message"]["content"] for c in reply["choices"]] == ["9.9 is", "9.9 is"]
    assert engine.seeds[-2] + 1 == engine.seeds[-1]
    stream = server.openai().chat.completions.create(
        model="any",
        messages=QUESTION,
        n=2,
        stream=True,
    )
    assert {chunk.choices[0].index for chunk in stream} == {0, 1}


def test_what_other_clients_send_is_understood(
    server: Running, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages with thoughts and parts, and fields that nobody knows, which are logged once."""
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "secret", "refusal": None},
        {"role": "user", "content": "Bye"},
    ]
    for _ in range(2):
        status, _reply = ask(server, messages=messages, store=True, frequency_penalty=0)
        assert status == 200
    assert [r.getMessage() for r in caplog.records if "'store'" in r.getMessage()] == [
        "request field 'store' is not known; it is ignored"
    ]
    prompt = bytes(i for i in engine.prompts[-1] if i < 256).decode()
    assert prompt.startswith("system\nBe brief.")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": QUESTION * 4097}, "messages", "invalid_value"),
        ({"tools": [TOOL] * 257}, "tools", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"temperature": 11}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"presence_penalty": -3}, "presence_penalty", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"n": 99}, "n", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logit_bias": {"1": 500}}, "logit_bias", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "no_tools"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            "messages",
            "context_length_exceeded",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "invalid_value",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_the_field(
    server: Running, body: dict[str, Any], param: str, code: str, *, stream: bool
) -> None:
    """In OpenAI's form, with 400, streamed or not."""
    status, reply = ask(server, **body, stream=stream)
    assert status == 400, reply
    error = reply["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code), error


def test_the_client_sees_an_exception_of_its_own(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature: 11"):
        server.openai().chat.completions.create(
            model="any",
            messages=QUESTION,
            temperature=11,
        )
    with pytest.raises(openai.NotFoundError):
        server.openai().models.retrieve("gpt-9")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "x": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": ["user"], "content": "x"}]}',
    ],
    ids=["empty", "cut", "list", "bytes", "surrogate", "deep", "nan", "role"],
)
def test_malformed_bodies_are_400(server: Running, data: bytes) -> None:
    status, reply = post(server, data)
    assert status == 400, reply
    assert reply["error"]["type"] == "invalid_request_error"


def test_models(server: Running) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["nano-qwq"]
    assert client.models.retrieve("nano-qwq").owned_by == "qwq-local"
