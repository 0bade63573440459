"""Servers of several dialects, played by a small one: the same events as from a file."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from convert.errors import EngineError, UsageError
from qwq_local import Answer, Notice, QwQ, Reasoning, Reply, Sampling, ToolCall, sse

USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 9,
    "completion_tokens_details": {"reasoning_tokens": 4},
    "prompt_tokens_details": {"cached_tokens": 16},
}
CALLS = [
    {"index": 0, "id": "c0", "function": {"name": "add", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"a"'}},
    {"index": 1, "id": "c1", "function": {"name": "sub", "arguments": "{}"}},
    {"index": 0, "function": {"arguments": ": 1}"}},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


class Player(BaseHTTPRequestHandler):
    """Answers each request with the next of its server's scripts."""

    server: "Scripted"

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "qwq-32b"}, {"id": "other"}]})

    def do_POST(self) -> None:
        self.server.headers.append(dict(self.headers))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(json.loads(body))
        script = self.server.scripts.pop(0)
        if isinstance(script, int):
            self.answer(script, {"error": {"message": "not\nnow"}})
            return
        self.send_response(200)
        self.end_headers()
        for event in script:
            if isinstance(event, float):
                time.sleep(event)
                continue
            text = event if isinstance(event, str) else json.dumps(event)
            try:
                self.wfile.write(f": comment\ndata: {text}\n\n".encode())
            except OSError:
                self.server.hung_up.set()
                return

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Scripted(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Player)
        self.scripts: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(sse, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv("QWQ_API_KEY", raising=False)
    with playing() as scripted:
        yield scripted


@contextmanager
def playing() -> Iterator[Scripted]:
    with Scripted() as scripted:
        thread = threading.Thread(target=scripted.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield scripted
        scripted.shutdown()
        thread.join()


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def script(*chunks: Any) -> list[Any]:
    return [*chunks, {"choices": [], "usage": USAGE}, "[DONE]"]


SCRIPTS = {
    "DashScope": script(
        chunk(role="assistant", content=None, reasoning_content=""),
        chunk(content=None, reasoning_content="H"),
        chunk(content="", reasoning_content="m."),
        chunk(content="Y", reasoning_content=None),
        chunk(content="es."),
        chunk("stop", content=""),
    ),
    "vLLM": script(chunk(reasoning="Hm."), chunk(content="Yes."), chunk("stop", content=None)),
    "tags in the text": script(
        *[chunk(content=c) for c in "<think>\nHm.\n</think>\n\nYes."], chunk("stop")
    ),
    "a thought in the text": script(
        *[chunk(content=c) for c in "Hm.\n</think>\n\nYes."], chunk("stop")
    ),
}
CUT = [Notice("unfinished_thought", "the reply ended inside its thought")]


def ask(server: Scripted, what: Any, **options: Any) -> Reply:
    server.scripts.append(what)
    with QwQ.open(server.url) as qwq:
        return qwq.session(system="Be brief.", seed=7).ask("?", **options)


@pytest.mark.parametrize("dialect", SCRIPTS)
def test_every_dialect_gives_the_same_reply(server: Scripted, dialect: str) -> None:
    """Would catch a thought that is shown as the answer."""
    reply = ask(server, SCRIPTS[dialect])
    assert (reply.reasoning, reply.answer, reply.notices) == ("Hm.", "Yes.", ())
    assert reply.finish_reason == "stop"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens) == (20, 9, 4)
    assert (reply.timings.n_cached, reply.timings.n_prefilled) == (16, 4)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([chunk(reasoning_content="H"), chunk("length", reasoning_content="m")], ("Hm", "", CUT)),
        ([chunk(reasoning_content="Hm"), chunk("stop", content="")], ("Hm", "", CUT)),
        ([chunk(reasoning_content="Hm"), chunk("length", content="Y")], ("Hm", "Y", [])),
        ([chunk(content="H"), chunk("length", content="m")], ("Hm", "", CUT)),
        ([chunk(content="<think>\nHm"), chunk("length")], ("Hm", "", CUT)),
        ([chunk(content="Hm</think>"), chunk("length", content="\n\n")], ("Hm", "", [])),
        ([chunk(content="Hm</thi"), chunk("length", content="nk>Y")], ("Hm", "Y", [])),
        ([chunk(content="Y"), chunk("stop", content="es")], ("", "Yes", [])),
        (
            [chunk(content="\n"), chunk(reasoning="Hm"), chunk("stop", content="Y</think>")],
            ("Hm", "Y</think>", []),
        ),
        ([chunk("length")], ("", "", [])),
    ],
)
def test_a_thought_that_was_cut_is_told(
    server: Scripted, chunks: list[Any], expected: tuple[str, str, list[Notice]]
) -> None:
    """Would catch a thought that counts as ended, or as the answer, where the server is silent."""
    reply = ask(server, [*chunks, "[DONE]"])
    assert (reply.reasoning, reply.answer, list(reply.notices)) == expected
    n_pieces = sum(bool(one["choices"][0]["delta"]) for one in chunks)
    assert reply.usage.reasoning_tokens <= n_pieces
    assert (reply.usage.reasoning_tokens > 0) == bool(reply.reasoning)


def test_an_answer_without_a_thought_is_not_held_back(server: Scripted) -> None:
    """Would catch a reply that is shown late, or as a thought, where none was asked for."""
    chunks = [chunk(content="Y"), chunk("length", content="es"), "[DONE]"]
    for options in ({"reasoning_tokens": 0}, {"answer_format": {"type": "string"}}):
        server.scripts.append(chunks)
        with QwQ.open(server.url) as qwq:
            stream = qwq.session().send("?", **options)
            assert next(stream) == Answer("Y")
            assert stream.reply().answer == "es"  # the rest


def test_what_is_asked_is_what_was_meant(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Would catch a lost sampling number, a thought that is sent back, a key that is logged."""
    monkeypatch.setenv("QWQ_API_KEY", "secret-key")
    caplog.set_level(0)
    server.scripts += [SCRIPTS["vLLM"], 503, SCRIPTS["vLLM"]]
    with QwQ.open(f"{server.url}#mine") as qwq:
        sampling = Sampling(temperature=0.7, presence_penalty=1.0)
        session = qwq.session(tools=TOOLS, sampling=sampling, seed=7)
        session.ask("One?", max_tokens=50, reasoning_tokens=20, answer_format={"type": "object"})
        session.ask("Two?")
    first, _, second = server.bodies
    assert first["model"] == "mine"
    assert (first["temperature"], first["top_p"], first["top_k"]) == (0.7, 0.95, 40)
    assert (first["presence_penalty"], first["max_tokens"]) == (1.0, 50)
    assert first["thinking_budget"] == 20
    assert first["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert first["tools"] == TOOLS
    assert first["stream_options"] == {"include_usage": True}
    assert second["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in caplog.text + repr(sse.Server("http://x", "secret-key"))


def test_tools_make_a_round_trip(server: Scripted) -> None:
    server.scripts += [
        script(*[chunk(tool_calls=[call]) for call in CALLS], chunk("tool_calls")),
        SCRIPTS["vLLM"],
    ]
    with QwQ.open(server.url) as qwq:
        session = qwq.session(tools=TOOLS)
        reply = session.ask("?")
        assert reply.tool_calls == (ToolCall("c0", "add", {"a": 1}), ToolCall("c1", "sub", {}))
        assert reply.finish_reason == "tool_calls"
        session.tool_result("c0", {"sum": 2})
        session.tool_result("c1", "1")
        assert session.ask().answer == "Yes."
    sent = server.bodies[1]["messages"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert sent[2] == {"role": "tool", "tool_call_id": "c0", "content": '{"sum": 2}'}


def test_a_broken_call_is_given_as_text(server: Scripted) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "add", "arguments": '{"a": '}}
    reply = ask(server, script(chunk(tool_calls=[call]), chunk("tool_calls")))
    assert reply.tool_calls == ()
    assert '{"a": ' in reply.answer
    assert [notice.kind for notice in reply.notices] == ["broken_tool_call"]


def test_stops_and_loops_end_the_reply_here(server: Scripted) -> None:
    """Would catch a stop that ends a thought, and a server that is left talking."""
    long = script(chunk(reasoning="a END b"), *[chunk(content=f"x{i}") for i in range(5)])
    reply = ask(server, long, stop="x3")
    assert (reply.reasoning, reply.answer, reply.finish_reason) == ("a END b", "x0x1x2", "stop")
    loop = [chunk(content="again ")] * 500
    for first in (chunk(reasoning="Hm."), chunk(content="Hm.</think>")):
        reply = ask(server, script(first, *loop))
        assert reply.finish_reason == "repetition"
        assert 0 < len(reply.answer) < 600
    reply = ask(server, script(*loop))
    assert reply.finish_reason == "repetition"
    assert 0 < len(reply.reasoning) < 600


def test_a_busy_server_is_asked_again(server: Scripted) -> None:
    server.scripts += [429, 500]
    assert ask(server, SCRIPTS["vLLM"]).answer == "Yes."
    server.scripts += [503] * sse.N_TRIES
    with pytest.raises(EngineError, match=r"it answers 503 \(not now\); ask again later"):
        ask(server, SCRIPTS["vLLM"])


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_final(server: Scripted, status: int) -> None:
    with pytest.raises(UsageError, match=rf"it answers {status} \(not now\); correct"):
        ask(server, status)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("end", [[], ["{"], ["<html>"]])
def test_a_reply_that_breaks_off_is_an_error(server: Scripted, end: list[str]) -> None:
    """Would catch half a reply that passes for a whole one."""
    with pytest.raises(EngineError, match=r"the reply broke off|is no JSON"):
        ask(server, [chunk(reasoning="Hm."), *end])


def test_cancelling_hangs_up_at_once(server: Scripted) -> None:
    """Would catch a cancel that waits for the server's next word."""
    server.scripts.append([chunk(reasoning="Hm."), *[1.0, chunk(reasoning="Hm.")] * 9])
    with QwQ.open(server.url) as qwq:
        session = qwq.session()
        stream = session.send("?")
        assert next(stream) == Reasoning("Hm.")
        threading.Timer(0.1, stream.cancel).start()
        assert stream.reply().finish_reason == "cancelled"
        assert session.messages == []
    assert server.hung_up.wait(60)


def test_wishes_are_passed_on_or_refused(server: Scripted) -> None:
    """Would catch an answer_now or a hint that is dropped in silence."""
    server.scripts += [[chunk(reasoning="Hm."), *SCRIPTS["vLLM"]], 404, 404]
    with QwQ.open(server.url) as qwq:
        stream = qwq.session().send("?")
        stream.answer_now()
        stream.steer("mind the sign")
        reply = stream.reply()
    assert [n.text for n in reply.notices] == [
        "the server takes no answer-now; the thought goes on",
        "the server takes no steer; the thought goes on",
    ]
    assert (reply.reasoning, reply.answer) == ("Hm.Hm.", "Yes.")
    assert server.bodies[1:] == [{}, {"hint": "mind the sign"}]


def test_what_a_server_cannot_do_is_said(server: Scripted) -> None:
    reply = ask(server, SCRIPTS["vLLM"], reasoning_seconds=1.0)
    assert reply.notices == (
        Notice("unsupported", "the server takes no budget in seconds; it is left out"),
    )
    with pytest.raises(UsageError, match="no GBNF grammar; give a schema"):
        ask(server, SCRIPTS["vLLM"], answer_format="root ::= [a-z]")
    server.scripts.append(SCRIPTS["vLLM"])
    with QwQ.open(server.url) as qwq:
        reply = qwq.ask("?", sampling=Sampling(temperature=0, repetition_penalty=1.1))
        assert [notice.kind for notice in reply.notices] == ["sampling", "sampling"]
        assert qwq.path == server.url
        with pytest.raises(UsageError, match="a server runs this model"):
            _ = qwq.engine
        assert qwq.name == "qwq-32b"


def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "FIRST_PAUSE_S", 0.01)
    with pytest.raises(UsageError, match="names no server"):
        QwQ.open("http://")
    with pytest.raises(EngineError, match="it cannot be reached"):
        QwQ.open("http://127.0.0.1:9/v1")
