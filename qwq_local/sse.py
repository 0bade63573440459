"""One streamed request to an OpenAI-compatible server: JSON in, JSON events out."""

from __future__ import annotations

import http.client
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from convert.errors import EngineError, UsageError
from qwq_local.stream import Control

N_TRIES = 5
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
CONNECT_SECONDS = 20.0
SILENCE_SECONDS = 600.0
"""A server that is silent for so long is given up; a long prefill takes its time."""
_WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_POLL_SECONDS = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go. key: sent as bearer token, and shown nowhere."""

    url: str
    key: str | None = field(default=None, repr=False)

    def get(self, path: str) -> Any:
        """The JSON document at a path. Raises EngineError or UsageError."""
        connection, response = self._request("GET", path, None, Control())
        with suppress(OSError):
            connection.close()
        return self._json(response.body)

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Send what needs no answer. Raises EngineError or UsageError."""
        connection, response = self._request("POST", path, body, Control())
        response.hang_up(connection)

    def events(self, path: str, body: Mapping[str, Any], control: Control) -> Iterator[Any]:
        """Post a body, and yield the data of each event until "[DONE]", the end, or a cancel.

        A server that is busy or cannot be reached is asked again, N_TRIES times in all, with
        growing pauses. Raises UsageError where it refuses the request, EngineError where it cannot
        be reached or breaks off.
        """
        connection, response = self._request("POST", path, body, control)
        if response.lines is None:  # cancelled meanwhile
            return
        try:
            for line in _until_cancelled(response.lines, control):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield self._json(data)
            if not control.cancelled.is_set():
                raise EngineError(f"{self.url}: the reply broke off; ask again")
        finally:
            response.hang_up(connection)

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            problem = f"sent {data[:80]!r}, which is no JSON"
            raise EngineError(f"{self.url}: {problem}; ask again") from error

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, control: Control
    ) -> tuple[http.client.HTTPConnection, _Response]:
        pause_s = FIRST_PAUSE_S
        for n_left in reversed(range(N_TRIES)):
            try:
                return self._try(method, path, body)
            except _BusyError as busy:
                if n_left == 0 or control.cancelled.is_set():
                    raise EngineError(f"{self.url}: {busy}; ask again later") from busy
                _log.debug("%s: %s; asking again", self.url, busy)
                control.cancelled.wait(min(max(pause_s, busy.pause_s), LONGEST_PAUSE_S))
                pause_s *= 2
        raise AssertionError("the last try returns or raises")

    def _try(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, _Response]:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_SECONDS)
            sent = None if body is None else json.dumps(body)
            connection.request(method, parts.path.rstrip("/") + path, sent, headers)
            sock = connection.sock
            response = connection.getresponse()
            if response.status == 200 and method == "POST":
                return connection, _Response(sock, response, b"")
            text = response.read(1 << 24)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _BusyError(f"it cannot be reached ({error})") from error
        if response.status in (200, 202):
            return connection, _Response(sock, None, text)
        connection.close()
        problem = f"it answers {response.status} ({_reason(text)})"
        if response.status in _WORTH_ANOTHER_TRY:
            raise _BusyError(problem, response.headers.get("Retry-After", ""))
        raise UsageError(f"{self.url}: {problem}; correct the request, its model or the key")


class _BusyError(Exception):
    """A try that failed and may succeed later."""

    def __init__(self, problem: str, retry_after: str = "") -> None:
        super().__init__(problem)
        self.pause_s = float(retry_after) if retry_after.isdigit() else 0.0


class _Response:
    """lines: what is streamed, None where `body` is all there is."""

    def __init__(
        self, sock: socket.socket, lines: http.client.HTTPResponse | None, body: bytes
    ) -> None:
        self._sock = sock
        self.lines = lines
        self.body = body

    def hang_up(self, connection: http.client.HTTPConnection) -> None:
        """End the transfer, whoever waits for it."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._sock.close()
        connection.close()


def _until_cancelled(lines: http.client.HTTPResponse, control: Control) -> Iterator[bytes]:
    """Lines as another thread receives them, so that a cancel need not wait for one."""
    received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def receive() -> None:
        # who hangs up closes the response, on which http.client then stumbles in one of four ways
        with suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            for line in lines:
                received.put(line)
        received.put(None)

    threading.Thread(target=receive, name="qwq-remote", daemon=True).start()
    deadline = time.monotonic() + SILENCE_SECONDS
    while not control.cancelled.is_set() and time.monotonic() < deadline:
        try:
            line = received.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            return
        deadline = time.monotonic() + SILENCE_SECONDS
        yield line


def _reason(text: bytes) -> str:
    """What an error's body says, in a line."""
    try:
        error = json.loads(text)["error"]
        reason = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        reason = text.decode("utf-8", errors="replace")
    return " ".join(str(reason).split())[:200] or "no reason given"
