"""The head of a safetensors file, which says where each tensor lies: read and checked, or made.

A file is 8 bytes with the header's length (little-endian); the header, a JSON object
{"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}};
and the data, which the tensors cover without gap or overlap, in any order.
Source: https://github.com/huggingface/safetensors#format

Nothing in a file is believed before it is checked: a header may be damaged, or made to do harm.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lm_jax import json_text
from lm_jax.errors import UserError, shown

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # as the format says
_MAX_RANK = 64  # as numpy says
_POINTER = b"version https://git-lfs.github.com/spec"


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A safetensors file whose header was checked against the file's size."""

    path: str
    size: int
    data_begin: int
    tensors: dict[str, Tensor]


def read_header(path: str) -> File:
    """Reads and checks the header of the file at `path`.

    Raises:
      UserError: it cannot be read, or breaks the format; the message names file and tensor.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            refuse_pointer(path, f.read(len(_POINTER)))
            f.seek(0)
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UserError(
                    f"{path}: is truncated or no safetensors file: its first 8 bytes give a header"
                    f" of {length} bytes; the file has {size}, and a header at most {_MAX_HEADER}"
                )
            header = f.read(length)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    entries = parse_object(header, f"{path}: the header")
    _check_metadata(path, entries.pop("__metadata__", {}))
    data_begin = 8 + length
    tensors = {name: _tensor(path, name, e, data_begin) for name, e in entries.items()}
    _check_layout(path, size, data_begin, tensors)
    return File(path, size, data_begin, tensors)


def refuse_pointer(path: str, start: bytes) -> None:
    """Raises UserError where `start`, the first bytes of a file, are those of a Git LFS pointer."""
    if start.startswith(_POINTER):
        raise UserError(
            f"{path}: is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder"
        )


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `data` holds; a key that stands twice is refused, at any depth.

    Raises:
      UserError: beginning with `where`.
    """
    try:
        value = json_text.loads(data, finite=True)
    except json_text.JsonError as e:
        raise UserError(f"{where} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, not {shown(value)}")
    return value


def _check_metadata(path: str, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ must be an object of strings, not {shown(metadata)}")


def _tensor(path: str, name: str, entry: Any, data_begin: int) -> Tensor:
    """Checks what can be checked of a tensor by itself; its size is that of its span."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{path}: tensor {shown(name)}: {what}")

    try:
        name.encode()
    except UnicodeEncodeError:  # JSON can escape it
        require(False, "half of a surrogate pair is no text")
    require(
        isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
        f"expected an object of dtype, shape and data_offsets, found {shown(entry)}",
    )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(
        isinstance(code, str) and code in DTYPES,
        f"dtype {shown(code)} is unknown; expected one of {', '.join(DTYPES)}",
    )
    # Larger dimensions no array can have, even an empty one; larger offsets no file.
    require(
        isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape),
        f"shape must be a list of integers from 0, not {shown(shape)}",
    )
    require(
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(n) is int and 0 <= n < 2**63 for n in offsets)
        and offsets[0] <= offsets[1],
        f"data_offsets must be [begin, end] with 0 <= begin <= end, not {shown(offsets)}",
    )
    require(len(shape) <= _MAX_RANK, f"{len(shape)} dimensions are more than {_MAX_RANK}")
    dtype, (begin, end) = DTYPES[code], offsets
    require(
        math.prod(n or 1 for n in shape) * dtype.itemsize < 2**63,
        f"shape {shown(shape)} is too large",
    )
    expected = math.prod(shape) * dtype.itemsize
    require(
        end - begin == expected,
        f"data_offsets {offsets} span {end - begin} bytes;"
        f" expected {expected} for {code} of shape {shown(shape)}",
    )
    return Tensor(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_layout(path: str, size: int, data_begin: int, tensors: Mapping[str, Tensor]) -> None:
    """Checks that the tensors cover the file's data from its begin to its end, each byte once."""
    expected = max((tensor.end for tensor in tensors.values()), default=data_begin)
    if expected > size:
        cut = min((t.begin, name) for name, t in tensors.items() if t.end > size)[1]
        raise UserError(
            f"{path}: is truncated at tensor {shown(cut)}: by its header the file should have"
            f" {expected} bytes, and it has {size}"
        )
    position, before = data_begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps" if tensor.begin < position else "leaves a gap after"
            raise UserError(
                f"{path}: tensor {shown(name)}: {what} {before}: it begins at byte"
                f" {tensor.begin - data_begin} of the data, expected {position - data_begin}"
            )
        position, before = tensor.end, f"tensor {shown(name)}"
    if position < size:
        raise UserError(
            f"{path}: {size - position} bytes follow {before}, the last: by its header the file"
            f" should have {position} bytes, and it has {size}"
        )


def dtype_code(dtype: np.dtype) -> str:
    """How the format calls `dtype`; ValueError where it has no name for it."""
    if dtype not in _NAMES:
        raise ValueError(f"safetensors files cannot hold {dtype} ({dtype.str})")
    return _NAMES[dtype]


def make_header(
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of `tensors` (name to shape and dtype), and where each begins.

    Wide types come first and the header's end is a multiple of 8, so that each tensor is aligned:
    readers that map the file need that.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, position = {}, 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": dtype_code(dtype),
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        begins[name], position = position, end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _MAX_HEADER:
        raise ValueError(f"a header of {len(header)} bytes is more than {_MAX_HEADER}")
    start = len(header).to_bytes(8, "little") + header
    return start, {name: len(start) + begin for name, begin in begins.items()}
