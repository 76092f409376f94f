"""Random access to the documents of a text file, and what becomes of those that cannot be read.

Every reader, here and in `lm_jax.data.records`, is a picklable sequence that opens its files when
it is asked for a document or record, so that worker processes can hold it. One that cannot be read
raises a `UserError` that says where it is, or, with `data.on_error='skip'`, is counted and reads as
an empty one.
"""

import functools
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from lm_jax.data import files
from lm_jax.data.files import stamp
from lm_jax.errors import UserError, cut

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(rb"\n")
_CHUNK = 1 << 24  # bytes searched for line ends at a time
_NEAR = 1 << 16  # bytes in which the end of a line is looked for first
MARK = b"\xef\xbb\xbf"  # of byte order, before the text
_SPACES = list(b" \t\r\n\v\f")
_COUNTED = 1 << 20  # bytes whose lines are counted together
_LONGEST = 1000  # characters of what is said of one record

Part = tuple[int, int | None]  # of a file: its first byte, and the one after its last; None: all


class Errors:
    """What becomes of a record that cannot be read, as `data.on_error` says."""

    def __init__(self, policy: str):
        self.skip = policy == "skip"
        self.places: dict[str, None] = {}  # the messages of what was skipped in this process

    def handle(self, message: str) -> None:
        """Raises `message` as a `UserError`, or counts the record and logs the first few."""
        message = cut(message, _LONGEST)  # it may quote the record
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
    """The line of the file, from 1, that holds the byte at `offset`.

    Raises:
      UserError: the file cannot be read.
    """
    if not offset:
        return 1
    whole = offset // _COUNTED
    before = int(_line_ends(path, stamp(path))[whole])
    return 1 + before + files.read(path, whole * _COUNTED, offset).count(b"\n")


@functools.lru_cache(maxsize=64)
def _line_ends(path: str, stamp: tuple[int, int]) -> np.ndarray:
    """How many lines end before each multiple of `_COUNTED` bytes: with many bad records in a file,
    it is not to be read from its begin on for each. `stamp`: as of `_spans`."""
    size = len(files.kept(path)) if files.is_zipped(path) else stamp[0]
    ends = [
        files.read(path, at, at + _COUNTED).count(b"\n")
        for at in range(0, size - _COUNTED + 1, _COUNTED)
    ]
    return np.cumsum([0, *ends])


def _decode(data: bytes, path: str, offset: int, errors: Errors) -> str:
    if offset == 0 and data.startswith(MARK):
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
            empty = stamp(path)[0] == 0
        except UserError as e:
            self.errors.handle(str(e))
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
        if not data:
            self.errors.handle(f"{self.paths[i]}: the file is empty, and was not before")
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
            self.spans = _spans_of(self._data, self._start, unit)
        if not len(self.spans) and (part is None or part[1] is None):
            errors.handle(f"{path}: the file is empty")

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> str:
        start, stop = self.spans[i].tolist()
        if self._data is not None:
            data = self._data[start - self._start : stop - self._start]
            return _decode(data, self.path, start, self.errors)
        try:
            data = self._read(start, stop)
        except UserError as e:
            self.errors.handle(f"{e} (the document at byte {start})")
            return ""
        return _decode(data, self.path, start, self.errors)

    def _read(self, start: int, stop: int) -> bytes:
        """With the bytes around it, by which a file is known that was written anew since."""
        first, end = max(start - 1, 0), stop < self.spans[-1, 1]
        data = files.read(self.path, first, stop + end)
        if (start > len(MARK) and data[:1] != b"\n") or (end and data[-1:] != b"\n"):
            raise UserError(f"{self.path}: it was changed since it was opened: start anew")
        return data[start - first : stop - first]

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
    if files.is_zipped(path) or total <= size:
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
        data += files.read(path, at + len(data), min(at + max(2 * len(data), _NEAR), total))
        if (found := end.search(data)) and found.end() < len(data):
            return at + found.end()
    return total


@functools.lru_cache(maxsize=1024)
def _spans(path: str, unit: str, stamp: tuple[int, int]) -> np.ndarray:
    """Where each line or paragraph that is not blank begins and ends: int64 [documents, 2].

    `stamp` (size and time of change) makes the cache forget a file that was rewritten.
    """
    if files.is_zipped(path):
        return _spans_of(files.kept(path), 0, unit)
    found = [
        _spans_of(files.read(path, start, stop), start, unit)
        for start, stop in parts(path, unit, _CHUNK)
    ]
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


def _spans_of(text: bytes, offset: int, unit: str) -> np.ndarray:
    """As `_spans`, of what stands at `offset` of a file."""
    data = np.frombuffer(text, np.uint8)
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
    if offset == 0 and text.startswith(MARK):
        starts[0] = min(len(MARK), stops[0])
    full = stops > starts
    starts, stops = starts[full], stops[full]
    ends = np.isin(data[starts], _SPACES) & np.isin(data[stops - 1], _SPACES)
    for i in np.flatnonzero(ends):
        ends[i] = text[starts[i] : stops[i]].isspace()
    return offset + np.stack([starts, stops], axis=1)[~ends]
