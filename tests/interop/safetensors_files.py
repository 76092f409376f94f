"""Safetensors files for the tests, made by hand or by the safetensors package."""

import json
import pathlib

import safetensors.numpy

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
    "c": {"dtype": "BF16", "shape": [], "data_offsets": [29, 31]},
    "d": {"dtype": "F16", "shape": [0, 4], "data_offsets": [31, 31]},
}
DATA = bytes(range(31))


def write_raw(path: pathlib.Path, header: dict | bytes, data: bytes = DATA) -> pathlib.Path:
    """A file with this header, however wrong."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw_bytes(header, data))
    return path


def raw_bytes(header: dict | bytes, data: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def save_sharded(folder: pathlib.Path, shards: dict[str, dict], **weight_map: str) -> None:
    """A folder of these files, and an index that names them, but for what `weight_map` says."""
    folder.mkdir(exist_ok=True)
    for name, arrays in shards.items():
        safetensors.numpy.save_file(arrays, folder / name)
        weight_map = dict.fromkeys(arrays, name) | weight_map
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
