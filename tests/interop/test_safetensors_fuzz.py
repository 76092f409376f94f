"""Damaged weights of every kind end in a UserError, or are read as what they now are."""

import json
import os
import random
import re
import tracemalloc

import numpy as np
import safetensors
from safetensors_files import DATA, GOOD, save_sharded, write_raw

from lm_jax.errors import UserError
from lm_jax.interop.safetensors import open_weights


def mutated_header(rng: random.Random, header: dict) -> bytes:
    """`header` with something of its structure changed."""
    odd = [None, True, -1, 0, 1, 7, 24, 25, 2**31, 2**40, 2**63, 10**30, 1.0, 1e300, "", "F32",
           "BF16", "f32", [], [0], [0, 24], [24, 0], [[0]], {}, {"a": 1}, "é", "\x00"]  # fmt: skip
    header = json.loads(json.dumps(header))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice([name for name, entry in header.items() if isinstance(entry, dict)])
        entry = header[name]
        key = rng.choice(["dtype", "shape", "data_offsets"])
        kind = rng.randrange(8)
        if kind == 0:
            entry[key] = rng.choice(odd)
        elif kind == 1 and isinstance(entry.get(key), list) and entry[key]:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(odd)
        elif kind == 2 and isinstance(entry.get(key), list):
            entry[key].insert(rng.randint(0, len(entry[key])), rng.choice(odd))
        elif kind == 3:
            entry.pop(key, None)
        elif kind == 4:
            entry[rng.choice(["dtype ", "strides", "shape"])] = rng.choice(odd)
        elif kind == 5:
            header[rng.choice(["a", "b", "x", "", "__metadata__", "é"])] = header.pop(name)
        elif kind == 6:
            header[rng.choice(["y", "__metadata__"])] = rng.choice([*odd, {"a": "b"}])
        else:  # a shape and a span that agree, far beyond the file
            size = 2 ** rng.randint(20, 50)
            entry |= {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        if not any(isinstance(entry, dict) for entry in header.values()):
            break
    text = json.dumps(header)
    kind = rng.randrange(8)
    if kind == 0:
        text = text[:-1] + ', "a": ' + json.dumps(header.get("a", {})) + "}"
    elif kind == 1:
        number = rng.choice(re.findall("[0-9]+", text))
        new = rng.choice(["NaN", "Infinity", "1e3", "9" * 5000, "[" * 5000, "0x1", "01"])
        text = text.replace(number, new, 1)
    return text.encode()


def corrupted(rng: random.Random, good: bytes, header: dict, data: bytes) -> tuple[bytes, bool]:
    """`good` damaged, and whether only its data bytes were."""
    data_begin = len(good) - len(data)
    kind = rng.randrange(6)
    if kind == 0:  # bytes of the header
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 10])):
            bad[rng.randrange(8, data_begin)] = rng.choice([rng.randrange(256), *b'0919"{}[],: '])
        return bytes(bad), False
    if kind == 1:  # bytes of the data
        bad = bytearray(good)
        for _ in range(rng.choice([1, 5])):
            bad[rng.randrange(data_begin, len(good))] ^= rng.randrange(1, 256)
        return bytes(bad), True
    if kind == 2:  # the end
        region = rng.choice([(0, 8), (8, data_begin), (data_begin, len(good))])
        return good[: rng.randrange(*region)], False
    if kind == 3:  # the length field
        length = data_begin - 8
        odd = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 10**8, 10**8 + 1, len(good), len(good) - 8]
        new = rng.choice([*odd, length - 1, length + 1, rng.randrange(len(good))])
        return new.to_bytes(8, "little") + good[8:], False
    if kind == 4:  # something added, anywhere
        at = rng.randrange(len(good) + 1)
        return good[:at] + rng.randbytes(rng.choice([1, 8, 100])) + good[at:], False
    head = mutated_header(rng, header)
    return len(head).to_bytes(8, "little") + head + data, False


def test_no_corruption_ends_in_anything_but_a_user_error(tmp_path):
    """What is read all the same is what the safetensors package finds in those bytes."""
    rng = random.Random(0)
    path = tmp_path / "model.safetensors"
    good = write_raw(path, GOOD).read_bytes()
    outcomes = {"refused": 0, "data changed": 0, "read": 0}
    tracemalloc.start()
    try:
        for step in range(3000):
            bad, only_data = corrupted(rng, good, GOOD, DATA)
            path.write_bytes(bad)
            try:
                weights = open_weights(tmp_path)
                read = {name: weights.read(name) for name in weights.names()}
                weights.fingerprint()
            except UserError as e:
                assert not only_data, (step, bad)
                assert str(e).startswith(str(path)) and len(str(e)) < 2000, (step, bad)
                outcomes["refused"] += 1
                continue
            except Exception as e:
                raise AssertionError(f"step {step}, on {bad!r}") from e
            expected = dict(safetensors.deserialize(bad))
            assert set(expected) == set(read), (step, bad)
            for name, array in read.items():
                assert list(array.shape) == expected[name]["shape"], (step, bad)
                assert array.tobytes() == expected[name]["data"], (step, bad)
            outcomes["data changed" if only_data else "read"] += bad != good
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    assert min(outcomes.values()) > 10, outcomes


def test_no_corrupted_index_ends_in_anything_but_a_user_error(tmp_path):
    rng = random.Random(0)
    parts = {f"model-0000{i}-of-00003.safetensors": {f"x{i}": np.ones(i)} for i in (1, 2, 3)}
    save_sharded(tmp_path, parts)
    path = tmp_path / "model.safetensors.index.json"
    good = path.read_bytes()
    refused = 0
    for step in range(1000):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            bad[rng.randrange(len(bad))] = rng.choice([rng.randrange(256), *b'019"{}[],: ./\\'])
        if rng.random() < 0.1:
            del bad[rng.randrange(len(bad)) :]
        path.write_bytes(bad)
        try:
            names = open_weights(tmp_path).names()
        except UserError as e:
            assert os.path.dirname(str(e).split(":")[0]) == str(tmp_path), (step, bad)
            refused += 1
        else:
            assert set(names) <= {"x1", "x2", "x3"}, (step, bad)
    assert refused > 500
