"""Which documents a source holds, how they are split, and what is said where one fails."""

import gzip
import json
import pickle
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import data_config, jsonl

from lm_jax.config import DataConfig
from lm_jax.data.sources import all_documents, documents
from lm_jax.errors import UserError


def texts_of(*sources, **changes):
    return list(all_documents(DataConfig(sources, **changes)))


def test_a_folder_is_read_in_order_with_what_it_knows(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "sub" / "c.py").write_text("five")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    jsonl(tmp_path / "c.jsonl", ["three", "four"])
    assert texts_of(str(tmp_path)) == ["one", "two", "three", "four", "five"]
    assert texts_of(str(tmp_path / "*.txt"), str(tmp_path / "**" / "*.py")) == ["two", "five"]


@pytest.mark.parametrize("zipped", [False, True])
def test_units_of_a_text_file(tmp_path, zipped):
    data = "\n\none\ntwo\n \n\nthree é\r\n\r\nfour".encode()
    path = tmp_path / ("a.txt" + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert texts_of(str(path)) == [data.decode()]
    paragraphs = texts_of(str(path), document="paragraph")
    assert [p.strip() for p in paragraphs] == ["one\ntwo", "three é", "four"]
    lines = texts_of(str(path), document="line")
    assert [line.strip() for line in lines if line.strip()] == ["one", "two", "three é", "four"]


def test_jsonl_and_parquet(tmp_path):
    texts = ["first", "", "third\nline", "vierté"]
    path = tmp_path / "a.jsonl.gz"
    lines = "\n\n".join(json.dumps({"body": t, "id": 3}) for t in texts)
    path.write_bytes(gzip.compress(lines.encode()))
    assert texts_of(str(path), text_key="body") == texts
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": texts, "id": range(4)}), table, row_group_size=3)
    assert texts_of(str(table), text_key="body") == texts


def test_documents_travel_to_other_processes(tmp_path):
    jsonl(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "b.txt").write_text("c")
    pq.write_table(pa.table({"text": ["d"]}), tmp_path / "c.parquet")
    found = all_documents(DataConfig((str(tmp_path),)))
    list(found)
    assert list(pickle.loads(pickle.dumps(found))) == ["a", "b", "c", "d"]


def test_the_users_python_is_a_corpus_without_its_tests():
    config = DataConfig(("python:",))
    train, validation = documents(config, "train"), documents(config, "validation")
    paths = all_documents(config).parts[0].paths
    assert len(train) + len(validation) == len(paths) > 300
    assert any(p.endswith("pydoc_data/topics.py") for p in paths)
    assert paths == sorted(paths)
    assert not any(f"/{name}/" in p for p in paths for name in ("test", "site-packages"))
    assert 1 <= len(validation) <= len(paths) // 50
    assert sum(len(train[i]) for i in range(0, len(train), 10)) > 300_000


@pytest.mark.parametrize("count", [2, 3, 10, 25])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.9])
def test_the_document_split_parts_the_documents(tmp_path, count, fraction):
    texts = [f"text {i}" for i in range(count)]
    config = DataConfig((jsonl(tmp_path / "a.jsonl", texts),), validation_fraction=fraction)
    train, validation = documents(config, "train"), documents(config, "validation")
    assert len(train) >= 1 and len(validation) >= 1
    assert sorted([*train, *validation]) == sorted(texts)
    assert len(validation) == max(1, count // max(2, round(1 / fraction)))
    for part in (train, validation):
        assert [part[i] for i in range(len(part))] == list(part)


def test_the_tail_split_is_nanogpts(tmp_path):
    texts = ["abcdefghij" * 3, "é" * 7]
    config = DataConfig(
        (jsonl(tmp_path / "a.jsonl", texts),), validation_split="tail", validation_fraction=0.1
    )
    train, validation = documents(config, "train"), documents(config, "validation")
    assert [len(t) for t in train] == [int(30 * 0.9), int(7 * 0.9)]
    assert [a + b for a, b in zip(train, validation, strict=True)] == texts


def test_validation_sources_leave_the_sources_whole(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", ["one", "two"]), jsonl(tmp_path / "b.jsonl", ["three"])
    config = data_config(a, validation_sources=(b,))
    assert list(documents(config, "train")) == ["one", "two"]
    assert list(documents(config, "validation")) == ["three"]


def test_weighted_sources_are_split_one_by_one(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", ["a1", "a2", "a3"])
    b = jsonl(tmp_path / "b.jsonl", ["b1", "b2"])
    config = DataConfig((a, b), weights=(1.0, 2.0), validation_fraction=0.5)
    assert list(documents(config, "train")) == ["a1", "a3", "b1"]
    assert list(documents(config, "validation")) == ["a2", "b2"]


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"good\nb\xffd\n", r"a\.txt:2: not UTF-8 at byte 6 \(0xff\)"),
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: not a readable gzip file"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n', r"a\.jsonl:3: not JSON: .* at column 13"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: a JSON object is wanted, not a list"),
        ("a.jsonl", b'{"body": 1, "id": 2}\n', r"a\.jsonl:1: no key 'text'; keys: body, id\."),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', r"a\.jsonl:2: 'text' must be a string, no"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: 'text' holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 at byte 24"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=message):
        texts_of(str(path))
    # Beside a good file, skipping leaves only what is bad out, and counts it.
    jsonl(tmp_path / "z.jsonl", ["good"])
    found = all_documents(DataConfig((str(tmp_path),), on_error="skip"))
    good = data.count(b'"x"}') + data.count(b'"y"}') + 1
    assert len([text for text in found if text]) == good
    assert found.errors.count == 1
    assert name in found.errors.summary()


def test_parquet_without_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; columns: body, id\."):
        texts_of(str(path))
    with pytest.raises(UserError, match=r"a\.parquet: column 'id' must hold strings, not int64"):
        texts_of(str(path), text_key="id")


def test_missing_sources_name_what_is_near(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    for source, message in {
        "corpse.txt": r"no such file; did you mean '.*/corpus\.txt'\?",
        "nowhere/x.txt": r"the folder '.*/nowhere' does not exist",
        "*.jsonl": r"no file matches; '.*' holds corpus\.txt",
        "nowhere/*.txt": r"the folder '.*/nowhere' does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            texts_of(str(tmp_path / source))
    with pytest.raises(UserError, match="'python:', 'tfds:NAME"):
        texts_of("hub:c4")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\xff")
    with pytest.raises(UserError, match="no file in this folder has a known extension"):
        texts_of(str(tmp_path / "pictures"))


def test_nothing_left_is_an_error(tmp_path):
    write(tmp_path / "a.txt", b"")
    with pytest.raises(UserError, match=r"no documents \(1 records skipped.*a\.txt"):
        texts_of(str(tmp_path), on_error="skip")
    write(tmp_path / "a.txt", b"one document")
    with pytest.raises(UserError, match=r"data\.validation_split='tail'"):
        documents(DataConfig((str(tmp_path),)), "train")


def test_sources_import_nothing_heavy():
    code = (
        "import sys; from lm_jax.config import DataConfig; "
        "from lm_jax.data.sources import documents; "
        "documents(DataConfig(('python:',)), 'train')[0]; "
        "heavy = {'jax', 'grain', 'pyarrow', 'tensorflow', 'tensorflow_datasets', 'torch'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
