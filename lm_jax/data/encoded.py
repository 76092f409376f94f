"""Corpora as token ids on disk: `lm_jax.tokenize` makes them, the source 'tokens:DIR' reads them.

lm_jax_tokens.json  what they were made of and with, how much there is, and whether it is all
ids                 the ids of all documents, one after the other: uint16, of more ids int32
ends                where each document ends among them: int64
tokenizer/          what they were made with

Numbers are little-endian. Bos and eos are not among the ids: they are added where these are read. A
document that was empty, or skipped, has no ids, so that each keeps its number.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np

from lm_jax import json_text, paths
from lm_jax.data import files
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError

PREFIX = "tokens:"
META, IDS, ENDS, TOKENIZER = "lm_jax_tokens.json", "ids", "ends", "tokenizer"
_LOCK = "lock"
_DTYPES = ("<u2", "<i4")
_PART = 1 << 20  # ends that are checked at a time
_SAVE_EVERY = 5.0  # seconds of work that a kill may cost


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The ids of a document, or of a part of it.

    Attributes:
      ids: int32 [n], without bos or eos.
      fingerprint: of the tokenizer that they were made with.
      folder: where they lie.
    """

    ids: np.ndarray
    fingerprint: str
    folder: str

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Encoded":
        return dataclasses.replace(self, ids=self.ids[part])


def ids_of(document: str | Encoded, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a document, int32 [n], without bos or eos; of '' none.

    Raises:
      UserError: it cannot be encoded, or was encoded with another tokenizer.
    """
    if isinstance(document, str):
        return tokenizer.encode(document) if document else np.zeros(0, np.int32)
    if document.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"data source '{PREFIX}{document.folder}': made with another tokenizer: set"
            f" tokenizer.kind='file' and tokenizer.path='{document.folder}/{TOKENIZER}', or make"
            " tokens anew"
        )
    ids = document.ids
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise UserError(
            f"{document.folder}/{IDS}: damaged: it holds ids that its tokenizer does not have"
        )
    return ids


@dataclasses.dataclass
class Meta:
    """What a folder of tokens says of itself.

    Attributes:
      fingerprint: the tokenizer's.
      dtype: of the ids.
      documents, tokens, text_bytes: how much there is; the bytes are those of the text in UTF-8.
      skipped: records that could not be read, and have no ids.
      blocks: of how many blocks (`lm_jax.data.blocks`) it was made so far.
      digest: of these, and of how they were read.
      complete: whether those are all.
    """

    fingerprint: str
    dtype: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    blocks: int = 0
    digest: str = ""
    complete: bool = False


def read_meta(folder: str) -> Meta:
    """
    Raises:
      UserError: there are no tokens there, or they are damaged.
    """
    where = os.path.join(folder, META)
    if not os.path.exists(where):
        raise UserError(
            f"data source '{PREFIX}{folder}': no tokens there ({META} is missing): python -m"
            " lm_jax.tokenize makes them"
        )
    try:
        meta = Meta(**json_text.loads(files.read(where)))
    except (json_text.JsonError, TypeError):
        meta = None
    if meta is None or not _is_sound(meta):
        raise UserError(f"{where}: damaged: not what lm_jax.tokenize writes")
    for name, size in _sizes(meta).items():
        path = os.path.join(folder, name)
        if (files.stamp(path)[0] if os.path.exists(path) else -1) < size:
            raise UserError(
                f"{path}: damaged: {size} bytes were written to it, and fewer are there"
            )
    return meta


def _is_sound(meta: Meta) -> bool:
    """Whether each field is of its type, and none is below 0."""
    fields = [(getattr(meta, f.name), f.type) for f in dataclasses.fields(meta)]
    right = all(type(value) is kind and (kind is not int or value >= 0) for value, kind in fields)
    return right and meta.dtype in _DTYPES


def _sizes(meta: Meta) -> dict[str, int]:
    return {IDS: meta.tokens * np.dtype(meta.dtype).itemsize, ENDS: meta.documents * 8}


class Tokens(Sequence):
    """The documents of a folder of tokens, each read when it is asked for. Picklable."""

    def __init__(self, folder: str):
        """
        Args:
          folder: may lie in a bucket, from which it is copied to this disk.

        Raises:
          UserError: there are none, not all of them, or they are damaged.
        """
        folder = os.path.expanduser(folder)
        self.folder = folder.rstrip("/")
        self._local = paths.local_copy(folder)
        self.meta = read_meta(self._local)
        if not self.meta.complete:
            raise UserError(
                f"data source '{PREFIX}{folder}': not complete: the command that was to make it"
                " goes on with it, given once more"
            )

        last = 0
        for start in range(0, len(self), _PART):
            ends = self._read(ENDS, "<i8", start, min(start + _PART, len(self)))
            if (np.diff(ends, prepend=last) < 0).any():
                raise self._damaged()
            last = int(ends[-1])
        if last != self.meta.tokens:
            raise self._damaged()

    def _damaged(self) -> UserError:
        return UserError(
            f"{os.path.join(self.folder, ENDS)}: damaged: it does not say where documents end"
        )

    def _read(self, name: str, dtype: str, start: int, stop: int) -> np.ndarray:
        """Numbers `start` to `stop` of a file. Not mapped: a file that shrinks would end the
        process."""
        width = np.dtype(dtype).itemsize
        path = os.path.join(self._local, name)
        return np.frombuffer(files.read(path, start * width, stop * width), dtype)

    def __len__(self) -> int:
        return self.meta.documents

    def __getitem__(self, i: int) -> Encoded:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, stop = [0, *self._read(ENDS, "<i8", max(i - 1, 0), i + 1).tolist()][-2:]
        if not 0 <= start <= stop <= self.meta.tokens:
            raise self._damaged()
        ids = self._read(IDS, self.meta.dtype, start, stop).astype(np.int32)
        return Encoded(ids, self.meta.fingerprint, self.folder)


class Writer:
    """Adds documents to a folder of tokens; see `writing`."""

    def __init__(self, folder: str, meta: Meta):
        self.meta, self._folder, self._saved = meta, folder, time.monotonic()
        self._files = {}
        for name, size in _sizes(meta).items():
            self._files[name] = open(os.path.join(folder, name), "ab")  # noqa: SIM115
            self._files[name].truncate(size)  # what a kill left behind

    def add(
        self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int, skipped: int, digest: str
    ) -> None:
        """Adds a block of documents.

        Args:
          ids: of all of them.
          lengths: int64 [documents], how many ids each has.
          digest: of all blocks up to this one.
        """
        meta = self.meta
        self._files[IDS].write(ids.astype(meta.dtype, copy=False).tobytes())
        self._files[ENDS].write((meta.tokens + np.cumsum(lengths)).astype("<i8").tobytes())
        meta.documents += len(lengths)
        meta.tokens += len(ids)
        meta.text_bytes += text_bytes
        meta.skipped += skipped
        meta.blocks += 1
        meta.digest, meta.complete = digest, False
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """What was added is there, whatever happens next."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        paths.write_whole(
            os.path.join(self._folder, META),
            json.dumps(dataclasses.asdict(self.meta), indent=2) + "\n",
        )
        self._saved = time.monotonic()

    def close(self) -> None:
        self.save()
        for file in self._files.values():
            file.close()


@contextlib.contextmanager
def writing(folder: str, tokenizer: Tokenizer) -> Iterator[Writer]:
    """Makes a folder of tokens, or opens one to go on with it.

    Raises:
      UserError: it holds something else, tokens of another tokenizer, or is being written.
    """
    if paths.remote(folder):
        raise UserError(
            f"--output: '{folder}': tokens are written to a local disk; copy them after"
        )
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--output: '{folder}' exists already: name another folder")
    own = {IDS, ENDS, TOKENIZER, f"{META}.tmp", _LOCK}
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if META not in there and (strange := there - own):
        raise UserError(
            f"--output: '{folder}' holds other files ('{min(strange)}'): name another folder"
        )
    os.makedirs(folder, exist_ok=True)
    held = f"--output: '{folder}' is being written by process {{process}}: wait for it, or stop it"
    with paths.locked(os.path.join(folder, _LOCK), held):
        if os.path.exists(os.path.join(folder, META)):
            meta = read_meta(folder)
            if meta.fingerprint != tokenizer.fingerprint:
                raise UserError(
                    f"--output: '{folder}' holds tokens of another tokenizer: remove it, or name"
                    " another folder"
                )
        else:
            dtype = _DTYPES[tokenizer.vocab_size > 1 << 16]
            meta = Meta(tokenizer.fingerprint, dtype)
            tokenizer.save(os.path.join(folder, TOKENIZER))
        writer = Writer(folder, meta)
        try:
            yield writer
        finally:
            writer.close()
