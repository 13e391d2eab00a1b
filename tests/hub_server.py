"""A stand-in for the Hugging Face hub on this machine's loopback, with transfers that go wrong.

It answers what huggingface_hub asks for a model: its revision, its tree of files, and the files,
whole or from a byte on; large ones come from a second address, as on the real hub.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "04c3b9ad9361b824064a1f25ea60a8be9599b127"
LARGE_FILES = (".safetensors", ".gguf")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(tree|revision)/(?P<revision>[^/?]+)")
CDN = re.compile(r"/cdn/(?P<repo>[^/]+/[^/]+)/(?P<name>.+)")


@dataclass
class Hub:
    """Repositories by name, each a dict of files; and how to misbehave."""

    port: int = 0
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: tuple[str, ...] = (COMMIT, "main")
    status: int | None = None  # answer every request with this
    error_code: str = ""  # and the hub's own name for it
    page: bytes = b""  # as this page, like a network that wants to be paid first
    cut_after: list[int] = field(default_factory=list)  # drop connections after so many bytes
    stall_after: int | None = None  # send so many bytes of a large file and then nothing
    damage: bool = False  # flip a byte of each large file
    ranges: bool = True  # serve the rest of a file when asked for it
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path
    transfers: list[tuple[str, str | None]] = field(default_factory=list)  # large file, Range
    released: threading.Event = field(default_factory=threading.Event)  # ends a stall
    tokens: set[tuple[str, str | None]] = field(default_factory=set)  # "hub" or "cdn", token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running() -> Iterator[Hub]:
    """A hub at `hub.url`, gone at the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            cdn = self.path.startswith("/cdn/")
            hub.asked.append((self.command, self.path))
            hub.tokens.add(("cdn" if cdn else "hub", self.headers.get("Authorization")))
            if hub.status:
                return self.send(hub.page, hub.status, {"X-Error-Code": hub.error_code})
            for form, serve in ((CDN, self.serve_cdn), (TREE, self.serve_tree), (FILE, self.serve)):
                if match := form.match(self.path):
                    return serve(**match.groupdict())
            return self.send(b"", 404)

        def serve_tree(self, repo: str, revision: str) -> None:
            if repo not in hub.repos:
                return self.send(b"", 404, {"X-Error-Code": "RepoNotFound"})
            if revision not in hub.revisions:
                return self.send(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            files = [entry(name, data) for name, data in hub.repos[repo].items()]
            if "/tree/" in self.path:
                return self.send(json.dumps(files).encode())
            about = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False}
            about["siblings"] = [{"rfilename": file["path"]} for file in files]
            return self.send(json.dumps(about | {"tags": [], "downloads": 0, "likes": 0}).encode())

        def serve(self, repo: str, revision: str, name: str) -> None:
            data = hub.repos.get(repo, {}).get(name)
            if data is None or revision not in hub.revisions:
                return self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
            about = entry(name, data)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{about["oid"]}"'}
            if not name.endswith(LARGE_FILES):
                return self.send(data, headers=headers)
            headers |= {
                "X-Linked-Etag": f'"{about["lfs"]["oid"]}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"http://localhost:{hub.port}/cdn/{repo}/{name}",
            }
            return self.send(b"", 302, headers)

        def serve_cdn(self, repo: str, name: str) -> None:
            data = bytearray(hub.repos[repo][name])
            if hub.damage:
                data[len(data) // 2] ^= 1
            span = self.headers.get("Range")
            hub.transfers.append((name, span))
            if span and hub.ranges:
                first = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
                headers = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
                return self.send(bytes(data[first:]), 206, headers, hub.cut_after)
            return self.send(bytes(data), cuts=hub.cut_after)

        def send(
            self,
            body: bytes,
            status: int = 200,
            headers: dict[str, str] | None = None,
            cuts: list[int] | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if cuts is not None and hub.stall_after:
                self.wfile.write(body[: hub.stall_after])
                self.close_connection = hub.released.wait(60)
                return
            if cuts:
                body = body[: cuts.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def entry(name: str, data: bytes) -> dict:
    """A file as the hub lists it: git's hash for small ones, SHA-256 for large ones."""
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    about = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if name.endswith(LARGE_FILES):
        sha = hashlib.sha256(data).hexdigest()
        about["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
    return about
