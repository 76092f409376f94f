"""Random access to the documents of one file or data set: text, JSON lines, Parquet and TFDS.

Every reader is a picklable sequence of str that opens its files when it is asked for a document, so
that worker processes can hold it. A record that cannot be read raises a `UserError` that says where
it is, or, with `data.on_error='skip'`, is counted and reads as the empty document ''.
"""

import bisect
import functools
import json
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_jax.data import files
from lm_jax.errors import UserError

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_CHUNK = 1 << 24  # bytes searched for line ends at a time
_PARQUET_CACHE = 512 << 20  # bytes of decoded row groups that a process keeps


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


class JsonLines(Spans):
    """One JSON object a line, of which the string at `key` is the document."""

    def __init__(self, path: str, key: str, errors: Errors):
        super().__init__(path, "line", errors)
        self.key = key
        if len(self):
            self[0]  # a wrong text_key is better known now than in the middle of a run

    def __getitem__(self, i: int) -> str:
        text = super().__getitem__(i)
        if not text and self.errors.skip:
            return ""
        try:
            record = json.loads(text)
        except json.JSONDecodeError as e:
            return self._bad(i, f"not JSON: {e.msg} at column {e.colno}; one object a line is read")
        if not isinstance(record, dict):
            return self._bad(i, f"a JSON object is wanted, not {_kind(record)}")
        if self.key not in record:
            there = ", ".join(record) or "none"
            return self._bad(i, f"no key '{self.key}'; keys: {there}. Set data.text_key")
        value = record[self.key]
        if not isinstance(value, str):
            return self._bad(i, f"'{self.key}' must be a string, not {_kind(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:  # \\ud800 without its other half is JSON, but no text
            return self._bad(i, f"'{self.key}' holds half of a surrogate pair")
        return value

    def _bad(self, i: int, why: str) -> str:
        at = line_number(self.path, int(self.spans[i][0]))
        self.errors.handle(f"{self.path}:{at}: {why}")
        return ""


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


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


class Parquet(Sequence):
    """The rows of a Parquet file, of which the string column `key` holds the documents.

    Row groups are decoded whole, and kept in memory up to `_PARQUET_CACHE` bytes a process: beyond
    that, shuffled reading decodes a group for each document; convert such corpora to a TFDS data
    set (lm_jax.data.tfds_text).
    """

    def __init__(self, path: str, key: str, errors: Errors):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.key, self.errors = path, key, errors
        self.starts = [0]  # first row of each row group, and the number of rows
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowException, OSError) as e:
            errors.handle(f"{path}: not a readable Parquet file: {e}")
            return
        if key not in schema.names:
            names = ", ".join(schema.names) or "none"
            raise UserError(f"{path}: no column '{key}'; columns: {names}. Set data.text_key")
        kind = schema.field(key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column '{key}' must hold strings, not {kind}")
        for group in range(metadata.num_row_groups):
            self.starts.append(self.starts[-1] + metadata.row_group(group).num_rows)
        if not len(self):
            errors.handle(f"{path}: the file has no rows")

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> str:
        import pyarrow as pa

        group = bisect.bisect_right(self.starts, i) - 1
        try:
            value = _row_group(self.path, group, self.key)[i - self.starts[group]].as_py()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            self.errors.handle(f"{self.path}: row {i + 1}: cannot be read: {e}")
            return ""
        if value is None:
            self.errors.handle(f"{self.path}: row {i + 1}: '{self.key}' must be a string, not null")
        return value or ""


_row_groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
_row_groups_lock = threading.Lock()


def _row_group(path: str, group: int, key: str) -> Any:
    """The column `key` of a row group, decoded: a pyarrow ChunkedArray of strings."""
    import pyarrow.parquet as pq

    with _row_groups_lock:
        place = (path, group, key)
        if place not in _row_groups:
            with pq.ParquetFile(path) as file:
                _row_groups[place] = file.read_row_group(group, columns=[key]).column(0)
            while len(_row_groups) > 1 and (
                sum(c.nbytes for c in _row_groups.values()) > _PARQUET_CACHE
            ):
                _row_groups.popitem(last=False)
        _row_groups.move_to_end(place)
        return _row_groups[place]


class Tfds(Sequence):
    """A split of a prepared TFDS data set, read from ArrayRecord without TensorFlow."""

    def __init__(self, name: str, splits: Sequence[str], key: str, errors: Errors):
        """`splits`: the names that will do, best first."""
        self.name, self.key, self.errors = name, key, errors
        builder = _tfds_builder(name)
        features = list(builder.info.features or ())
        if key not in features:
            there = ", ".join(features)
            raise UserError(
                f"tfds:{name}: no feature '{key}'; features: {there}. Set data.text_key"
            )
        there = [s for s in builder.info.splits if builder.info.splits[s].num_examples]
        self.split = next((s for s in splits if s in there), "")
        if not self.split:
            raise UserError(
                f"tfds:{name}: no split {' or '.join(splits)}; splits: {', '.join(there) or 'none'}"
            )
        self._length = builder.info.splits[self.split].num_examples
        try:
            self._records = builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise UserError(
                f"tfds:{name}: prepared as {builder.info.file_format.value}, which has no random "
                "access; prepare it again with file_format='array_record', in another TFDS_DATA_DIR"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}  # a worker process opens the files itself

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> str:
        if self._records is None:
            self._records = _tfds_builder(self.name).as_data_source(split=self.split)
        value = self._records[i][self.key]
        place = f"tfds:{self.name}: {self.split} record {i}"
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as e:
                self.errors.handle(f"{place}: not UTF-8 at byte {e.start}")
                return ""
        if not isinstance(value, str):
            self.errors.handle(f"{place}: '{self.key}' must be text, not {type(value).__name__}")
            return ""
        return value


def _tfds_builder(name: str) -> Any:
    """The builder of a prepared data set; TFDS_DATA_DIR or ~/tensorflow_datasets holds it."""
    import tensorflow_datasets as tfds

    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    try:
        builder = tfds.builder(name, file_format=tfds.core.FileFormat.ARRAY_RECORD)
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"tfds:{name}: no such data set in {folder} or in TFDS: {first} Set TFDS_DATA_DIR to "
            "the folder that holds it, or make one of local files with lm_jax.data.tfds_text"
        ) from None
    if not builder.data_path.exists():
        raise UserError(
            f"tfds:{name}: not prepared in {folder}. Prepare it once with: python -c "
            f"\"import tensorflow_datasets as tfds; tfds.data_source('{name}')\", or set "
            "TFDS_DATA_DIR to the folder that holds it"
        )
    return builder
