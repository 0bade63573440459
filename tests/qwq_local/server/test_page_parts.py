"""The page without a browser: its HTML, its files, what it asks for."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwq_local import QwqError, UsageError
from qwq_local.server.page.markup import MOST_FORMULA, as_html, code_css
from qwq_local.server.page.shelf import Settings, Shelf, conversations_folder
from qwq_local.server.page.talk import recent

ALLOWED_TAGS = set(
    "h1 p br strong em ol li table thead tbody tr th td pre code span div button a hr s blockquote "
    "math mrow mi mo mn mtext msup msub mfrac mtable mtr mtd mstyle mspace menclose msqrt".split()
)


class Tags(HTMLParser):
    """Collects what a browser would make of a text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "markdown",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "text <svg/onload=alert(1)> text",
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt&colon;alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "[x](vbscript:x) [y](//evil.example) [z](\x01javascript:alert(1))",
        "![x](https://evil.example/x.png)",
        '[x](https://a.example "onmouseover=alert(1)")',
        '[x](https://a.example/"onmouseover="alert(1))',
        "<javascript:alert(1)>",
        "`<b>` and ```<b>```",
        '```"><script>alert(1)</script>\n<script>alert(1)</script>\n```',
        "$<script>alert(1)</script>$",
        r"$\text{<img src=x onerror=alert(1)>}$",
        r"$\href{javascript:alert(1)}{x}$ $\style{background:url(//evil.example)}{x}$",
        r'$\color{red" onclick="alert(1)}x$',
        r"\(\text{</math><script>alert(1)</script>}\)",
        "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=x onerror=x>'>",
    ],
)
def test_a_models_markup_stays_text(markdown: str) -> None:
    """Would catch HTML of the model's own, a script in a link, and a picture that tells who reads.

    The browser's sanitizer stands behind this and is tested in one.
    """
    found = Tags(as_html(markdown))
    assert found.tags <= ALLOWED_TAGS
    for name, value in found.attributes:
        assert not name.startswith("on"), name
        assert name not in ("src", "style", "srcset")
        if name == "href":
            assert value == "#" or str(value).startswith(("https://", "http://", "mailto:"))


@pytest.mark.parametrize(
    ("markdown", "part"),
    [
        ("**9.9** and\nmore", "<strong>9.9</strong> and<br />"),
        ("$x^2$", "<msup><mi>x</mi><mn>2</mn></msup>"),
        (r"\(0.9 > 0.11\)", "<mn>0.9</mn><mo>&gt;</mo><mn>0.11</mn>"),
        ("\\[\n\\frac{1}{2}\n\\]", '<div class="formula block"><math'),
        ("$$\n\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}\n$$", "<mtable"),
        ("```python\nprint(1)\n```", '<span class="nb">print</span>'),
        ("```nonsense\n<b>\n```", "&lt;b&gt;"),
        ("| a |\n|---|\n| 1 |", "<td>1</td>"),
        ("[x](https://a.example)", 'rel="noopener noreferrer nofollow"'),
        (r"$\left( x$", r"<code>\left( x</code>"),
        (f"${'x' * (MOST_FORMULA + 1)}$", "<code>xx"),
    ],
)
def test_what_is_drawn(markdown: str, part: str) -> None:
    assert part in as_html(markdown)


def test_money_is_no_formula() -> None:
    assert "<math" not in as_html("It costs $5, or $6 with the case.")


def test_every_beginning_of_an_answer_can_be_shown() -> None:
    """An answer is shown while it grows: would catch a formula or a table that fails half-way."""
    answer = (
        "# A\n\\[\n\\frac{a}{\\sqrt{b}} \\begin{aligned}a&=b\\\\c\\end{aligned}\n\\]\n| a |\n|-|"
    )
    answer += "\n```py\nx = '\n```\n$\\left(\\binom{n}{k}\\right)^{2_1}$"
    for end in range(len(answer) + 1):
        assert Tags(as_html(answer[:end])).tags <= ALLOWED_TAGS | {"mover", "munder", "mpadded"}


def test_code_has_colours_in_light_and_dark() -> None:
    css = code_css()
    assert ".code .k {" in css
    assert ".body--dark .code .k {" in css


def test_conversations_are_found_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "new" / "folder")
    assert shelf.newest_first() == []
    settings = Settings(system="Be brief.", temperature=0.2, reasoning_tokens=64)
    conversation = shelf.begin(settings)
    conversation.messages.append({"role": "user", "content": "What is\n larger " + "x" * 99})
    shelf.save(conversation)
    other = shelf.begin(Settings())
    shelf.save(other)
    found = Shelf(tmp_path / "new" / "folder")
    assert [one.id for one in found.newest_first()] == [other.id, conversation.id]
    again = found[conversation.id]
    assert (again.settings, again.messages) == (settings, conversation.messages)
    assert again.title.startswith("What is larger xxx")
    assert again.title.endswith("…")
    found.delete(other.id)
    assert other.id not in Shelf(tmp_path / "new" / "folder")


def test_a_damaged_file_is_left_alone_and_the_others_are_found(tmp_path: Path) -> None:
    """Would catch one broken conversation that keeps the server from starting, or its deletion."""
    shelf = Shelf(tmp_path)
    conversation = shelf.begin(Settings())
    shelf.save(conversation)
    whole = (tmp_path / f"{conversation.id}.json").read_text(encoding="utf-8")
    broken = {
        "cut": whole[: len(whole) // 2],
        "empty": "",
        "list": "[]",
        "other": whole.replace('"format": 1', '"format": 99'),
        "role": json.dumps(json.loads(whole) | {"id": "role", "messages": [{"content": 1}]}),
        "hot": json.dumps(json.loads(whole) | {"id": "hot", "settings": {"temperature": 99}}),
        "deep": "[" * 100_000,
    }
    for name, text in broken.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    assert [one.id for one in Shelf(tmp_path).newest_first()] == [conversation.id]
    for name, text in broken.items():
        assert (tmp_path / f"{name}.json").read_text(encoding="utf-8") == text


def test_a_conversation_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path)
    conversation = shelf.begin(Settings())
    conversation.messages.append({"role": "user", "content": "kept"})
    shelf.save(conversation)
    conversation.messages.append({"role": "user", "content": "lost"})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(QwqError, match="disk filled up"):
        shelf.save(conversation)
    assert [m["content"] for m in Shelf(tmp_path)[conversation.id].messages] == ["kept"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"temperature": 99.0}, "temperature: 99"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"reasoning_tokens": -1}, "reasoning_tokens: -1"),
        ({"context": 0}, "context: 0"),
        ({"tools": "{"}, "tools: no JSON"),
        ({"tools": '[{"name": "x"}]'}, "no list of functions"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises((QwqError, UsageError), match=problem):
        Settings(**settings)


def test_the_context_keeps_the_newest_turns() -> None:
    """A turn goes as a whole, with its tool results; the newest stays however long it is."""
    roles = ["user", "assistant", "user", "assistant", "tool", "assistant", "user"]
    messages = [{"role": role, "content": "x" * 92} for role in roles]  # 100 tokens each

    def kept(n_tokens: int) -> int:
        return len(recent(messages, n_tokens, len))

    assert [kept(n) for n in (1, 100, 499, 500, 699, 700)] == [1, 1, 1, 5, 5, 7]


def test_the_users_data_folder_is_used() -> None:
    assert conversations_folder({"XDG_DATA_HOME": "/data"}) == Path("/data/qwq-local/conversations")
