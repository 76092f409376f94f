"""From `DataConfig.sources` to documents, random-access sequences that are split for validation.

A document is a str, the ids of one (`Encoded`) or, where the objective is about examples, an
`Example`.
"""

import bisect
import hashlib
import os
from collections.abc import Sequence
from typing import Literal

from lm_jax.config import OF_EXAMPLES, DataConfig
from lm_jax.data import encoded, files, records
from lm_jax.data.columnar import Parquet, Tfds, with_split
from lm_jax.data.encoded import Encoded, Tokens
from lm_jax.data.examples import Example, Examples, fields_of
from lm_jax.data.nested import holder
from lm_jax.data.readers import Errors, Files, Part, Spans
from lm_jax.data.records import Column, Records
from lm_jax.errors import UserError

Split = Literal["train", "validation"]
Document = str | Encoded | Example

# Splits of a TFDS data set that are read where none is named, the first that is there.
_TRAIN = ("train",)
_HELD_OUT = ("validation", "test", "train")


class Documents(Sequence):
    """Documents of several readers, one after the other; '' or SKIPPED where one was skipped.

    Picklable: a copy in another process opens the files itself. `errors` counts what this process
    has skipped.
    """

    def __init__(self, parts: Sequence[Sequence[Document]], errors: Errors):
        self.parts, self.errors = [p for p in parts if len(p)], errors
        self.starts = [0]
        for part in self.parts:
            self.starts.append(self.starts[-1] + len(part))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = bisect.bisect_right(self.starts, i) - 1
        return self.parts[part][i - self.starts[part]]


class Every(Sequence):
    """Each `k`-th document (from the k-th on), or all the others."""

    def __init__(self, documents: Sequence[Document], k: int, others: bool):
        self.documents, self.k, self.others = documents, k, others

    def __len__(self) -> int:
        held_out = len(self.documents) // self.k
        return len(self.documents) - held_out if self.others else held_out

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.documents[i + i // (self.k - 1) if self.others else i * self.k + self.k - 1]


class Tail(Sequence):
    """The last `fraction` of each document's characters (or ids), or all that is before."""

    def __init__(self, documents: Sequence[str | Encoded], fraction: float, head: bool):
        self.documents, self.fraction, self.head = documents, fraction, head

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: int) -> str | Encoded:
        text = self.documents[i]
        cut = int(len(text) * (1 - self.fraction))
        return text[:cut] if self.head else text[cut:]


class Texts(Sequence):
    """The text of each document, all of an example that a tokenizer can learn from."""

    def __init__(self, documents: Sequence[Document]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: int) -> str:
        document = self.documents[i]
        if isinstance(document, Encoded):
            raise UserError(
                f"data source '{encoded.PREFIX}{document.folder}': tokens are no text to learn a"
                " tokenizer from: set tokenizer.kind='file' and"
                f" tokenizer.path='{document.folder}/{encoded.TOKENIZER}'"
            )
        return document.text if isinstance(document, Example) else document


def texts(config: DataConfig, split: Split) -> Sequence[str]:
    """As `documents`, for a tokenizer to learn from."""
    return Texts(documents(config, split))


def documents(config: DataConfig, split: Split) -> Sequence[Document]:
    """All documents of a split, in the order of the sources.

    Raises:
      UserError: a source is missing, empty or unreadable, or cannot be split; reading a document
        raises it for a record that cannot be read, unless `on_error` is 'skip'.
    """
    parts = by_source(config, split)
    return parts[0] if len(parts) == 1 else Documents(parts, Errors(config.on_error))


def all_documents(config: DataConfig) -> Sequence[Document]:
    """The documents of all sources, before any is held out for validation."""
    return _open(config.sources, config, _TRAIN)


def by_source(config: DataConfig, split: Split) -> list[Sequence[Document]]:
    """As `documents`, but one sequence for each source that has a weight; without weights, one."""
    if split == "validation" and config.validation_sources:
        return [_open(config.validation_sources, config, _HELD_OUT)]
    groups = [(s,) for s in config.sources] if config.weights else [config.sources]
    found: list[Sequence[Document]] = [_open(group, config, _TRAIN) for group in groups]
    if config.validation_sources:
        return found
    return [_split(part, config, split, ", ".join(g)) for part, g in zip(found, groups)]


def digest(found: Sequence[Document]) -> str:
    """Tells documents from others, wherever they lie."""
    out = hashlib.sha256()
    for i in range(len(found)):
        document = found[i]
        tokens = isinstance(document, Encoded)  # whose repr leaves some out
        out.update(document.ids.tobytes() if tokens else repr(document).encode())
        out.update(b"\0")
    return out.hexdigest()


def held_out_sources(config: DataConfig) -> list[str]:
    """The sources that the validation split is of, those of TFDS with the split that is read.

    Raises:
      UserError: TFDS has none such.
    """
    splits = _HELD_OUT if config.validation_sources else _TRAIN
    return [
        f"tfds:{with_split(source.removeprefix('tfds:'), splits)}"
        if source.startswith("tfds:")
        else source
        for source in config.validation_sources or config.sources
    ]


def _split(
    found: Sequence[Document], config: DataConfig, split: Split, where: str
) -> Sequence[Document]:
    train = split == "train"
    if config.validation_split == "tail":
        return Tail(found, config.validation_fraction, head=train)
    if len(found) < 2:
        raise UserError(
            f"data source '{where}': one document cannot be split into training and validation "
            "documents; set data.validation_split='tail' to hold out its end, or name "
            "data.validation_sources"
        )
    k = min(max(2, round(1 / config.validation_fraction)), len(found))
    return Every(found, k, others=train)


def _open(sources: Sequence[str], config: DataConfig, tfds_splits: Sequence[str]) -> Documents:
    errors = Errors(config.on_error)
    parts: list[Sequence[Document]] = []
    for source in sources:
        if source.startswith(encoded.PREFIX):
            if config.objective in OF_EXAMPLES:
                raise UserError(
                    f"data source '{source}': objective '{config.objective}' is about records with"
                    " fields, and tokens are those of a text"
                )
            parts.append(Tokens(source.removeprefix(encoded.PREFIX)))
        elif source.startswith("tfds:"):
            name = source.removeprefix("tfds:")
            found = Tfds(name, tfds_splits, _wanted(config), errors)
            parts.append(_of_records(found, config, source))
        elif config.objective in OF_EXAMPLES:
            parts += _examples(find_files(source, files.RECORDS), config, errors)
        else:
            parts += _readers(find_files(source), config, errors)
    found = Documents(parts, errors)
    if not len(found):
        summary = errors.summary()
        raise UserError(
            f"data source '{', '.join(sources)}': no documents"
            + (f" ({summary})" if summary else "")
        )
    return found


def find_files(source: str, known: Sequence[str] | None = None) -> list[str]:
    """As `files.find`.

    Raises:
      UserError: there are none; or it is a folder of tokens.
    """
    if os.path.isfile(os.path.join(os.path.expanduser(source), encoded.META)):
        raise UserError(
            f"data source '{source}': this folder is of tokens: write 'tokens:{source}'"
        )
    return files.find(source, known)


def _wanted(config: DataConfig) -> list[str]:
    """The fields of a record that are read."""
    if config.objective not in OF_EXAMPLES:
        return [config.text_key]
    fields = fields_of(config)
    return [*fields, *map(holder, fields)]


def _of_records(found: Records, config: DataConfig, where: str) -> Sequence[Document]:
    """What each record gives: an example, or the text of one field."""
    if config.objective in OF_EXAMPLES:
        return Examples(found, config, where)
    return Column(found, config.text_key, where)


def _examples(paths: Sequence[str], config: DataConfig, errors: Errors) -> list[Sequence[Document]]:
    parts: list[Sequence[Document]] = []
    for path in paths:
        kind = files.suffix(path)
        try:
            if kind in files.PARQUET:
                found: Records = Parquet(path, _wanted(config), errors)
            elif kind in files.CSV:
                found = records.read_csv(path, errors)
            elif kind == ".json":
                found = records.read_json(path, errors)
            elif kind in files.JSONL:
                found = records.JsonLines(path, errors)
            else:
                raise UserError(
                    f"{path}: objective '{config.objective}' is about records with fields: give"
                    " JSON lines, CSV, TSV, Parquet, or JSON in the form of SQuAD"
                )
            if len(found):
                parts.append(_of_records(found, config, path))
        except UserError as e:
            if not errors.skip:
                raise
            errors.handle(str(e))
    return parts


def _readers(paths: Sequence[str], config: DataConfig, errors: Errors) -> list[Sequence[Document]]:
    """Readers of `paths` in order; neighbouring files that are one document each share one."""
    parts: list[Sequence[Document]] = []
    whole: list[str] = []  # text files that wait for their common reader
    for path in paths:
        if is_one_document(path, config):
            whole.append(path)
            continue
        if whole:
            parts.append(Files(whole, errors))
            whole = []
        parts += documents_of(path, config, errors)
    return [*parts, Files(whole, errors)] if whole else parts


def is_one_document(path: str, config: DataConfig) -> bool:
    """Whether a file is one document, and does not hold several."""
    kind = files.suffix(path)
    return kind not in (*files.JSONL, *files.PARQUET) and config.document == "file"


def documents_of(
    path: str, config: DataConfig, errors: Errors, part: Part | None = None
) -> list[Sequence[str]]:
    """The documents of a file that holds several, as one sequence; none where it was skipped.

    Args:
      part: of a file of text or JSON lines, as `lm_jax.data.readers.parts` gives it; None: all.

    Raises:
      UserError: it cannot be read, and `errors` skips nothing.
    """
    kind = files.suffix(path)
    if kind in files.PARQUET:
        table = Parquet(path, [config.text_key], errors)
        return [_of_records(table, config, path)] if len(table) else []
    try:
        if kind in files.JSONL:
            return [_of_records(records.JsonLines(path, errors, part), config, path)]
        return [Spans(path, config.document, errors, part)]
    except UserError as e:
        if not errors.skip:
            raise
        errors.handle(str(e))
        return []
