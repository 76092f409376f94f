"""Reading weights: what the safetensors package writes is read alike; what is wrong is named."""

import json
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors_files import DATA, GOOD, save_sharded, write_raw

from lm_jax.errors import UserError
from lm_jax.interop.safetensors import open_weights


def with_a(**changes) -> dict:
    """The header GOOD with tensor 'a' changed; None takes a key away."""
    entry = {key: value for key, value in (GOOD["a"] | changes).items() if value is not None}
    return GOOD | {"a": entry}


def test_every_dtype_that_torch_writes_is_read(tmp_path):
    names = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32"
    names += " float64 complex64 float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz"
    names += " float8_e5m2fnuz"
    values = torch.arange(24).reshape(2, 3, 4) % 5
    tensors = {name: values.to(getattr(torch, name)) for name in names.split()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert weights.names() == sorted(tensors)
    for name, tensor in tensors.items():
        array = weights.read(name)
        assert array.dtype == weights.dtype(name) == np.dtype(name)
        assert array.shape == weights.shape(name) == (2, 3, 4)
        assert array.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        if not tensor.is_complex():
            np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_tensors_without_dimensions_or_elements(tmp_path):
    arrays = {"scalar": np.array(2.5, np.float32), "none": np.zeros((3, 0, 2), np.int64)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    weights = open_weights(str(tmp_path))
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights.read(name), array, strict=True)
    assert weights.read_rows("none", 1, 3).shape == (2, 0, 2)
    with pytest.raises(ValueError, match="no rows"):
        weights.read_rows("scalar", 0, 0)


def test_rows_are_those_of_the_whole(tmp_path):
    array = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(ml_dtypes.bfloat16)
    tensors = {"x": torch.tensor(array.astype(np.float32)).bfloat16(), "y": torch.zeros(3)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    for start in range(8):
        for stop in range(start, 8):
            got = weights.read_rows("x", start, stop)
            np.testing.assert_array_equal(got, array[start:stop], strict=True)
    for start, stop in [(-1, 2), (3, 2), (0, 8)]:
        with pytest.raises(ValueError, match="no rows"):
            weights.read_rows("x", start, stop)


def test_shards_read_as_one(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"layers.{i}.w": rng.normal(size=(3, i + 1)) for i in range(30)}
    parts = {
        f"model-{i + 1:05d}-of-00010.safetensors": dict(list(arrays.items())[3 * i : 3 * i + 3])
        for i in range(10)
    }
    save_sharded(tmp_path, parts)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        weights = open_weights(path)
        assert weights.names() == sorted(arrays)
        assert "layers.29.w" in weights and "layers.30.w" not in weights
        for name, array in arrays.items():
            np.testing.assert_array_equal(weights.read(name), array, strict=True)
    with pytest.raises(UserError, match=r"index\.json: holds no tensor 'layers\.30\.w'"):
        weights.read("layers.30.w")


def test_a_tensor_that_the_index_leaves_out_counts(tmp_path):
    save_sharded(tmp_path, {"model-00001-of-00001.safetensors": {"x": np.ones(2)}})
    safetensors.numpy.save_file(
        {"x": np.ones(2), "y": np.ones(3)}, tmp_path / "model-00001-of-00001.safetensors"
    )
    assert open_weights(tmp_path).names() == ["x", "y"]


def test_an_adapter_is_named_by_its_file(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    safetensors.numpy.save_file({"x": np.ones(2)}, path)
    np.testing.assert_array_equal(open_weights(path).read("x"), np.ones(2))
    with pytest.raises(UserError, match=r"expected model\.safetensors .*'adapter_model\.saf"):
        open_weights(tmp_path)


def test_reading_holds_one_tensor(tmp_path):
    size = 2**20
    arrays = {f"x{i}": np.full(size // 4, i, np.float32) for i in range(12)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    del arrays
    tracemalloc.start()
    try:
        weights = open_weights(tmp_path)
        for i, name in enumerate(f"x{i}" for i in range(12)):
            assert weights.read(name)[-1] == i
        whole = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for name in weights.names():
            weights.read_rows(name, 1000, 2000)
        weights.fingerprint()
        rows = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size <= whole < 1.5 * size
    assert rows < 0.2 * size


def test_the_fingerprint_changes_with_the_weights(tmp_path):
    def fingerprint(folder: str, change=lambda arrays: None) -> str:
        rng = np.random.default_rng(0)
        arrays = {f"x{i}": rng.normal(size=(256, 512)).astype(np.float32) for i in range(20)}
        change(arrays)
        (tmp_path / folder).mkdir()
        safetensors.numpy.save_file(arrays, tmp_path / folder / "model.safetensors")
        return open_weights(tmp_path / folder).fingerprint()

    first = fingerprint("first")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert fingerprint("same") == first
    other = [
        fingerprint("trained", lambda arrays: [np.add(a, 1e-3, out=a) for a in arrays.values()]),
        fingerprint("renamed", lambda arrays: arrays.update(y=arrays.pop("x0"))),
        fingerprint("shorter", lambda arrays: arrays.pop("x3")),
    ]
    # Whichever tensor alone is changed.
    other += [fingerprint(f"one{i}", lambda a, i=i: a[f"x{i}"].fill(0)) for i in range(20)]
    assert len({first, *other}) == 24
    path = tmp_path / "same" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last bytes are always among those read
    path.write_bytes(data)
    assert open_weights(tmp_path / "same").fingerprint() != first


HEADERS = {
    "too long": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes; the file has 10"),
    "cut in the header": (
        b"\x40" + bytes(7) + b'{"a":',
        "truncated or no saf.* header of 64 bytes",
    ),
    "empty": (b"", "the file has 0"),
    "a page": (b"<!DOCTYPE html><html></html>", "truncated or no safetensors file"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "Git LFS pointer.*git lfs pull",
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_no_header(tmp_path, kind):
    data, message = HEADERS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"(?s)^{re.escape(str(path))}: .*{message}"):
        open_weights(tmp_path)


def test_a_header_above_the_formats_bound(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as f:
        f.write((100_000_001).to_bytes(8, "little"))
        f.truncate(200_000_000)  # sparse: takes no space
    with pytest.raises(UserError, match=r"header of 100000001 bytes; .* at most 100000000"):
        open_weights(tmp_path)


A = "tensor 'a': "
WRONG = {
    "not UTF-8": (b'{"a\xff": 1}', "the header cannot be read as JSON: not UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "the header cannot be read as JSON"),
    "not JSON": (b'{"a": ', "the header cannot be read as JSON"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON"),
    "not an object": (b"[1, 2]", r"the header must be a JSON object, not \[1, 2\]"),
    "too deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON: .*digits"),
    "half a surrogate": (b'{"\\ud800": {}}', "half of a surrogate pair"),
    "twice": (json.dumps(GOOD).encode()[:-1] + b', "a": {}}', "the key 'a' stands there twice"),
    "twice inside": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "the key 'dtype' stands there"),
    "metadata": (GOOD | {"__metadata__": {"step": 1}}, r"__metadata__ must be.*\{'step': 1\}"),
    "metadata list": (GOOD | {"__metadata__": []}, r"__metadata__ must be.*\[\]"),
    "entry": (GOOD | {"a": 3}, A + "expected an object of dtype, .*, found 3"),
    "no shape": (with_a(shape=None), A + "expected an object of dtype, shape and"),
    "strides": (with_a(strides=[1, 2]), A + "expected an object of dtype.*'strides'"),
    "dtype": (with_a(dtype="F31"), A + "dtype 'F31' is unknown; expected one of .*BF16"),
    "dtype list": (with_a(dtype=["F32"]), A + r"dtype \['F32'\] is unknown"),
    "shape number": (with_a(shape=6), A + "shape must be .*, not 6"),
    "shape bool": (with_a(shape=[True, 6]), A + "shape must be"),
    "shape float": (with_a(shape=[2.0, 3]), A + r"shape must be .*, not \[2.0, 3\]"),
    "shape below 0": (with_a(shape=[-2, -3]), A + r"shape must be .*, not \[-2, -3\]"),
    "shape beyond": (with_a(shape=[2**63, 0]), A + "shape must be"),
    "empty and huge": (with_a(shape=[0, 2**61], data_offsets=[0, 0]), A + "shape .* is too large"),
    "rank": (with_a(shape=[2, 3] + [1] * 63), A + "65 dimensions are more than 64"),
    "offsets bool": (with_a(data_offsets=[False, 24]), A + "data_offsets must be"),
    "three offsets": (with_a(data_offsets=[0, 12, 24]), A + "data_offsets must be"),
    "no offsets": (with_a(data_offsets={}), A + r"data_offsets must be .*, not \{\}"),
    "below 0": (with_a(data_offsets=[-24, 0]), A + r"data_offsets must be .*not \[-24, 0\]"),
    "backward": (with_a(data_offsets=[24, 0]), A + r"data_offsets must be .*, not \[24, 0\]"),
    "span": (
        with_a(data_offsets=[0, 20]),
        A + r"data_offsets \[0, 20\] span 20 bytes; expected 24 for F32 of shape \[2, 3\]",
    ),
    "malicious": (
        {"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}},
        f"truncated at tensor 'a': .* should have {2**40 + 92} bytes, and it has 123",
    ),
    "overlap": (
        GOOD | {"b": {"dtype": "U8", "shape": [6], "data_offsets": [23, 29]}},
        "tensor 'b': overlaps tensor 'a': it begins at byte 23 of the data, expected 24",
    ),
    "gap": (
        GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [25, 29]}},
        "tensor 'b': leaves a gap after tensor 'a': it begins at byte 25 of the data, expected 24",
    ),
    "gap at first": ({"b": GOOD["b"], "c": GOOD["c"]}, "tensor 'b': leaves a gap after the header"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_header_is_named(tmp_path, kind):
    header, message = WRONG[kind]
    path = write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match=f"(?s)^{re.escape(str(path))}: .*{message}") as error:
        open_weights(tmp_path)
    assert len(str(error.value)) < 1000


def test_too_few_and_too_many_bytes(tmp_path):
    path = write_raw(tmp_path / "model.safetensors", GOOD)
    size = path.stat().st_size
    assert open_weights(path).names() == ["a", "b", "c", "d"]
    write_raw(path, GOOD, DATA[:-3])
    message = f"truncated at tensor 'b': .* should have {size} bytes, and it has {size - 3}$"
    with pytest.raises(UserError, match=message):
        open_weights(path)
    write_raw(path, GOOD, DATA + b"xyz")
    message = f"3 bytes follow tensor 'd', the last: .* {size} bytes, and it has {size + 3}$"
    with pytest.raises(UserError, match=message):
        open_weights(path)


def test_what_changes_once_it_is_opened(tmp_path):
    path = write_raw(tmp_path / "model.safetensors", GOOD)
    weights = open_weights(path)
    write_raw(path, GOOD, DATA[:10])
    with pytest.raises(UserError, match="ends 14 bytes before tensor 'a' does: it was changed"):
        weights.read("a")
    path.unlink()
    for use in (lambda: weights.read("a"), weights.fingerprint):
        with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: No such file"):
            use()


def test_bools_are_0_or_1(tmp_path):
    header = {"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    path = write_raw(tmp_path / "model.safetensors", header, bytes([0, 1, 1]))
    assert open_weights(path).read("x").tolist() == [False, True, True]
    write_raw(path, header, bytes([0, 7, 1]))
    with pytest.raises(UserError, match="tensor 'x': BOOL holds bytes of 0 or 1, found 7"):
        open_weights(path).read("x")


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match="nowhere: there is no such file or folder"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no weights: expected model\.safetensors or"):
        open_weights(tmp_path)
    write_raw(tmp_path / "model-00001-of-00002.safetensors", GOOD)
    with pytest.raises(UserError, match=r"found only 'model-00001-of-00002\.safetensors'"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match=r"model\.safetensors: is a link that leads nowhere"):
        open_weights(tmp_path)
    write_raw(tmp_path / "blob", GOOD)
    assert open_weights(tmp_path).names() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("pytorch_model.bin", "is a pickle"),
        ("pytorch_model-00001-of-00002.bin", "is a pickle"),
        ("model.pt", "is a pickle"),
        ("model.pth", "is a pickle"),
        ("model.ckpt", "is a pickle"),
        ("tf_model.h5", "is of TensorFlow or Flax"),
        ("flax_model.msgpack", "is of TensorFlow or Flax"),
    ],
)
def test_other_formats_are_refused_with_the_reason(tmp_path, name, reason):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name, (tmp_path / name).with_suffix(".safetensors")):
        with pytest.raises(UserError, match=f"{name}: {reason}.* with save_pretrained"):
            open_weights(path)
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).names() == ["x"]


INDEX = {
    "not JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", r"must be a JSON object, not \[\]"),
    "twice": ('{"weight_map": {"x": "a", "x": "b"}}', "the key 'x' stands there twice"),
    "no map": ("{}", "weight_map must be an object of tensor and file names, not None"),
    "empty map": ('{"weight_map": {}}', r"weight_map must be .*not \{\}"),
    "map of lists": ('{"weight_map": {"x": ["a"]}}', "weight_map must be"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}
for _path in ("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\\\x.safetensors",
              "x.bin", "..", "", "x\\u0000.safetensors"):  # fmt: skip
    INDEX[f"path {_path}"] = (
        f'{{"weight_map": {{"x": "{_path}"}}}}',
        "tensor 'x': expected the plain name of a safetensors file",
    )


@pytest.mark.parametrize("kind", INDEX)
def test_a_wrong_index_is_named(tmp_path, kind):
    text, message = INDEX[kind]
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:? .*{message}"):
        open_weights(tmp_path)


def test_an_index_and_its_shards_agree(tmp_path):
    one, two, three = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    arrays = {one: {"x": np.ones(2)}, two: {"y": np.ones(2)}, three: {"z": np.ones(2)}}
    save_sharded(tmp_path / "missing", arrays)
    (tmp_path / "missing" / one).unlink()
    (tmp_path / "missing" / three).unlink()
    message = f"names 3 files, of which 2 are not there: '{one}', '{three}'"
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path / "missing")

    save_sharded(tmp_path / "elsewhere", arrays, z=one)
    with pytest.raises(UserError, match=rf"{one}: holds no tensor 'z', though .*index\.json"):
        open_weights(tmp_path / "elsewhere")

    save_sharded(tmp_path / "twice", arrays | {three: {"x": np.ones(2), "z": np.ones(2)}})
    with pytest.raises(UserError, match=f"{three}: tensor 'x' is in .*{one} too"):
        open_weights(tmp_path / "twice")

    save_sharded(tmp_path / "damaged", arrays)
    write_raw(tmp_path / "damaged" / two, with_a(dtype="F31"))
    with pytest.raises(UserError, match=f"{two}: tensor 'a': dtype 'F31'"):
        open_weights(tmp_path / "damaged")

    save_sharded(tmp_path / "both", arrays)
    assert open_weights(tmp_path / "both").names() == ["x", "y", "z"]
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "both" / "model.safetensors")
    with pytest.raises(UserError, match=r"holds both model\.safetensors and model"):
        open_weights(tmp_path / "both")
    save_sharded(tmp_path / "one", {"model.safetensors": {"x": np.ones(2)}})
    assert open_weights(tmp_path / "one").names() == ["x"]
