"""A person at the explorer: a real browser on Voila and on JupyterLab."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from playwright.sync_api import Browser, Page, TimeoutError, expect

from bitnet_edu.files.source import TINY

PATIENCE = 300_000  # milliseconds: to end a hang, not to judge a busy machine
expect.set_options(timeout=PATIENCE)
# JupyterLab and Voila say these themselves, on every page and without our panels
HARMLESS = ("shared singleton module", "shared module", "favicon", "fontawesome")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[str]:
    """Run a web server on loopback until the block ends; its log is shown if it does not answer."""
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=60).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.25)
        else:
            pytest.fail(f"no answer from {command[0]}: {log.read_text()}")
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def voila_url() -> Iterator[str]:
    """`bitnet-edu app`, as a user starts it."""
    command = [sys.executable, "-m", "bitnet_edu.cli", "app", "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.terminate()


# tiny answers faster than anybody can press Stop, so it gets the pace of a large model
SLOW_PANEL = """
import time
from bitnet_edu.ui.chat import ChatPanel

panel = ChatPanel("tiny")
panel.wait()
model, next_tokens = panel.session.model, panel.session.model.next_tokens
model.next_tokens = lambda *arguments: time.sleep(0.05) or next_tokens(*arguments)
panel
"""


@pytest.fixture(scope="module")
def slow_notebook(tmp_path_factory) -> Path:
    """A notebook whose one cell shows a chat panel."""
    path = tmp_path_factory.mktemp("notebooks") / "chat.ipynb"
    cell = nbformat.v4.new_code_cell(SLOW_PANEL)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)
    return path


@pytest.fixture(scope="module")
def slow_voila_url(slow_notebook: Path, tmp_path_factory) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "voila", str(slow_notebook), "--no-browser", f"--port={port}"]
    with server(command, port, tmp_path_factory.mktemp("slow") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def lab_url(slow_notebook: Path, tmp_path_factory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token="),
        str(slow_notebook.parent),
    ]
    os.environ.setdefault("JUPYTERLAB_SETTINGS_DIR", str(folder / "settings"))
    with server(command, port, folder / "log") as url:
        yield f"{url}/lab/tree/chat.ipynb"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test on any error of a script or on the console."""
    errors = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda m: errors.append(f"{m.text} {m.location}") if m.type == "error" else 0
    )
    yield page
    page.close()
    assert not [e for e in errors if not any(word in e for word in HARMLESS)]


def idle(page: Page) -> None:
    expect(page.locator(".bn-chat")).to_have_attribute("aria-busy", "false", timeout=PATIENCE)


def send(page: Page, text: str) -> None:
    """Write a message, press Enter, and wait until the kernel has taken it up."""
    page.evaluate("document.querySelector('.bn-notice').textContent = ''")
    before = page.locator(".bn-message").count()
    box = page.get_by_label("Message", exact=True)
    box.fill(text)
    box.press("Enter")
    page.wait_for_function(
        """before => document.querySelectorAll('.bn-message').length > before
        || document.querySelector('.bn-notice').textContent""",
        arg=before,
    )


def answer(page: Page) -> str:
    return page.locator(".bn-message").last.locator(".bn-text").inner_text()


def drive_chat(page: Page) -> None:
    """Type, send, see text come, stop midway, regenerate, break a line, send what is not HTML."""
    page.locator(".bn-chat").wait_for()
    idle(page)
    send(page, "Hello!")
    expect(page.locator(".bn-assistant .bn-text").last).not_to_be_empty()
    idle(page)
    assert "tokens/s" in page.locator(".bn-stats").inner_text()
    assert page.locator(".bn-message").count() == 2

    first = answer(page)
    page.evaluate("document.querySelector('.bn-assistant').dataset.old = 'yes'")
    page.get_by_role("button", name="Again").click()
    page.wait_for_function("!document.querySelector('.bn-assistant[data-old]')")
    idle(page)
    expect(page.locator(".bn-message")).to_have_count(2)
    assert answer(page) == first  # temperature 0

    box = page.get_by_label("Message", exact=True)
    box.fill("first")
    box.press("Shift+Enter")
    box.type("second")
    assert box.input_value() == "first\nsecond"
    box.fill("")

    hostile = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> **b** שלום"
    send(page, hostile)
    idle(page)
    assert page.locator(".bn-user .bn-text").last.inner_text() == hostile
    assert page.evaluate("window.hacked") is None

    send(page, "word " * 2_000)
    idle(page)
    assert "context" in page.locator(".bn-notice").inner_text()

    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".bn-message")).to_have_count(0)


def stop_midway(page: Page) -> None:
    """See text come piece by piece, press Escape, and find that it ends at once."""
    page.locator(".bn-chat").wait_for()
    idle(page)
    send(page, "Tell me a story about a fox.")
    live = page.locator(".bn-assistant .bn-text").last
    expect(live).not_to_be_empty()
    first = live.inner_text()
    expect(live).not_to_have_text(first)  # it grows
    page.get_by_label("Message", exact=True).press("Escape")
    expect(page.locator(".bn-chat")).to_have_attribute("aria-busy", "false", timeout=PATIENCE)
    stopped = answer(page)
    page.evaluate("document.querySelector('.bn-assistant').dataset.old = 'yes'")
    page.get_by_role("button", name="Again").click()
    page.wait_for_function("!document.querySelector('.bn-assistant[data-old]')")
    idle(page)
    assert answer(page).startswith(stopped)
    assert len(answer(page)) > len(stopped)


def test_chat_in_voila(page: Page, voila_url: str):
    page.goto(voila_url)
    drive_chat(page)
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.querySelector('.bn-chat').scrollWidth <= 390")


def test_stop_in_voila(page: Page, slow_voila_url: str):
    page.goto(slow_voila_url)
    stop_midway(page)


def test_full_context_in_voila(page: Page, voila_url: str):
    page.goto(voila_url)
    page.locator(".bn-chat").wait_for()
    idle(page)
    forget = page.get_by_role("button", name="Forget the oldest")
    for _ in range(20):
        assert forget.is_hidden()
        send(page, "What is a ternary weight? " * 12)
        idle(page)
        if page.locator(".bn-notice").inner_text():
            break
    many = page.locator(".bn-message").count()
    forget.click()
    page.wait_for_function(
        "many => document.querySelectorAll('.bn-message').length < many", arg=many
    )
    idle(page)
    expect(page.locator(".bn-message").last).to_have_class("bn-message bn-assistant")
    assert forget.is_hidden()


def test_model_picker_in_voila(page: Page, voila_url: str, tmp_path: Path):
    page.goto(voila_url)
    page.locator(".bn-chat").wait_for()
    idle(page)
    copy = shutil.copytree(TINY, tmp_path / "copy")
    wanted = iter([str(tmp_path / "nowhere"), str(copy)])
    page.on("dialog", lambda dialog: dialog.accept(next(wanted)))
    picker = page.locator(".bn-top select")
    picker.select_option(label="Another folder, file or hub id ...")
    expect(page.locator(".bn-notice")).to_contain_text("nowhere")
    idle(page)
    assert picker.input_value() == "tiny"
    picker.select_option(label="Another folder, file or hub id ...")
    expect(picker).to_have_value(str(copy))
    idle(page)
    send(page, "Hello!")
    expect(page.locator(".bn-assistant .bn-text").last).not_to_be_empty()


def test_saved_conversation_comes_back_in_voila(page: Page, voila_url: str):
    page.goto(voila_url)
    page.locator(".bn-chat").wait_for()
    idle(page)
    send(page, "Hello!")
    idle(page)
    page.locator(".bn-settings summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".bn-message")).to_have_count(0)
    page.locator("input[type=file]").set_input_files(download.value.path())
    expect(page.locator(".bn-message")).to_have_count(2)


def test_text_that_is_none_is_replaced_in_voila(page: Page, voila_url: str, tmp_path: Path):
    page.goto(voila_url)
    page.locator(".bn-chat").wait_for()
    idle(page)
    send(page, b"lone \\ud800 surrogate".decode("unicode_escape"))
    idle(page)
    expect(page.locator(".bn-user .bn-text")).to_have_text("lone \ufffd surrogate")
    expect(page.locator(".bn-assistant .bn-text")).not_to_be_empty()
    saved = tmp_path / "saved.json"
    lone = {"role": "user", "content": "\ud800"}
    saved.write_text(json.dumps({"system": None, "messages": [lone]}))
    page.locator("input[type=file]").set_input_files(saved)
    expect(page.locator(".bn-message")).to_have_count(1)
    expect(page.locator(".bn-user .bn-text")).to_have_text("\ufffd")
    assert page.get_by_label("System prompt").input_value() == ""


def test_other_panels_in_voila(page: Page, voila_url: str):
    page.goto(voila_url)
    page.locator(".bn-chat").wait_for()
    page.get_by_role("tab", name="Paper").click()
    page.get_by_role("button", name="BitNet b1.58 2B").click()
    assert page.locator(".bn-paper td a").first.get_attribute("href").startswith("https://")
    page.get_by_role("tab", name="Architecture").click()
    page.get_by_role("button", name="BitLinear down: explain").click()
    expect(page.locator(".bn-details pre")).to_contain_text("def bit_linear")
    # each figure's own style sheet is there
    for figure, width in ((".bn-arch", "1088px"), (".bn-paper", "960px")):
        found = page.locator(figure).evaluate("node => getComputedStyle(node).maxWidth")
        assert found == width, figure
    page.get_by_role("tab", name="System").click()
    expect(page.locator(".bn-system")).to_contain_text("Kernel")


def test_app_asks_no_other_host(page: Page, voila_url: str):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.goto(voila_url)
    page.locator(".bn-chat").wait_for()
    idle(page)
    for name in ("Benchmark", "Paper", "Architecture", "System"):
        page.get_by_role("tab", name=name).click()
    here = urlsplit(voila_url).netloc
    assert {urlsplit(url).scheme for url in asked} >= {"http", "ws"}
    assert {urlsplit(u).netloc for u in asked if not u.startswith(("data:", "blob:"))} == {here}


def test_page_without_the_token_shows_nothing(browser: Browser, voila_url: str):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(voila_url.split("?")[0])
    assert "with its token" in page.locator("body").inner_text()
    page.goto(voila_url)  # and with the cookie that this gives, the bare address is enough
    page.goto(voila_url.split("?")[0])
    page.locator(".bn-chat").wait_for(timeout=PATIENCE)
    page.close()


def test_chat_in_jupyterlab(page: Page, lab_url: str):
    page.goto(lab_url)
    page.locator(".jp-CodeCell .cm-content").first.click()
    for _ in range(100):  # until the kernel has started, the keys do nothing
        page.keyboard.press("Control+Enter")
        try:
            page.locator(".bn-chat").wait_for(timeout=3_000)
            break
        except TimeoutError:
            pass
    drive_chat(page)
    stop_midway(page)
