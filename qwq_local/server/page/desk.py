"""What all open pages share: the conversations, and the replies that are being made."""

from collections.abc import Mapping

from qwq_local.messages import Message
from qwq_local.server.engine_room import EngineRoom
from qwq_local.server.page.shelf import Conversation, Settings, Shelf
from qwq_local.server.page.talk import Talk


class Desk:
    """Used in asyncio's thread alone. A conversation has one reply at a time."""

    def __init__(self, room: EngineRoom, shelf: Shelf, model_name: str) -> None:
        self.shelf = shelf
        self.model_name = model_name
        self._room = room
        self._talks: dict[str, Talk] = {}

    @property
    def loading(self) -> bool:
        return self._room.state == "loading"

    def talk_of(self, conversation: Conversation) -> Talk | None:
        """The reply that is being made, if one is."""
        return self._talks.get(conversation.id)

    def say(self, conversation: Conversation, text: str) -> None:
        """Add a question, and have it replied to. Raises QwqError where it cannot be."""
        self._add(conversation, {"role": "user", "content": text})

    def give_result(self, conversation: Conversation, call_id: str, result: str) -> None:
        """Add what a tool returned; once no call waits any more, the reply follows."""
        message = {"role": "tool", "tool_call_id": call_id, "content": result}
        self._add(conversation, message)

    def ask_again(self, conversation: Conversation) -> None:
        """Take the last reply back, and have another made. Raises QwqError where it cannot be."""
        if self.talk_of(conversation) is None:
            while conversation.messages and conversation.messages[-1]["role"] == "assistant":
                conversation.messages.pop()
            self.shelf.save(conversation)
            self._begin(conversation)

    def set_up(self, conversation: Conversation, settings: Settings) -> None:
        """Make further replies with these settings."""
        conversation.settings = settings
        if conversation.messages:
            self.shelf.save(conversation)

    def delete(self, id_: str) -> None:
        """Forget a conversation; a reply that is being made for it ends."""
        if (talk := self._talks.pop(id_, None)) is not None:
            talk.stop()
        self.shelf.delete(id_)

    def _add(self, conversation: Conversation, message: Message) -> None:
        if self.talk_of(conversation) is None:
            conversation.messages.append(message)
            self.shelf.save(conversation)
            if not open_calls(conversation):
                self._begin(conversation)

    def _begin(self, conversation: Conversation) -> None:
        def finish(message: Message) -> None:
            if self._talks.pop(conversation.id, None) is not None:  # else it was deleted
                conversation.messages.append(message)
                self.shelf.save(conversation)

        self._talks[conversation.id] = Talk(self._room, conversation, finish)


def open_calls(conversation: Conversation) -> dict[str, Mapping[str, object]]:
    """The calls that wait for a result, by id."""
    calls = {call["id"]: call for m in conversation.messages for call in m.get("tool_calls", ())}
    for message in conversation.messages:
        calls.pop(message.get("tool_call_id"), None)
    return calls
