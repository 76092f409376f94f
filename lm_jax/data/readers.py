"""Random access to the documents of a text file, and what becomes of those that cannot be read.

Every reader, here and in `lm_jax.data.records`, is a picklable sequence that opens its files when
it is asked for a document or record, so that worker processes can hold it. One that cannot be read
raises a `UserError` that says where it is, or, with `data.on_error='skip'`, is counted and reads as
an empty one.
"""

import functools
import os
import re
import sys
from collections.abc import Sequence

import numpy as np

from lm_jax.data import files
from lm_jax.errors import UserError

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_CHUNK = 1 << 24  # bytes searched for line ends at a time


class Errors:
    """What becomes of a record that cannot be read, as `data.on_error` says."""

    def __init__(self, policy: str):
        self.skip = policy == "skip"
        self.places: dict[str, None] = {}  # the messages of what was skipped in this process

    def handle(self, message: str) -> None:
        """Raises `message` as a `UserError`, or counts the record and logs the first few."""
        if not self.skip:
            raise UserError(f"{message} (data.on_error='skip' leaves such records out)")
        if message not in self.places:
            self.note(message)
            if len(self.places) <= 3:
                print(f"skipped: {message}", file=sys.stderr, flush=True)
            elif self.count in (10, 100) or self.count % 1000 == 0:
                print(f"skipped so far: {self.count} records", file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        """Counts what was left out, without a word."""
        self.places[message] = None

    @property
    def count(self) -> int:
        return len(self.places)

    def summary(self) -> str:
        """'' or a line such as '12 records skipped, the first: ...'."""
        first = "; ".join(list(self.places)[:3])
        return f"{self.count} records skipped, the first: {first}" if self.places else ""


def line_number(path: str, offset: int) -> int:
    """The line of the file, from 1, that holds the byte at `offset`."""
    return 1 + files.read(path, 0, offset).count(b"\n") if offset else 1


def _decode(data: bytes, path: str, offset: int, errors: Errors) -> str:
    if offset == 0 and data.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no text
        data, offset = data[3:], 3
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        at = offset + e.start
        errors.handle(
            f"{path}:{line_number(path, at)}: not UTF-8 at byte {at} (0x{data[e.start]:02x}): "
            "convert the file to UTF-8"
        )
        return ""


class Files(Sequence):
    """Each file is one document."""

    def __init__(self, paths: Sequence[str], errors: Errors):
        self.errors = errors
        self.paths = [p for p in paths if not self._empty(p)]

    def _empty(self, path: str) -> bool:
        try:
            empty = os.path.getsize(path) == 0
        except OSError as e:
            self.errors.handle(f"{path}: cannot be read: {e.strerror}")
            return True
        if empty:  # as many an __init__.py; if nothing else is there, the corpus is empty
            self.errors.note(f"{path}: the file is empty")
        return empty

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> str:
        try:
            data = files.read(self.paths[i])
        except UserError as e:
            self.errors.handle(str(e))
            return ""
        return _decode(data, self.paths[i], 0, self.errors)


class Spans(Sequence):
    """The lines or paragraphs of a text file, found once and read one by one."""

    def __init__(self, path: str, unit: str, errors: Errors):
        self.path, self.errors = path, errors
        self.spans = _spans(path, unit, _stamp(path))  # int64 [documents, 2]: first byte, end
        if not len(self.spans):
            errors.handle(f"{path}: the file is empty")

    def __len__(self) -> int:
        return len(self.spans)

    def _bytes(self, i: int) -> bytes:
        start, stop = self.spans[i]
        return files.read(self.path, int(start), int(stop))

    def __getitem__(self, i: int) -> str:
        return _decode(self._bytes(i), self.path, int(self.spans[i][0]), self.errors)

    def place(self, i: int) -> str:
        """FILE:LINE of document i."""
        return f"{self.path}:{line_number(self.path, int(self.spans[i][0]))}"


def _stamp(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _spans(path: str, unit: str, stamp: tuple[int, int]) -> np.ndarray:
    """Where each line or paragraph that is not blank begins and ends: int64 [documents, 2].

    `stamp` (size and time of change) makes the cache forget a file that was rewritten.
    """
    data = files.as_array(path)
    if unit == "paragraph":
        gaps = np.array([m.span() for m in _BLANK_LINES.finditer(data)], np.int64).reshape(-1, 2)
        starts, stops = np.append(0, gaps[:, 1]), np.append(gaps[:, 0], len(data))
    else:
        ends = [
            at + np.flatnonzero(data[at : at + _CHUNK] == ord("\n"))
            for at in range(0, len(data), _CHUNK)
        ]
        breaks = np.concatenate([*ends, np.zeros(0, np.int64)])
        starts, stops = np.append(0, breaks + 1), np.append(breaks, len(data))
    width = stops - starts
    blank = width <= 0
    short = np.flatnonzero(width == 1)  # a lone carriage return or line end is blank too
    blank[short] = np.isin(data[starts[short]], [ord("\r"), ord("\n")])
    return np.stack([starts, stops], axis=1)[~blank]
