"""What the fuzz tests and the fuzzer share: targets, mutations of inputs, and one guarded try.

The property of every target: whatever the input, the call returns what is right or raises a
`UserError` with a message of a length that can be read, within a time limit.
"""

import contextlib
import copy
import dataclasses
import json
import pathlib
import random
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_jax.errors import UserError

SECONDS = 10  # of a CPU's time that one input may take
WAITING = 300  # seconds that may pass, on a machine with other work
LONGEST_MESSAGE = 4000  # characters

_ODD = [
    *(None, True, False, -1, 0, 1, 2, 7, 255, 2**16, 2**31, 2**32 - 1, 2**63, 10**30, 0.5, -0.0),
    *(1e300, float("nan"), float("inf"), "", "x", "1", "a b", "\ud800", "\0", "é", "../x", "/x"),
    *([], {}, [[]], [None], [1, 2], ["x"], {"a": 1}, {"": []}, {"content": "x"}),
]
_TEXTS = (b"9" * 5000, b"[" * 3000, b'{"a":1,"a":2}', *b'NaN 1e999 {} null "\\ud800"'.split())
_BYTES = [
    *b'\n|\r\n|\r|\n\n|\0|\xff|\xef\xbb\xbf|\xed\xa0\x80|\x1f\x8b|"|\\|{|}|[|]|,|:| |\t|-|0'.split(
        b"|"
    ),
    *(
        b"9" * 30,
        b"\xf0\x9f",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\x7f",
        b"\x80",
        b"1e9",
        b"%",
        b"#",
    ),
]


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that takes input.

    Attributes:
      check: gives the call an input, and compares what it returns with what another way of reading
        finds; the folder is empty. Returns whether anything was read. It raises UserError where the
        call does, and AssertionError where that is wrong.
      seeds: inputs that are right, or nearly so.
      words: pieces that an input of this kind is likely to hold.
      json: whether inputs are JSON, to be changed as such as well.
    """

    check: Callable[[bytes, pathlib.Path], bool]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()
    json: bool = False


def mutated(rng: random.Random, target: Target, data: bytes, other: bytes) -> bytes:
    """`data` with one change or several; `other` is another input, to take a piece of."""
    if target.json and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):
            return _mutated_json(rng, json.loads(data))
    bad = bytearray(data)
    pieces = (*_BYTES, *_BYTES, *_TEXTS, *target.words, *target.words, *target.words)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(bad) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            bad[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del bad[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 2 and bad:
            bad[at - 1] ^= 1 << rng.randrange(8)
        elif kind == 3:
            begin = rng.randrange(len(bad) + 1)
            bad[at:at] = bad[begin : begin + rng.choice((1, 4, 16, 100))]
        elif kind == 4:
            begin = rng.randrange(len(other) + 1)
            bad[at:at] = other[begin : begin + rng.choice((4, 16, 100, 1000))]
        elif kind == 5 and rng.random() < 0.3:
            del bad[at:]
        else:
            piece = rng.choice(pieces)
            bad[at : at + rng.choice((0, 0, len(piece), 1))] = piece
    return bytes(bad[:100_000])


def _mutated_json(rng: random.Random, value: Any) -> bytes:
    root = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind < 3:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
        elif kind == 3 and len(places) > 1:
            del holder[key]
        elif kind == 4:
            other, there = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[there]))
        elif kind == 5:
            holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, [holder[key]] * 2))
        elif kind == 6 and isinstance(holder, dict):
            holder[rng.choice((*holder, "", "x", "type", "content"))] = holder.pop(key)
        elif isinstance(holder[key], int | float):
            holder[key] = rng.choice(
                (-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key]))
            )
        elif isinstance(holder[key], str):
            at = rng.randrange(len(holder[key]) + 1)
            piece = rng.choice(("\0", "\ud800", " ", "x", "\n", "é", "{", "}", "%", "9" * 40, "日"))
            holder[key] = rng.choice(
                (holder[key][:at] + piece + holder[key][at:], holder[key][:at])
            )
        if not root:
            root = [value]
    text = json.dumps(root[0], ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(_TEXTS) + text[at + rng.choice((0, 1, 2)) :]
    return text[:100_000]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each value inside, as what holds it and by which key."""
    left = [value]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                left.append(holder[key])


class TooSlow(BaseException):
    """An input took longer than it may."""


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TooSlow(f"more than {SECONDS} seconds of work, or {WAITING} in all")

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, end) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def attempt(target: Target, data: bytes) -> bool:
    """Whether anything was read of `data`.

    Raises:
      BaseException: the property does not hold; whatever the target raised.
    """
    try:
        # A folder of its own: caches know a file by its name, size and time.
        with _in_time(), tempfile.TemporaryDirectory() as folder:
            return target.check(data, pathlib.Path(folder))
    except UserError as e:
        message = str(e)
        assert message.strip(), "a UserError that says nothing"
        assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
        return False
