"""Text sources as blocks of neighbouring documents, read one by one: a corpus of any size is worked
through with little memory, by as many processes as there are.

Where a block begins is told by the size of files alone. What lies in it is found by who reads it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

from lm_jax.config import DataConfig
from lm_jax.data import encoded, files
from lm_jax.data.columnar import Parquet, Tfds
from lm_jax.data.files import stamp
from lm_jax.data.readers import Errors, Files, Part, parts
from lm_jax.data.records import Column
from lm_jax.data.sources import documents_of, find_files, is_one_document
from lm_jax.errors import UserError

_BYTES = 1 << 20  # of a block, unless a document is larger
_RECORDS = 1000  # of a block of a TFDS data set, whose sizes are not known


@dataclasses.dataclass(frozen=True)
class Block:
    """Some documents. Picklable.

    Attributes:
      identity: what it is made of; another one where a file has changed.
      open: the documents, str; those that cannot be read are told to the `Errors`.
    """

    identity: str
    open: Callable[[Errors], Sequence[str]]


class Range(Sequence):
    """Documents `start` to `stop` of others."""

    def __init__(self, documents: Sequence[str], start: int, stop: int):
        self.documents, self.start, self.stop = documents, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.documents[self.start + i]

    def place(self, i: int) -> str:
        return self.documents.place(self.start + i)


def blocks(config: DataConfig, errors: Errors) -> Iterator[Block]:
    """Blocks of `config.sources`; their documents are those of `sources.all_documents`, in order.

    A .gz file is one block; of Parquet, a row group is.

    Raises:
      UserError: a source is missing or unreadable, or holds no text but tokens.
    """
    for source in config.sources:
        if source.startswith(encoded.PREFIX):
            raise UserError(f"data source '{source}': tokens are no text to make tokens of")
        if source.startswith("tfds:"):
            yield from _of_tfds(source, config, errors)
        else:
            yield from _of_files(find_files(source), config, errors)


def _of_tfds(source: str, config: DataConfig, errors: Errors) -> Iterator[Block]:
    found = Tfds(source.removeprefix("tfds:"), ("train",), [config.text_key], errors)
    column = Column(found, config.text_key, source)
    for start in range(0, len(found), _RECORDS):
        stop = min(start + _RECORDS, len(found))
        yield Block(
            f"{source} {found.split} {start}-{stop} of {len(found)}",
            functools.partial(_open_records, column, start, stop),
        )


def _of_files(paths: Sequence[str], config: DataConfig, errors: Errors) -> Iterator[Block]:
    whole: list[str] = []  # text files, one document each
    size = 0
    for path in paths:
        one = is_one_document(path, config)
        if whole and (not one or size >= _BYTES):
            yield _whole(whole)
            whole, size = [], 0
        if one:
            whole.append(path)
            size += _stamp(path)[0]
        elif files.suffix(path) in files.PARQUET:
            starts = Parquet(path, [config.text_key], errors).starts
            for start, stop in itertools.pairwise(starts):
                opened = functools.partial(_open_rows, path, config, start, stop)
                yield Block(f"{path} {_stamp(path)} rows {start}-{stop}", opened)
        else:
            yield from _of_text(path, config, errors)
    if whole:
        yield _whole(whole)


def _of_text(path: str, config: DataConfig, errors: Errors) -> Iterator[Block]:
    unit = "line" if files.suffix(path) in files.JSONL else config.document
    try:
        for part in parts(path, unit, _BYTES):
            opened = functools.partial(_open_part, path, config, part)
            yield Block(f"{path} {_stamp(path)} bytes {part}", opened)
    except UserError as e:
        if not errors.skip:
            raise
        errors.handle(str(e))


def _whole(paths: Sequence[str]) -> Block:
    identity = "; ".join(f"{path} {_stamp(path)}" for path in paths)
    return Block(identity, functools.partial(Files, tuple(paths)))


def _stamp(path: str) -> tuple[int, int]:
    """As `files.stamp`; that a file cannot be read is for who reads it to say."""
    try:
        return stamp(path)
    except UserError:
        return 0, 0


def _open_part(path: str, config: DataConfig, part: Part, errors: Errors) -> Sequence[str]:
    found = documents_of(path, config, errors, part)
    return found[0] if found else ()


def _open_rows(
    path: str, config: DataConfig, start: int, stop: int, errors: Errors
) -> Sequence[str]:
    found = documents_of(path, config, errors)
    return Range(found[0], start, stop) if found else ()


def _open_records(column: Column, start: int, stop: int, errors: Errors) -> Sequence[str]:
    column.records.errors = errors
    return Range(column, start, stop)
