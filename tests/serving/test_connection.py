"""Clients that are wrong, slow, odd or gone: each gets what it is due, and nobody else feels it."""

import contextlib
import dataclasses
import json
import random
import socket
import subprocess
import threading
import time

import h11
import pytest
from test_protocol import any_value
from tiny_serving import (
    LAST,
    LIMITS,
    call,
    complete,
    connected,
    events,
    held,
    model_of,
    post,
    raw,
    rest,
    serving,
    slowed,
    statuses,
    until,
)

from lm_jax.serving.service import Limits

HASTY = dataclasses.replace(LIMITS, read_timeout=0.4, idle_timeout=0.4)
LONG = {"prompt": "hi", "max_tokens": 150, "temperature": 0}
SHORT = {"prompt": "hi", "max_tokens": 2}
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def model():
    return model_of()


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


WRONG = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, 400, "http://, not https://"),
    (b"hello\r\n\r\n", 400, "no request of HTTP"),
    (b"GET / HTTP/9.9\r\n\r\n", 505, "HTTP/1.1 is spoken"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1 is spoken"),
    (b"GET / HTTX/1.1\r\n\r\n", 400, "no request of HTTP"),
    (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "no request of HTTP"),
    (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "Host: '[' is no name"),
    (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501, "no such method"),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, "the address is longer"),
    (GET + b"a: b\r\n" * 200 + b"\r\n", 431, "more than 100"),
    (GET + b"a: " + b"b" * 70_000 + b"\r\n\r\n", 431, "more than 100"),
    (b"GET / HTTP/1.1\r\n\r\n", 400, "needs a Host"),
    (b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\n\r\n", 415, "must be application/json"),
    (post(SHORT, headers="Content-Type: text/plain\r\n"), 415, "must be application/json"),
    (post(b"").replace(b"Content-Length: 0\r\n", b""), 411, "Content-Length"),
    (post(b"").replace(b": 0", b": -1"), 400, "Content-Length: not a number"),
    (post(b"").replace(b": 0", b": " + b"9" * 18), 413, "larger than 5000"),
    (post(b"").replace(b": 0", b": " + b"9" * 30), 400, "not a number"),
    (post(SHORT, headers="Content-Length: 2\r\n"), 400, "Content-Length: not a number"),
    (post(b"", headers="Expect: 100-continue\r\nContent-Length: 99999\r\n"), 400, "not a number"),
    (post(b" " * 9999, headers="Expect: 100-continue\r\n"), 413, "larger than 5000"),
    (post(SHORT, headers="Expect: wonders\r\n"), 417, "Expect"),
    (post(b"0\r\n\r\n", headers="Transfer-Encoding: gzip, chunked\r\n"), 501, "chunked alone"),
    (post(b"zz\r\n\r\n", headers="Transfer-Encoding: chunked\r\n"), 400, "a chunk"),
    (post(b"2\r\n{}0\r\n\r\n", headers="Transfer-Encoding: chunked\r\n"), 400, "a chunk"),
    (post(b"1388\r\n" + b" " * 5000 + b"\r\n1\r\n", headers="Transfer-Encoding: chunked\r\n"), 413,
     "larger than 5000"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status", "said"), WRONG, ids=lambda x: str(x)[:40])
def test_what_is_wrong_is_refused(server, data, status, said):
    got = raw(server, data + LAST)
    assert statuses(got) in ([status], [status, 200])
    body = got.partition(b"\r\n\r\n")[2].splitlines()[0]
    assert said in json.loads(body)["error"]["message"]
    assert call(server, "/health")[0] == 200


@pytest.mark.parametrize(
    "header",
    [
        b"X-Foo : a",
        b"X-Foo\x0b: a",
        b" folded",
        b"\tfolded",
        b"no colon",
        b": no name",
        b"From someone",
        b"X: a\rY: b",
        b"X: a\nY: b",
        b"X: a\x00",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: +5",
        b"Content-Length: 5, 5",
        b"Content-Length: 0x5",
    ],
)
def test_nothing_passes_for_another_request(server, header):
    """What a lenient proxy took for a body is not answered as a request."""
    ahead = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    assert statuses(raw(server, ahead + header + b"\r\n\r\n" + LAST)) == [400]
    hidden = header + b"\r\nContent-Length: %d\r\n\r\n" % len(LAST) + LAST
    got = statuses(raw(server, GET + hidden + LAST))
    assert got == [400] or (b"Length: " in header and got == [200])


def test_random_bytes_leave_it_running(server):
    rng = random.Random(0)
    for i in range(60):
        data = rng.randbytes(rng.randrange(1, 300))
        data = [data, b"POST /v1/completions HTTP/1.1\r\n" + data, post(data)][i % 3]
        with connected(server) as s:
            s.sendall(data)
    assert complete(server, max_tokens=1)[0] == 200


def test_random_bodies_are_read_or_refused(server):
    rng, found = random.Random(1), set()
    names = ["prompt", "max_tokens", "temperature", "stop", "stream", "top_k", "top_p", "seed", "n"]
    with connected(server) as s:
        for _ in range(150):
            fields = {"prompt": "hi", "max_tokens": 1}
            fields |= {rng.choice(names): any_value(rng) for _ in range(rng.randrange(3))}
            fields["stream"] = None if fields.get("stream") is True else fields.get("stream")
            s.sendall(post(fields))
            found.add(int(s.recv(65_536).split()[1]))
    assert found == {200, 400}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("lm.localhost", 200),
        ("127.0.0.1:1", 200),
        ("192.168.1.7:8000", 200),
        ("[::1]:8000", 200),
        ("box", 200),
        ("box.", 200),
        (socket.gethostname(), 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:80:80", 400),
        ("user@localhost", 400),
        ("localhost, evil.example", 400),
        ("?", 400),
    ],
)
def test_it_answers_to_its_names_alone(model, host, status):
    """So that a page of another site, whose name leads here, reads nothing."""
    with serving(model, allow_hosts=["Box"]) as server:
        head = f"HTTP/1.1\r\nHost: {host}\r\n"
        got = raw(server, f"GET /health {head}Connection: close\r\n\r\n".encode())
        assert statuses(got) == [status]
        if status == 403:
            assert f"--allow_host={host}".encode() in got
        if host != "?":
            whole = LAST.replace(b"/health", f"http://{host}/health".encode())
            assert statuses(raw(server, whole)) == [status if " " not in host else 400]


def test_any_name_may_be_allowed(model):
    with serving(model, allow_hosts=["*"]) as server:
        assert statuses(raw(server, LAST.replace(b"localhost", b"evil.example"))) == [200]
        assert statuses(raw(server, b"GET /health HTTP/1.0\r\n\r\n")) == [200]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ('application/json;charset="utf-8"', 200),
        ("application/json; charset=latin-1", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
    ],
)
def test_what_a_form_can_send_is_refused(server, kind, status):
    data = post(SHORT).replace(b": application/json", f": {kind}".encode())
    assert statuses(raw(server, data + LAST))[0] == status


def test_a_preflight_allows_nothing(server):
    """A browser asks before it sends JSON from a page of another site."""
    for path, allowed in (("/v1/completions", b"POST, OPTIONS"), ("/", b"GET, HEAD, OPTIONS")):
        head = f"OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
        got = raw(server, head.encode() + b"Connection: close\r\n\r\n")
        assert statuses(got) == [200] and b"Allow: " + allowed + b"\r\n" in got
        assert b"access-control" not in got.lower()


def test_a_body_in_chunks(server):
    whole = raw(server, post(SHORT | {"seed": 1}) + LAST)
    body = json.dumps(SHORT | {"seed": 1}).encode()
    chunks = b"".join(b"%X;x=y\r\n%s\r\n" % (len(c), c) for c in (body[:1], body[1:18], body[18:]))
    data = post(chunks + b"0\r\nTrailer: x\r\n\r\n", headers="Transfer-Encoding: Chunked\r\n")
    got = raw(server, data + LAST)
    assert statuses(got) == statuses(whole) == [200, 200]
    bodies = [x.partition(b"\r\n\r\n")[2] for x in (got, whole)]
    choices = [json.loads(x.splitlines()[0])["choices"] for x in bodies]
    assert choices[0] == choices[1]


def test_a_client_may_wait_to_be_told_to_go_on(server):
    with connected(server) as s:
        head, _, body = post(SHORT, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        s.sendall(head + b"\r\n\r\n")
        assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(body)
        assert s.recv(15) == b"HTTP/1.1 200 OK"


def test_curl_is_understood(server, tmp_path):
    """With a large body, before which it waits for leave, and with one in chunks."""
    (tmp_path / "body").write_text(json.dumps(SHORT | {"temperature": 0}) + " " * 3000)
    for more in (["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"], ["-0"]):
        kind = ["-H", "Content-Type: application/json"]
        command = ["curl", "-sS", "-d", f"@{tmp_path}/body", *kind, *more]
        command += [f"{server.address}/v1/completions"]
        got = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert json.loads(got.stdout)["usage"]["completion_tokens"] == 2, got


def test_slow_requests_are_given_up(model):
    with serving(model, limits=HASTY) as server:
        with connected(server) as s:
            s.sendall(post(b"").replace(b": 0", b": 500"))
            with contextlib.suppress(OSError):
                for _ in range(20):  # drop by drop
                    s.sendall(b" ")
                    time.sleep(0.05)
            assert s.recv(100).split()[1] == b"408"
        assert statuses(raw(server, b"GET / HTTP/1.1\r\nHost:")) == [408]
        assert raw(server, b"") == b""  # closed, though nothing came
        assert statuses(raw(server, GET + b"\r\n")) == [200]  # and closed, when nothing follows


def test_connections_are_kept(server):
    stream = SHORT | {"stream": True}
    missing = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
    got = raw(server, post(SHORT) + post(stream) + missing + post(b"{") + post(SHORT) + LAST)
    assert statuses(got) == [200, 200, 404, 400, 200, 200]
    # After a body that was not read, what follows is no request.
    got = raw(server, post(b"x" * 9000) + LAST)
    assert statuses(got) == [413] and b"Connection: close" in got
    assert statuses(raw(server, post(SHORT, path="/nothing") + LAST)) == [404]
    assert statuses(raw(server, GET + b"Content-Length: 40\r\n\r\n" + LAST)) == [200]
    # HTTP/1.0 has no chunks.
    got = raw(server, post(stream).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"chunked" not in head and len(events(body)) >= 2
    assert raw(server, b"HEAD / HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


def test_answers_are_what_h11_reads(server):
    reader, found = h11.Connection(h11.CLIENT), []
    json_of = [("Content-Type", "application/json"), ("Expect", "100-continue")]
    asked = [("GET", "/", b""), ("HEAD", "/", b""), ("OPTIONS", "/v1/models", b"")]
    asked += [("DELETE", "/", b""), ("GET", "/nothing", b""), ("POST", "/health", b"")]
    for more in ({}, {"stream": True}, {"n": 2}):
        asked.append(("POST", "/v1/completions", json.dumps(SHORT | more).encode()))
    with connected(server) as s:
        for method, path, body in asked:
            headers = [("Host", "localhost"), ("Content-Length", str(len(body)))]
            headers += json_of if body else []
            s.sendall(reader.send(h11.Request(method=method, target=path, headers=headers)))
            s.sendall(reader.send(h11.Data(data=body)) + reader.send(h11.EndOfMessage()))
            status, said = 0, b""
            while not isinstance(event := reader.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    reader.receive_data(s.recv(65_536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    said += event.data
            found.append((status, len(said) > 0))
            reader.start_next_cycle()
    assert found[:3] == [(200, True), (200, False), (200, False)]
    assert [status for status, _ in found[3:]] == [405, 404, 405, 200, 200, 400]


@pytest.mark.parametrize("more", [b"", LAST], ids=["", "more was sent"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_that_leaves_frees_its_slot(server, stream, more, monkeypatch):
    scheduler = server.service.scheduler
    turn = scheduler._turn
    monkeypatch.setattr(scheduler, "_turn", lambda: (time.sleep(0.02), turn()))
    with connected(server) as s:
        s.sendall(post(LONG | {"stream": stream}) + more)
        until(lambda: scheduler.counts() == (1, 0))
        job = scheduler._running[0]
    until(lambda: scheduler.counts() == (0, 0))
    assert len(job.row.tokens) < 150


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_that_says_no_more_still_listens(server, stream, monkeypatch):
    scheduler = server.service.scheduler
    turn = scheduler._turn
    monkeypatch.setattr(scheduler, "_turn", lambda: (time.sleep(0.01), turn()))
    with connected(server) as s:
        s.sendall(post(LONG | {"max_tokens": 60, "stream": stream}))
        s.shutdown(socket.SHUT_WR)
        got = rest(s)
    assert statuses(got)[-1] == 200
    assert b'"length"' in got and got.endswith(b"\r\n\r\n" if stream else b"}\n")


def test_too_many_are_told_to_come_again(model):
    limits = Limits(request_timeout=1.5, connections=3)
    with serving(model, limits=limits, slots=1, waiting=1) as server:
        server.service.warm_up()
        slowed(server, 0.03)
        with connected(server) as first, connected(server) as second:
            first.sendall(post(LONG | {"stream": True}))
            until(lambda: server.service.scheduler.counts() == (1, 0))
            second.sendall(post(LONG))
            until(lambda: server.service.scheduler.counts() == (1, 1))
            status, error = complete(server)
            assert status == 429 and error["code"] == "queue_full"
            # Time is up for both: in the middle of its answer, and before its first token.
            got = b""
            while b"[DONE]" not in got:
                got += first.recv(65_536)
            assert b'"code":"timeout"' in got
            assert second.recv(65_536).split()[1] == b"504"
        until(lambda: complete(server, max_tokens=1)[0] == 200)


def test_those_that_say_nothing_keep_nobody_out(model):
    """Whether they are new, were answered before, or drip."""
    limits = dataclasses.replace(LIMITS, connections=3, read_timeout=60, idle_timeout=60)
    with serving(model, limits=limits, slots=1) as server, contextlib.ExitStack() as stack:
        server.service.warm_up()
        for i in range(9):
            s = stack.enter_context(connected(server))
            s.sendall([b"", post(SHORT), post(SHORT)[:-3]][i % 3])
            if i % 3 == 1:
                assert s.recv(65_536).split()[1] == b"200"
        assert complete(server, max_tokens=1)[0] == 200
        # Those that are being answered keep their places.
        goes_on, busy = held(server), []
        for n in range(3):
            busy.append(stack.enter_context(connected(server)))
            busy[n].sendall(post(SHORT, headers="Connection: close\r\n"))
            until(lambda: sum(server.service.scheduler.counts()) > n)  # noqa: B023
        with connected(server) as s:
            assert statuses(rest(s)) == [503]
        goes_on.set()
        assert [statuses(rest(s)) for s in busy] == [[200]] * 3


def test_where_no_thread_starts_there_is_room_again(model, monkeypatch):
    with serving(model, limits=dataclasses.replace(LIMITS, connections=1)) as server:
        start = threading.Thread.start

        def fails(self):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", fails)
        for _ in range(3):
            assert statuses(raw(server, b"")) == [503]
        monkeypatch.setattr(threading.Thread, "start", start)
        assert statuses(raw(server, LAST)) == [200]


def test_one_that_does_not_read_keeps_nobody_out(model):
    limits = dataclasses.replace(LIMITS, read_timeout=0.3, connections=1)
    with serving(model, limits=limits) as server, socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(server.server_address[:2])
        s.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)  # 8 MB, were it read
        until(lambda: server._answering)
        until(lambda: statuses(raw(server, LAST)) == [200])
