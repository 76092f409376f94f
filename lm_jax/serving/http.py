"""The server: OpenAI's endpoints over HTTP/1.1, a thread for each connection.

Everything that a client can make large or slow is bounded: connections, headers, bodies, the time
that a request takes to arrive, to be answered and to be read.
"""

import contextlib
import http.server
import importlib.resources
import io
import json
import select
import socket
import socketserver
import threading
import time
import traceback
import urllib.parse
from typing import Any

from lm_jax.generation.decoding import Completion
from lm_jax.serving.protocol import Answer, ApiError, Request, parse, usage_of
from lm_jax.serving.service import Running, Service

_LINGER = 1.0  # seconds in which a refused body is read, so that the answer to it arrives
_PAGE = importlib.resources.files("lm_jax.serving").joinpath("page.html")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_METHODS = {
    "/": ("GET", "HEAD"),
    "/health": ("GET", "HEAD"),
    "/v1/models": ("GET", "HEAD"),
    "/v1/completions": ("POST",),
    "/v1/chat/completions": ("POST",),
}


class Server(http.server.ThreadingHTTPServer):
    """Listens as soon as it is made.

    Attributes:
      service: what is served.
      stopping: whether new requests are refused.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 8000):
        """
        Args:
          port: 0 finds a free one; see `address`.

        Raises:
          OSError: it cannot listen there.
        """
        self.service, self.stopping = service, False
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._room = threading.BoundedSemaphore(service.limits.connections)
        self._answering = 0
        self._changed = threading.Condition()
        super().__init__((host, port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, name="accept", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def stop(self, seconds: float) -> None:
        """Refuses new requests, gives those that run so long to end, and stops listening."""
        self.stopping = True
        self.service.scheduler.close(seconds)
        with self._changed:  # what was made is still to be sent
            self._changed.wait_for(lambda: not self._answering, timeout=5)
        self.shutdown()
        self.server_close()

    @contextlib.contextmanager
    def answering(self):
        """While entered, `stop` waits."""
        with self._changed:
            self._answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server's asks a name server for its name
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = json.dumps(ApiError(503, "too many connections").body()).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            request.settimeout(_LINGER)
            request.sendall(head.encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        traceback.print_exc()


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


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lm_jax", ""
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._arriving = _Arriving(self.connection)
        self.rfile = io.BufferedReader(self._arriving, 65_536)

    def handle_one_request(self) -> None:
        limits = self.server.service.limits
        self._arriving.until = time.monotonic() + limits.idle_timeout
        self.command, self._sent, self._unread = "", False, True
        try:
            if not self.rfile.peek(1):
                self.close_connection = True
                return
            self._arriving.until = time.monotonic() + limits.read_timeout
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
            self._refuse(e)
            return False
        return super().handle_expect_100()

    def do_GET(self) -> None:
        with self.server.answering():
            try:
                self._answer()
            except ApiError as e:
                self._refuse(e)
            except OSError:
                self.close_connection = True
            except Exception:
                traceback.print_exc()
                self._refuse(ApiError(500, "a defect of the server; its log says more"))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _answer(self) -> None:
        path = self._path()
        if path not in _METHODS:
            raise ApiError(404, f"there is nothing at '{path[:200]}'", code="not_found")
        if self.command not in _METHODS[path]:
            allowed = " or ".join(_METHODS[path])
            raise ApiError(405, f"{path}: takes {allowed}, not {self.command}")
        if path == "/":
            self._send(200, _PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/health":
            self._health()
        elif path == "/v1/models":
            self._models()
        else:
            self._complete(chat=path == "/v1/chat/completions")

    def _path(self) -> str:
        try:
            return urllib.parse.urlsplit(self.path).path
        except ValueError:
            raise ApiError(400, "that is no path") from None

    def _health(self) -> None:
        service = self.server.service
        running, waiting = service.scheduler.counts()
        stopping = self.server.stopping
        self._send_json(
            503 if stopping else 200,
            {
                "status": "stopping" if stopping else "ok",
                "model": service.name,
                "chat": service.template is not None,
                "max_tokens": service.limits.max_tokens,
                "running": running,
                "waiting": waiting,
            },
        )

    def _models(self) -> None:
        service = self.server.service
        model = {"id": service.name, "object": "model", "created": service.created}
        self._send_json(200, {"object": "list", "data": [model | {"owned_by": "lm_jax"}]})

    def _complete(self, chat: bool) -> None:
        service = self.server.service
        body = self._body()
        if self.server.stopping:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        most = service.limits.max_tokens
        request = parse(body, chat=chat, model=service.name, max_tokens=most)
        running = service.begin(request)
        answer = Answer.to(request, service.name)
        try:
            (self._stream if request.stream else self._whole)(request, running, answer)
        finally:
            running.cancel()

    def _whole(self, request: Request, running: Running, answer: Answer) -> None:
        done: dict[int, Completion] = {}
        for index, event in running.events(self._gone):
            if isinstance(event, Completion):
                done[index] = event
        completions = [done[i] for i in sorted(done)]
        self._send_json(
            200,
            answer.whole(
                [c.text for c in completions],
                [c.finish_reason for c in completions],
                usage_of(running.prompt_tokens, running.completion_tokens),
            ),
        )

    def _stream(self, request: Request, running: Running, answer: Answer) -> None:
        begun: set[int] = set()
        try:
            for index, event in running.events(self._gone):
                if not self._sent:  # until the first event, an error has a status of its own
                    self._begin_stream()
                if index not in begun and (first := answer.first(index)):
                    self._event(first)
                begun.add(index)
                if isinstance(event, Completion):
                    self._event(answer.last(index, event.finish_reason))
                else:
                    self._event(answer.piece(index, event))
        except ApiError as e:
            if not self._sent:
                raise
            self._event(e.body())
        else:
            if request.include_usage:
                counts = usage_of(running.prompt_tokens, running.completion_tokens)
                self._event(answer.usage(counts))
        self._write_event(b"[DONE]")
        if self._chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _begin_stream(self) -> None:
        self._chunked = self.request_version == "HTTP/1.1"
        self.close_connection |= not self._chunked
        self.connection.settimeout(self.server.service.limits.read_timeout)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Accel-Buffering", "no")  # nginx: each piece as it comes
        if self._chunked:
            self.send_header("Transfer-Encoding", "chunked")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self._sent = True

    def _event(self, value: dict[str, Any]) -> None:
        self._write_event(json.dumps(value, separators=(",", ":")).encode())

    def _write_event(self, data: bytes) -> None:
        data = b"data: " + data + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

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
        most = self.server.service.limits.max_body_bytes
        if len(text) > 18 or int(text) > most:
            raise ApiError(413, f"the body is larger than {most} bytes (--max_body_bytes)")
        return int(text)

    def _body(self) -> bytes:
        length = self._length()
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive") from None
        if len(body) < length:
            raise ConnectionAbortedError
        self._unread = False
        return body

    def _gone(self) -> bool:
        """Whether the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _refuse(self, error: ApiError) -> None:
        if self._sent:  # in the middle of an answer, nothing can be said
            self.close_connection = True
            return
        headers = {}
        if error.status == 405:
            headers["Allow"] = ", ".join(_METHODS[self._path()])
        if error.status == 429:
            headers["Retry-After"] = "1"
        has_body = self.command not in ("GET", "HEAD") or bool(self._declares_body())
        unread = self._unread and has_body
        self.close_connection |= unread
        with contextlib.suppress(OSError):
            self._send_json(error.status, error.body(), headers)
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
        self._refuse(ApiError(code, message or short))

    def _send_json(
        self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        self._send(status, body, "application/json", headers)

    def _send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        if self._unread and self._declares_body():  # of a GET
            self.close_connection = True
        self.connection.settimeout(self.server.service.limits.read_timeout)
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
        self._sent = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""
