"""Random access to the records of data sets in columns: Parquet and TFDS."""

import bisect
import functools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_jax.data.files import stamp
from lm_jax.data.readers import Errors
from lm_jax.data.records import Record, Records
from lm_jax.errors import UserError

_PARQUET_CACHE = 512 << 20  # bytes of decoded row groups that a process keeps


class Parquet(Records):
    """The rows of a Parquet file.

    Row groups are decoded whole, and kept in memory up to `_PARQUET_CACHE` bytes a process: beyond
    that, shuffled reading decodes a group for each record; convert such corpora to a TFDS data set
    (lm_jax.data.tfds_text).
    """

    noun = "column"

    def __init__(self, path: str, wanted: Sequence[str], errors: Errors):
        """`wanted`: the columns to read; those that are not there are left out."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(errors, ())
        self.path = path
        self.starts = [0]  # first row of each row group, and the number of rows
        try:
            self.stamp = stamp(path)
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except UserError as e:
            errors.handle(str(e))
            return
        except (pa.ArrowException, OSError) as e:
            errors.handle(f"{path}: not a readable Parquet file: {_said(e)}")
            return
        if len(set(schema.names)) < len(schema.names):
            errors.handle(f"{path}: two columns have the same name")
            return
        self.fields, self.schema = tuple(schema.names), schema
        self.columns = tuple(name for name in schema.names if name in wanted)
        for group in range(metadata.num_row_groups):
            self.starts.append(self.starts[-1] + metadata.row_group(group).num_rows)
        if not len(self):
            errors.handle(f"{path}: the file has no rows")

    def check_text(self, key: str) -> None:
        import pyarrow as pa

        kind = self.schema.field(key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{self.path}: column '{key}' must hold strings, not {kind}")

    def __len__(self) -> int:
        return self.starts[-1]

    def place(self, i: int) -> str:
        return f"{self.path}: row {i + 1}"

    def __getitem__(self, i: int) -> Record | None:
        import pyarrow as pa

        group = bisect.bisect_right(self.starts, i) - 1
        try:
            if stamp(self.path) != self.stamp:
                raise OSError("the file was changed since it was opened")
            table = _row_group(self.path, self.stamp, group, self.columns)
            at = i - self.starts[group]
            return {name: table.column(name)[at].as_py() for name in self.columns}
        # A time that Python has no value for is a ValueError or an OverflowError.
        except (pa.ArrowException, OSError, UserError, ValueError, OverflowError) as e:
            self.bad(i, f"cannot be read: {_said(e)}")
            return None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())


_row_groups: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_row_groups_lock = threading.Lock()


def _row_group(path: str, stamp: tuple[int, int], group: int, columns: tuple[str, ...]) -> Any:
    """Columns of a row group, decoded: a pyarrow Table. `stamp`: that of the file."""
    import pyarrow.parquet as pq

    with _row_groups_lock:
        place = (path, stamp, group, columns)
        if place not in _row_groups:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                _row_groups[place] = file.read_row_group(group, columns=list(columns))
            while len(_row_groups) > 1 and (
                sum(c.nbytes for c in _row_groups.values()) > _PARQUET_CACHE
            ):
                _row_groups.popitem(last=False)
        _row_groups.move_to_end(place)
        return _row_groups[place]


class Tfds(Records):
    """A split of a prepared TFDS data set, read from ArrayRecord without TensorFlow."""

    noun = "feature"

    def __init__(self, source: str, splits: Sequence[str], wanted: Sequence[str], errors: Errors):
        """
        Args:
          source: NAME[/CONFIG], and behind it in brackets a split as TFDS writes it: 'test',
            'train[:10%]', 'train[5:]+validation'.
          splits: without one there, the names that will do, best first.
          wanted: the features to read; those that are not there are left out.
        """
        self.name, self.split, builder = _opened(source, splits)
        super().__init__(errors, tuple(builder.info.features or ()))
        self.wanted = tuple(f for f in self.fields if f in wanted)
        try:
            self._records = builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise UserError(
                f"tfds:{source}: prepared as {builder.info.file_format.value}, which has no random "
                "access; prepare it again with file_format='array_record', in another TFDS_DATA_DIR"
            ) from None
        except ValueError as e:
            first = str(e).splitlines()[0]
            there = _listed(_splits_of(builder))
            raise UserError(f"tfds:{source}: {first} Splits: {there}") from None
        self._length = len(self._records)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}  # a worker process opens the files itself

    def __len__(self) -> int:
        return self._length

    def place(self, i: int) -> str:
        return f"tfds:{self.name}: {self.split} record {i}"

    def __getitem__(self, i: int) -> Record | None:
        if self._records is None:
            self._records = _tfds_records(self.name, self.split, os.environ.get("TFDS_DATA_DIR"))
        record = self._records[i]
        try:
            return {name: _plain(record[name]) for name in self.wanted}
        except UnicodeDecodeError as e:
            self.bad(i, f"not UTF-8 at byte {e.start}")
            return None


def with_split(source: str, splits: Sequence[str]) -> str:
    """NAME[SPLIT], the split being the one that `Tfds` reads of that source.

    Raises:
      UserError: as `Tfds`.
    """
    name, split, _ = _opened(source, splits)
    return f"{name}[{split}]"


def _opened(source: str, splits: Sequence[str]) -> tuple[str, str, Any]:
    """A data set's name, which split of it is meant, and its builder."""
    parts = re.fullmatch(r"([^][]+)(?:\[(.+)\])?", source)
    if parts is None:
        raise UserError(
            f"tfds:{source}: name a data set, and a split in brackets if you like, as in"
            " 'tfds:squad/v1.1[validation]'"
        )
    name, split = parts.groups()
    builder = _tfds_builder(name)
    there = _splits_of(builder)
    split = split or next((s for s in splits if s in there), "")
    if not split:
        raise UserError(
            f"tfds:{source}: no split {' or '.join(splits)}; splits: {_listed(there)}. Name one"
            f" of them in brackets: 'tfds:{source}[SPLIT]'"
        )
    return name, split, builder


def _splits_of(builder: Any) -> list[str]:
    """Those that hold something."""
    return [s for s in builder.info.splits if builder.info.splits[s].num_examples]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _plain(value: Any) -> Any:
    """Text, numbers and lists in place of bytes and arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@functools.lru_cache(maxsize=8)
def _tfds_records(name: str, split: str, folder: str | None) -> Sequence[Any]:
    """Opened once in a process; `folder` is where it lies."""
    del folder
    return _tfds_builder(name).as_data_source(split=split)


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
