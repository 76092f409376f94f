"""Requests as bytes: read strictly, so that nobody takes them for something else.

What a request is, and where it ends, is said in one way only (RFC 9112). Whatever a proxy in front
could understand otherwise is refused: lines that end in a line feed alone, spaces around a header's
name, headers that go on in the next line, two lengths.
"""

import dataclasses
import re
import socket
import time
from collections.abc import Mapping

from lm_jax.serving.protocol import ApiError

_LONGEST_HEAD = 65_536  # bytes, as http.client's; cookies of other servers on this machine count
_MOST_HEADERS = 100
_LONGEST_CHUNK_LINE = 256
_AHEAD = 65_536  # bytes that may follow a request while it is answered
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REQUEST = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _NAME.pattern)
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class _TooLong(Exception):
    """A line has no end where it should have one."""


class Incoming:
    """What a client sends, up to a point of time, however slowly bytes drip in.

    Attributes:
      until: of time.monotonic. Reading beyond it raises a TimeoutError; reading beyond what the
        client sends, a ConnectionAbortedError.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._held, self.until = connection, bytearray(), 0.0

    def first(self) -> int | None:
        """The next byte, which stays. None: there is none."""
        return self._held[0] if self._held or self._more() else None

    def line(self, most: int) -> bytes:
        """What stands before the next line end, which is taken too.

        Raises:
          ApiError: 400, it ends in a line feed alone.
        """
        seen = 0
        while (end := self._held.find(b"\n", seen)) < 0:
            seen = len(self._held)
            if seen >= most:
                raise _TooLong
            self._need_more()
        if end >= most:
            raise _TooLong
        line = self._take(end + 1)
        if line[-2:] != b"\r\n":
            raise ApiError(400, "a line of the request ends without a carriage return")
        return line[:-2]

    def exactly(self, size: int) -> bytes:
        while len(self._held) < size:
            self._need_more()
        return self._take(size)

    def pass_over(self) -> None:
        """Reads to the end, and forgets it."""
        while self._more():
            self._held.clear()

    def may_be_over(self) -> bool:
        """Whether the client sends nothing more, as far as can be told without waiting. What it
        sends stays, up to a bound, at which nothing can be told."""
        self._connection.settimeout(0)
        while len(self._held) < _AHEAD:
            try:
                data = self._connection.recv(_AHEAD)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._held += data
        return True

    def _take(self, size: int) -> bytes:
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    def _need_more(self) -> None:
        if not self._more():
            raise ConnectionAbortedError

    def _more(self) -> bool:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        data = self._connection.recv(65_536)
        self._held += data
        return bool(data)


@dataclasses.dataclass(frozen=True)
class Head:
    """All of a request but its body.

    Attributes:
      headers: by name, which is in small letters. Of a header that stands there several times the
        values are joined with commas, as they may be.
    """

    method: str
    target: str
    version: tuple[int, int]  # (1, 0) or (1, 1)
    headers: Mapping[str, str]

    @property
    def _parts(self) -> tuple[str, str]:
        """The host of a target as proxies are asked for it, else '', and the path."""
        target = self.target.partition("?")[0]
        if match := re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://([^/]*)(.*)", target):
            return match[1], match[2] or "/"
        return "", target

    @property
    def path(self) -> str:
        """Of the target, without the query."""
        return self._parts[1]

    @property
    def host(self) -> str | None:
        """Whom the client means to speak to, in small letters and without the port; an address of
        IPv6 in brackets.

        Raises:
          ApiError: 400, that cannot be told.
        """
        stated = self.headers.get("host")
        if stated is None and self.version != (1, 0):
            raise ApiError(400, "a request needs a Host")
        both = stated, self._parts[0] or None  # the second counts: RFC 9112, 3.2.2
        names = [_name_of(host) for host in both if host is not None]
        return names[-1] if names else None

    @property
    def kept(self) -> bool:
        """Whether the client would send another request after this one."""
        tokens = [t.strip() for t in self.headers.get("connection", "").lower().split(",")]
        return self.version == (1, 1) and "close" not in tokens

    @property
    def length(self) -> int | None:
        """Of the body, 0 without one. None: it comes in chunks.

        Raises:
          ApiError: 400 or 501, that cannot be told, or in two ways.
        """
        coding, stated = (self.headers.get(f) for f in ("transfer-encoding", "content-length"))
        if coding is None:
            if not re.fullmatch("[0-9]{1,18}", "0" if stated is None else stated):
                raise ApiError(400, "Content-Length: not a number of bytes")
            return int(stated or 0)
        if stated is not None or self.version == (1, 0):
            raise ApiError(400, "Transfer-Encoding: not with a Content-Length, nor with HTTP/1.0")
        if coding.lower() != "chunked":
            raise ApiError(501, "Transfer-Encoding: chunked alone is understood")
        return None

    @property
    def states_length(self) -> bool:
        return bool(self.headers.keys() & {"transfer-encoding", "content-length"})


def _name_of(host: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::[0-9]{0,5})?", host.lower())
    if not match:
        raise ApiError(400, f"Host: '{host}' is no name of a host")
    return match[1]


def read_head(incoming: Incoming) -> Head:
    """
    Raises:
      ApiError: it is malformed, too long, or of another protocol.
    """
    first = incoming.first()
    if first == 0x16:  # the first byte of TLS: an answer now, and not when the time is up
        raise ApiError(400, "this is no HTTP but TLS: ask http://, not https://")
    left = _LONGEST_HEAD
    try:
        line = incoming.line(left)
    except _TooLong:
        raise ApiError(414, f"the address is longer than {_LONGEST_HEAD} bytes") from None
    if not (match := _REQUEST.fullmatch(line)):
        raise ApiError(400, "that is no request of HTTP")
    method, target, version = match[1].decode(), match[2].decode(), (int(match[3]), int(match[4]))
    if version not in ((1, 0), (1, 1)):
        raise ApiError(505, "HTTP/1.1 is spoken here, and HTTP/1.0")
    head = Head(method, target, version, _headers(incoming, left - len(line)))
    _ = head.host, head.length  # whatever it asks for, they can be told
    return head


def _headers(incoming: Incoming, left: int) -> dict[str, str]:
    """
    Args:
      left: bytes that there may be.
    """
    found: dict[str, str] = {}
    try:
        for _ in range(_MOST_HEADERS + 1):
            line = incoming.line(left)
            if not line:
                return found
            left -= len(line) + 2
            name, colon, value = line.partition(b":")
            if not colon or not _NAME.fullmatch(name) or _CONTROL.search(value):
                raise ApiError(400, f"a header is malformed: {line[:80]!r}")
            key, text = name.decode().lower(), value.strip(b" \t").decode("latin-1")
            found[key] = f"{found[key]}, {text}" if key in found else text
    except _TooLong:
        pass
    raise ApiError(
        431, f"the headers are more than {_MOST_HEADERS}, or than {_LONGEST_HEAD} bytes long"
    )


def check_body(head: Head, most: int) -> None:
    """
    Args:
      most: bytes of the longest body that is taken.

    Raises:
      ApiError: 411 or 413, none is announced, or a larger one.
    """
    if not head.states_length:
        raise ApiError(411, "a body is needed, and its Content-Length")
    if (head.length or 0) > most:
        raise _too_large(most)


def read_body(incoming: Incoming, head: Head, most: int) -> bytes:
    """
    Raises:
      ApiError: it is malformed, or larger than `most` bytes.
    """
    if head.length is None:
        return _read_chunks(incoming, most)
    check_body(head, most)
    return incoming.exactly(head.length)


def _read_chunks(incoming: Incoming, most: int) -> bytes:
    body = bytearray()
    malformed = ApiError(400, "a chunk of the body is malformed")
    while True:
        try:
            match = _CHUNK.fullmatch(incoming.line(_LONGEST_CHUNK_LINE))
        except _TooLong:
            raise malformed from None
        if not match:
            raise malformed
        size = int(match[1], 16)
        if not size:
            trailers = _headers(incoming, _LONGEST_HEAD)  # of which none is wanted
            if trailers.keys() & {"transfer-encoding", "content-length", "host"}:
                raise malformed
            return bytes(body)
        if len(body) + size > most:
            raise _too_large(most)
        body += incoming.exactly(size)
        if incoming.exactly(2) != b"\r\n":
            raise malformed


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes (--max_body_bytes)")
