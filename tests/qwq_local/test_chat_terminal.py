"""`qwq chat`: its commands, and what it is like in a terminal."""

import os
import re
import select
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from qwq_local import QwqError, Sampling
from qwq_local.chat import COMMANDS, MOST_FILE_NBYTES, Chat, command_completer, history_file
from tests.qwq_local.server.running import Repeating, fake_qwq
from tests.qwq_local.server.slow_page import THOUGHT

PROMPT = r"\?2004h.*>"  # a line may be typed


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *command: str, environment: dict[str, str]) -> None:
        import pty
        import termios

        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 100))
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self.output = ""
        self._n_seen = 0

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What was shown up to the end of the pattern, since the last call, as plain text."""
        until_s = time.monotonic() + 120
        while True:
            plain = re.sub(r"\x1b\[(?!\?2004h)\??[\d;]*[a-zA-Z]", "", self.output)
            found = re.compile(pattern, re.DOTALL).search(plain, self._n_seen)
            if found is not None:
                shown, self._n_seen = plain[self._n_seen : found.end()], found.end()
                return shown
            assert time.monotonic() < until_s, f"no {pattern!r} in {plain[self._n_seen :]!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self.output += os.read(self._ours, 65536).decode(errors="replace")

    def exit_code(self) -> int:
        return self._process.wait(timeout=120)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there are pseudo-terminals on POSIX alone")
def test_a_chat_in_a_terminal(tmp_path: Path) -> None:
    """Streams, answers at once, stops with Ctrl-C and goes on, completes, remembers lines."""
    environment = os.environ | {
        "PYTHONPATH": str(Path.cwd()),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "XDG_STATE_HOME": str(tmp_path),
    }
    command = (sys.executable, "-m", "tests.qwq_local.slow_chat")
    with Terminal(*command, environment=environment) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("Which is larger?\r")
        terminal.wait_for("Both are below ten")
        assert "\x1b[2mB\x1b[0m" in terminal.output, "the thought is not dimmed"
        terminal.type("/answer-now\n")
        shown = terminal.wait_for("9.11.*1.*" + PROMPT)
        assert shown.count("tenths decide") < THOUGHT.count("tenths decide") - 1
        assert "**9.9**" not in shown, "the Markdown is not laid out"
        assert "print(max(9.9, 9.11))" in shown
        terminal.type("And 9.8?\r")
        terminal.wait_for("Both are")
        terminal.type("mind the sign\n")
        terminal.wait_for("mind the sign.*mind the sign")  # its echo, and in the thought
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.wait_for(PROMPT)
        terminal.type("/bud\t")
        terminal.wait_for("/budget")
        terminal.type(" 7\r")
        terminal.wait_for("thoughts may take 7.*" + PROMPT)
        terminal.type("\x03")
        terminal.wait_for(PROMPT)
        terminal.type("\x1b[A\x1b[A\r")  # the line before the last one
        terminal.wait_for("And 9.8")
        terminal.wait_for("9.11.*1.*" + PROMPT)
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0
    history = tmp_path / "qwq-local" / "history"
    assert "+Which is larger?" in history.read_text(encoding="utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.fixture
def chat() -> Iterator[Chat]:
    with fake_qwq(engine=Repeating("Hm.\n</think>\n\nOne.", "Well.\n</think>\n\nTwo.")) as qwq:
        yield Chat(qwq, system=None, sampling=Sampling(), seed=1, thought="dimmed", markdown=False)


def test_a_reply_is_retried(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    """The question is asked again, with another seed, and the first reply is gone."""
    chat.take("Hi")
    chat.take("/retry")
    assert capsys.readouterr().out == "One.\nTwo.\n"
    engine: Any = chat._qwq.engine
    assert engine.prompts[0] == engine.prompts[1]
    assert engine.seeds[0] != engine.seeds[1]
    assert [m["content"] for m in chat._session.messages] == ["Hi", "Two."]


def test_a_file_goes_with_the_next_question_alone(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("the notes", encoding="utf-8")
    chat.take(f"/file {path}")
    chat.take("Sum up.")
    chat.take("Thanks.")
    questions = [m["content"] for m in chat._session.messages if m["role"] == "user"]
    assert questions == ["Sum up.\n\nnotes.txt:\n\nthe notes", "Thanks."]


def test_a_conversation_is_kept_and_goes_on(chat: Chat, tmp_path: Path) -> None:
    """A file of another conversation is not replaced, its own is."""
    path = tmp_path / "kept.qwq"
    chat.take("Hi")
    chat.take(f"/save {path}")
    chat.take("More")
    chat.take("/save")
    chat.take("/clear")
    chat.take("Else")
    with pytest.raises(QwqError, match="exists already"):
        chat.take(f"/save {path}")
    chat.take(f"/load {path}")
    assert [m["content"] for m in chat._session.messages] == ["Hi", "One.", "More", "Two."]


def test_a_budget_closes_the_thought(chat: Chat) -> None:
    chat.take("/budget 2")
    chat.take("Hi")
    engine: Any = chat._qwq.engine
    assert [len(said) for said in engine.said] == [2]
    chat.take("/budget off")
    chat.take("Hi")
    assert len(engine.said) == 1
    chat.take("/budget 30s")


def test_a_new_system_prompt_begins_anew(chat: Chat) -> None:
    chat.take("Hi")
    chat.take("/system Be brief.")
    assert [m["content"] for m in chat._session.messages] == ["Be brief."]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/nonsense", "no such command; /help"),
        ("/budget much", "no budget"),
        ("/budget -1", "no budget"),
        ("/retry", "nothing was asked"),
        ("/answer-now", "no thought is going on"),
        ("/save", "there is no path"),
        ("/load", "there is no path"),
        ("/load nowhere", "no saved session"),
        ("/file nowhere", "no text that can be read"),
        ("/file /", "no text that can be read"),
        ("/plan", "fake: cannot be read"),
    ],
)
def test_what_cannot_be_is_said(chat: Chat, line: str, problem: str) -> None:
    with pytest.raises(QwqError, match=problem):
        chat.take(line)


def test_a_file_that_is_too_long_is_refused(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.truncate(MOST_FILE_NBYTES + 1)
    with pytest.raises(QwqError, match="give a part"):
        chat.take(f"/file {path}")


def test_commands_and_paths_are_completed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    def completions(line: str) -> list[str]:
        found = command_completer().get_completions(Document(line), CompleteEvent())
        return [completion.text for completion in found]

    assert completions("/s") == ["/system", "/save"]
    assert completions(f"/file {tmp_path}/no") == ["tes.txt"]
    assert completions("Hello /s") == []
    assert completions("") == []
    assert {"/answer-now", "/budget", "/save", "/load", "/retry", "/plan"} <= set(COMMANDS)


def test_the_history_is_its_owners(tmp_path: Path) -> None:
    path = history_file({"XDG_STATE_HOME": str(tmp_path)})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
