"""The app lets in who has the token, at this machine's names, from its own page; nobody else."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import pytest
from tornado.web import create_signed_value

PATIENCE = 300  # seconds: to end a hang, not to judge a busy machine
APP = [sys.executable, "-m", "bitnet_edu.cli", "app", "--no-browser", "--port"]


class Running(NamedTuple):
    process: subprocess.Popen
    port: int
    token: str
    line: str


def end(app: Running, sent: signal.Signals = signal.SIGTERM) -> int:
    """Its exit status; the address must have been all that it said."""
    app.process.send_signal(sent)
    assert app.process.communicate(timeout=PATIENCE)[0] == ""
    return app.process.returncode


def start(log: Path, **environment: str) -> Running:
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*APP, "0"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | environment,
        )
    line = process.stdout.readline()
    assert line, log.read_text()
    address = urlsplit(line.strip())
    return Running(process, address.port, address.query.removeprefix("token="), line)


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[Running]:
    running = start(tmp_path_factory.mktemp("app") / "log")
    yield running
    end(running)


def request(app: Running, path: str, *headers: str, host: str = "", method: str = "GET"):
    """Status, headers and the beginning of the body of a raw request."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{app.port}'}", *headers]
    with socket.create_connection(("127.0.0.1", app.port), timeout=PATIENCE) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while b"\r\n\r\n" not in answer and (more := connection.recv(65536)):
            answer += more
    head = answer.split(b"\r\n\r\n")[0].decode()
    return int(head.split()[1]), head


@pytest.fixture(scope="module")
def cookie(app) -> str:
    """What a browser sends back after its first visit."""
    status, head = request(app, f"/?token={app.token}")
    assert status == 200
    return "Cookie: " + re.search(r"Set-Cookie: ([^;]+);", head)[1]


def handshake(origin: str | None) -> list[str]:
    key = base64.b64encode(b"0123456789abcdef").decode()
    lines = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    return [*lines, f"Sec-WebSocket-Key: {key}", *([f"Origin: {origin}"] if origin else [])]


CHANNELS = "/api/kernels/01234567-0123-0123-0123-0123456789ab/channels"
PLACES = [
    "/",
    "/app.ipynb",
    "/voila/static/voila.js",
    "/voila/templates/lab/static/voila.js",
    "/voila/labextensions/anywidget/package.json",
    "/voila/files/x.png",
    "/voila/api/shutdown/01234567-0123-0123-0123-0123456789ab",
    "/api/kernels/01234567-0123-0123-0123-0123456789ab",
    CHANNELS,
    "/login",
    "/logout",
    "/nowhere",
]


def test_address_has_a_new_token_each_time(app, tmp_path):
    assert app.line == f"http://127.0.0.1:{app.port}/?token={app.token}\n"
    assert len(app.token) >= 32
    other = start(tmp_path / "log")
    assert other.token != app.token
    assert end(other) == 0


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_nothing_is_served_without_the_token(app, path, method):
    assert request(app, path, "Content-Length: 0", method=method)[0] == 403


@pytest.mark.parametrize("token", ["", "wrong", "%ff", "{token}x", "x&token=", "{token}&token=x"])
def test_a_wrong_token_is_none(app, token):
    assert request(app, "/?token=" + token.format(token=app.token))[0] == 403


def test_a_cookie_that_we_did_not_sign_is_none(app):
    name = f"bitnet-edu-{app.port}"
    user = {"username": "x", "name": "x", "display_name": "x", "initials": "x"}
    value = json.dumps(user | {"avatar_url": None, "color": None})
    for secret in ("", "secret"):
        forged = create_signed_value(secret, name, value).decode()
        assert request(app, "/", f"Cookie: {name}={forged}")[0] == 403
    assert request(app, "/", f"Cookie: {name}={app.token}")[0] == 403
    for value in ("", "2|", "2|1:0|", "x" * 5_000, '"', "\x80"):
        assert request(app, "/", f"Cookie: {name}={value}")[0] in (400, 403)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.168.0.1:{port}",
        "0.0.0.0",
        "127.0.0.2",
        "[::2]",
        "localhost,evil.example",
        "%2Ftmp",
    ],
)
def test_another_host_is_refused_even_with_token_and_cookie(app, cookie, host):
    host = host.format(port=app.port)
    for path in (f"/?token={app.token}", f"/voila/static/voila.js?token={app.token}"):
        assert request(app, path, cookie, host=host)[0] in (400, 403)
    assert request(app, CHANNELS, cookie, *handshake(f"http://{host}"), host=host)[0] in (400, 403)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:{port}", "LOCALHOST", "[::1]:{port}"])
def test_names_of_this_machine_are_good(app, host):
    path = f"/voila/static/voila.js?token={app.token}"
    assert request(app, path, host=host.format(port=app.port))[0] == 200


def test_cookie_is_strict_and_enough(app, cookie):
    _, head = request(app, f"/?token={app.token}")
    assert re.search("Set-Cookie: .*HttpOnly.*SameSite=Strict", head)
    assert request(app, "/voila/static/voila.js", cookie)[0] == 200
    # such a kernel does not exist, and that is for Voila to say
    assert request(app, CHANNELS, cookie, *handshake(f"http://127.0.0.1:{app.port}"))[0] == 404


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://localhost:1", "null", "file://", "http://[", "x"]
)
def test_websocket_from_another_page_is_refused(app, cookie, origin):
    path = f"{CHANNELS}?token={app.token}"
    assert request(app, path, cookie, *handshake(origin))[0] == 403


def test_websocket_needs_token_or_cookie(app):
    assert request(app, CHANNELS, *handshake(f"http://127.0.0.1:{app.port}"))[0] == 403
    assert request(app, CHANNELS, *handshake(None))[0] == 403


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that can be caught")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_app_and_its_kernels(tmp_path, sent, status):
    running = start(tmp_path / "log", TMPDIR=str(tmp_path))
    assert request(running, f"/?token={running.token}")[0] == 200
    deadline = time.monotonic() + PATIENCE
    while not (kernels := psutil.Process(running.process.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert end(running, sent) == status
    assert psutil.wait_procs(kernels, timeout=PATIENCE)[1] == []
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not list(tmp_path.glob("voila_*"))


def refusal(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_a_port_that_cannot_be_had_is_one_line(app):
    assert f"port {app.port}" in refusal(*APP, str(app.port))
    assert "port 70000" in refusal(*APP, "70000")
    assert "port -1" in refusal(*APP, "-1")


@pytest.mark.parametrize("missing", ["voila", "jupyter_server", "tornado"])
def test_a_missing_library_is_one_line(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "from bitnet_edu.cli import main; sys.exit(main(['app', '--no-browser']))"
    )
    assert "pip install 'bitnet-edu[ui]'" in refusal(sys.executable, "-c", code)
