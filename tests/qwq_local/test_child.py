"""Messages between processes, small and large, one by one and several at once."""

import os
import threading
from collections.abc import Iterator

import pytest

from qwq_local.child import Channel, Message

LARGE = bytes(range(256)) * 1024  # more than a pipe holds, and than what is read at once


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Two channels, each hearing what the other sends."""
    (a, b), (c, d) = os.pipe(), os.pipe()
    with (
        os.fdopen(a, "rb", buffering=0) as from_there,
        os.fdopen(b, "wb", buffering=0) as to_here,
        os.fdopen(c, "rb", buffering=0) as from_here,
        os.fdopen(d, "wb", buffering=0) as to_there,
    ):
        yield Channel(from_there, to_there), Channel(from_here, to_here)


def test_large_and_small_messages_come_as_they_went(ends: tuple[Channel, Channel]) -> None:
    """Catches a buffer that is handed on with the head of its message, or with the next one."""
    here, there = ends
    messages = [
        Message("first", b"small", 1),
        Message(None, LARGE, 2),
        Message(["text"], LARGE[:-1], 3),
        Message({"no": "bytes"}, b"", 4),
        Message("x" * 100_000, LARGE, 5),
        Message(None, b"last", 6),
    ]

    def send_all() -> None:
        for one in messages:
            there.send(one.value, memoryview(one.data), number=one.number)

    for _ in range(3):  # what one round leaves behind would spoil the next
        sender = threading.Thread(target=send_all)
        sender.start()
        received = [here.receive() for _ in messages]
        sender.join()
        assert received == messages


def test_what_was_received_does_not_change(ends: tuple[Channel, Channel]) -> None:
    """Catches a large message whose bytes are the buffer that the next one is read into."""
    here, there = ends
    received = []
    for fill in (b"a", b"b"):
        sender = threading.Thread(target=there.send, args=(None, fill * len(LARGE)))
        sender.start()
        received.append(here.receive())
        sender.join()
    assert [set(one.data) for one in received] == [set(b"a"), set(b"b")]
