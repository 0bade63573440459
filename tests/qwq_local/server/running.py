"""A server on a free port, in a thread of the test's process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI

from qwq_local import QwQ
from qwq_local.local import LocalModel
from qwq_local.server.app import ServerSettings, create_app
from qwq_local.server.chat_wire import ReasoningForm
from qwq_local.server.engine_room import EngineRoom
from qwq_local.server.guard import Access
from qwq_local.server.metrics import Metrics
from qwq_local.server.serving import Listening
from tests.fakes import FakeEngine, describe_fake

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n<think>\n' }}"
)
THOUGHT = "9>1\n</think>\n\n9.9 is larger."
QUESTION = [{"role": "user", "content": "Which is larger, 9.9 or 9.11?"}]


@dataclass(frozen=True, slots=True)
class Running:
    port: int
    room: EngineRoom
    clients: contextlib.ExitStack  # they are closed with the server
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = "any") -> Any:
        """A client; Any, since its overloads take no messages that come from a variable."""
        url = f"{self.url}/v1"
        return self.keep(OpenAI(api_key=key, base_url=url, max_retries=0, timeout=60))

    def keep(self, client: Any) -> Any:
        return self.clients.enter_context(client)

    def stop(self) -> None:
        """Begin to end, as Ctrl-C does."""
        self.server.should_exit = True

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(2000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("what was waited for did not come")


class Repeating(FakeEngine):
    """Says all its replies, and then all of them again."""

    def __init__(self, *replies: str) -> None:
        super().__init__(*replies)
        self._all = replies

    def generate(self, *arguments: Any, **options: Any) -> Any:
        self.replies = self.replies or list(self._all)
        return super().generate(*arguments, **options)


def fake_qwq(*replies: str, engine: FakeEngine | None = None) -> QwQ:
    return QwQ(LocalModel(engine or FakeEngine(*replies), describe_fake(TEMPLATE), Path("fake")))


@contextlib.contextmanager
def running(
    open_model: Callable[[], QwQ],
    *,
    access: Access | None = None,
    reasoning: ReasoningForm = "separate",
    n_waiting: int = 8,
    n_parallel: int = 1,
    grace_s: int = 1,
    until_ready: bool = True,
) -> Iterator[Running]:
    metrics = Metrics()
    room = EngineRoom(open_model, n_waiting=n_waiting, n_parallel=n_parallel, on_done=metrics.add)
    settings = ServerSettings("nano-qwq", access or Access(), reasoning)
    config = uvicorn.Config(
        create_app(room, settings, metrics),
        log_level="warning",
        loop="asyncio",
        http="h11",
        ws="none",
        timeout_graceful_shutdown=grace_s,
    )
    server = uvicorn.Server(config)
    with (
        contextlib.ExitStack() as clients,
        Listening(port=0).bind() as listener,
        OneThread(server, listener),
    ):
        found = Running(listener.getsockname()[1], room, clients, server)
        if until_ready:
            found.wait(lambda: room.state != "loading")
        yield found


class OneThread:
    """The server's own thread, which ends with the `with` block."""

    def __init__(self, server: uvicorn.Server, listener: object) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
