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
from collections.abc import Iterator, Sequence

import numpy as np

from lm_jax.data import files
from lm_jax.errors import UserError

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(rb"\n")
_CHUNK = 1 << 24  # bytes searched for line ends at a time
_NEAR = 1 << 16  # bytes in which the end of a line is looked for first

Part = tuple[int, int | None]  # of a file: its first byte, and the one after its last; None: all


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

    def place(self, i: int) -> str:
        return self.paths[i]


class Spans(Sequence):
    """The lines or paragraphs of a text file, found once and read one by one."""

    def __init__(self, path: str, unit: str, errors: Errors, part: Part | None = None):
        """
        Args:
          part: of the file, as `parts` gives it, whose documents these are; it is read at once.
            None: all of the file.
        """
        self.path, self.errors = path, errors
        self._data, self._start = None, 0
        if part is None:
            self.spans = _spans(path, unit, stamp(path))  # int64 [documents, 2]: first byte, end
        else:
            self._start, self._data = part[0], files.read(path, *part)
            self.spans = self._start + _spans_of(np.frombuffer(self._data, np.uint8), unit)
        if not len(self.spans) and (part is None or part[1] is None):
            errors.handle(f"{path}: the file is empty")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> str:
        start, stop = self.spans[i].tolist()
        if self._data is None:
            data = files.read(self.path, start, stop)
        else:
            data = self._data[start - self._start : stop - self._start]
        return _decode(data, self.path, start, self.errors)

    def place(self, i: int) -> str:
        """FILE:LINE of document i."""
        return f"{self.path}:{line_number(self.path, int(self.spans[i][0]))}"


def parts(path: str, unit: str, size: int) -> Iterator[Part]:
    """Parts of about `size` bytes of a text file, each of whole lines or paragraphs. A .gz file is
    one part.

    Raises:
      UserError: it cannot be read.
    """
    total = stamp(path)[0]
    if path.lower().endswith(".gz") or total <= size:
        yield 0, None
        return
    start = 0
    while start < total:
        stop = _end_of_unit(path, unit, start + size, total)
        yield start, stop
        start = stop


def _end_of_unit(path: str, unit: str, at: int, total: int) -> int:
    """The first place from byte `at` on where a line, or a gap between paragraphs, has ended."""
    end = _BLANK_LINES if unit == "paragraph" else _LINE_END
    data = b""
    while at + len(data) < total:
        more = files.read(path, at + len(data), at + max(2 * len(data), _NEAR))
        if not more:  # it became shorter
            break
        data += more
        if (found := end.search(data)) and found.end() < len(data):
            return at + found.end()
    return total


def stamp(path: str) -> tuple[int, int]:
    """Bytes of a file, and when it was changed.

    Raises:
      UserError: it cannot be read.
    """
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
    return _spans_of(files.as_array(path), unit)


def _spans_of(data: np.ndarray, unit: str) -> np.ndarray:
    """As `_spans`, of uint8 [bytes]."""
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
