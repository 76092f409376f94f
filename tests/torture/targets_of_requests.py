"""What users and clients send: command lines, templates of examples, requests over HTTP."""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import socket
import sys

import h11
import tiny_models
from absl import flags
from fuzzing import Target

from lm_jax import cli
from lm_jax.config import Config
from lm_jax.config_keys import fits, walk
from lm_jax.data.chat import ChatTemplate
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.generation.decoding import Completion
from lm_jax.serving.http import Server
from lm_jax.serving.scheduler import Full, Scheduler
from lm_jax.serving.service import Limits, Service
from lm_jax.template import Template
from lm_jax.validation import validate


def command_line(data: bytes, folder: pathlib.Path) -> bool:
    """Arguments, a line each, after the name of a recipe: the config that they give has values of
    the types that its fields have, or the process ends with one message."""
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from lm_jax.config import Config\ndef get_config(arg=None):\n    return Config()\n"
    )
    arguments = data.decode("utf-8", "surrogateescape").split("\n")
    values, said = flags.FlagValues(), io.StringIO()
    line = ["train", f"--config={recipe}", *arguments]
    before, flags.FLAGS, sys.argv = (flags.FLAGS, sys.argv), values, line
    try:
        with contextlib.redirect_stderr(said):
            holder = cli.define_config_flag(values)
            cli._parse(list(line))
        config = cli.config_of(holder)
    except SystemExit as e:
        assert e.code == 1 and said.getvalue().startswith("error: "), (e.code, said.getvalue())
        return False
    finally:
        flags.FLAGS, sys.argv = before
    for key, value, field in walk(config):
        assert fits(value, field.type), (key, value)
    validate(config)
    return True


def values_of_a_config(data: bytes, folder: pathlib.Path) -> bool:
    """An object of keys and values, whatever their types: all that is wrong is said."""
    config, values = Config(), None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(data)
    if not isinstance(values, dict):
        return False
    known = {key: field for key, _, field in walk(config)}
    for key, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in known and fits(value, known[key].type):
            *sections, name = key.split(".")
            setattr(functools.reduce(getattr, sections, config), name, value)
    validate(config)
    return True


def words_with_fields(data: bytes, folder: pathlib.Path) -> bool:
    text = data.decode("utf-8", "replace")
    found = Template(text, "data.prompt")
    filled, spans = found.fill({name: f"<{name}>" for name in found.fields})
    assert [filled[a:b] for a, b in spans] == [f"<{name}>" for name in found.fields]
    assert filled == text.format(**{name: f"<{name}>" for name in found.fields})
    return True


class _Echo(Scheduler):
    """Answers at once, without a model."""

    def __init__(self):
        self.slots, self.waiting, self.max_length = 2, 4, 60
        self.tokenizer = BytesTokenizer()
        self._config = dataclasses.replace(tiny_models.LLAMA, vocab_size=300, max_length=60)

    def submit(self, jobs):
        if len(jobs) > self.slots + self.waiting:
            raise Full
        for job in jobs:
            job.row.finish_reason = "length"
            job.tell("é")
            job.tell(Completion("", "é", (1,), "length"))

    def counts(self):
        return 0, 0

    def close(self, seconds):
        return


@functools.cache
def _server() -> Server:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    limits = Limits(max_body_bytes=5000, read_timeout=2.0, idle_timeout=2.0)
    return Server(Service(_Echo(), "tiny", template, limits), port=0)


_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def _sent(data: bytes) -> bytes:
    with socket.create_connection(_server().server_address[:2], timeout=5) as s:
        parts = []
        with contextlib.suppress(ConnectionError):
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := s.recv(65_536):
                parts.append(part)
        return b"".join(parts)


def _answers(data: bytes, methods: list[bytes]) -> list[tuple[int, bytes]]:
    """Status and body of each answer, as a strict client reads them."""
    found = []
    while data:
        client = h11.Connection(h11.CLIENT)
        method = methods[len(found)] if len(found) < len(methods) else b"GET"
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        body = b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            assert event is not h11.NEED_DATA, "an answer that does not end"
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        found.append((status, body))
        data = client.trailing_data[0]
    return found


def requests(data: bytes, folder: pathlib.Path) -> bool:
    """Bytes: what comes back is HTTP, is no defect, and the server goes on."""
    came = _sent(data)
    try:
        came = _answers(came, [b"HEAD"] if data.startswith(b"HEAD ") else [])
    except (h11.RemoteProtocolError, AssertionError):
        if b"HEAD " not in data:  # to which answers have no body: which of several were they?
            raise
        came = []
    for status, body in came:
        assert status in (100, 200, 400, 403, 404, 405, 408, 411, 413, 414, 415, 417, 429, 431,
                          501, 505), (status, body)  # fmt: skip
        if status >= 400 and body:
            assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
    ((status, _),) = _answers(_sent(_HEALTH), [])
    assert status == 200
    return any(status == 200 for status, _ in came)


def bodies(path: str):
    def check(data: bytes, folder: pathlib.Path) -> bool:
        """One body: it is answered, and once."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        ((status, body),) = _answers(_sent(head.encode() + data), [b"POST"])
        assert status in (200, 400, 404, 413, 429), (status, body)
        if status == 200 and body.startswith(b"data: "):
            events = [part.removeprefix("data: ") for part in body.decode().split("\n\n")[:-1]]
            assert events.pop() == "[DONE]"
            assert all(json.loads(event)["choices"] is not None for event in events)
        elif status == 200:
            assert all(c["finish_reason"] == "length" for c in json.loads(body)["choices"])
        else:
            assert json.loads(body)["error"]["message"]
        return status == 200

    return check


def _post(path: str, body: bytes, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    head += "" if "chunked" in more else f"Content-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


_COMPLETION = {"model": "tiny", "prompt": ["hi", "é"], "max_tokens": 3, "temperature": 0.5,
               "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 1,
               "stop": ["x"], "n": 1, "user": "u", "logit_bias": {}}  # fmt: skip
_CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
         {"type": "text", "text": "hi"}], "name": "n"}], "max_completion_tokens": 4,
         "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
_PIECES = (
    *(b" HTTP/1.1\r\n", b"\r\n", b"\r\n\r\n", b"Host: ", b"Content-Length: ", b"chunked", b"%00"),
    *(b"Transfer-Encoding: ", b"POST ", b"GET ", b"HEAD ", b"Connection: close", b"Expect: "),
    *(b"100-continue", b"0\r\n\r\n", b"HTTP/1.0", b"/v1/models/", b"OPTIONS "),
)
_FLAGS = (
    *(b"--config.", b"--noconfig.", b"data.sources=", b"model.layers=", b"training.steps=", b"--"),
    *(b"optimizer.name=", b"nan", b"1e999", b"None", b"True", b"('a',)", b"{[]:1}", b"(" * 300),
    *(b"--help", b"--flagfile=x", b"--undefok=y", b"data.weights=", b"9" * 5000),
)
_CHUNKS = b"34\r\n" + json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
_CHUNKS += b"\r\n0\r\n\r\n"
_VALUES = [dict(part) for part in ({}, {"model.heads": 4, "model.width": 64, "data.length": 64})]
_VALUES.append({key: value for key, value, _ in walk(Config())})
_VALUES = [value | {"data.sources": ["x"]} for value in _VALUES]

REQUESTS = {
    "command_line": Target(
        command_line,
        (
            b"--config.model.layers=2\n--config.data.sources=a,b\n--config.optimizer.name=lion",
            b"--config.data.sources=a,b\n--config.data.lanes=1\n--noconfig.model.causal\n--config.data.epochs=2",
        ),
        _FLAGS,
    ),
    "config_values": Target(
        values_of_a_config, tuple(json.dumps(v).encode() for v in _VALUES), (), True
    ),
    "template": Target(
        words_with_fields, (b"Question: {question} {{x}} {answer}",), (b"{a!r}", b"{a:9}")
    ),
    "http": Target(
        requests,
        (
            b"GET /v1/models HTTP/1.1\r\nHost: localhost:1\r\n\r\n" + _HEALTH,
            _post("/v1/completions", json.dumps(_COMPLETION).encode()) + _HEALTH,
            _post("/v1/chat/completions", _CHUNKS, "Transfer-Encoding: chunked\r\n"),
            b"HEAD / HTTP/1.0\r\nExpect: 100-continue\r\nCookie: a\r\nCookie: b\r\n\r\n",
        ),
        _PIECES,
    ),
    "http_completions": Target(
        bodies("/v1/completions"), (json.dumps(_COMPLETION).encode(),), (), True
    ),
    "http_chat": Target(bodies("/v1/chat/completions"), (json.dumps(_CHAT).encode(),), (), True),
}
