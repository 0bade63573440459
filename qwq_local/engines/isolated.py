"""An engine in a process of its own: what kills native code there is an exception here."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import struct
import threading
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert import errors
from convert.errors import EngineError, QwqError
from qwq_local.child import Channel, Child, Message
from qwq_local.engine import Drafts, EngineSettings, Generation, Intervention, OnProgress
from qwq_local.engines.here import open_here
from qwq_local.rope import RopePlan, Yarn
from qwq_local.sampling import Sampling
from qwq_local.scored import ScoredId, pack, unpack

_Told = Generator[tuple[Any, bytes | memoryview], Intervention | None, None]
"""What a stream over there tells: a JSON value, and bytes beside it; not both are empty."""
PIECE_NBYTES = 1 << 23  # of logits in a message: memory that malloc has at hand, not new pages
_STREAM = struct.Struct("<Q")  # a call of this alone is for its next
_TOKEN = struct.Struct("<III")  # id, and how many were proposed and came; its bytes follow


class IsolatedEngine:
    """Hands every call to an engine in a child process, one at a time.

    Where that process dies, the call that found it dead raises EngineError, and the next one
    starts another; nothing of a conversation is lost with it, for it holds only the kv_cache.
    """

    entry = "qwq_local.engines.isolated:serve"

    def __init__(
        self, path: Path, settings: EngineSettings, *, on_progress: OnProgress | None = None
    ) -> None:
        self._path = path
        self._settings = settings
        self._lock = threading.Lock()
        self._closed = False
        self._child: Child | None = None
        self._last_death = f"{path}: its process was stopped meanwhile; ask again"
        self._pieces: dict[int, bytes] = {}
        with self._lock:
            about = self._start(on_progress)
        self.vocab_size: int = about["vocab_size"]
        self.control_tokens: Mapping[str, int] = about["control_tokens"]
        plan, yarn = about["rope_plan"], _yarn(about["rope_plan"]["yarn"])
        self.rope_plan = RopePlan(plan["context_length"], plan["native_length"], yarn)

    @property
    def pid(self) -> int | None:
        """The process that runs the model now."""
        child = self._child
        return None if child is None else child.pid

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        ids: list[int] = self._request("tokenize", text, parse_special).value
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id not in self._pieces:
            self._pieces[token_id] = bytes(self._request("token_bytes", token_id).data)
        return self._pieces[token_id]

    def grammar(self, answer_format: Mapping[str, Any] | str) -> str:
        text: str = self._request("grammar", answer_format).value
        return text

    def n_cached(self, ids: Sequence[int], *, rope: Yarn | None = None) -> int:
        n: int = self._request("n_cached", list(ids), _fields(rope)).value
        return n

    def prefill(self, ids: Sequence[int], *, rope: Yarn | None = None) -> Iterator[int]:
        for message in self._stream("prefill", list(ids), _fields(rope)):
            yield message.value

    def generate(
        self,
        ids: Sequence[int],
        *,
        sampling: Sampling,
        seed: int,
        max_tokens: int,
        stop_ids: Collection[int],
        rope: Yarn | None = None,
        drafts: Drafts | None = None,
    ) -> Generation:
        options = [_fields(sampling), seed, max_tokens, list(stop_ids), _fields(rope)]
        stream = self._stream("generate", list(ids), *options)
        try:
            message = next(stream, None)
            while message is not None:
                token_id, n_drafted, n_accepted = _TOKEN.unpack_from(message.data)
                if drafts is not None:
                    drafts.n_drafted, drafts.n_accepted = n_drafted, n_accepted
                self._pieces[token_id] = bytes(message.data[_TOKEN.size :])
                scores = message.value
                change = yield token_id if scores is None else unpack(token_id, scores)
                try:
                    message = stream.send(change)
                except StopIteration:
                    return
        finally:
            stream.close()

    def logits(
        self, ids: Sequence[int], *, first: int = 0, rope: Yarn | None = None
    ) -> Iterator[NDArray[np.float32]]:
        for message in self._stream("logits", list(ids), first, _fields(rope)):
            yield np.frombuffer(message.data, dtype=np.float32).reshape(-1, self.vocab_size)

    def export_cache(self, ids: Sequence[int], *, rope: Yarn | None = None) -> bytes:
        return bytes(self._request("export_cache", list(ids), _fields(rope)).data)

    def import_cache(self, ids: Sequence[int], state: bytes, *, rope: Yarn | None = None) -> None:
        self._request("import_cache", list(ids), _fields(rope), data=state)

    def close(self) -> None:
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()  # whoever waits for it gets an error, and lets go of the lock
        with self._lock:
            self._forget()

    def _stream(self, name: str, *arguments: Any) -> Generator[Message, Intervention | None, None]:
        """What an iterator over there yields; a change sent in here is sent in there."""
        stream = self._request("open", name, arguments).value
        child = self._child
        go_on = _STREAM.pack(stream)
        change: Intervention | None = None
        try:
            while True:
                if change is None:
                    message = self._ask(None, of=child, data=go_on)
                else:
                    message = self._request("next", stream, _fields(change), of=child)
                if message.value is None and not message.data:
                    return
                change = yield message
        finally:
            if self._child is child and not self._closed:
                self._request("drop", stream, of=child)

    def _request(
        self, name: str, *arguments: Any, of: Child | None = None, data: bytes = b""
    ) -> Message:
        """Call over there. of: the process that must still be the one to ask."""
        return self._ask([name, *arguments], of=of, data=data)

    def _ask(self, request: Any, *, of: Child | None = None, data: bytes = b"") -> Message:
        """The answer to a name and arguments, or to a stream's number as data."""
        with self._lock:
            if self._closed:
                raise QwqError(f"{self._path}: the model is closed; open it again")
            if self._child is None:
                self._start(None)
            child = self._child
            assert child is not None
            if of is not None and of is not child:
                raise EngineError(self._last_death)
            try:
                message = child.ask(request, data)
            except EngineError as error:
                self._last_death = str(error)
                self._forget()
                if self._closed:
                    raise QwqError(f"{self._path}: the model is closed; open it again") from None
                raise
        raise_error(message)
        return message

    def _start(self, on_progress: OnProgress | None) -> Any:
        child = Child(self.entry)
        self._child = child
        done = False
        try:
            child.send([str(self._path), _fields(self._settings), _log_level()])
            while isinstance((message := child.receive()).value, list):
                if on_progress is not None:
                    on_progress(*message.value)
            raise_error(message)
            done = True
        finally:
            if not done:
                self._forget()
        return message.value

    def _forget(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def serve(channel: Channel) -> None:
    """The life of the process: a path and settings in, then calls in and their results out."""
    calls = open_engine(channel)
    while calls is not None:
        request = channel.receive()
        channel.send(*calls.answer(request), number=request.number)
        calls.engine.read_on()


def open_engine(channel: Channel) -> Calls | None:
    """Take a path and settings, and tell of the engine or of what went wrong."""
    path, settings, log_level = channel.receive().value
    logging.basicConfig(format="%(message)s", level=log_level)
    _volunteer_to_die_first()
    try:
        engine = open_here(
            Path(path),
            EngineSettings(**settings),
            on_progress=lambda done, total: channel.send([done, total]),
        )
    except QwqError as error:
        channel.send(_error(error))
        return None
    about = {
        "vocab_size": engine.vocab_size,
        "control_tokens": engine.control_tokens,
        "rope_plan": dataclasses.asdict(engine.rope_plan),
    }
    channel.send(about)
    return Calls(engine)


class Calls:
    """What can be called, from several threads; each gives a value and bytes.

    The bytes beside a call are its last argument. Without a name it is for a stream's next.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._streams: dict[int, tuple[_Told, threading.Lock]] = {}
        self._numbers = itertools.count()

    def answer(self, request: Message) -> tuple[Any, bytes | memoryview]:
        """Do what is asked for by name."""
        if request.value is None:
            name, arguments = "next", [*_STREAM.unpack(request.data), None]
        else:
            name, *arguments = request.value
            if request.data:
                arguments.append(bytes(request.data))
        try:
            value, data = getattr(self, name)(*arguments)
        except QwqError as error:
            value, data = _error(error), b""
        return value, data

    def tokenize(self, text: str, parse_special: bool) -> tuple[Any, bytes]:
        return self.engine.tokenize(text, parse_special=parse_special), b""

    def token_bytes(self, token_id: int) -> tuple[Any, bytes]:
        return None, self.engine.token_bytes(token_id)

    def grammar(self, answer_format: Mapping[str, Any] | str) -> tuple[Any, bytes]:
        return self.engine.grammar(answer_format), b""

    def n_cached(self, ids: list[int], rope: dict[str, Any] | None) -> tuple[Any, bytes]:
        return self.engine.n_cached(ids, rope=_yarn(rope)), b""

    def export_cache(self, ids: list[int], rope: dict[str, Any] | None) -> tuple[Any, bytes]:
        return None, self.engine.export_cache(ids, rope=_yarn(rope))

    def import_cache(
        self, ids: list[int], rope: dict[str, Any] | None, state: bytes = b""
    ) -> tuple[Any, bytes]:
        self.engine.import_cache(ids, state, rope=_yarn(rope))
        return None, b""

    def open(self, name: str, arguments: list[Any]) -> tuple[Any, bytes]:
        number = next(self._numbers)
        self._streams[number] = getattr(self, f"_{name}")(*arguments), threading.Lock()
        return number, b""

    def next(self, number: int, change: dict[str, Any] | None) -> tuple[Any, bytes | memoryview]:
        stream, lock = self._streams[number]
        try:
            with lock:
                told: tuple[Any, bytes | memoryview] = stream.send(_intervention(change))
        except StopIteration:
            return None, b""
        return told

    def drop(self, number: int) -> tuple[Any, bytes]:
        stream, lock = self._streams.pop(number)
        with lock:  # a step that nobody waits for any more
            stream.close()
        return None, b""

    def _prefill(self, ids: list[int], rope: dict[str, Any] | None) -> _Told:
        for n_read in self.engine.prefill(ids, rope=_yarn(rope)):
            yield n_read, b""

    def _logits(self, ids: list[int], first: int, rope: dict[str, Any] | None) -> _Told:
        n = max(1, PIECE_NBYTES // (4 * self.engine.vocab_size))
        for rows in self.engine.logits(ids, first=first, rope=_yarn(rope)):
            for start in range(0, len(rows), n):
                yield True, memoryview(rows[start : start + n]).cast("B")

    def _generate(
        self,
        ids: list[int],
        sampling: dict[str, Any],
        seed: int,
        max_tokens: int,
        stop_ids: list[int],
        rope: dict[str, Any] | None,
    ) -> _Told:
        drafts = Drafts()
        generation = self.engine.generate(
            ids,
            sampling=Sampling(**sampling),
            seed=seed,
            max_tokens=max_tokens,
            stop_ids=frozenset(stop_ids),
            rope=_yarn(rope),
            drafts=drafts,
        )
        with closing(generation):
            token_id = next(generation, None)
            while token_id is not None:
                scores = pack(token_id) if isinstance(token_id, ScoredId) else None
                head = _TOKEN.pack(token_id, drafts.n_drafted, drafts.n_accepted)
                change = yield scores, head + self.engine.token_bytes(token_id)
                try:
                    token_id = generation.send(change)
                except StopIteration:
                    return


def _fields(value: Any) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)


def _intervention(fields: dict[str, Any] | None) -> Intervention | None:
    if fields is None:
        return None
    return Intervention(tuple(fields["ids"]), fields["grammar"], _yarn(fields["rope"]))


def _yarn(fields: dict[str, Any] | None) -> Yarn | None:
    return None if fields is None else Yarn(**fields)


def _error(error: QwqError) -> dict[str, Any]:
    return {"error": [type(error).__name__, str(error)]}


def raise_error(message: Message) -> None:
    """Raise here what was raised over there, if anything was."""
    if isinstance(message.value, dict) and "error" in message.value:
        kind, text = message.value["error"]
        raise getattr(errors, kind)(text)


def _log_level() -> int:
    return logging.getLogger("qwq_local").getEffectiveLevel()


def _volunteer_to_die_first() -> None:
    """Where memory runs out Linux is to end this process, and not the application."""
    if Path("/proc/self/oom_score_adj").exists():
        Path("/proc/self/oom_score_adj").write_text("500")
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
