"""Writing weights: the safetensors package and Transformers read them; no half is ever left."""

import errno
import json
import os
import random
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from huggingface_hub.serialization import split_state_dict_into_shards_factory

from lm_jax.errors import UserError
from lm_jax.interop import safetensors_writer
from lm_jax.interop.safetensors import open_weights
from lm_jax.interop.safetensors_header import DTYPES
from lm_jax.interop.safetensors_writer import WeightsWriter


def plan(arrays: dict[str, np.ndarray]) -> list[tuple]:
    return [(name, array.shape, array.dtype) for name, array in arrays.items()]


def write_all(folder, arrays: dict[str, np.ndarray], **options) -> None:
    with WeightsWriter(folder, plan(arrays), **options) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def test_every_dtype_is_read_by_the_package(tmp_path):
    # 15 elements, so that alignment depends on the order; powers of two, which all types hold.
    values = 2 ** (np.arange(15) % 5).reshape(3, 5)
    arrays = {f"x.{code}": values.astype(dtype) for code, dtype in DTYPES.items()}
    arrays |= {"scalar": np.array(3, np.uint8), "none": np.zeros((2, 0), np.float32)}
    write_all(tmp_path, arrays)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    found = dict(safetensors.deserialize(data))
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert set(found) == set(loaded) == set(weights.names()) == set(arrays)
    for name, array in arrays.items():
        assert tuple(found[name]["shape"]) == tuple(loaded[name].shape) == array.shape
        assert found[name]["data"] == array.tobytes()
        np.testing.assert_array_equal(weights.read(name), array, strict=True)
    for code in DTYPES:
        assert found[f"x.{code}"]["dtype"] == code
        assert str(loaded[f"x.{code}"].dtype) == f"torch.{DTYPES[code].name}"
        if code != "C64":
            expected = values.astype(bool) if code == "BOOL" else values
            np.testing.assert_array_equal(loaded[f"x.{code}"].float().numpy(), expected)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as f:
        assert f.metadata() == {"format": "pt"}


def test_metadata_and_an_adapters_name(tmp_path):
    arrays = {"é.lora_A": np.ones((2, 3), np.float32), "é.lora_B": np.ones((3, 2), np.float32)}
    options = {"stem": "adapter_model", "max_shard_bytes": None, "metadata": {"a": "b", "c": "ä"}}
    write_all(tmp_path / "new" / "folder", arrays, **options)
    assert os.listdir(tmp_path / "new" / "folder") == ["adapter_model.safetensors"]
    with safetensors.safe_open(tmp_path / "new/folder/adapter_model.safetensors", "np") as f:
        assert f.metadata() == {"a": "b", "c": "ä"}
        assert sorted(f.keys()) == sorted(arrays)


def test_shards_are_those_of_hugging_face(tmp_path):
    rng = random.Random(0)
    for step in range(20):
        count, limit = rng.randint(1, 12), rng.randint(1, 60)
        arrays = {f"x{i}": np.full(rng.randint(0, 40), i, np.uint8) for i in range(count)}
        folder = tmp_path / str(step)
        write_all(folder, arrays, max_shard_bytes=limit)
        expected = split_state_dict_into_shards_factory(
            arrays,
            get_storage_size=lambda array: array.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=limit,
        )
        files = set(expected.filename_to_tensors)
        for file, names in expected.filename_to_tensors.items():
            assert set(safetensors.numpy.load_file(folder / file)) == set(names)
        if expected.is_sharded:
            files.add("model.safetensors.index.json")
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["weight_map"] == expected.tensor_to_filename
            assert index["metadata"] == expected.metadata
        assert set(os.listdir(folder)) == files
        weights = open_weights(folder)
        for name, array in arrays.items():
            np.testing.assert_array_equal(weights.read(name), array, strict=True)


def test_transformers_and_we_read_each_others_shards(tmp_path):
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16, "vocab_size": 40}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    theirs = open_weights(tmp_path / "theirs")
    arrays = {name: theirs.read(name) for name in theirs.names()}
    state = model.state_dict()
    assert {name: state[name].shape for name in arrays} == {
        name: array.shape for name, array in arrays.items()
    }
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, state[name].numpy(), strict=True)

    write_all(tmp_path / "ours", arrays, max_shard_bytes=4000)
    assert len(os.listdir(tmp_path / "ours")) > 3
    config.save_pretrained(tmp_path / "ours")
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_tensors_come_in_any_order_and_any_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_PIECE", 100)  # so that small arrays take all paths
    rng = np.random.default_rng(0)
    arrays = {}
    for i in range(60):
        array = rng.normal(size=rng.integers(1, 9, size=rng.integers(1, 5))).astype(np.float32)
        array = array.transpose(rng.permutation(array.ndim))
        array = array[:: rng.choice([-1, 1, 2])]
        arrays[f"x{i}"] = array[None] if rng.random() < 0.3 else array
    arrays["wide"] = np.broadcast_to(np.float32(3), (5, 700))
    arrays["bf16"] = rng.normal(size=(50, 30)).astype(ml_dtypes.bfloat16).T
    assert sum(not array.flags.c_contiguous for array in arrays.values()) > 20
    with WeightsWriter(tmp_path, plan(arrays), max_shard_bytes=5000) as writer:
        for name in rng.permutation(list(arrays)):
            writer.write(str(name), arrays[str(name)])
    weights = open_weights(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights.read(name), array, strict=True)


def test_writing_holds_one_tensor(tmp_path):
    shape = (2048, 4096)  # 32 MiB, above the pieces of strided arrays
    size = 4 * shape[0] * shape[1]
    tensors = [(f"x{i}", shape, np.float32) for i in range(4)]
    tensors += [(f"t{i}", shape[::-1], np.float32) for i in range(2)]
    tracemalloc.start()
    try:
        with WeightsWriter(tmp_path, tensors, max_shard_bytes=2 * size) as writer:
            for name, *_ in tensors:
                array = np.full(shape, int(name[1:]), np.float32)
                writer.write(name, array.T if name[0] == "t" else array)
                del array
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size <= peak <= 1.5 * size + 2**20
    assert open_weights(tmp_path).read_rows("t1", 7, 8).tolist() == [[1.0] * 2048]


def test_what_does_not_fit_the_plan_is_refused(tmp_path):
    x = np.ones((2, 3), np.float32)
    refusals = {
        "y": (x, "'y' was not planned"),
        "a": (x.T, r"'a': expected float32 of shape \(2, 3\), got float32 of \(3, 2\)"),
        "b": (x.astype(np.float16), "'b': expected float32 .*, got float16"),
        "c": (x.astype(">f4"), "'c': expected float32"),
    }
    with WeightsWriter(tmp_path, [(name, (2, 3), np.float32) for name in "abc"]) as writer:
        for name, (array, message) in refusals.items():
            with pytest.raises(ValueError, match=message):
                writer.write(name, array)
        for name in "abc":
            writer.write(name, x)
        with pytest.raises(ValueError, match="'a' was not planned, or is written already"):
            writer.write("a", x)
    with pytest.raises(ValueError, match="written already"):
        writer.write("a", x)
    writer.close()  # again, without effect
    for wrong in (
        [("x", (1,), np.float32), ("x", (1,), np.float32)],
        [("__metadata__", (1,), np.float32)],
        [("x", (-1,), np.float32)],
        [("x", (1,), ">f4")],
        [("x", (1,), np.complex128)],
        [("x", (1,), ml_dtypes.int4)],
        [("\ud800", (1,), np.float32)],
    ):
        with pytest.raises(ValueError):
            WeightsWriter(tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


def test_nothing_is_left_of_what_did_not_end(tmp_path):
    tensors = [(f"x{i}", (10,), np.float32) for i in range(4)]
    x = np.ones(10, np.float32)
    with pytest.raises(KeyError), WeightsWriter(tmp_path, tensors, max_shard_bytes=80) as writer:
        writer.write("x0", x)
        present = os.listdir(tmp_path)
        assert len(present) == 3 and all(name.endswith(".partial") for name in present)
        raise KeyError("something else")
    assert os.listdir(tmp_path) == []
    writer = WeightsWriter(tmp_path, tensors, max_shard_bytes=80)
    writer.write("x3", x)
    with pytest.raises(ValueError, match=r"3 tensors were not written: \['x0', 'x1', 'x2'\]"):
        writer.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="were not written"):
        writer.close()


def test_other_weights_are_not_overwritten(tmp_path):
    arrays = {"x": np.ones(4, np.float32), "y": np.ones(4, np.float32)}
    write_all(tmp_path, arrays)
    before = (tmp_path / "model.safetensors").read_bytes()
    for options in ({}, {"max_shard_bytes": 16}):
        with pytest.raises(UserError, match=r"holds weights already \('model\.safetensors'\)"):
            WeightsWriter(tmp_path, plan(arrays), **options)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    write_all(tmp_path, arrays, stem="adapter_model")  # which is another thing
    write_all(tmp_path / "shards", arrays, max_shard_bytes=16)
    with pytest.raises(UserError, match="holds weights already"):
        WeightsWriter(tmp_path / "shards", plan(arrays))


def test_a_full_disk_leaves_nothing(tmp_path):
    """The bound on a file's size stands in for the disk's: the system refuses the write alike."""
    tensors = [("small", (10,), np.float32), ("large", (3, 2**18), np.float32)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = WeightsWriter(tmp_path, tensors)
    writer.write("small", np.ones(10, np.float32))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
        with pytest.raises(UserError, match=r"partial: cannot be written: .* take 3145768 bytes"):
            writer.write("large", np.ones((3, 2**18), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="'large'"):
        writer.close()


@pytest.mark.parametrize("call, fails_at", [("fsync", 1), ("replace", 1), ("replace", 3)])
def test_a_disk_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch, call, fails_at):
    real, calls = getattr(os, call), []

    def fail(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    arrays = {f"x{i}": np.ones(10, np.float32) for i in range(3)}
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_all(tmp_path, arrays, max_shard_bytes=40)
    assert len(calls) == fails_at
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match=f"{folder}: cannot be written: "):
            WeightsWriter(folder, [("x", (1,), np.float32)])
