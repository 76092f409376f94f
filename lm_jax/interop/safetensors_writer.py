"""Weights as Hugging Face keeps them are written one tensor at a time, however large the model."""

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import DTypeLike

from lm_jax.errors import UserError
from lm_jax.interop.safetensors_header import dtype_code, make_header

_PIECE = 2**22  # bytes of a strided array that are made contiguous at a time


class WeightsWriter:
    """Writes a model's or an adapter's tensors to disk as they come, holding none of them.

    ```
    with WeightsWriter(folder, [("embed", (50257, 768), np.float32), ...]) as writer:
        writer.write("embed", embed_VD)
        ...
    ```

    The files are those that Transformers would make: model.safetensors, or shards and their index.
    They are planned from the shapes alone, so tensors may come in any order. Until `close` they go
    by other names; a writer that fails, or whose `with` is left by an exception, removes them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensors: Iterable[tuple[str, tuple[int, ...], DTypeLike]],
        *,
        stem: str = "model",
        max_shard_bytes: int | None = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Makes the folder where there is none, and files that hold the headers so far.

        Args:
          tensors: name, shape and dtype of each, in the order in which they fill the shards.
          stem: of the files' names; with 'adapter_model' give max_shard_bytes=None.
          max_shard_bytes: of tensors in a file, unless one alone has more; None: all in one file.
          metadata: by default {'format': 'pt'}, which Transformers asks for.

        Raises:
          UserError: the folder holds such weights already, or cannot be written.
          ValueError: a name stands twice, a dtype is not one of the format's, or the like.
        """
        folder = os.fspath(folder)
        metadata = {"format": "pt"} if metadata is None else metadata
        self._left: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for name, shape, dtype in tensors:
            if name in self._left or name == "__metadata__":
                raise ValueError(f"the name {name!r} is taken")
            if any(n < 0 for n in shape):
                raise ValueError(f"{name!r}: shape {shape} has a negative dimension")
            self._left[name] = tuple(map(int, shape)), np.dtype(dtype)
            dtype_code(np.dtype(dtype))
        sizes = {name: math.prod(s) * d.itemsize for name, (s, d) in self._left.items()}
        self._total = sum(sizes.values())
        shards = _plan(sizes, max_shard_bytes)
        names = _file_names(stem, len(shards))
        contents = [make_header({n: self._left[n] for n in shard}, metadata) for shard in shards]
        starts = [start for start, _ in contents]
        if len(shards) > 1:
            weight_map = {n: file for file, shard in zip(names, shards) for n in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            names.append(f"{stem}.safetensors.index.json")
            starts.append((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        self._finals = [os.path.join(folder, name) for name in names]
        token = secrets.token_hex(4)  # two writers into one folder keep apart
        self._partials = [f"{final}.{token}.partial" for final in self._finals]
        self._places = {
            name: (partial, begin)
            for partial, (_, begins) in zip(self._partials, contents)
            for name, begin in begins.items()
        }
        self._renamed: list[str] = []
        self._closed = False
        with self._writing(folder):
            os.makedirs(folder, exist_ok=True)
            _refuse_existing(folder, stem)
            for partial, start in zip(self._partials, starts):
                with open(partial, "xb") as f:
                    f.write(start)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor to its place; a strided array is copied a piece at a time.

        Raises:
          ValueError: it was not planned, is written already, or is of another shape or dtype.
          UserError: the disk is full, or the file cannot be written; then no file is left.
        """
        if name not in self._left:
            raise ValueError(f"{name!r} was not planned, or is written already")
        shape, dtype = self._left[name]
        array = np.asarray(array)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name!r}: expected {dtype} of shape {shape}, got {array.dtype} of {array.shape}"
            )
        partial, begin = self._places[name]
        with self._writing(partial), open(partial, "r+b") as f:
            f.seek(begin)
            for piece in _pieces(array):
                f.write(piece.reshape(-1).view(np.uint8).data)
        del self._left[name]

    def close(self) -> None:
        """Gives the files their names, once they are on the disk; the index comes last.

        Raises:
          ValueError: some tensors were not written; then no file is left.
          UserError: the disk is full, or a file cannot be written; then no file is left.
        """
        if self._closed:
            return
        if self._left:
            self._remove()
            raise ValueError(f"{len(self._left)} tensors were not written: {[*self._left][:3]} ...")
        for partial in self._partials:
            with self._writing(partial), open(partial, "r+b") as f:
                os.fsync(f.fileno())
        for partial, final in zip(self._partials, self._finals):
            with self._writing(final):
                os.replace(partial, final)
                self._renamed.append(final)
        self._closed = True

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            self._remove()

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        """Removes all files where writing `path` fails."""
        try:
            yield
        except OSError as e:
            self._remove()
            raise UserError(
                f"{path}: cannot be written: {e.strerror or e} (the weights take {self._total}"
                " bytes in all; no file of them is left)"
            ) from None
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        for path in (*self._partials, *self._renamed):
            with contextlib.suppress(OSError):  # it was not made, or is renamed
                os.remove(path)


def _plan(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Which tensors go into which shard: as huggingface_hub splits them, so that files compare.

    A tensor above the limit gets a shard for itself, before the one that is being filled.
    """
    if limit is None:
        return [list(sizes)]
    shards: list[list[str]] = []
    filling: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if size > limit:
            shards.append([name])
            continue
        if filled + size > limit:
            shards.append(filling)
            filling, filled = [], 0
        filling.append(name)
        filled += size
    if filling or not shards:
        shards.append(filling)
    return shards


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _refuse_existing(folder: str, stem: str) -> None:
    """Weights over others are not replaced at one blow, and a mixture of both would be silent."""
    pattern = re.compile(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    found = sorted(filter(pattern.fullmatch, os.listdir(folder)))
    if found:
        raise UserError(
            f"{folder}: holds weights already ('{found[0]}'): name another folder, or remove them"
        )


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """`array` in contiguous pieces, in order; only small ones are copies."""
    if array.flags.c_contiguous:
        yield array
    elif array.nbytes <= _PIECE:
        yield np.ascontiguousarray(array)
    elif len(array) == 1:
        yield from _pieces(array[0])
    else:
        rows = max(1, _PIECE * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            yield from _pieces(array[start : start + rows])
