"""The explorer as an application: Voila on this machine, for who knows the address.

A server on loopback is open to every program and, if a name is made to point here (DNS rebinding),
to every page in the browser. So one gate stands before all of Voila: pages, kernels, websockets,
static files.
"""

import os
import shutil
import signal
import socket
import sys
import threading
import webbrowser
from hmac import compare_digest
from pathlib import Path
from secrets import token_urlsafe

from jupyter_core.utils import run_sync
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest, split_host_and_port
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.routing import Router
from tornado.web import Application, RequestHandler, decode_signed_value
from traitlets.config import Config
from voila.app import Voila

from bitnet_edu.errors import InputError

UI = Path(__file__).parent
ADDRESS = "127.0.0.1"
HOSTS = {"localhost", ADDRESS, "[::1]"}


class Refused(RequestHandler):
    """The answer to who may not come in."""

    def prepare(self) -> None:
        """403 to everything."""
        self.set_status(403)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish("Open the address that bitnet-edu app printed, with its token.\n")


class Gate(Router):
    """Passes a request on to Voila if it is for this machine, from its own page, and known."""

    def __init__(self, app: Application):
        self.app = app

    def find_handler(self, request: HTTPServerRequest, **_: object) -> HTTPMessageDelegate:
        """Whoever will answer `request`: Voila, or `Refused`."""
        if self._for_this_machine(request) and self._is_known(request):
            return self.app.find_handler(request)
        return self.app.get_handler_delegate(request, Refused)

    def _for_this_machine(self, request: HTTPServerRequest) -> bool:
        host = split_host_and_port(request.host.lower())[0]
        origin = request.headers.get("Origin")
        return host in HOSTS and origin in (None, f"http://{request.host}")

    def _is_known(self, request: HTTPServerRequest) -> bool:
        """Has the token in its address, or the cookie that Voila gives to who had it."""
        settings = self.app.settings
        provider = settings["identity_provider"]
        if compare_digest(request.query_arguments.get("token", [b""])[-1], provider.token.encode()):
            return True
        name = provider.cookie_name
        cookie = request.cookies.get(name)
        return cookie is not None and bool(
            decode_signed_value(settings["cookie_secret"], name, cookie.value)
        )


class Explorer(Voila):
    """Voila with the gate, without configuration that lies in folders, without other hosts."""

    sockets: list[socket.socket]

    def setup_template_dirs(self) -> None:
        """Put our page before Voila's."""
        super().setup_template_dirs()
        self.template_paths.insert(0, str(UI / "template"))

    def init_settings(self) -> dict:
        """Voila's settings, with a cookie that no other site's page can make use of."""
        settings = super().init_settings()
        provider = settings["identity_provider"]
        provider.cookie_name = f"bitnet-edu-{self.port}"
        provider.cookie_options = {"samesite": "Strict"}
        return settings | {"log_function": lambda handler: None}

    def listen(self) -> None:
        """Print the address, open it, and serve until a signal comes."""
        HTTPServer(Gate(self.app)).add_sockets(self.sockets)
        address = f"http://{ADDRESS}:{self.port}/?token={self.token}"
        print(address, flush=True)
        if self.open_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        try:
            IOLoop.current().start()
        finally:
            self.stop()

    def stop(self) -> None:
        """End the kernels at once: nothing in them waits to be saved."""
        shutil.rmtree(self.connection_dir)
        run_sync(self.kernel_manager.shutdown_all)(now=True)


def serve(model: str, port: int, open_browser: bool) -> None:
    """Serve the explorer of `model` on this machine until Ctrl-C or SIGTERM.

    Prints one line, the address with its token; port 0 takes any free one. InputError if the port
    can't be had.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"a port is a number from 0 (any free one) to 65535, not port {port}")
    try:
        sockets = bind_sockets(port, ADDRESS, socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"can't listen on port {port}: {error.strerror}; choose another with --port"
        ) from None
    os.environ["BITNET_EDU_APP_MODEL"] = model  # for the kernels
    encrypted = {"KernelManager": {"transport_encryption": "auto"}}
    explorer = Explorer(
        config=Config(encrypted),
        notebook_path=str(UI / "app.ipynb"),
        root_dir=str(UI),
        config_file_paths=[],
        port=sockets[0].getsockname()[1],
        token=token_urlsafe(24),
        open_browser=open_browser,
        log_level="ERROR",
    )
    explorer.sockets = sockets
    explorer.initialize([])
    explorer.voila_configuration.show_tracebacks = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # and with it `stop`
    explorer.start()
