"""The server: OpenAI's endpoints over HTTP/1.1, a thread for each connection.

Everything that a client can make large or slow is bounded: connections, headers, bodies, the time
that a request takes to arrive, to be answered and to be read.
"""

import contextlib
import http.server
import importlib.resources
import json
import socket
import socketserver
import threading
import traceback
from typing import Any

from lm_jax.generation.decoding import Completion
from lm_jax.serving.connection import Connection
from lm_jax.serving.protocol import Answer, ApiError, Request, parse, usage_of
from lm_jax.serving.service import Limits, Running, Service

_PAGE = importlib.resources.files("lm_jax.serving").joinpath("page.html")
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
            request.settimeout(1.0)
            request.sendall(head.encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        traceback.print_exc()


class _Handler(Connection):
    server: Server
    methods = _METHODS

    @property
    def limits(self) -> Limits:
        return self.server.service.limits

    def do_GET(self) -> None:
        with self.server.answering():
            try:
                self._answer()
            except ApiError as e:
                self.refuse(e)
            except OSError:
                self.close_connection = True
            except Exception:
                traceback.print_exc()
                self.refuse(ApiError(500, "a defect of the server; its log says more"))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _answer(self) -> None:
        path = self.plain_path()
        if path not in _METHODS:
            raise ApiError(404, f"there is nothing at '{path[:200]}'", code="not_found")
        if self.command not in _METHODS[path]:
            allowed = " or ".join(_METHODS[path])
            raise ApiError(405, f"{path}: takes {allowed}, not {self.command}")
        if path == "/":
            self.send(200, _PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/health":
            self._health()
        elif path == "/v1/models":
            self._models()
        else:
            self._complete(chat=path == "/v1/chat/completions")

    def _health(self) -> None:
        service = self.server.service
        running, waiting = service.scheduler.counts()
        stopping = self.server.stopping
        self.send_json(
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
        self.send_json(200, {"object": "list", "data": [model | {"owned_by": "lm_jax"}]})

    def _complete(self, chat: bool) -> None:
        service = self.server.service
        body = self.read_body()
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
        for index, event in running.events(self.gone):
            if isinstance(event, Completion):
                done[index] = event
        completions = [done[i] for i in sorted(done)]
        self.send_json(
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
            for index, event in running.events(self.gone):
                if not self.answered:  # until the first event, an error has a status of its own
                    self.begin_stream()
                if index not in begun and (first := answer.first(index)):
                    self.send_event(first)
                begun.add(index)
                if isinstance(event, Completion):
                    self.send_event(answer.last(index, event.finish_reason))
                else:
                    self.send_event(answer.piece(index, event))
        except ApiError as e:
            if not self.answered:
                raise
            self.send_event(e.body())
        else:
            if request.include_usage:
                counts = usage_of(running.prompt_tokens, running.completion_tokens)
                self.send_event(answer.usage(counts))
        self.end_stream()
