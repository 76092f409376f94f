"""One connection: requests come in within bounds, answers and streams go out, nothing is mixed up.

Kept connections carry one request after the other; one whose body was not read is closed, as what
follows in it could pass for a request.
"""

import contextlib
import email.utils
import http
import json
import select
import socket
import socketserver
import time
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

from lm_jax.serving.incoming import Head, Incoming, check_body, read_body, read_head
from lm_jax.serving.protocol import ApiError
from lm_jax.serving.service import Limits

_LINGER = 1.0  # seconds in which what was refused is still read, so that the answer to it arrives
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_KNOWN = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"}
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Owner(Protocol):
    """The server of a connection.

    Attributes:
      limits: of sizes and times.
      stopping: whether new requests are refused.
    """

    limits: Limits
    stopping: bool

    def knows(self, host: str) -> bool:
        """Whether it is called so."""

    def methods(self, path: str) -> tuple[str, ...]:
        """What is taken there, OPTIONS aside; nothing where nothing is."""

    def arriving(self, connection: socket.socket) -> contextlib.AbstractContextManager[None]:
        """While entered, it may end the connection."""

    def answering(self) -> contextlib.AbstractContextManager[None]:
        """While entered, it does not stop."""


class Connection(socketserver.BaseRequestHandler):
    """What is the same for all requests.

    Attributes:
      head: of the request at hand; None: it could not be read.
      kept: whether another request may follow.
      answered: whether an answer to this one has begun.
    """

    server: Owner
    head: Head | None

    def answer(self, body: bytes) -> None:
        """Answers the request of `head`.

        Raises:
          ApiError: it cannot be; the client is told.
          OSError: the client is gone.
        """
        raise NotImplementedError

    def handle(self) -> None:
        self._incoming, self.kept = Incoming(self.request), True
        with contextlib.suppress(OSError):  # the client is gone, or the connection was ended
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self.kept:
                self._one()
            if self._unread:
                with self.server.arriving(self.request):
                    self._linger()

    def _one(self) -> None:
        self.head, self.answered, self._asked, self._unread = None, False, False, True
        try:
            with self.server.arriving(self.request):
                body = self._receive()
        except ApiError as e:
            self.refuse(e)
            return
        with self.server.answering():
            try:
                self.answer(body)
            except ApiError as e:
                self.refuse(e)
            except OSError:
                raise
            except Exception:
                traceback.print_exc()
                self.refuse(ApiError(500, "a defect of the server; its log says more"))

    def _receive(self) -> bytes:
        """Waits for a request and reads it.

        Raises:
          ApiError: it is not to be answered.
          OSError: none came.
        """
        limits = self.server.limits
        self._incoming.until = time.monotonic() + limits.idle_timeout
        if self._incoming.first() is None:
            raise ConnectionAbortedError
        self._incoming.until = time.monotonic() + limits.read_timeout
        try:
            self.head = read_head(self._incoming)
            self._unread = self.head.length != 0
            self.kept = self.head.kept and not self.server.stopping
            self._check()
            return self._body() if self.head.method == "POST" else b""
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive") from None

    def _check(self) -> None:
        """
        Raises:
          ApiError: it is for nobody here.
        """
        self._check_host()
        method, path = self.head.method, self.head.path
        if method not in _KNOWN:
            raise ApiError(501, f"{method[:60]}: there is no such method")
        taken = self.server.methods(path)
        if not taken:
            raise ApiError(404, f"there is nothing at '{path[:200]}'", code="not_found")
        if method not in (*taken, "OPTIONS"):
            raise ApiError(405, f"{path}: takes {' or '.join(taken)}, not {method}")

    def _body(self) -> bytes:
        self._check_type()
        most = self.server.limits.max_body_bytes
        check_body(self.head, most)
        if (expected := self.head.headers.get("expect")) and self.head.version == (1, 1):
            if expected.lower() != "100-continue":
                raise ApiError(417, "Expect: 100-continue is all that can be expected")
            self._write(_CONTINUE)
        body = read_body(self._incoming, self.head, most)
        self._unread = False
        return body

    def _check_host(self) -> None:
        """A page of another site that has its name lead to this machine (DNS rebinding) could read
        what is here; its requests go to that name."""
        host = self.head.host
        if host is not None and not self.server.knows(host):
            raise ApiError(
                403,
                f"Host: this server is not known as '{host}'; if it should be, start it with"
                f" --allow_host={host}",
                code="unknown_host",
            )

    def _check_type(self) -> None:
        """A page of another site can send a form or plain text without being asked, and nothing of
        this type."""
        kind, _, parameters = self.head.headers.get("content-type", "").lower().partition(";")
        charset = parameters.replace('"', "").strip()
        if kind.strip() != "application/json" or charset not in ("", "charset=utf-8"):
            raise ApiError(
                415,
                "Content-Type: must be application/json, in UTF-8 (curl:"
                " -H 'Content-Type: application/json')",
                code="unsupported_media_type",
            )

    def gone(self) -> bool:
        """Whether the client is.

        One that has closed its side may still listen. Of HTTP/1.1 it is then sent something that it
        passes over: where nobody listens any more, the connection is reset. Of HTTP/1.0 it counts
        as gone, as nothing can be sent to find out.
        """
        poll = select.poll()
        poll.register(self.request, 0)
        if poll.poll(0):  # it was reset
            return True
        if not self._incoming.may_be_over():
            return False
        if self.head.version == (1, 0):
            return True
        if not self._asked:
            self._asked = True
            if self.answered:
                self._write_part(b":\n\n")
            else:
                self._write(_CONTINUE)
        return False

    def begin_stream(self) -> None:
        self._chunked = self.head.version == (1, 1)
        self.kept &= self._chunked
        fields = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",  # nginx: each piece as it comes
        }
        self._begin(200, fields | ({"Transfer-Encoding": "chunked"} if self._chunked else {}))

    def send_event(self, value: dict[str, Any]) -> None:
        data = json.dumps(value, separators=(",", ":"))
        self._write_part(b"data: %s\n\n" % data.encode())

    def end_stream(self) -> None:
        self._write_part(b"data: [DONE]\n\n")
        if self._chunked:
            self._write(b"0\r\n\r\n")

    def _write_part(self, data: bytes) -> None:
        self._write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def refuse(self, error: ApiError) -> None:
        """Says so, unless it is in the middle of an answer, where nothing can be said."""
        if self.answered:
            self.kept = False
            return
        self.kept &= not self._unread
        fields = {}
        if error.status == 405:
            fields["Allow"] = self.allowed()
        if error.status == 429:
            fields["Retry-After"] = "1"
        self.send_json(error.status, error.body(), fields)

    def allowed(self) -> str:
        return ", ".join((*self.server.methods(self.head.path), "OPTIONS"))

    def send_json(
        self, status: int, value: dict[str, Any], fields: Mapping[str, str] | None = None
    ) -> None:
        body = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        self.send(status, body, "application/json", fields)

    def send(
        self, status: int, body: bytes, kind: str, fields: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
          kind: of `body`, by which browsers are bound.
          fields: more of the head.
        """
        self.kept &= not self._unread
        own = {"Content-Type": kind, "Content-Length": str(len(body))}
        own["X-Content-Type-Options"] = "nosniff"
        if kind.startswith("text/html"):
            own["Content-Security-Policy"] = _POLICY
        without = self.head is not None and self.head.method == "HEAD"
        self._begin(status, own | dict(fields or {}), b"" if without else body)

    def _begin(self, status: int, fields: Mapping[str, str], body: bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
        lines += ["Server: lm_jax", f"Date: {email.utils.formatdate(usegmt=True)}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        if not self.kept:
            lines.append("Connection: close")
        self.answered = True
        self._write("\r\n".join([*lines, "", ""]).encode() + body)

    def _write(self, data: bytes) -> None:
        self.request.settimeout(self.server.limits.read_timeout)
        self.request.sendall(data)

    def _linger(self) -> None:
        """Reads what the client is still sending: closing now could take the answer from it."""
        self.request.shutdown(socket.SHUT_WR)
        self._incoming.until = time.monotonic() + _LINGER
        self._incoming.pass_over()
