"""Weights as Hugging Face keeps them are read one tensor at a time, however large the model.

A model's folder holds either model.safetensors, or model-00001-of-0000N.safetensors ... and
model.safetensors.index.json. An adapter is one file, adapter_model.safetensors.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator

import numpy as np

from lm_jax.errors import UserError
from lm_jax.interop.safetensors_header import (
    File,
    Tensor,
    parse_object,
    read_header,
    refuse_pointer,
    shown,
)

_INDEX = ".safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_OTHER = (".h5", ".msgpack")  # of TensorFlow, of Flax
_BLOCK = 4096  # bytes that a fingerprint reads in one place


class Weights:
    """The tensors of one file or of several; their names, shapes and dtypes cost no reading.

    What is read comes by plain reads, not by mapping: mapped pages count as memory.
    """

    def __init__(self, path: str, files: Iterable[File]) -> None:
        """`path` is what messages call the whole; use `open_weights`."""
        self.path = path
        self._files = sorted(files, key=lambda file: file.path)
        self._found: dict[str, tuple[File, Tensor]] = {}
        for file in self._files:
            for name, tensor in file.tensors.items():
                if name in self._found:
                    raise UserError(
                        f"{file.path}: tensor {shown(name)} is in"
                        f" {self._found[name][0].path} too; expected it in one file"
                    )
                self._found[name] = file, tensor

    def names(self) -> list[str]:
        """The names of all tensors, sorted; tied tensors may have several or one."""
        return sorted(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype on disk; bfloat16 and 8-bit floats are those of ml_dtypes."""
        return self._find(name)[1].dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor, in a new array of the shape and dtype on disk.

        Raises:
          UserError: there is no such tensor, or its file cannot be read or has changed.
        """
        file, tensor = self._find(name)
        return self._read(file, name, tensor.begin, tensor.shape, tensor.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """`read(name)[start:stop]`, with no memory or reading for the other rows.

        Raises:
          UserError: as `read`.
          ValueError: the tensor has no such rows.
        """
        file, tensor = self._find(name)
        if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
            raise ValueError(f"{name} of shape {tensor.shape} has no rows {start} to {stop}")
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        shape = (stop - start, *tensor.shape[1:])
        return self._read(file, name, tensor.begin + start * row_bytes, shape, tensor.dtype)

    def fingerprint(self) -> str:
        """A sha256, in hex, that tells these weights from others at next to no cost.

        It is a sample: of each file its size, its header, 64 blocks of 4 KiB spread evenly over
        its data, first and last bytes included, and one such block amid each tensor. Training
        changes nearly every byte and so the fingerprint; an edit of a few rows may not.
        """
        digest = hashlib.sha256()
        for file in self._files:
            last = max(file.data_begin, file.size - _BLOCK)
            spread = {file.data_begin + (last - file.data_begin) * i // 63 for i in range(64)}
            amid = {
                max(file.data_begin, (t.begin + t.end - _BLOCK) // 2) for t in file.tensors.values()
            }
            digest.update(file.size.to_bytes(8, "little"))
            with _reading(file.path), open(file.path, "rb", buffering=0) as f:
                digest.update(f.read(file.data_begin))
                for begin in sorted(spread | amid):
                    f.seek(begin)
                    digest.update(f.read(_BLOCK))
        return digest.hexdigest()

    def _find(self, name: str) -> tuple[File, Tensor]:
        if name not in self._found:
            raise UserError(f"{self.path}: holds no tensor {shown(name)}")
        return self._found[name]

    @staticmethod
    def _read(
        file: File, name: str, begin: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        array = np.empty(shape, dtype)
        raw = array.reshape(-1).view(np.uint8)
        left = memoryview(raw)
        with _reading(file.path), open(file.path, "rb", buffering=0) as f:
            f.seek(begin)
            while left:
                count = f.readinto(left)
                if not count:
                    raise UserError(
                        f"{file.path}: ends {len(left)} bytes before tensor {shown(name)} does:"
                        " it was changed since it was opened"
                    )
                left = left[count:]
        if dtype == np.bool_ and raw.max(initial=0) > 1:
            raise UserError(
                f"{file.path}: tensor {shown(name)}: BOOL holds bytes of 0 or 1, found {raw.max()}"
            )
        return array


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """The weights of a model's folder, of one safetensors file, or of an index and its shards.

    Tensors that a shard holds and the index leaves out count too, as they do for Transformers.

    Raises:
      UserError: there are none, they are not all there, they contradict each other, or a file
        breaks the format; the message names the file and the tensor.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        file = _file_of_folder(path)
    elif os.path.isfile(path):
        file = path
    else:
        _refuse_others([os.path.splitext(path)[0] + end for end in (*_PICKLED, *_OTHER)])
        raise UserError(f"{path}: there is no such file or folder of weights")
    if file.endswith(_INDEX):
        return Weights(file, _read_shards(file))
    _refuse_others([file])
    return Weights(file, [read_header(file)])


def _file_of_folder(folder: str) -> str:
    single, index = (os.path.join(folder, "model" + end) for end in (".safetensors", _INDEX))
    if os.path.isfile(index):
        if os.path.lexists(single) and "model.safetensors" not in _weight_map(index).values():
            raise UserError(
                f"{folder}: holds both model.safetensors and model{_INDEX}, of other files: which"
                " of them is meant? Name that file, or take the others away"
            )
        return index
    if os.path.isfile(single):
        return single
    for path in filter(os.path.lexists, (index, single)):
        raise UserError(f"{path}: is a link that leads nowhere, or no file")
    with _reading(folder):
        names = sorted(os.listdir(folder))
    found = [name for name in names if name.endswith((".safetensors", _INDEX))]
    if found:
        raise UserError(
            f"{folder}: expected model.safetensors or model{_INDEX}, found only"
            f" {', '.join(map(shown, found))}: name the file itself, or add what is missing"
        )
    _refuse_others([os.path.join(folder, name) for name in names])
    raise UserError(f"{folder}: holds no weights: expected model.safetensors or model{_INDEX}")


def _refuse_others(paths: Iterable[str]) -> None:
    """Raises UserError where one of the files holds weights in a form that is not read."""
    for path in filter(os.path.isfile, paths):
        if path.endswith((*_PICKLED, *_OTHER)):
            why, how = "is of TensorFlow or Flax, which lm_jax does not read", "Transformers 4"
            if path.endswith(_PICKLED):
                why = "is a pickle, and reading a pickle runs whatever code it contains"
                how = "Transformers, if you trust it"
            raise UserError(
                f"{path}: {why}. Load it with {how}, and write it anew as safetensors with"
                " save_pretrained(FOLDER, safe_serialization=True)"
            )


def _weight_map(index: str) -> dict[str, str]:
    """Which file, beside the index, holds which tensor."""
    with _reading(index), open(index, "rb") as f:
        data = f.read()
    refuse_pointer(index, data)
    files = parse_object(data, index).get("weight_map")
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(file, str) for file in files.values())
    ):
        raise UserError(
            f"{index}: weight_map must be an object of tensor and file names, not {shown(files)}"
        )
    for name, file in files.items():
        if not file.endswith(".safetensors") or any(c in file for c in "/\\\0"):
            raise UserError(
                f"{index}: tensor {shown(name)}: expected the plain name of a safetensors file"
                f" in the same folder, found {shown(file)}"
            )
    return files


def _read_shards(index: str) -> list[File]:
    weight_map = _weight_map(index)
    folder = os.path.dirname(index)
    shards = {name: os.path.join(folder, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in shards.items() if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{index}: names {len(shards)} files, of which {len(missing)} are not there:"
            f" {', '.join(map(shown, missing))}"
        )
    files = {name: read_header(path) for name, path in shards.items()}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise UserError(
                f"{shards[shard]}: holds no tensor {shown(name)}, though {index} says so"
            )
    return list(files.values())
