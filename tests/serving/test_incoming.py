"""What is taken for a request is what a strict reader of HTTP takes for one, and nothing else."""

import random
import socket
import time

import h11
import pytest
from tiny_serving import LAST, post

from lm_jax.serving.incoming import Incoming, read_body, read_head
from lm_jax.serving.protocol import ApiError

MOST = 3000  # bytes of a body


def incoming(data: bytes) -> Incoming:
    """Of a client that sends that and closes."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
    made = Incoming(ours)
    made.until = time.monotonic() + 60
    return made


def requests(data: bytes) -> list[tuple]:
    """Method, target, version and body of each request up to the first one that is refused."""
    reader, found = incoming(data), []
    with reader._connection:
        try:
            while reader.first() is not None:
                head = read_head(reader)
                body = read_body(reader, head, MOST) if head.states_length else b""
                found.append((head.method, head.target, head.version, body))
                if not head.kept:
                    break
        except ApiError as e:
            assert e.status in (400, 411, 413, 414, 431, 501, 505)
        except ConnectionAbortedError:
            pass
    return found


def of_h11(data: bytes) -> list[tuple]:
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    reader.receive_data(data)
    reader.receive_data(b"")
    found, request, body = [], None, b""
    try:
        while not isinstance(event := reader.next_event(), h11.ConnectionClosed):
            if isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                version = tuple(map(int, request.http_version.decode().split(".")))
                method, target = request.method.decode(), request.target.decode()
                found.append((method, target, version, body))
                reader.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                reader.send(h11.EndOfMessage())
                if reader.our_state is h11.MUST_CLOSE:
                    break
                reader.start_next_cycle()
    except h11.RemoteProtocolError:
        pass
    return found


CHUNKED = "Transfer-Encoding: chunked\r\n"
KINDS = [
    LAST,
    LAST.replace(b"Connection: close", b"Connection: keep-alive"),
    LAST.replace(b"HTTP/1.1", b"HTTP/1.0"),
    LAST.replace(b"/health", b"http://localhost:80/health?a=b#c"),
    post({"prompt": "hi", "max_tokens": 2}),
    post(b"", headers="Expect: 100-continue\r\n"),
    post(b"5;a=b\r\n{ \r\n}\r\n10\r\n" + b" " * 16 + b"\r\n0\r\nT: x\r\n\r\n", headers=CHUNKED),
]
PIECES = [
    *(b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b":", b",", b";", b"\x00", b"\x0b", b"\x7f"),
    *(b"\x85", b"\xff", b"0", b"1", b"5", b"a", b"-", b"+", b"chunked", b"close", b"HTTP/1.1"),
    *(b"Content-Length: 5\r\n", b"Content-Length:0\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Host: x\r\n", b"Host:\r\n", b" folded\r\n", b"X: y\r\n", b"transfer-encoding:x\r\n"),
    b"0\r\n\r\n",
]  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    data = bytearray(b"".join(rng.choices(KINDS, k=rng.randrange(1, 4))))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        place = rng.randrange(len(data))
        if rng.random() < 0.3:  # at the beginning of a line, where most of them mean something
            place = data.rfind(b"\n", 0, place) + 1
        size = rng.choice([0, 0, 1, 1, 2, 5, 20])
        data[place : place + size] = rng.choice([b"", rng.choice(PIECES), rng.choice(PIECES)])
    return bytes(data)


def test_what_is_taken_is_what_h11_takes():
    rng, taken, refused = random.Random(0), 0, 0
    for _ in range(2500):
        data = mutated(rng)
        ours, theirs = requests(data), of_h11(data)
        assert ours == theirs[: len(ours)], data
        taken += len(ours)
        refused += len(theirs) > len(ours)
    assert taken > 1500 and refused > 20


def test_headers_are_read():
    data = b"GET /a?b HTTP/1.1\r\nHost:  Box:80 \r\nX-a: 1\r\nx-A:2\r\nEmpty:\r\nB: \xe4\r\n\r\n"
    head = read_head(incoming(data))
    assert head.headers == {"host": "Box:80", "x-a": "1, 2", "empty": "", "b": "\xe4"}
    assert (head.path, head.host, head.kept, head.length) == ("/a", "box", True, 0)


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        ("/a/b?c=http://d/e", "/a/b", "x"),
        ("//evil/a", "//evil/a", "x"),
        ("http://evil:80/a?b", "/a", "evil"),
        ("HTTP://evil", "/", "evil"),
        ("*", "*", "x"),
        ("evil:443", "evil:443", "x"),
    ],
)
def test_where_a_target_leads(target, path, host):
    head = read_head(incoming(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
    assert (head.path, head.host) == (path, host)


def test_drops_are_put_together_until_the_time_is_up():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = Incoming(ours)
        reader.until = time.monotonic() + 0.05
        theirs.sendall(b"GET / HT")
        assert reader.first() == ord("G")
        with pytest.raises(TimeoutError):
            read_head(reader)
        reader.until = time.monotonic() + 60
        theirs.sendall(b"TP/1.0\r\n\r\nmore")
        assert read_head(reader).version == (1, 0)
        assert not reader.may_be_over() and reader.exactly(4) == b"more"
        theirs.sendall(b"and more")
        theirs.shutdown(socket.SHUT_WR)
        assert reader.may_be_over() and reader.exactly(8) == b"and more"


def test_what_is_read_ahead_is_bounded():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = Incoming(ours)
        theirs.setblocking(False)
        sent = 0
        while not reader.may_be_over():
            sent += theirs.send(bytes(10_000))
        assert sent < 200_000
