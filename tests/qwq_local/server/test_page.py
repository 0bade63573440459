"""The page in a browser, Chromium without a window, and who is let in to it."""

import contextlib
import http.client
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, WebSocket, expect, sync_playwright

from qwq_local.server.sign_in import COOKIE, page_token
from tests.qwq_local.test_cli import QWQ

KEY = "qwq-0123456789abcdef"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
pytestmark = pytest.mark.slow
expect.set_options(timeout=120_000)


@contextlib.contextmanager
def slow_server(folder: Path, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.qwq_local.server.slow_page", str(folder), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(timeout=120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with slow_server(tmp_path_factory.mktemp("conversations")) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with slow_server(tmp_path_factory.mktemp("guarded"), KEY) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("there is no Chromium; on Debian or Ubuntu: apt install chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """A page that must fetch nothing from elsewhere, and must make no error."""
    problems: list[str] = []

    def note(asked: Request | WebSocket) -> None:
        address = urlsplit(asked.url)
        if address.scheme != "data" and address.netloc != urlsplit(url).netloc:
            problems.append(f"fetched {asked.url}")

    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", note)
        page.on("websocket", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        yield page
        assert problems == []


def ask(page: Page, question: str) -> None:
    box = page.get_by_label("Your question")
    box.fill(question)
    box.press("Enter")


def test_a_conversation(browser: Browser, server: str) -> None:
    """Ask, watch the thought, answer now; a second turn; and all of it after a reload."""
    with opened(browser, server) as page:
        ask(page, "Which is larger, 9.9 or 9.11?")
        thought = page.locator(".thought .plain")
        expect(thought).to_contain_text("Both are below ten")
        n_before = len(thought.inner_text())
        expect(page.locator(".thought")).to_contain_text(re.compile("Thinking for .* about"))
        expect(thought).to_have_text(re.compile(f".{{{n_before + 5},}}"))  # it streams
        page.get_by_text("Answer now").click()
        reply = page.get_by_label("Reply")
        expect(reply.locator("math")).to_have_count(2)
        expect(reply.locator("pre")).to_have_text("print(max(9.9, 9.11))  # <b>not bold</b>\n")
        expect(reply.locator("td").first).to_have_text("9.9")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        reply.get_by_label("Copy the code").click()
        expect(reply.get_by_label("Copy the code")).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == "print(max(9.9, 9.11))  # <b>not bold</b>\n"
        expect(page.get_by_role("status")).to_have_text("The reply is there")
        expect(page.get_by_label("Ask again")).to_be_visible()
        line = page.locator(".thought .q-item").first
        expect(line).to_contain_text(re.compile(r"Thought for [\d.]+ s · \d+ tokens"))
        expect(thought).to_be_hidden()
        line.focus()
        page.keyboard.press("Enter")  # by keyboard
        expect(thought).to_contain_text("Both are below ten")
        assert len(thought.inner_text()) < 300, "the thought went on after Answer now"
        expect(page.locator(".figures")).to_contain_text(
            re.compile(r"[\d.]+ tokens/s · \d+ % of \d+ tokens from the cache")
        )
        ask(page, "And 9.8?")
        page.get_by_text("Answer now").click()
        expect(page.get_by_label("Ask again").nth(1)).to_be_visible()
        page.reload()
        expect(page.get_by_label("You", exact=True)).to_have_text(
            ["Which is larger, 9.9 or 9.11?", "And 9.8?"]
        )
        expect(page.locator("article math")).to_have_count(4)


def test_several_conversations(browser: Browser, server: str) -> None:
    """Each with its own messages, also after a reload; one that is deleted is gone."""
    with opened(browser, server) as page:
        for question in ("the first one", "the second one"):
            page.get_by_text("New conversation").click()
            ask(page, question)
            page.get_by_text("Answer now").click()
            expect(page.get_by_label("Ask again")).to_be_visible()
        said = page.get_by_label("You", exact=True)
        expect(said).to_have_text(["the second one"])
        page.get_by_role("button", name="the first one", exact=True).click()
        expect(said).to_have_text(["the first one"])
        page.reload()
        expect(said).to_have_text(["the first one"])
        page.get_by_label("Delete the first one").click()
        expect(page.get_by_label("Delete the first one")).to_have_count(0)
        expect(said).to_have_count(0)
        page.get_by_role("button", name="the second one", exact=True).click()
        expect(said).to_have_text(["the second one"])


def test_a_models_html_stays_text(browser: Browser, server: str) -> None:
    """Scripts, event handlers, links that are scripts and pictures from elsewhere."""
    with opened(browser, server) as page:
        page.get_by_text("New conversation").click()
        ask(page, "hostile")
        page.get_by_text("Answer now").click()
        expect(page.get_by_label("Ask again")).to_be_visible()
        answer = page.locator(".markdown")
        expect(answer).to_contain_text('<script>document.title = "owned"</script>')
        expect(answer).to_contain_text("onerror=")
        for selector in ("script", "img", "style", "[onerror]", "[href^='javascript:']"):
            assert answer.locator(selector).count() == 0, selector
        answer.get_by_text("picture").hover()
        page.wait_for_timeout(200)
        assert page.title() == "nano-qwq · qwq-local"


def test_what_our_markdown_let_through_the_browser_would_not_run(
    browser: Browser, server: str
) -> None:
    """The second wall by itself: HTML that is given to the page's elements is sanitized there."""
    with opened(browser, server) as page:
        kept = page.evaluate(
            """() => { const e = document.createElement("div"); document.body.append(e);
            e.setHTML("<img src=x onerror='document.title=1'><a href='javascript:x'>a</a>"
            + "<script>document.title=1</script><math><mi>x</mi></math>"); return e.innerHTML; }"""
        )
        assert "<math><mi>x</mi></math>" in kept
        assert not re.search("onerror|javascript:|<script", kept)


def test_stopping_steering_and_asking_again(browser: Browser, server: str) -> None:
    with opened(browser, server) as page:
        page.get_by_text("New conversation").click()
        ask(page, "Which is larger?")
        expect(page.locator(".thought .plain")).to_contain_text("Both")
        ask(page, "mind the sign")
        expect(page.locator(".thought .plain")).to_contain_text("mind the sign")
        page.get_by_label("Your question").press("Escape")
        expect(page.get_by_text("stopped")).to_be_visible()
        page.get_by_label("Ask again").click()
        expect(page.get_by_text("stopped")).to_have_count(0)
        page.get_by_text("Stop", exact=True).click()
        expect(page.get_by_text("stopped")).to_be_visible()


def test_settings_and_a_tool_call(browser: Browser, server: str) -> None:
    """A budget that cannot be is said; one that can closes the thought; a call is shown."""
    with opened(browser, server) as page:
        page.get_by_text("New conversation").click()
        page.get_by_label("Settings").first.click()
        budget = page.get_by_label("Thought, tokens at most")
        budget.fill("-1")
        page.get_by_text("Save").click()
        expect(page.get_by_role("alert")).to_contain_text("reasoning_tokens: -1 leaves no reply")
        budget.fill("40")
        tools = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
        page.get_by_label("Tools, a JSON list").fill(tools)
        page.get_by_text("Save").click()
        ask(page, "weather in Rome?")
        call = page.get_by_label("Tool call")
        expect(call).to_contain_text('weather({"city": "<b>Rome</b>"})')
        expect(page.locator(".thought .q-item").first).to_contain_text("tokens")
        page.get_by_label("Result of weather").fill("sunny")
        page.get_by_text("Return", exact=True).click()
        expect(page.get_by_label("Result", exact=True)).to_have_text("→ sunny")
        expect(page.locator("article math")).to_have_count(2)


def test_a_narrow_dark_window(browser: Browser, server: str) -> None:
    """Nothing is wider than a phone, and dark stays after a reload."""
    with opened(browser, server) as page:
        page.set_viewport_size({"width": 360, "height": 640})
        page.reload()  # as a phone opens it, without the conversations over it
        page.get_by_label("Dark or light").click()
        expect(page.locator("body")).to_have_class(re.compile("body--dark"))
        page.reload()
        expect(page.locator("body")).to_have_class(re.compile("body--dark"))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        expect(page.get_by_label("Your question")).to_be_in_viewport()
        for button in page.get_by_role("button").all():
            if button.is_visible():
                assert button.inner_text().strip() or button.get_attribute("aria-label")


def test_the_key_is_asked_for(browser: Browser, guarded: str) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        assert (page.goto(guarded) or pytest.fail("no answer")).status == 401
        page.get_by_label("The server's key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("This is not the key.")
        page.get_by_label("The server's key").fill(KEY)
        page.keyboard.press("Enter")
        ask(page, "Which is larger?")
        expect(page.locator(".thought .plain")).to_contain_text("Both")
        cookie = context.cookies()[0]
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert KEY not in str(cookie)


def handshake(url: str, **headers: str) -> int:
    """The status that a websocket's opening gets."""
    port = urlsplit(url).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    connection.request("GET", path, headers=HANDSHAKE | headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_guard_stands_before_the_websocket(guarded: str) -> None:
    """Would catch a page elsewhere, or a rebound name, that talks to the page's socket."""
    host = urlsplit(guarded).netloc
    key = {"Cookie": f"{COOKIE}={page_token(KEY)}"}
    assert handshake(guarded, **key) == 101
    assert handshake(guarded, **key, Origin=f"http://{host}") == 101
    assert handshake(guarded, Authorization=f"Bearer {KEY}") == 101
    assert handshake(guarded) == 403
    assert handshake(guarded, Cookie=f"{COOKIE}={page_token('another key')}") == 403
    assert handshake(guarded, Cookie=f"{COOKIE}={KEY}") == 403
    assert handshake(guarded, **key, Origin="https://evil.example") == 403
    assert handshake(guarded, **key, Origin="null") == 403
    assert handshake(guarded, **key, Host="evil.example") == 403


def test_every_path_of_the_page_is_guarded(guarded: str) -> None:
    """And all others stay the interface's: a page that takes 404 and 405 over would be noticed."""
    port = urlsplit(guarded).port

    def get(path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read().decode()

    polling = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"
    for path in ("/", "/favicon.ico", "/_nicegui/x", polling, "/v1/models"):
        assert get(path)[0] == 401, path
        assert get(path, Host="evil.example")[0] == 403, path
    key = {"Authorization": f"Bearer {KEY}"}
    status, headers, body = get("/", **key)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", body)
    status, headers, _ = get(polling, **key, Origin=f"http://127.0.0.1:{port}")
    assert status == 200
    assert not [name for name in headers if name.startswith("access-control")]
    assert get("/v1/chat/completions", **key)[0] == 405
    status, headers, body = get("/nowhere", **key)
    assert (status, headers["content-type"]) == (404, "application/json")


def test_nano_qwq_and_a_restart(browser: Browser, bf16_gguf: Path, tmp_path: Path) -> None:
    """The real program and model; a second server finds what the first has kept."""
    command = [*QWQ, "serve", "-m", str(bf16_gguf), "--port", "0", "--context", "512"]
    for is_first in (True, False):
        with subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | {"XDG_DATA_HOME": str(tmp_path)},
        ) as process:
            assert process.stderr is not None
            found = re.search(r"chat page at (http://\S+);", process.stderr.readline())
            assert found
            try:
                with opened(browser, found[1]) as page:
                    if is_first:
                        ask(page, "Which is larger, 9.9 or 9.11?")
                        expect(page.get_by_label("Ask again")).to_be_visible()
                    expect(page.locator(".thought")).to_contain_text("Thought for")
                    expect(page.locator(".markdown")).not_to_be_empty()
            finally:
                process.terminate()
            assert "Traceback" not in process.stderr.read()
    assert len(list((tmp_path / "qwq-local" / "conversations").glob("*.json"))) == 1
