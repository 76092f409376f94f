"""TFDS data sets are written and read without TensorFlow, even where it is installed."""

import os
import subprocess
import sys

import pytest
from data_helpers import jsonl

from lm_jax.config import DataConfig
from lm_jax.data.sources import documents
from lm_jax.errors import UserError

ROUND_TRIP = """
import pickle, re, sys
from lm_jax.config import DataConfig
from lm_jax.data.sources import documents, held_out_sources
if sys.argv[1] == "write":
    from lm_jax.data.tfds_text import prepare
    print(prepare("mine", [sys.argv[2]], validation_sources=[sys.argv[3]]))
    from lm_jax.errors import UserError
    try:
        prepare("mine", [sys.argv[2]])
    except UserError as e:
        assert "is there already" in str(e)
else:
    source = ("tfds:local_text/mine",)
    config = DataConfig(source, validation_sources=source)
    train = documents(config, "train")
    train[0]
    assert list(pickle.loads(pickle.dumps(train))) == ["one", "zwö", "three"]
    assert list(documents(config, "validation")) == ["four"]
    assert held_out_sources(config) == ["tfds:local_text/mine[validation]"]
    assert held_out_sources(DataConfig(source)) == ["tfds:local_text/mine[train]"]
    part = documents(DataConfig(("tfds:local_text/mine[train[1:]+validation]",)), "train")
    assert list(pickle.loads(pickle.dumps(part))) == ["zwö", "three"]
    from lm_jax.errors import UserError
    for split, said in {
        "[test]": "Unknown split 'test'.* Splits: train, validation",
        "[train[x]]": r"mine\\[train\\[x\\]\\]: Error parsing split",
        "[train": "in brackets if you like",
    }.items():
        try:
            documents(DataConfig((f"tfds:local_text/mine{split}",)), "train")
        except UserError as e:
            assert re.search(said, str(e)), e
        else:
            assert False, split
assert not {"tensorflow", "jax", "torch"} & set(sys.modules)
"""


def test_local_text_becomes_a_data_set(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", ["one", "zwö", "three"])
    held_out = jsonl(tmp_path / "b.jsonl", ["four"])
    # A TensorFlow that cannot be imported stands where one might be installed.
    (tmp_path / "path" / "tensorflow").mkdir(parents=True)
    (tmp_path / "path" / "tensorflow" / "__init__.py").write_text("raise SystemExit('imported')")
    env = os.environ | {
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), *filter(None, sys.path)]),
    }
    for verb in ("write", "read"):
        done = subprocess.run(
            [sys.executable, "-c", ROUND_TRIP, verb, train, held_out],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert verb == "read" or "tfds:local_text/mine" in done.stdout


def test_missing_data_sets_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"tfds:mnist: not prepared in .*tfds\.data_source"):
        documents(DataConfig(("tfds:mnist",)), "train")
    with pytest.raises(UserError, match=r"tfds:no_such_set: no such data set in .*TFDS_DATA_DIR"):
        documents(DataConfig(("tfds:no_such_set",)), "train")
