"""Running the server: its socket, its access rules, its end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_local import QwQ, QwqError, UsageError

if TYPE_CHECKING:
    from qwq_local.server.app import ServerSettings

GRACE_S = 10
"""So long replies that are being made may take to end when the server is stopped."""

MOST_FRAME_NBYTES = 1 << 20
"""The longest message of the page's websocket."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the server listens. port 0 takes any that is free. tls: certificate and key."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls: tuple[Path, Path] | None = None

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def bind(self) -> socket.socket:
        """Raises QwqError where the address cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except (OSError, OverflowError) as error:
            raise QwqError(
                f"{self.host}:{self.port}: cannot listen there ({error}); choose another --port"
            ) from error


def serve(
    open_model: Callable[[], QwQ],
    settings: ServerSettings,
    listening: Listening,
    *,
    n_waiting: int = 32,
    n_parallel: int = 1,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted, n_parallel replies at once. on_listening: told the server's address.

    Raises UsageError where others could come in without a key, QwqError where the model cannot be
    opened or the address not be had.
    """
    import uvicorn

    from qwq_local.server.app import create_app
    from qwq_local.server.engine_room import EngineRoom
    from qwq_local.server.metrics import Metrics

    if settings.access.key is None and not listening.is_loopback:
        raise UsageError(f"{listening.host}: other machines reach it, so it needs a key; give one")
    failures: list[QwqError] = []

    def stop(error: QwqError) -> None:
        failures.append(error)
        server.should_exit = True

    metrics = Metrics()
    room = EngineRoom(
        open_model,
        n_waiting=n_waiting,
        n_parallel=n_parallel,
        on_done=metrics.add,
        on_failure=stop,
    )
    cert, key = listening.tls or (None, None)
    config = uvicorn.Config(
        create_app(room, settings, metrics),
        log_level="warning",
        loop="asyncio",
        http="h11",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none" if settings.page is None else "websockets-sansio",
        ws_max_size=MOST_FRAME_NBYTES,
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=cert,
        ssl_keyfile=key,
    )
    server = uvicorn.Server(config)
    with listening.bind() as listener:
        port = listener.getsockname()[1]
        host = f"[{listening.host}]" if ":" in listening.host else listening.host
        if on_listening is not None:
            on_listening(f"{'https' if listening.tls else 'http'}://{host}:{port}")
        server.run(sockets=[listener])
    if failures:
        raise failures[0]
