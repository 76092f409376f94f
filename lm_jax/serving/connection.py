"""One connection: requests come in within bounds, answers and streams go out, nothing is mixed up.

Kept connections carry one request after the other; one whose body was not read is closed, as what
follows in it could pass for a request.
"""

import contextlib
import http.server
import io
import json
import select
import socket
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from lm_jax.serving.protocol import ApiError
from lm_jax.serving.service import Limits

_LINGER = 1.0  # seconds in which a refused body is read, so that the answer to it arrives
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Arriving(io.RawIOBase):
    """Reads from a socket up to a point of time, however slowly bytes drip in."""

    def __init__(self, connection: socket.socket):
        self._connection, self.until = connection, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Connection(http.server.BaseHTTPRequestHandler):
    """What is the same for all requests.

    Attributes:
      limits: of sizes and times.
      methods: what each path takes.
    """

    limits: Limits
    methods: Mapping[str, tuple[str, ...]]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lm_jax", ""
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._arriving = _Arriving(self.connection)
        self.rfile = io.BufferedReader(self._arriving, 65_536)

    def handle_one_request(self) -> None:
        self._arriving.until = time.monotonic() + self.limits.idle_timeout
        self.command, self.answered, self._unread = "", False, True
        try:
            if not self.rfile.peek(1):
                self.close_connection = True
                return
            self._arriving.until = time.monotonic() + self.limits.read_timeout
            super().handle_one_request()
        except (OSError, ValueError):  # the client is gone, or the connection was closed on it
            self.close_connection = True

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.request_version not in ("HTTP/1.0", "HTTP/1.1"):
            self.send_error(505)
            return False
        return True

    def handle_expect_100(self) -> bool:
        try:
            self._length()
        except ApiError as e:
            self.refuse(e)
            return False
        return super().handle_expect_100()

    def plain_path(self) -> str:
        try:
            return urllib.parse.urlsplit(self.path).path
        except ValueError:
            raise ApiError(400, "that is no path") from None

    def begin_stream(self) -> None:
        self._chunked = self.request_version == "HTTP/1.1"
        self.close_connection |= not self._chunked
        self.connection.settimeout(self.limits.read_timeout)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Accel-Buffering", "no")  # nginx: each piece as it comes
        if self._chunked:
            self.send_header("Transfer-Encoding", "chunked")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.answered = True

    def send_event(self, value: dict[str, Any]) -> None:
        self._write_part(json.dumps(value, separators=(",", ":")).encode())

    def _write_part(self, data: bytes) -> None:
        data = b"data: " + data + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def end_stream(self) -> None:
        self._write_part(b"[DONE]")
        if self._chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _length(self) -> int:
        """Of the body.

        Raises:
          ApiError: it has none, or too much of it.
        """
        if self.headers.get("Transfer-Encoding") is not None:
            raise ApiError(411, "a body needs a Content-Length; chunks are not taken")
        stated = self.headers.get_all("Content-Length") or []
        if not stated:
            raise ApiError(411, "a body with a Content-Length is needed")
        text = stated[0].strip()
        if len(set(stated)) > 1 or not (text.isascii() and text.isdigit()):
            raise ApiError(400, "Content-Length: not a number")
        most = self.limits.max_body_bytes
        if len(text) > 18 or int(text) > most:
            raise ApiError(413, f"the body is larger than {most} bytes (--max_body_bytes)")
        return int(text)

    def read_body(self) -> bytes:
        length = self._length()
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive") from None
        if len(body) < length:
            raise ConnectionAbortedError
        self._unread = False
        return body

    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def refuse(self, error: ApiError) -> None:
        if self.answered:  # in the middle of an answer, nothing can be said
            self.close_connection = True
            return
        headers = {}
        if error.status == 405:
            headers["Allow"] = ", ".join(self.methods[self.plain_path()])
        if error.status == 429:
            headers["Retry-After"] = "1"
        has_body = self.command not in ("GET", "HEAD") or bool(self._declares_body())
        unread = self._unread and has_body
        self.close_connection |= unread
        with contextlib.suppress(OSError):
            self.send_json(error.status, error.body(), headers)
            if unread:
                self._linger()

    def _declares_body(self) -> bool:
        headers = getattr(self, "headers", None) or {}
        length = headers.get("Content-Length", "0").strip()
        return length != "0" or "Transfer-Encoding" in headers

    def _linger(self) -> None:
        """Reads what the client is still sending: closing now could take the answer from it."""
        self.connection.shutdown(socket.SHUT_WR)
        self._arriving.until = time.monotonic() + _LINGER
        while self.rfile.read1(65_536):
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself finds wrong: a malformed or endless line, an unknown method."""
        short = http.server.BaseHTTPRequestHandler.responses.get(code, ("not understood", ""))[0]
        self.close_connection = True
        if not getattr(self, "request_version", "").startswith("HTTP/1."):
            self.request_version = "HTTP/1.1"
        self.refuse(ApiError(code, message or short))

    def send_json(
        self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        self.send(status, body, "application/json", headers)

    def send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        if self._unread and self._declares_body():  # of a GET
            self.close_connection = True
        self.connection.settimeout(self.limits.read_timeout)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if kind.startswith("text/html"):
            self.send_header("Content-Security-Policy", _POLICY)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.answered = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""
