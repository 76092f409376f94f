"""Workdirs, text and models in a bucket. The bucket is a folder; requests to it go by fsspec, and
those of tensorstore, which has a reader of its own for gs://, are led to the folder as well."""

import json
import pathlib

import commands
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry, known_implementations

from lm_jax import paths
from lm_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from lm_jax.data import files
from lm_jax.data.sources import documents
from lm_jax.errors import UserError

WORDS = [f"the {i}th document says {i * i} and ends" for i in range(30)]


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> pathlib.Path:
    """What gs://bucket holds."""
    root = tmp_path / "buckets"
    (root / "bucket").mkdir(parents=True)

    class Bucket(DirFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

        def __init__(self, **_):
            super().__init__(str(root), LocalFileSystem(auto_mkdir=True))

        @classmethod
        def _strip_protocol(cls, path):
            return path.partition("://")[2].rstrip("/") if "://" in path else path.rstrip("/")

        def unstrip_protocol(self, name):
            return f"gs://{name}"

    for name in ("gs", "gcs"):
        monkeypatch.setitem(_registry, name, Bucket)
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))
    return root / "bucket"


def write_corpus(folder: pathlib.Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "deep" / ".hidden").mkdir(parents=True)
    (folder / "a.txt").write_text(WORDS[0])
    (folder / "deep" / "b.jsonl").write_text(
        "".join(json.dumps({"text": word}) + "\n" for word in WORDS[1:20])
    )
    pq.write_table(pa.table({"text": WORDS[20:]}), folder / "deep" / "c.parquet")
    (folder / "deep" / ".hidden" / "no.txt").write_text("hidden")
    (folder / "image.png").write_bytes(b"no text")


def test_sources_are_files_folders_and_globs(bucket):
    write_corpus(bucket / "corpus")

    def read(*sources: str) -> list[str]:
        config = DataConfig(sources=sources, validation_sources=sources)
        return list(documents(config, "train"))

    assert read("gs://bucket/corpus") == WORDS == read("gs://bucket/corpus/")
    assert read("gs://bucket/corpus/a.txt") == WORDS[:1]
    assert read("gs://bucket/corpus/*/*.jsonl") == WORDS[1:20]
    assert read("gs://bucket/corpus/**/*.parquet") == WORDS[20:]
    for wrong in ("gs://bucket/nothing", "gs://bucket/corpus/*.md", "gs://bucket/corpus/b.txt"):
        with pytest.raises(UserError, match=wrong.replace("*", r"\*")):
            read(wrong)


def test_a_file_that_changed_is_copied_anew_and_no_other(bucket, monkeypatch):
    (bucket / "a.txt").write_text("before")
    (bucket / "b.txt").write_text("same")
    (first,) = files.find("gs://bucket/a.txt")
    assert files.read(first) == b"before"
    files.find("gs://bucket/b.txt")
    (bucket / "a.txt").write_text("afterwards")
    copied = []
    monkeypatch.setattr(paths.shutil, "disk_usage", _counting(copied, paths.shutil.disk_usage))
    assert files.read(files.find("gs://bucket/a.txt")[0]) == b"afterwards"
    files.find("gs://bucket/b.txt")
    assert len(copied) == 1


def _counting(calls: list, function):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def test_what_does_not_fit_on_the_disk_is_refused(bucket, monkeypatch):
    (bucket / "a.txt").write_text("text")
    full = type("Usage", (), {"free": 3})
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"(?s)gs://bucket/a.txt.*LM_JAX_CACHE"):
        files.find("gs://bucket/a.txt")


@pytest.mark.parametrize(
    "url, said", [("s3://bucket/x", r"lm_jax\[s3\]"), ("nowhere://bucket/x", "nowhere")]
)
def test_a_missing_package_is_named(url, said, monkeypatch):
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(
        known_implementations,
        "s3",
        {"class": "package_that_is_not_there.S3", "err": "not installed"},
    )
    with pytest.raises(UserError, match=said):
        paths.exists(url)


@pytest.mark.parametrize("folder", ["memory://logs", "local"])
def test_a_log_is_whole_when_it_is_flushed(folder, tmp_path):
    path = f"{tmp_path}/log" if folder == "local" else f"{folder}/{tmp_path.name}/log"
    log = paths.Log(path)
    log.write("one\n")
    log.write("two\n")
    log.flush()
    assert paths.read_text(path) == "one\ntwo\n"
    again = paths.Log(path)
    again.write("three\n")
    again.close()
    assert paths.read_text(path) == "one\ntwo\nthree\n"
    paths.append(path, "four\n")
    assert paths.read_text(path).splitlines() == ["one", "two", "three", "four"]


def test_a_bucket_that_takes_no_log_for_a_while_ends_nothing(monkeypatch, capsys):
    path, write_whole = "memory://logs/away", paths.write_whole

    def away(path: str, text: str) -> None:
        raise OSError("503: try again")

    monkeypatch.setattr(paths, "write_whole", away)
    log = paths.Log(path)
    for line in ("one\n", "two\n"):
        log.write(line)
        log.flush()
    assert not paths.exists(path)
    monkeypatch.setattr(paths, "write_whole", write_whole)
    log.write("three\n")
    log.close()
    assert paths.read_text(path) == "one\ntwo\nthree\n"
    said = capsys.readouterr().err
    assert said.count("503: try again") == 1 and path in said


def test_a_run_lives_in_a_bucket(bucket, monkeypatch, tmp_path):
    """It trains, goes on, is evaluated, started from and exported, as one on a disk does."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.path import step as step_lib

    from lm_jax.evaluators.loss import evaluate_model
    from lm_jax.training.loop import train

    monkeypatch.setattr(
        gcs_utils,
        "get_kvstore_for_gcs",
        lambda path: {"driver": "file", "path": str(bucket.parent / path.removeprefix("gs://"))},
    )
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda _: False)
    assert step_lib.gcs_utils is gcs_utils
    commands.write_corpus(bucket / "text")

    def config(**training) -> Config:
        return Config(
            model=ModelConfig(layers=1, width=16, heads=2, max_length=32, dtype="float32"),
            tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=280),
            data=DataConfig(sources=("gs://bucket/text",), length=32, batch_size=8),
            optimizer=OptimizerConfig(schedule="constant"),  # however many steps: compiled once
            training=TrainingConfig(
                **{"evaluate_every": 2, "sample_tokens": 3, "sample_prompt": "the"} | training
            ),
        )

    run = "gs://bucket/runs/one"
    assert train(config(steps=2), run) == 0
    assert train(config(steps=4), run) == 0
    here = bucket / "runs" / "one"
    records = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in records if r["kind"] == "train"} >= {1, 2, 3, 4}
    assert "=== step 4 ===" in (here / "samples.txt").read_text()
    assert list((here / "tensorboard").iterdir())
    assert not (here / "lock").exists()

    assert train(config(steps=4), str(tmp_path / "disk")) == 0
    of_disk = (tmp_path / "disk" / "metrics.jsonl").read_text().splitlines()
    loss = json.loads(of_disk[-1])["loss"]
    assert records[-1]["loss"] == pytest.approx(loss, rel=1e-6)
    assert evaluate_model(run)["loss"] == pytest.approx(loss, rel=1e-5)

    started = config(steps=1)
    started.init_from = run
    assert train(started, str(tmp_path / "started")) == 0
    with pytest.raises(UserError, match="a workdir lies on a disk"):
        train(config(steps=1), "memory://run")
    with pytest.raises(UserError, match="holds other files"):
        train(config(steps=1), "gs://bucket/text")
