"""A loopback HTTP server for the tests of downloads: it serves bytes, cuts connections and remembers requests."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Served:
    """One address. `cuts` holds, for each of the first GET requests, after how many body bytes the server hangs up."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    reset: bool = False  # hang up rudely (RST) instead of by closing
    ranges: bool = True
    etag: str | None = None
    delay: float = 0.0


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    sent: int  # bytes of the body


class WeightServer:
    """`with WeightServer() as server: server.pages["/model.pth"] = Served(b"...")`; bound to 127.0.0.1 only."""

    def __init__(self) -> None:
        self.pages: dict[str, Served] = {}
        self.requests: list[Request] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WeightServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_hub_file(self, repository: str, filename: str, body: bytes, sha256: str | None = None) -> Served:
        """Serve a file as the Hugging Face Hub does: its SHA-256 as the ETag, the commit and the size as headers."""
        sha256 = sha256 or hashlib.sha256(body).hexdigest()
        served = Served(body, etag=f'"{sha256}"')
        served.headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-ETag": f'"{sha256}"',
            "X-Linked-Size": str(len(body)),
        }
        self.pages[f"/{repository}/resolve/main/{filename}"] = served
        return served

    def gets(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and request.path == path]


def _handler_of(server: WeightServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            page = server.pages.get(self.path) or self.missing()
            body, status, asked = page.body, page.status, self.headers.get("Range")
            same_version = self.headers.get("If-Range") in (None, page.etag)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and page.ranges and same_version else 0
            if start >= len(body) > 0:
                status, body = 416, b""
            elif start:
                status, body = 206, body[start:]
            time.sleep(page.delay if with_body else 0)
            cut = page.cuts.pop(0) if with_body and page.cuts else len(body)
            sent = min(cut, len(body)) if with_body else 0
            server.requests.append(Request(self.command, self.path, asked, sent))
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(page.body) - 1}/{len(page.body)}")
            if page.etag:
                self.send_header("ETag", page.etag)
            for name, value in page.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])
            if with_body and sent < len(body):
                self.hang_up(page.reset)

        def missing(self) -> Served:
            """404, with the code by which the Hub tells a missing file from a missing repository."""
            parts = self.path.split("/resolve/")
            known = any(path.startswith(parts[0] + "/resolve/") for path in server.pages)
            if len(parts) == 1:
                return Served(b"not here", status=404)
            if known and not parts[1].startswith("main/"):
                return Served(b"", status=404, headers={"X-Error-Code": "RevisionNotFound"})
            if known:
                return Served(b"", status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return Served(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})

        def hang_up(self, reset: bool) -> None:
            self.wfile.flush()
            self.close_connection = True
            if reset:
                time.sleep(0.05)  # an RST overtakes bytes that were not read yet
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
