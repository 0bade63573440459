"""The queue, clients that leave, engines that die, the end."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from qwq_local import Done, EngineError, QwQ, QwqError, Stream, Timings, Usage
from qwq_local.engine import Generation
from qwq_local.engines.parallel import ParallelEngine
from qwq_local.reply import Event
from qwq_local.server import following
from qwq_local.server.app import ServerSettings
from qwq_local.server.engine_room import EngineRoom, QueueFullError
from qwq_local.server.guard import Access
from qwq_local.server.serving import Listening, serve
from tests.fakes import FakeEngine
from tests.qwq_local.server.running import QUESTION, THOUGHT, Running, fake_qwq, running


class Held(FakeEngine):
    """Thinks of nothing in particular until it is let go, or told something."""

    def __init__(self, *replies: str) -> None:
        super().__init__(*replies)
        self.go = threading.Event()
        self.n_begun = self.n_ended = 0

    def generate(self, ids: Sequence[int], **options: Any) -> Generation:
        letters = random.Random(0)
        self.n_begun += 1
        try:
            while not self.go.wait(0.01):
                change = yield letters.randrange(97, 123)
                if change is not None:
                    self.changes.append(change)
                    self.go.set()
            yield from super().generate(ids, **options)
        finally:
            self.n_ended += 1


class Mortal(FakeEngine):
    """Fails in its first reply, after a token."""

    def __init__(self, error: Exception, *replies: str) -> None:
        super().__init__(*replies)
        self._error = error

    def generate(self, ids: Sequence[int], **options: Any) -> Generation:
        if not self.prompts:
            self.prompts.append(list(ids))
            yield ord("x")
            raise self._error
        yield from super().generate(ids, **options)


@contextlib.contextmanager
def asking(server: Running, key: str = "a", **body: Any) -> Iterator[http.client.HTTPConnection]:
    """A request that is sent, and whose answer may be read."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = json.dumps({"messages": QUESTION} | body)
    connection.request("POST", "/v1/chat/completions", data, headers)
    try:
        yield connection
    finally:
        connection.close()


def answer(connection: http.client.HTTPConnection) -> tuple[int, dict[str, Any]]:
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def get(server: Running, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_one_more_than_the_queue_holds_is_told_when_to_come_back() -> None:
    engine = Held(THOUGHT, THOUGHT)
    with (
        running(lambda: fake_qwq(engine=engine), n_waiting=1) as server,
        asking(server) as first,
    ):
        server.wait(lambda: server.room.n_running == 1)
        with asking(server) as second:
            server.wait(lambda: server.room.n_waiting == 1)
            with asking(server) as third:
                response = third.getresponse()
                assert response.status == 429
                assert int(response.headers["Retry-After"]) > 0
                assert json.loads(response.read())["error"]["code"] == "queue_full"
            text = get(server, "/metrics")[1]
            assert "qwq_requests_waiting 1\n" in text
            assert "qwq_requests_running 1\n" in text
            engine.go.set()
            assert answer(first)[0] == answer(second)[0] == 200


def test_so_many_replies_are_made_at_once() -> None:
    """And no more: the next one waits, and one more than the queue holds is sent away."""
    engine = Held(*[THOUGHT] * 3)
    with (
        running(lambda: fake_qwq(engine=engine), n_waiting=1, n_parallel=2) as server,
        asking(server) as first,
        asking(server, stream=True) as second,
    ):
        server.wait(lambda: engine.n_begun == 2)
        with asking(server) as third:
            server.wait(lambda: server.room.n_waiting == 1)
            assert server.room.n_running == 2
            with asking(server) as fourth:
                assert answer(fourth)[1]["error"]["code"] == "queue_full"
            second.close()
            server.wait(lambda: engine.n_begun == 3)  # the third has its place
            assert (engine.n_ended, server.room.n_running, server.room.n_waiting) == (1, 2, 0)
            engine.go.set()
            assert answer(first)[0] == answer(third)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(*, stream: bool) -> None:
    """While its reply is made, and while it waits."""
    engine = Held(THOUGHT)
    with running(lambda: fake_qwq(engine=engine)) as server:
        with asking(server, stream=stream):
            server.wait(lambda: engine.n_begun == 1)
            with asking(server, stream=stream):
                server.wait(lambda: server.room.n_waiting == 1)
            server.wait(lambda: server.room.n_waiting == 0)
            assert engine.n_ended == 0
        server.wait(lambda: server.room.n_running == 0)
        assert engine.n_ended == 1
        engine.go.set()
        with asking(server) as next_one:
            status, reply = answer(next_one)
    assert status == 200
    assert reply["choices"][0]["message"]["content"] == "9.9 is larger."
    assert len(engine.prompts) == 1


def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_place() -> None:
    """Within one micro-batch, whatever is left of the prompt."""

    class Reader(FakeEngine):
        n_read = 0

        def prefill(self, ids: Sequence[int], **options: Any) -> Iterator[int]:
            for _ in range(100):
                self.n_read += 1
                yield 64
                step.wait(120)

    engine, step = Reader(THOUGHT), threading.Event()
    with running(lambda: fake_qwq(engine=engine)) as server:
        with asking(server, stream=True):
            server.wait(lambda: engine.n_read == 1)
            (job,) = server.room._running
        server.wait(lambda: job.cancelled)
        step.set()
        server.wait(lambda: server.room.n_running == 0)
    assert engine.n_read <= 2
    assert not engine.prompts


def test_clients_take_turns() -> None:
    """One client's many requests do not keep another's waiting."""
    order: list[str] = []

    async def ask_all() -> None:
        room = EngineRoom(lambda: fake_qwq(*[THOUGHT] * 5))
        jobs = []
        for name in ("a1", "a2", "a3", "b1", "b2"):

            def ask(qwq: QwQ, _: object, name: str = name) -> Any:
                order.append(name)
                return qwq.reply(QUESTION)

            jobs.append(room.submit(ask, name[0]))
        room.start()
        for job in jobs:
            while not job.ended:
                await job.next()
        room.close()

    asyncio.run(ask_all())
    assert order == ["a1", "b1", "a2", "b2", "a3"]


def test_the_queue_is_for_those_who_wait() -> None:
    """Would catch a refusal while places are free, because their threads are not awake yet."""

    async def submit_all() -> None:
        room = EngineRoom(lambda: fake_qwq(*[THOUGHT] * 3), n_waiting=1, n_parallel=2)
        for _ in range(3):
            room.submit(lambda qwq, _: qwq.reply(QUESTION), "a")
        with pytest.raises(QueueFullError):
            room.submit(lambda qwq, _: qwq.reply(QUESTION), "a")

    asyncio.run(submit_all())


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_one_request_are_made_at_once(*, stream: bool) -> None:
    engine = Held(*[THOUGHT] * 3)
    with (
        running(lambda: fake_qwq(engine=engine), n_parallel=3) as server,
        asking(server, stream=stream, n=3) as request,
    ):
        server.wait(lambda: server.room.n_running == 3)
        engine.go.set()
        text = request.getresponse().read()
    assert text.count(b'"finish_reason": "stop"' if stream else b'"finish_reason":"stop"') == 3


def test_clients_take_turns_at_every_place() -> None:
    """One client's many requests leave no place without a turn for another's."""
    engine = Held(*[THOUGHT] * 9)
    order: list[str] = []

    async def ask_all() -> None:
        room = EngineRoom(lambda: fake_qwq(engine=engine), n_parallel=2)
        jobs = []
        for name in ("a1", "a2", "a3", "a4", "b1"):

            def ask(qwq: QwQ, _: object, name: str = name) -> Any:
                order.append(name)
                return qwq.reply(QUESTION)

            jobs.append(room.submit(ask, name[0]))
        room.start()
        while len(order) < 2:
            await asyncio.sleep(0.01)
        engine.go.set()
        for job in jobs:
            while not job.ended:
                await job.next()
        await asyncio.to_thread(room.close)

    asyncio.run(ask_all())
    assert set(order[:2]) == {"a1", "b1"}


def test_an_engine_that_died_under_two_replies_starts_once() -> None:
    """Both are told, and the server goes on."""
    both = threading.Barrier(2)
    revived: list[str] = []

    class Dying(FakeEngine):
        def generate(self, ids: Sequence[int], **options: Any) -> Generation:
            if len(self.prompts) < 2:
                self.prompts.append(list(ids))
                both.wait(120)
                raise EngineError("process 1: it died; ask again")
            revived.append(bytes(i for i in ids if i < 256).decode())
            yield from super().generate(ids, **options)

    with (
        running(lambda: fake_qwq(engine=Dying(*[THOUGHT] * 4)), n_parallel=2) as server,
        asking(server) as first,
        asking(server) as second,
    ):
        assert [answer(one)[1]["error"]["code"] for one in (first, second)] == ["engine_died"] * 2
        server.wait(lambda: server.room.state == "ready")
        with asking(server) as third:
            assert answer(third)[0] == 200
    assert 1 <= sum("user\nHi" in prompt for prompt in revived) <= 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_replaced(*, stream: bool) -> None:
    """Its reply ends with an error, health says so, and the next reply is there."""
    engine = Mortal(EngineError("process 1: it died; ask again"), "Hi", THOUGHT)
    with running(lambda: fake_qwq(engine=engine)) as server:
        client = server.openai().chat.completions
        with pytest.raises(openai.APIError, match="it died") as caught:
            list(client.create(model="x", messages=QUESTION, stream=stream))
        assert caught.value.code == "engine_died"
        server.wait(lambda: server.room.state == "ready")
        assert client.create(model="x", messages=QUESTION).choices[0].message.content
        assert "qwq_requests_total 1\n" in get(server, "/metrics")[1]


@pytest.mark.skipif(os.name != "posix", reason="SIGSTOP is a signal of POSIX")
def test_a_killed_process_is_replaced(bf16_gguf: Path) -> None:
    """The same with the real engine, under two replies."""
    opened: list[QwQ] = []

    def open_model() -> QwQ:
        opened.append(QwQ.open(bf16_gguf, context=512, threads=1, parallel=2))
        return opened[0]

    with running(open_model, n_parallel=2) as server:
        engine = opened[0].engine
        assert isinstance(engine, ParallelEngine)
        killed = engine.pid
        assert killed is not None
        os.kill(killed, signal.SIGSTOP)  # so that no reply ends before
        with asking(server) as first, asking(server, stream=True) as second:
            server.wait(lambda: len(engine._boxes) == 2)  # both wait for its answers
            os.kill(killed, signal.SIGKILL)
            for request in (first, second):
                status, reply = answer(request)
                assert (status, reply["error"]["code"]) == (503, "engine_died")
                assert "SIGKILL" in reply["error"]["message"]
        server.wait(lambda: server.room.state == "ready")
        with asking(server, max_tokens=9) as third:
            assert answer(third)[0] == 200
        assert engine.pid != killed


def test_an_engine_that_stays_dead_is_seen() -> None:
    class Dead(FakeEngine):
        def generate(self, ids: Sequence[int], **options: Any) -> Generation:
            raise EngineError("process 1: it died; ask again")
            yield

    with running(lambda: fake_qwq(engine=Dead())) as server:
        assert get(server, "/health") == (200, '{"status":"ready"}')
        with asking(server) as request:
            assert answer(request)[0] == 503
        assert get(server, "/health") == (503, '{"status":"down"}')


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_one_reply_is_not_the_end_of_all() -> None:
    """The reply's client is told, and the thread that makes replies has a successor."""
    engine = Mortal(ZeroDivisionError(), THOUGHT)
    with running(lambda: fake_qwq(engine=engine)) as server:
        with asking(server) as request:
            status, reply = answer(request)
        assert (status, reply["error"]["type"]) == (503, "server_error")
        with asking(server) as request:
            assert answer(request)[0] == 200


def test_it_says_that_it_loads() -> None:
    go = threading.Event()

    def open_model() -> QwQ:
        go.wait(120)
        return fake_qwq(THOUGHT)

    with running(open_model, until_ready=False) as server:
        assert get(server, "/health") == (503, '{"status":"loading"}')
        with asking(server) as request:
            status, reply = answer(request)
            assert (status, reply["error"]["code"]) == (503, "model_loading")
        go.set()
        server.wait(lambda: get(server, "/health")[0] == 200)


def test_a_model_that_cannot_be_opened_ends_the_server() -> None:
    """With the reason, as any other command."""

    def open_model() -> QwQ:
        raise QwqError("x.gguf: is no model; give one")

    with pytest.raises(QwqError, match="is no model"):
        serve(open_model, ServerSettings("x", Access()), Listening(port=0))


@pytest.mark.parametrize(
    ("action", "body", "said"),
    [("answer-now", {}, "time is limited"), ("steer", {"hint": "in German"}, "in German")],
)
def test_a_thought_can_be_turned_from_outside(action: str, body: Any, said: str) -> None:
    engine = Held(THOUGHT)
    with running(lambda: fake_qwq(engine=engine)) as server:
        client = server.openai()
        stream = client.chat.completions.create(model="x", messages=QUESTION, stream=True)
        chunk = next(stream)
        client.post(f"/chat/completions/{chunk.id}/{action}", cast_to=object, body=body)
        deltas = [chunk.choices[0].delta for chunk in stream]
        thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        assert said in thought
        with pytest.raises(openai.NotFoundError, match="it may have ended"):
            client.post(f"/chat/completions/{chunk.id}/{action}", cast_to=object, body=body)


def test_a_hint_that_is_none_is_refused() -> None:
    engine = Held(THOUGHT)
    with running(lambda: fake_qwq(engine=engine)) as server:
        client = server.openai()
        stream = client.chat.completions.create(model="x", messages=QUESTION, stream=True)
        path = f"/chat/completions/{next(stream).id}/steer"
        with pytest.raises(openai.BadRequestError, match="steer"):
            client.post(path, cast_to=object, body={"hint": "</think>"})
        engine.go.set()
        assert [*stream][-1].choices[0].finish_reason == "stop"


def test_the_end_cancels_what_is_being_made() -> None:
    """A reply without end does not keep the server from ending."""
    engine = Held(THOUGHT)
    with running(lambda: fake_qwq(engine=engine)) as server:
        client = server.openai()
        stream = client.chat.completions.create(model="x", messages=QUESTION, stream=True)
        next(stream)
    assert engine.n_ended == 1
    with contextlib.suppress(openai.APIError):
        list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_lets_a_reply_that_is_nearly_done_finish(*, stream: bool) -> None:
    engine = Held(THOUGHT)
    with (
        running(lambda: fake_qwq(engine=engine), grace_s=30) as server,
        asking(server, stream=stream) as request,
    ):
        server.wait(lambda: server.room.n_running == 1)
        server.stop()
        with contextlib.suppress(OSError):  # until nobody is let in any more
            while get(server, "/health"):
                continue
        engine.go.set()
        text = request.getresponse().read()
    assert text.endswith(b"[DONE]\n\n") if stream else b"9.9 is larger." in text


def test_a_long_wait_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments keep the connection alive, and say how much of the prompt is read."""

    class Reader(FakeEngine):
        def prefill(self, ids: Sequence[int], **options: Any) -> Iterator[int]:
            yield 64
            go.wait(120)

    go = threading.Event()
    monkeypatch.setattr(following, "KEEP_ALIVE_S", 0.05)
    with (
        running(lambda: fake_qwq(engine=Reader(THOUGHT))) as server,
        asking(server, stream=True) as request,
    ):
        response = request.getresponse()
        assert response.status == 200
        lines = iter(response.readline, b"")
        comment = next(line for line in lines if b"tokens of the prompt are read" in line)
        assert comment.startswith(b": 64 of ")
        go.set()
        assert b"[DONE]" in response.read()


def test_a_reply_is_let_go_where_it_was_made() -> None:
    """Else its clean-up runs wherever memory is collected next, and may wait for its own thread."""
    threads: list[str] = []
    kept: list[Stream] = []

    def make() -> Generator[Event]:
        try:
            yield Done("stop", Usage(1, 1, 0), Timings(0, 1, 0.0, 1, 0.0))
        finally:
            threads.append(threading.current_thread().name)

    def ask(qwq: QwQ, _: object) -> Stream:
        kept.append(Stream(lambda control: make()))
        return kept[-1]

    async def ask_once() -> None:
        room = EngineRoom(lambda: fake_qwq())
        job = room.submit(ask, "a")
        room.start()
        assert isinstance(await job.next(), Done)
        room.close()

    asyncio.run(ask_once())
    assert threads == ["qwq-engine"]
