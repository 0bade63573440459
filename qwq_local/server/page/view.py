"""What one browser tab shows: the conversation, brought up to date ten times a second."""

import json
from collections.abc import Callable
from functools import partial

from nicegui import ui
from nicegui.events import GenericEventArguments

from convert.errors import QwqError
from qwq_local.messages import Message
from qwq_local.server.page.desk import Desk, open_calls
from qwq_local.server.page.markup import as_html
from qwq_local.server.page.settings_dialog import settings_dialog
from qwq_local.server.page.shelf import Conversation, Settings
from qwq_local.server.page.talk import Talk

REFRESH_S = 0.1
_CHUNK = 1500  # characters of a thought that are sent again with each piece of it
_KEYS = """(e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
        e.preventDefault(); emit("say", e.target.value);
    } else if (e.key === "Escape") { emit("stop", ""); }
}"""


class View:
    """The elements of one tab."""

    def __init__(self, desk: Desk, wanted: str) -> None:
        self._desk = desk
        newest = desk.shelf.newest_first()
        if wanted in desk.shelf:
            self._conversation = desk.shelf[wanted]
        elif newest:
            self._conversation = newest[0]
        else:
            self._conversation = desk.shelf.begin(Settings())
        self._shown: list[Message] = []
        self._live: LiveReply | None = None
        self._seen = (-1, -1, "")
        self._phase = ""
        self._build()
        self._refresh()
        ui.timer(REFRESH_S, self._refresh)

    def _build(self) -> None:
        with ui.left_drawer(bordered=True, bottom_corner=True) as self._drawer:
            self._drawer.props('aria-label="Conversations"')
            ui.button("New conversation", icon="add", on_click=self._begin).props(
                "flat no-caps align=left"
            ).classes("wide")
            self._list = ui.column().classes("list")
        with ui.header().classes("head"):
            _icon("menu", "Conversations", self._drawer.toggle)
            ui.label(self._desk.model_name).classes("name")
            self._figures = ui.label().classes("figures")
            _icon("contrast", "Dark or light", self._switch_dark)
            _icon("tune", "Settings", self._open_settings)
        with ui.column().classes("talk"):
            self._column = ui.column().classes("messages")
            self._live_slot = ui.column().classes("messages")
        self._status = ui.label().classes("unseen").props("role=status aria-live=polite")
        with ui.footer().classes("foot"), ui.column().classes("talk"), ui.row().classes("ask"):
            self._box = ui.textarea(placeholder="Ask something").props(
                'autogrow outlined dense autofocus rows=1 aria-label="Your question"'
            )
            self._box.classes("box").on("keydown", self._on_key, js_handler=_KEYS)
            self._send = _icon("send", "Send (Enter)", lambda: self._say(self._box.value or ""))
            self._steer = _text_button("Steer", "Put what you typed into the thought", self._hint)
            self._now = _text_button("Answer now", "Close the thought", self._answer_now)
            self._stop = _text_button("Stop", "End the reply (Escape)", self._stop_reply)

    def _refresh(self) -> None:
        conversation, shelf = self._conversation, self._desk.shelf
        talk = self._desk.talk_of(conversation)
        seen = (shelf.version, conversation.version, conversation.id)
        if seen != self._seen:
            self._seen = seen
            self._show_list()
            self._show_messages()
        if talk is None and self._live is not None:
            self._live_slot.clear()
            self._live = None
        elif talk is not None:
            if self._live is None or self._live.talk is not talk:
                self._live_slot.clear()
                with self._live_slot:
                    self._live = LiveReply(talk)
            self._live.refresh(loading=self._desk.loading)
        thinking = talk is not None and talk.thinking
        for button, visible in (
            (self._send, talk is None),
            (self._stop, talk is not None),
            (self._now, thinking),
            (self._steer, thinking),
        ):
            button.set_visibility(visible)
        phase = "" if talk is None else "thinking" if thinking else "answering"
        if phase != self._phase:
            self._status.set_text({"": "The reply is there"}.get(phase, f"The model is {phase}"))
            self._box.props(
                f'placeholder="{"A hint for the thought" if thinking else "Ask something"}"'
            )
            self._phase = phase

    def _show_list(self) -> None:
        self._list.clear()
        with self._list:
            for conversation in self._desk.shelf.newest_first():
                current = conversation.id == self._conversation.id
                with ui.row().classes("entry current" if current else "entry"):
                    entry = ui.button(
                        conversation.title, on_click=partial(self._open, conversation)
                    ).props("flat no-caps align=left")
                    entry.classes("title").props("aria-current=true" if current else "")
                    delete = partial(self._delete, conversation)
                    _icon("close", f"Delete {conversation.title}", delete)

    def _show_messages(self) -> None:
        messages = self._conversation.messages
        n_same = len(self._shown)
        if [*map(id, messages[:n_same])] != [*map(id, self._shown)]:
            self._column.clear()
            n_same = 0
        with self._column:
            for message in messages[n_same:]:
                self._show_message(message)
        self._shown = [*messages]
        last = messages[-1].get("figures", {}) if messages else {}
        self._figures.set_text(_figures_line(last))

    def _show_message(self, message: Message) -> None:
        if message["role"] == "user":
            with ui.element("article").classes("said").props('aria-label="You"'):
                ui.label(message["content"]).classes("plain")
            return
        if message["role"] == "tool":
            with ui.element("article").classes("call").props('aria-label="Result"'):
                ui.label(f"→ {message['content']}").classes("plain mono")
            return
        figures = message.get("figures", {})
        with ui.element("article").classes("reply").props('aria-label="Reply"'):
            if thought := message.get("reasoning_content"):
                with ui.expansion(_thought_line(figures)).classes("thought").props("dense"):
                    ui.label(thought).classes("plain")
            if message["content"]:
                ui.html(as_html(message["content"])).classes("markdown")
            for call in message.get("tool_calls", ()):
                self._show_call(call["id"], call["function"]["name"], call["function"]["arguments"])
            for line in _remarks(figures):
                ui.label(line).classes("remark")
            with ui.row().classes("actions"):
                answer = json.dumps(message["content"])
                _icon("content_copy", "Copy", lambda: ui.run_javascript(f"copyText({answer})"))
                _icon("refresh", "Ask again", lambda: self._again(message)).classes("again")

    def _show_call(self, id_: str, name: str, arguments: object) -> None:
        conversation = self._conversation
        with ui.element("section").classes("call").props('aria-label="Tool call"'):
            ui.label(f"{name}({json.dumps(arguments, ensure_ascii=False)})").classes("plain mono")
            if id_ not in open_calls(conversation):
                return
            with ui.row().classes("ask") as row:
                box = ui.input(placeholder="What it returns").props("dense outlined")
                box.classes("box").props(f'aria-label="Result of {_attribute(name)}"')

                def give() -> None:
                    row.delete()
                    self._try(lambda: self._desk.give_result(conversation, id_, box.value or ""))

                _text_button("Return", "Give this back to the model", give)

    def _on_key(self, event: GenericEventArguments) -> None:
        what, text = event.args
        if what == "stop":
            self._stop_reply()
        elif self._desk.talk_of(self._conversation) is None:
            self._say(text)
        else:
            self._box.set_value(text)
            self._hint()

    def _say(self, text: str) -> None:
        if text.strip() and self._desk.talk_of(self._conversation) is None:
            self._box.set_value("")
            self._try(lambda: self._desk.say(self._conversation, text.strip()))
            self._show_address()
            ui.run_javascript("follow()")

    def _hint(self) -> None:
        talk, text = self._desk.talk_of(self._conversation), (self._box.value or "").strip()
        if talk is not None and text:
            self._box.set_value("")
            self._try(lambda: talk.steer(text))

    def _answer_now(self) -> None:
        if (talk := self._desk.talk_of(self._conversation)) is not None:
            talk.answer_now()

    def _stop_reply(self) -> None:
        if (talk := self._desk.talk_of(self._conversation)) is not None:
            talk.stop()

    def _again(self, message: Message) -> None:
        if self._conversation.messages[-1] is message:
            self._try(lambda: self._desk.ask_again(self._conversation))

    def _begin(self) -> None:
        self._open(self._desk.shelf.begin(self._conversation.settings))

    def _open(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._column.clear()
        self._shown = []
        self._show_address()
        self._refresh()
        ui.run_javascript("follow()")

    def _delete(self, conversation: Conversation) -> None:
        self._desk.delete(conversation.id)
        if conversation is self._conversation:
            self._begin()

    def _open_settings(self) -> None:
        settings_dialog(
            self._conversation.settings,
            lambda settings: self._desk.set_up(self._conversation, settings),
        )

    def _switch_dark(self) -> None:
        ui.run_javascript("switchDark()")

    def _show_address(self) -> None:
        ui.run_javascript(f"history.replaceState(null, '', '?chat={self._conversation.id}')")

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except QwqError as error:
            ui.notify(str(error), type="negative", multi_line=True)


class LiveReply:
    """The elements of a reply that is being made."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self._n_shown = 0  # characters of the thought in labels that are full
        self._folded = False
        with ui.element("article").classes("reply").props('aria-label="Reply" aria-busy=true'):
            self._waiting = ui.label().classes("remark")
            self._thought = ui.expansion("Thinking", value=True).classes("thought").props("dense")
            with self._thought:
                self._column = ui.column().classes("pieces")
            self._budget = ui.linear_progress(0, show_value=False, size="3px").props(
                'instant-feedback aria-label="Budget of the thought"'
            )
            self._answer = ui.html("").classes("markdown")
        self._label: ui.label | None = None

    def refresh(self, *, loading: bool) -> None:
        """Show what has come since."""
        talk = self.talk
        self._waiting.set_text(_waiting_line(talk, loading=loading))
        self._waiting.set_visibility(not (talk.reasoning or talk.answer))
        self._thought.set_visibility(bool(talk.reasoning))
        self._show_thought()
        budget = talk.settings.reasoning_tokens
        self._budget.set_visibility(bool(budget) and talk.thinking)
        if budget:
            self._budget.set_value(min(1.0, talk.n_thought / budget))
            self._thought.set_text(f"{_thinking_line(talk)} of {budget:,} tokens")
        else:
            self._thought.set_text(f"{_thinking_line(talk)} tokens")
        if talk.answer and not self._folded:
            self._thought.set_value(False)
            self._folded = True
        self._answer.set_content(as_html(talk.answer))

    def _show_thought(self) -> None:
        text = self.talk.reasoning
        while self._n_shown < len(text) or self._label is None:
            rest = text[self._n_shown :]
            cut = rest.find("\n", _CHUNK) + 1
            if self._label is None:
                with self._column:
                    self._label = ui.label().classes("plain")
            if cut == 0:
                self._label.set_text(rest)
                return
            self._label.set_text(rest[: cut - 1])
            self._n_shown += cut
            self._label = None


def _icon(name: str, label: str, act: Callable[[], object]) -> ui.button:
    button = ui.button(icon=name, on_click=act).props("flat round dense")
    with button:
        ui.tooltip(label)
    return button.props(f'aria-label="{_attribute(label)}"')


def _text_button(text: str, label: str, act: Callable[[], object]) -> ui.button:
    button = ui.button(text, on_click=act).props("outline no-caps")
    with button:
        ui.tooltip(label)
    return button


def _attribute(text: str) -> str:
    """A text as NiceGUI's props take it."""
    return text.replace("\\", "").replace('"', "'").replace("\n", " ")


def _seconds(time_s: float) -> str:
    minutes, seconds = divmod(int(time_s), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{time_s:.1f} s"


def _thinking_line(talk: Talk) -> str:
    verb = "Thinking" if talk.thinking else "Thought"
    return f"{verb} for {_seconds(talk.thought_s)} · about {talk.n_thought:,}"


def _thought_line(figures: Message) -> str:
    line = f"Thought for {_seconds(figures.get('thought_s', 0.0))}"
    n_tokens = figures.get("reasoning_tokens")
    return line if n_tokens is None else f"{line} · {n_tokens:,} tokens"


def _waiting_line(talk: Talk, *, loading: bool) -> str:
    if loading:
        return "The model is being loaded …"
    if talk.progress is None:
        return "Waiting …"
    n_read, n_all = talk.progress
    return f"Reading {n_read:,} of {n_all:,} tokens …"


def _figures_line(figures: Message) -> str:
    """Speed, and what the cache saved, of the last reply."""
    parts = []
    if (speed := figures.get("tokens_per_s")) is not None:
        parts.append(f"{speed:,.1f} tokens/s")
    if n_prompt := figures.get("prompt_tokens"):
        hits = round(100 * figures["n_cached"] / n_prompt)
        parts.append(f"{hits} % of {n_prompt:,} tokens from the cache")
    return " · ".join(parts)


def _remarks(figures: Message) -> list[str]:
    """What is to be said of how a reply went."""
    ends = {
        "cancelled": "stopped",
        "length": "cut: the longest reply, or the context, was reached",
        "repetition": "ended: it went round in circles",
        "error": f"error: {figures.get('error')}",
    }
    end = ends.get(str(figures.get("finish_reason")))
    return [*figures.get("notices", ()), *([end] if end else [])]
