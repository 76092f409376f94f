"""A tiny model, a server of it, and what clients send."""

import contextlib
import dataclasses
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import tiny_models

from lm_jax.data.chat import ChatTemplate
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.model.transformer import Transformer
from lm_jax.serving.http import Server
from lm_jax.serving.scheduler import Scheduler
from lm_jax.serving.service import Limits, Service

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LIMITS = Limits(max_body_bytes=5000, max_prompt_tokens=100, read_timeout=1.5, idle_timeout=1.5)
USER = {"role": "user", "content": "hi"}
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def model_of(max_length: int = 160) -> Transformer:
    """For the vocabulary of a LetterTokenizer, or one of bytes with 300 ids."""
    config = dataclasses.replace(
        tiny_models.LLAMA, vocab_size=300, max_length=max_length, init_std=0.4
    )
    return tiny_models.build(config)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(model, template=TEMPLATE, limits=LIMITS, slots=2, waiting=20, **arguments):
    scheduler = Scheduler(model, BytesTokenizer(), slots=slots, waiting=waiting)
    template = ChatTemplate(template, {}) if template else None
    server = Server(Service(scheduler, "tiny", template, limits), port=0, **arguments)
    try:
        yield server
    finally:
        server.stop(0)


def slowed(server: Server, seconds: float) -> None:
    """Each step takes so much longer."""
    scheduler = server.service.scheduler
    turn = scheduler._turn
    scheduler._turn = lambda: (time.sleep(seconds), turn())


def held(server: Server) -> threading.Event:
    """Nothing is generated until the event is set."""
    scheduler, goes_on = server.service.scheduler, threading.Event()
    turn = scheduler._turn
    scheduler._turn = lambda: (goes_on.wait(60), turn())
    return goes_on


def asked(server: Server, path: str, body=None, method=None) -> urllib.request.Request:
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    return urllib.request.Request(server.address + path, data, kind, method=method)


def call(server: Server, path: str, body=None, method=None) -> tuple[int, dict]:
    """Status, and the JSON that came back; an error has OpenAI's form."""
    try:
        request = asked(server, path, body, method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as e:
        found = json.loads(e.read())
        if "status" in found:  # of the server's health
            return e.code, found
        assert found["error"].keys() == {"message", "type", "param", "code"}
        return e.code, found["error"]


def complete(server: Server, **fields) -> tuple[int, dict]:
    return call(server, "/v1/completions", {"prompt": "hi"} | fields)


def chat(server: Server, **fields) -> tuple[int, dict]:
    return call(server, "/v1/chat/completions", {"messages": [USER]} | fields)


def post(body: bytes | dict, path: str = "/v1/completions", headers: str = "") -> bytes:
    """A request as bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    if "Transfer-Encoding" not in headers:
        head += f"Content-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def connected(server: Server) -> socket.socket:
    return socket.create_connection(server.server_address[:2], timeout=20)


def rest(connection: socket.socket) -> bytes:
    """All that still comes, until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def raw(server: Server, data: bytes) -> bytes:
    """All that comes back for some bytes, until the server closes."""
    with connected(server) as s:
        s.sendall(data)
        return rest(s)


def statuses(data: bytes) -> list[int]:
    """Of the answers that came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", data)]


def events(data: bytes) -> list[dict]:
    """Of a stream, whole and without what marks chunks."""
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def streamed(server: Server, path: str, body: dict) -> list[dict]:
    with urllib.request.urlopen(asked(server, path, body), timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        return events(response.read())
