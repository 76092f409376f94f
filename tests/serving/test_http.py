"""The server as clients see it: right ones, wrong ones, slow ones, and ones that leave."""

import contextlib
import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import commands
import openai
import pytest
from tiny_serving import model_of, until

from lm_jax.data.chat import ChatTemplate
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
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


@pytest.fixture(scope="module")
def model():
    return model_of()


@contextlib.contextmanager
def serving(model, template=TEMPLATE, limits=LIMITS, slots=2, waiting=20):
    scheduler = Scheduler(model, BytesTokenizer(), slots=slots, waiting=waiting)
    template = ChatTemplate(template, {}) if template else None
    server = Server(Service(scheduler, "tiny", template, limits), port=0)
    try:
        yield server
    finally:
        server.stop(0)


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as made:
        made.service.warm_up()
        yield made


@pytest.fixture(autouse=True)
def nothing_is_said_to_the_log(capfd):
    """A traceback is a defect, whatever a client did."""
    yield
    assert "Traceback" not in capfd.readouterr().err


def call(server: Server, path: str, body=None, method=None) -> tuple[int, dict]:
    """Status, and the JSON that came back; an error has OpenAI's form."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(server.address + path, data, method=method)
    try:
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


def raw(server: Server, data: bytes, seconds: float = 10) -> bytes:
    """All that comes back for some bytes, until the server closes."""
    with socket.create_connection(server.server_address[:2], timeout=seconds) as s:
        s.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := s.recv(65_536):
                parts.append(part)
        return b"".join(parts)


def post(body: bytes, path: str = "/v1/completions", headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def alone(model, prompt: str, **arguments):
    sampling = {"sampling": Sampling(top_k=0), "max_tokens": 100} | arguments
    return Generator(model, BytesTokenizer()).generate([prompt], **sampling)[0]


def test_a_completion_is_that_of_the_generator(server, model):
    wanted = alone(model, "hi", seed=5, max_tokens=130)
    status, got = complete(server, seed=5, max_tokens=130)
    assert status == 200 and got["object"] == "text_completion" and got["model"] == "tiny"
    choice = got["choices"][0]
    assert choice["text"] == wanted.text
    assert choice["finish_reason"] == {"eos": "stop"}.get(
        wanted.finish_reason, wanted.finish_reason
    )
    tokens = len(wanted.tokens)
    assert got["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": tokens,
        "total_tokens": 3 + tokens,
    }
    several = complete(server, prompt=["hi", "hi"], seed=5, max_tokens=130)[1]
    assert [c["text"] for c in several["choices"]] == [wanted.text] * 2
    assert [c["index"] for c in several["choices"]] == [0, 1]
    assert several["usage"]["prompt_tokens"] == 6


def test_a_chat_is_the_completion_of_what_the_template_makes(server):
    rendered = ChatTemplate(TEMPLATE, {}).render([USER], True)
    assert rendered == "user: hi\nassistant: "
    arguments = {"seed": 1, "max_tokens": 20}
    got = chat(server, **arguments)[1]
    assert got["object"] == "chat.completion"
    message = got["choices"][0]["message"]
    assert message["role"] == "assistant"
    # A prompt begins with bos, and what a template makes with what it says.
    ids = len(BytesTokenizer().encode(rendered))
    assert got["usage"]["prompt_tokens"] == ids
    parts = [{"type": "text", "text": "hi"}]
    same = chat(server, messages=[{"role": "user", "content": parts}], **arguments)[1]
    assert same["choices"][0]["message"] == message


def events(data: bytes) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def streamed(server: Server, path: str, body: dict) -> list[dict]:
    request = urllib.request.Request(server.address + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        return events(response.read())


def test_streaming_gives_the_same_in_pieces(server):
    body = {"prompt": ["hi", "ho"], "seed": 3, "max_tokens": 40}
    whole = complete(server, **body)[1]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = streamed(server, "/v1/completions", body | options)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len({c["id"] for c in chunks}) == 1 and all(c["usage"] is None for c in chunks)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert len(own) > 5
    body = {"messages": [USER], "seed": 3, "max_tokens": 40}
    said = chat(server, **body)[1]["choices"][0]["message"]["content"]
    chunks = streamed(server, "/v1/chat/completions", body | {"stream": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and deltas[-1] == {}
    assert "".join(d.get("content", "") for d in deltas) == said
    assert all("usage" not in c and c["object"] == "chat.completion.chunk" for c in chunks)


def test_openais_client_works(server):
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        arguments = {"model": "tiny", "max_tokens": 12, "seed": 4}
        whole = client.completions.create(prompt="hi", **arguments)
        parts = client.completions.create(prompt="hi", stream=True, **arguments)
        assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
        whole = client.chat.completions.create(messages=[USER], **arguments)
        parts = client.chat.completions.create(
            messages=[USER], stream=True, stream_options={"include_usage": True}, **arguments
        )
        *parts, last = parts
        said = "".join(p.choices[0].delta.content or "" for p in parts)
        assert said == whole.choices[0].message.content
        assert last.usage == whole.usage and last.usage.completion_tokens == 12
        extra = {"top_k": 1, "repetition_penalty": 1.3}
        assert client.completions.create(prompt="hi", extra_body=extra, **arguments).choices
        with pytest.raises(openai.BadRequestError, match="n: is not supported"):
            client.chat.completions.create(messages=[USER], n=2, **arguments)
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.completions.create(prompt="hi", model="other")


def test_what_the_readme_asks_is_answered(server, capfd):
    readme = (commands.ROOT / "README.md").read_text(encoding="utf-8")
    body = json.loads(re.search(r"-d '(\{.*?\})'", readme)[1])
    assert len(streamed(server, "/v1/completions", body)) > 1
    code = re.search(r"^```py\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
    shown = "http://127.0.0.1:8000"
    assert shown in code
    exec(code.replace(shown, server.address), {})
    assert len(capfd.readouterr().out) > 10


def test_many_clients_at_once(server):
    wanted = {i: complete(server, seed=i, max_tokens=20)[1]["choices"] for i in range(10)}
    got = {}

    def work(i: int) -> None:
        got[i] = complete(server, seed=i, max_tokens=20)[1]["choices"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


def test_health_models_and_page(server):
    status, health = call(server, "/health")
    assert status == 200 and health["status"] == "ok" and health["chat"]
    assert call(server, "/v1/models")[1]["data"][0]["id"] == "tiny"
    with urllib.request.urlopen(server.address + "/") as response:
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert b"<!doctype html>" in response.read()
    assert raw(server, b"HEAD / HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("status", "path", "method", "body", "said"),
    [
        (404, "/v2", "GET", None, "there is nothing at '/v2'"),
        (404, "/v1/embeddings", "POST", {}, "there is nothing at"),
        (405, "/v1/completions", "GET", None, "takes POST, not GET"),
        (405, "/health", "POST", {}, "takes GET or HEAD, not POST"),
        (405, "/", "DELETE", None, "takes GET or HEAD, not DELETE"),
        (400, "/v1/completions", "POST", b"{", "not JSON"),
        (400, "/v1/completions", "POST", {"prompt": "a", "logprobs": 2}, "logprobs"),
        (400, "/v1/completions", "POST", {"prompt": "\ud800"}, "surrogate"),
        (400, "/v1/completions", "POST", {"prompt": "a" * 101}, "102 tokens, and may have 100"),
        (400, "/v1/completions", "POST", {"prompt": ["a", "a" * 900]}, "prompt[1]: it has 901"),
        (400, "/v1/completions", "POST", {"prompt": ["a"] * 23}, "at most 22 at a time"),
        (400, "/v1/chat/completions", "POST", {"messages": []}, "at least one message"),
        (
            400,
            "/v1/chat/completions",
            "POST",
            {"messages": [{"role": "system", "content": ""}]},
            "no system here",
        ),
        (413, "/v1/completions", "POST", {"prompt": "a" * 6000}, "larger than 5000 bytes"),
        (413, "/v1/completions", "POST", b" " * 3_000_000, "larger than 5000 bytes"),
    ],
)
def test_what_is_wrong_has_a_status_and_a_message(server, status, path, method, body, said):
    got, error = call(server, path, body, method)
    assert got == status and said in error["message"]
    assert complete(server, max_tokens=1)[0] == 200


def test_a_model_without_a_template_says_where_to_go(model):
    with serving(model, template=None) as server:
        status, error = chat(server)
        assert status == 400 and "/v1/completions" in error["message"]
        assert not call(server, "/health")[1]["chat"]


GARBAGE = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\n", b"400"),
    (b"hello\r\n\r\n", b"400"),
    (b"GET / HTTP/9.9\r\n\r\n", b"505"),
    (b"GET / HTTX/1.1\r\n\r\n", b"400"),
    (b"GET http://[ HTTP/1.1\r\n\r\n", b"400"),
    (b"BREW / HTTP/1.1\r\n\r\n", b"501"),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
    (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
    (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", b"431"),
    (b"POST /v1/completions HTTP/1.1\r\n\r\n", b"411"),
    (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", b"400"),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n", b"413"),
    (
        b"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 99999\r\n\r\n",
        b"413",
    ),
]


@pytest.mark.parametrize(("data", "status"), GARBAGE, ids=lambda x: str(x)[:40])
def test_what_is_no_http_is_refused(server, data, status):
    head, _, body = raw(server, data).partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert json.loads(body)["error"]["message"]
    assert call(server, "/health")[0] == 200


def test_random_bytes_leave_it_running(server):
    rng = random.Random(0)
    for i in range(40):
        data = rng.randbytes(rng.randrange(1, 300))
        data = [data, b"POST /v1/completions HTTP/1.1\r\n" + data, post(data)][i % 3]
        with socket.create_connection(server.server_address[:2], timeout=10) as s:
            s.sendall(data)
    assert complete(server, max_tokens=1)[0] == 200


def test_random_bodies_are_read_or_refused(server):
    from test_protocol import any_value

    rng, statuses = random.Random(1), set()
    names = ["prompt", "max_tokens", "temperature", "stop", "stream", "top_k", "top_p", "seed", "n"]
    for _ in range(150):
        fields = {"prompt": "hi", "max_tokens": 1}
        fields |= {rng.choice(names): any_value(rng) for _ in range(rng.randrange(3))}
        fields["stream"] = None if fields.get("stream") is True else fields.get("stream")
        statuses.add(complete(server, **fields)[0])
    assert statuses == {200, 400}


def test_a_slow_body_is_given_up(server):
    with socket.create_connection(server.server_address[:2], timeout=10) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(50):  # drop by drop
                s.sendall(b" ")
                time.sleep(0.05)
        assert s.recv(100).split()[1] == b"408"
    for head in (b"", b"GET / HTTP/1.1\r\nHost:"):
        assert raw(server, head) == b""  # closed, though nothing more came


def test_connections_are_kept(server):
    body = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
    stream = json.dumps({"prompt": "hi", "max_tokens": 2, "stream": True}).encode()
    missing = b"GET /nothing HTTP/1.1\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    got = raw(server, post(body) + post(stream) + missing + post(b"{") + post(body) + last)
    statuses = [part.split()[0] for part in got.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"404", b"400", b"200", b"200"]
    # After a body that was not read, what follows is no request.
    got = raw(server, post(b"x" * 9000) + last)
    assert got.count(b"HTTP/1.1") == 1 and b"Connection: close" in got
    got = raw(server, post(body, path="/nothing") + last)
    assert got.count(b"HTTP/1.1") == 1
    # HTTP/1.0 has no chunks.
    got = raw(server, post(stream).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    head, _, rest = got.partition(b"\r\n\r\n")
    assert b"chunked" not in head and len(events(rest)) >= 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_that_leaves_frees_its_slot(server, stream, monkeypatch):
    scheduler = server.service.scheduler
    turn = scheduler._turn
    monkeypatch.setattr(scheduler, "_turn", lambda: (time.sleep(0.02), turn()))
    body = json.dumps({"prompt": "hi", "max_tokens": 150, "temperature": 0, "stream": stream})
    with socket.create_connection(server.server_address[:2], timeout=10) as s:
        s.sendall(post(body.encode()))
        until(lambda: scheduler.counts() == (1, 0))
        job = scheduler._running[0]
    until(lambda: scheduler.counts() == (0, 0))
    assert len(job.row.tokens) < 150


def test_too_many_are_told_to_come_again(model):
    limits = Limits(request_timeout=3.0, connections=6)
    with serving(model, limits=limits, slots=1, waiting=1) as server:
        turn = server.service.scheduler._turn
        server.service.scheduler._turn = lambda: (time.sleep(0.03), turn())
        body = post(json.dumps({"prompt": "hi", "max_tokens": 150, "temperature": 0}).encode())
        streaming = post(
            json.dumps(
                {"prompt": "hi", "max_tokens": 150, "temperature": 0, "stream": 1 == 1}
            ).encode()
        )
        with contextlib.ExitStack() as stack:
            sockets = [
                stack.enter_context(socket.create_connection(server.server_address[:2], 20))
                for _ in range(2)
            ]
            for s, data in zip(sockets, (streaming, body)):
                s.sendall(data)
                time.sleep(0.2)
            until(lambda: sum(server.service.scheduler.counts()) == 2)
            status, error = complete(server)
            assert status == 429 and error["code"] == "queue_full"
            # Time is up for both: in the middle of its answer, and before its first token.
            got = b""
            while b"[DONE]" not in got:
                got += sockets[0].recv(65_536)
            assert b'"code":"timeout"' in got
            assert sockets[1].recv(65_536).split()[1] == b"504"
            more = [
                stack.enter_context(socket.create_connection(server.server_address[:2], 20))
                for _ in range(4)
            ]
            assert raw(server, b"").split()[1] == b"503"  # of connections
            for s in (*more, *sockets):
                s.close()
        until(lambda: complete(server, max_tokens=1)[0] == 200)


def test_stopping_lets_what_runs_end_and_refuses_the_rest(model):
    with serving(model, slots=1) as server:
        server.service.warm_up()
        turn = server.service.scheduler._turn
        server.service.scheduler._turn = lambda: (time.sleep(0.02), turn())
        got = {}

        def work(name: str, **fields) -> None:
            got[name] = complete(server, temperature=0, **fields)

        runs = threading.Thread(target=work, args=("runs",), kwargs={"max_tokens": 60})
        runs.start()
        until(lambda: server.service.scheduler.counts() == (1, 0))
        waits = threading.Thread(target=work, args=("waits",), kwargs={"max_tokens": 5})
        waits.start()
        until(lambda: server.service.scheduler.counts() == (1, 1))
        stops = threading.Thread(target=server.stop, args=(30,))
        stops.start()
        until(lambda: server.stopping)
        assert complete(server)[0] == 503 and call(server, "/health")[0] == 503
        for thread in (runs, waits, stops):
            thread.join(60)
        assert got["runs"][0] == 200
        assert len(got["runs"][1]["choices"][0]["text"]) > 5
        assert got["waits"] == (503, got["waits"][1])
        with pytest.raises(OSError):
            socket.create_connection(server.server_address[:2], timeout=2)
