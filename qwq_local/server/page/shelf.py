"""Conversations of the page, each a file of JSON that is written whole or not at all."""

import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.errors import QwqError
from convert.files import replacing_file
from qwq_local.messages import Message
from qwq_local.sampling import Sampling
from qwq_local.turn import Limits

FORMAT = 1
TITLE_LENGTH = 48
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """How replies are made; None is the model's own, or without limit.

    reasoning_tokens: what the thought may take. max_tokens: longest reply, thought included.
    context: tokens of conversation and reply that may be used. tools: function descriptions in
    OpenAI's form, as JSON. Raises UsageError for a number out of range.
    """

    system: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    reasoning_tokens: int | None = None
    max_tokens: int | None = None
    context: int | None = None
    tools: str = ""

    def __post_init__(self) -> None:
        self.sampling(Sampling())
        if self.context is not None and self.context < 1:
            raise QwqError(f"context: {self.context} leaves no room; choose 1 or more")
        _ = self.limits
        self.parsed_tools()

    def sampling(self, own: Sampling) -> Sampling:
        """The model's own with what is set here."""
        names = {f.name for f in dataclasses.fields(Sampling)} & set(self.__slots__)
        given = {name: getattr(self, name) for name in names}
        return dataclasses.replace(own, **{n: v for n, v in given.items() if v is not None})

    @property
    def limits(self) -> Limits:
        return Limits(self.max_tokens, self.reasoning_tokens)

    def parsed_tools(self) -> tuple[Mapping[str, Any], ...]:
        """Raises QwqError where they are no list of functions."""
        try:
            tools = json.loads(self.tools) if self.tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise QwqError(f"tools: no JSON ({error}); give a list of functions") from error
        if not isinstance(tools, list) or not all(
            isinstance(tool, dict)
            and isinstance(tool.get("function"), dict)
            and isinstance(tool["function"].get("name"), str)
            for tool in tools
        ):
            raise QwqError("tools: no list of functions in OpenAI's form; give one")
        return tuple(tools)


@dataclass(slots=True)
class Conversation:
    """messages: in OpenAI's form; an assistant's has `figures` beside it, what it took and how it
    ended. version: counts changes, for whoever shows it. changed_s: seconds since 1970.
    """

    id: str
    settings: Settings
    messages: list[Message] = field(default_factory=list)
    changed_s: float = 0.0
    version: int = 0

    @property
    def title(self) -> str:
        """How its first question begins."""
        first = next((m["content"] for m in self.messages if m["role"] == "user"), "")
        line = " ".join(str(first).split())
        return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1] + "…"


class Shelf:
    """The conversations in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Conversation] = {}
        self.version = 0
        for path in sorted(folder.glob("*.json")):
            try:
                conversation = _read(path)
            except (OSError, ValueError, LookupError, TypeError, RecursionError, QwqError) as error:
                _log.warning("%s: is no conversation and is left alone (%s)", path, error)
            else:
                self._held[conversation.id] = conversation

    def __getitem__(self, id_: str) -> Conversation:
        """Raises KeyError where there is none."""
        return self._held[id_]

    def __contains__(self, id_: object) -> bool:
        return id_ in self._held

    def newest_first(self) -> list[Conversation]:
        return sorted(self._held.values(), key=lambda one: one.changed_s, reverse=True)

    def begin(self, settings: Settings) -> Conversation:
        """A new conversation, which is on disk once it is saved."""
        return Conversation(secrets.token_hex(8), settings)

    def save(self, conversation: Conversation) -> None:
        """Raises QwqError where the folder cannot be written."""
        conversation.version += 1
        conversation.changed_s = time.time()
        self._held[conversation.id] = conversation
        self.version += 1
        document = {
            "format": FORMAT,
            "id": conversation.id,
            "changed_s": conversation.changed_s,
            "settings": dataclasses.asdict(conversation.settings),
            "messages": conversation.messages,
        }
        with replacing_file(self._path(conversation.id), force=True) as file:
            file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())

    def delete(self, id_: str) -> None:
        if self._held.pop(id_, None) is not None:
            self._path(id_).unlink(missing_ok=True)
            self.version += 1

    def _path(self, id_: str) -> Path:
        return self._folder / f"{id_}.json"


def conversations_folder(environment: Mapping[str, str]) -> Path:
    """Where conversations are kept: in the user's data folder."""
    base = environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "qwq-local" / "conversations"


def _read(path: Path) -> Conversation:
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["format"] != FORMAT or document["id"] != path.stem:
        raise ValueError(f"format {document['format']!r}, id {document['id']!r}")
    messages = document["messages"]
    if not all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
        raise ValueError("a message without role or content")
    settings = Settings(**document["settings"])
    return Conversation(path.stem, settings, messages, float(document["changed_s"]))
