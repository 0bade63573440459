"""`qwq chat`: a conversation in a terminal, and the commands that begin with a slash."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from convert.errors import QwqError, UsageError
from qwq_local.model import QwQ
from qwq_local.reply import Event
from qwq_local.sampling import Sampling
from qwq_local.session import SendOptions, Session
from qwq_local.stream import Stream
from qwq_local.terminal import ProgressLine, Thought, note, plan_lines, print_reply

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

MOST_FILE_NBYTES = 8 << 20
_TAKES_PATH = ("/file", "/load", "/save")


class Command(NamedTuple):
    """What a command does with the rest of its line, and its line of /help."""

    act: Callable[[Chat, str], None]
    takes: str
    summary: str


class Chat:
    """A conversation and how its replies are made."""

    def __init__(
        self,
        qwq: QwQ,
        *,
        system: str | None,
        sampling: Sampling,
        seed: int | None,
        thought: Thought,
        markdown: bool,
    ) -> None:
        self._qwq = qwq
        self._system = system
        self._sampling = sampling
        self._seed = seed
        self._thought: Thought = thought
        self._markdown = markdown
        self._options: SendOptions = {}
        self._files: list[str] = []
        self._kept_in: Path | None = None  # where it was saved or loaded: no other file is replaced
        self.over = False
        self._session = self._new_session()

    def take(self, line: str) -> None:
        """Do what a line says: a command, or a question. Raises QwqError where it cannot be."""
        name, _, rest = line.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/"):
            files, self._files = self._files, []
            self._ask("\n\n".join([line.strip(), *files]))
        elif name in COMMANDS:
            COMMANDS[name].act(self, rest.strip())
        else:
            raise UsageError(f"{name}: no such command; /help lists them")

    def help(self, _rest: str) -> None:
        width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            note(f"{f'{name} {command.takes}':{width}}  {command.summary}")
        note("Ctrl-C stops a reply; the conversation goes on as if it had not been asked for.")

    def clear(self, _rest: str) -> None:
        self._session = self._new_session()
        self._kept_in = None
        note("a new conversation")

    def system(self, rest: str) -> None:
        self._system = rest or None
        self.clear(rest)

    def budget(self, rest: str) -> None:
        """`512` are tokens, `30s` seconds, `off` is neither."""
        number = rest.removesuffix("s")
        if rest == "off":
            self._options = {}
        elif not number.isdecimal():
            raise UsageError(f"/budget: {rest!r} is no budget; give 512 (tokens), 30s or off")
        elif rest.endswith("s"):
            self._options = {"reasoning_seconds": float(number)}
        else:
            self._options = {"reasoning_tokens": int(number)}
        note("thoughts have no budget" if rest == "off" else f"thoughts may take {rest}")

    def answer_now(self, _rest: str) -> None:
        raise UsageError("/answer-now: no thought is going on; type it while there is one")

    def retry(self, _rest: str) -> None:
        question = self._session.take_back()
        if question is None:
            raise UsageError("/retry: nothing was asked yet; ask something")
        self._ask(question)

    def file(self, rest: str) -> None:
        path = Path(rest).expanduser()
        try:
            if path.stat().st_size > MOST_FILE_NBYTES:
                raise UsageError(f"{path}: has more than {MOST_FILE_NBYTES:,} bytes; give a part")
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: is no text that can be read ({error}); give one") from error
        self._files.append(f"{path.name}:\n\n{text}")
        note(f"{path.name} goes with the next question")

    def save(self, rest: str) -> None:
        path = self._path(rest, "/save")
        self._session.save(path, force=path == self._kept_in)
        self._kept_in = path
        note(f"saved in {path}")

    def load(self, rest: str) -> None:
        path = self._path(rest, "/load")
        self._session = self._qwq.load_session(path)
        self._kept_in = path
        note(f"{len(self._session.messages)} messages from {path}")

    def fold(self, _rest: str) -> None:
        self._thought = "dimmed" if self._thought == "folded" else "folded"
        note(f"thoughts are {self._thought}")

    def plan(self, _rest: str) -> None:
        from qwq_local.engine import EngineSettings
        from qwq_local.engines.here import plan_here

        settings = EngineSettings(self._qwq.engine.rope_plan.context_length)
        memory, _ = plan_here(Path(self._qwq.path), settings)
        for line in plan_lines(memory):
            note(line)

    def exit(self, _rest: str) -> None:
        self.over = True

    def _new_session(self) -> Session:
        return self._qwq.session(system=self._system, sampling=self._sampling, seed=self._seed)

    def _ask(self, question: str) -> None:
        line = ProgressLine("reading")
        options: SendOptions = {**self._options, "on_progress": line}
        stream = self._session.send(question, **options)
        try:
            with _listening(stream):
                self._print(line.before(stream))
        except KeyboardInterrupt:
            stream.close()
            note("\nstopped")

    def _print(self, events: Iterator[Event]) -> None:
        print_reply(events, thought=self._thought, figures=False, markdown=self._markdown)

    def _path(self, rest: str, name: str) -> Path:
        if not rest and self._kept_in is None:
            raise UsageError(f"{name}: there is no path; give one")
        return Path(rest).expanduser() if rest else self._kept_in or Path()


COMMANDS: Mapping[str, Command] = {
    "/help": Command(Chat.help, "", "this list"),
    "/answer-now": Command(Chat.answer_now, "", "typed during a thought: close it and answer"),
    "/budget": Command(Chat.budget, "512|30s|off", "what each thought may take"),
    "/retry": Command(Chat.retry, "", "take the last reply back and make another"),
    "/file": Command(Chat.file, "PATH", "put a text file with the next question"),
    "/system": Command(Chat.system, "TEXT", "start anew with this system prompt"),
    "/clear": Command(Chat.clear, "", "start anew"),
    "/save": Command(Chat.save, "PATH", "keep the conversation"),
    "/load": Command(Chat.load, "PATH", "go on with one that was kept"),
    "/fold": Command(Chat.fold, "", "show thoughts as one line, or whole again"),
    "/plan": Command(Chat.plan, "", "what the model takes of the machine's memory"),
    "/exit": Command(Chat.exit, "", "leave, as does Ctrl-D"),
}


def converse(chat: Chat, name: str) -> None:
    """Take lines until the input ends."""
    note(f"{name}; /help lists the commands")
    lines = _typed_lines() if sys.stdin.isatty() else _piped_lines()
    for line in lines:
        try:
            chat.take(line)
        except QwqError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("stopped")
        if chat.over:
            return


def history_file(environment: Mapping[str, str]) -> Path:
    """Where typed lines are kept: in the user's state folder, for nobody else to read."""
    base = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "qwq-local" / "history"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    return path


def _piped_lines() -> Iterator[str]:
    while True:
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            continue
        if not line:
            return
        yield line


def _typed_lines() -> Iterator[str]:
    prompt = _prompt_session()
    while True:
        try:
            yield prompt.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            continue


def _prompt_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        history: FileHistory | InMemoryHistory = FileHistory(str(history_file(os.environ)))
    except OSError:
        history = InMemoryHistory()
    return PromptSession(
        history=history, completer=command_completer(), complete_while_typing=False
    )


def command_completer() -> Completer:
    """Completes the commands, and the paths of those that take one."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class CommandCompleter(Completer):
        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            name, space, rest = document.text_before_cursor.partition(" ")
            if not space:
                for command in COMMANDS:
                    if name and command.startswith(name):
                        yield Completion(command, -len(name))
            elif name in _TAKES_PATH:
                yield from paths.get_completions(Document(rest), complete_event)

    return CommandCompleter()


@contextmanager
def _listening(stream: Stream) -> Iterator[None]:
    """Heed what is typed while a reply is made: /answer-now, and hints for the thought."""
    if os.name != "posix" or not sys.stdin.isatty():
        yield
        return
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(stream, over), daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()


def _listen(stream: Stream, over: threading.Event) -> None:
    descriptor = sys.stdin.fileno()
    while not over.is_set():
        if not select.select([descriptor], [], [], 0.1)[0]:
            continue
        line = os.read(descriptor, 4096).decode(errors="replace").strip()
        if line == "/answer-now":
            stream.answer_now()
        elif line.startswith("/"):
            note(f"{line}: not during a reply; /answer-now is, and Ctrl-C stops it")
        elif line:
            try:
                stream.steer(line)
            except QwqError as error:
                note(f"error: {error}")


def run_chat(
    qwq: QwQ,
    *,
    system: str | None,
    sampling: Sampling,
    seed: int | None,
    folded: bool,
) -> None:
    """Converse until the input ends."""
    chat = Chat(
        qwq,
        system=system,
        sampling=sampling,
        seed=seed,
        thought="folded" if folded else "dimmed",
        markdown=sys.stdout.isatty(),
    )
    converse(chat, qwq.name)
