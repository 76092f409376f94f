"""The server: OpenAI's endpoints over HTTP/1.1, a thread for each connection.

Everything that a client can make large or slow is bounded: connections, headers, bodies, the time
that a request takes to arrive, to be answered and to be read.
"""

import contextlib
import importlib.resources
import ipaddress
import json
import socket
import socketserver
import threading
import time
import traceback
import urllib.parse
from collections.abc import Sequence
from typing import Any

from lm_jax.generation.decoding import Completion
from lm_jax.serving.answer import Answer, usage_of
from lm_jax.serving.connection import Connection
from lm_jax.serving.protocol import ApiError, Request, check_model, parse
from lm_jax.serving.service import Running, Service

_PAGE = importlib.resources.files("lm_jax.serving").joinpath("page.html")
_GET = ("GET", "HEAD")
_ONE_MODEL = "/v1/models/"  # and its name
_METHODS = {
    "/": _GET,
    "/health": _GET,
    "/v1/models": _GET,
    "/v1/completions": ("POST",),
    "/v1/chat/completions": ("POST",),
}


class Server(socketserver.ThreadingTCPServer):
    """Listens as soon as it is made.

    Attributes:
      service: what is served.
      limits: of sizes and times.
      stopping: whether new requests are refused.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        service: Service,
        host: str = "127.0.0.1",
        port: int = 8000,
        allow_hosts: Sequence[str] = (),
    ):
        """
        Args:
          host: a name or an address to listen at.
          port: 0 finds a free one; see `address`.
          allow_hosts: names that clients know it by, besides `host`, 'localhost', the name of this
            machine and whatever address leads here; '*': any.

        Raises:
          OSError: it cannot listen there.
        """
        self.service, self.limits, self.stopping = service, service.limits, False
        self._names = {name.lower() for name in (host, socket.gethostname(), *allow_hosts)}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._room = threading.BoundedSemaphore(self.limits.connections)
        self._arriving: dict[socket.socket, None] = {}  # the oldest first
        self._answering = 0
        self._changed = threading.Condition()
        super().__init__((host, port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True)
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
        while self._end_oldest():
            pass

    def knows(self, host: str) -> bool:
        """An address needs no name server, so that nobody can have it lead elsewhere."""
        host = host.rstrip(".")
        if host in self._names or "*" in self._names or host.split(".")[-1] == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(host.strip("[]")))
        return False

    def methods(self, path: str) -> tuple[str, ...]:
        if path.startswith(_ONE_MODEL) and path != _ONE_MODEL:
            return _GET
        return _METHODS.get(path, ())

    @contextlib.contextmanager
    def arriving(self, connection: socket.socket):
        with self._changed:
            self._arriving[connection] = None
        try:
            yield
        finally:
            with self._changed:
                self._arriving.pop(connection, None)

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

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no file is left for it, say: it is asked for again at once
            time.sleep(0.05)
            raise

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if not self._find_room():
            self._refuse(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self._room.release()
            self._refuse(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def _find_room(self) -> bool:
        """If need be that of the connection whose request is longest in coming, so that neither
        those that are kept unused nor those that drip keep others out."""
        if self._room.acquire(blocking=False):
            return True
        return self._end_oldest() and self._room.acquire(timeout=1.0)

    def _end_oldest(self) -> bool:
        with self._changed:
            oldest = next(iter(self._arriving), None)
            self._arriving.pop(oldest, None)
        if oldest is None:
            return False
        with contextlib.suppress(OSError):
            oldest.shutdown(socket.SHUT_RD)  # it reads the end; what has come is still answered
        return True

    def _refuse(self, request: socket.socket) -> None:
        body = json.dumps(ApiError(503, "too many connections").body()).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            request.settimeout(1.0)
            request.sendall(head.encode() + body)
        self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        traceback.print_exc()


class _Handler(Connection):
    server: Server

    def answer(self, body: bytes) -> None:
        path = self.head.path
        if self.head.method == "OPTIONS":
            self.send(200, b"", "text/plain", {"Allow": self.allowed()})
        elif path == "/":
            self.send(200, _PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/health":
            self._health()
        elif path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [self._model()]})
        elif path.startswith(_ONE_MODEL):
            check_model(
                urllib.parse.unquote(path.removeprefix(_ONE_MODEL)), self.server.service.name
            )
            self.send_json(200, self._model())
        else:
            self._complete(body, chat=path == "/v1/chat/completions")

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

    def _model(self) -> dict[str, Any]:
        service = self.server.service
        model = {"id": service.name, "object": "model", "created": service.created}
        return model | {"owned_by": "lm_jax"}

    def _complete(self, body: bytes, chat: bool) -> None:
        service = self.server.service
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
