"""Files that are damaged, hostile or gone: each is said with its place, skipped and counted on
request, and keeps nobody waiting."""

import gzip
import json
import os
import tracemalloc
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_jax import host_memory, json_text
from lm_jax.config import DataConfig
from lm_jax.data import files, readers
from lm_jax.data.encoded import ENDS, IDS, META, Tokens, ids_of, writing
from lm_jax.data.readers import line_number
from lm_jax.data.sources import all_documents
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError

PAIRS = {"objective": "complete", "prompt": "{q}", "target": "{a}"}


def opened(*paths, **fields):
    return all_documents(DataConfig(tuple(map(str, paths)), **fields))


def skipping(*paths, **fields):
    """What is not skipped, and how many are."""
    found = opened(*paths, on_error="skip", **fields)
    return [d for d in found if d and getattr(d, "targets", True)], found.errors.count


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": ' + b"1" * 10_000 + b"}", "an integer of thousands of digits"),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": NaN}', "'text' must be a string, not a number"),
        (b'{"text": "a\x00"}', "Invalid control character"),
        (b'{"text": "' + b"x" * (1 << 24), "Unterminated string"),
        (b"\x00\x01\x02\xff", "not UTF-8"),
        (json.dumps({f"key {i} " + "x" * 500: i for i in range(999)}).encode(), "no key 'text'"),
    ],
    ids=range(8),
)
def test_a_line_that_is_no_record_is_named_and_left_out(line, said, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n \t\r\n' + line + b'\n{"text": "two"}')
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{said}") as e:
        list(opened(path))
    assert len(str(e.value)) < 4000
    assert skipping(path) == (["one", "two"], 1)


def test_how_deep_json_may_be_does_not_depend_on_who_reads_it():
    def outcome(text, frames):
        if frames:
            return outcome(text, frames - 1)
        try:
            return json_text.loads(text)
        except json_text.JsonError as e:
            return str(e)

    deep = "nested too deeply, in more than 200 levels"
    for text, wanted in (
        ("[" * 200 + "]" * 200, json.loads("[" * 200 + "]" * 200)),
        ("[" * 201 + "]" * 201, deep),
        ('{"a": ' * 960 + "1" + "}" * 960, deep),
        ("[" * 960 + "a", deep),
        ('["' + "[" * 960 + '\\"["]', ["[" * 960 + '"[']),
        ("[" + "[[]]," * 960 + "1]", [*[[[]]] * 960, 1]),
    ):
        assert [outcome(text, n) for n in (0, 20, 40)] == [wanted] * 3


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"q": float("nan"), "a": "x"}, "'q' must be text or a number, not nan"),
        ({"q": 1e300 * 1e10, "a": "x"}, "'q' must be text or a number, not inf"),
        ({"q": "x" * 9000, "a": None}, "'a' must be text or a number, not null"),
    ],
)
def test_an_example_of_what_is_no_number_is_none(record, said, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + '\n{"q": 1, "a": 2}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:1: {said}"):
        list(opened(path, **PAIRS))
    assert skipping(path, **PAIRS)[1] == 1


def test_rows_of_a_table_that_are_none_are_told_by_the_line_they_begin_in(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\n"two\nlines",x\n\xff,y\n1,"a"b\n"3\n4",z,\n5,6\n"7,8\n9,10')
    found, skipped = skipping(path, **PAIRS)
    assert [(d.prompt, *d.targets) for d in found] == [("two\nlines", "x"), ("5", "6")]
    assert skipped == 4
    for line, said in ((4, "not UTF-8"), (5, "not CSV"), (6, "3 columns"), (9, "not CSV")):
        rows = path.read_bytes().split(b"\n")
        bad = tmp_path / "bad.csv"  # with nothing wrong before it
        bad.write_bytes(b"\n".join([rows[0], *[b"1,2"] * (line - 2), *rows[line - 1 :]]))
        with pytest.raises(UserError, match=rf"bad\.csv:{line}: .*{said}"):
            list(opened(bad, **PAIRS))


def test_one_question_that_is_damaged_takes_no_others_with_it(tmp_path):
    def question(n, **other):
        return {"id": n, "question": f"q{n}", "answers": [{"text": "a", "answer_start": 0}]} | other

    good, bad = [question(1), question(3)], [question(2, answers=4), 5]
    paragraphs = [{"context": "a", "qas": [good[0], *bad, good[1]]}, {"context": "b"}, None]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}, 7]}))
    fields = {"objective": "extract", "prompt": "{question}", "target": "{answers}"}
    found, skipped = skipping(path, context="{context}", **fields)
    assert [d.prompt for d in found] == ["q1", "q3"] and skipped == 5


def test_a_bad_line_far_into_a_file_costs_no_reading_of_all_before_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes((b"x" * 99 + b"\n") * 60_000)
    assert line_number(str(path), 5_999_999) == 60_000
    read, real = [], files.read
    monkeypatch.setattr(files, "read", lambda p, a, b: (read.append(b - a), real(p, a, b))[1])
    assert [line_number(str(path), 100 * n) for n in (0, 1, 59_999)] == [1, 2, 60_000]
    assert sum(read) < 3 << 20


def test_a_text_file_of_many_parts_is_cut_as_one(tmp_path, monkeypatch):
    text = "\ufeffone\n \nlong " + "x" * 300_000 + "\n\n\t\n" + "two\nlines\n\nthree\n" * 20_000
    path = tmp_path / "a.txt"
    path.write_text(text)
    monkeypatch.setattr(readers, "_CHUNK", 70_000)
    documents = list(opened(path, document="paragraph"))
    assert documents[0] == "one" and documents[1].startswith("long ") and len(documents) == 20_003
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    os.utime(path, (1, 1))
    assert list(opened(path, document="line")) == lines


def test_files_that_are_none_keep_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink("loop.jsonl", tmp_path / "loop.jsonl")
    os.symlink("gone", tmp_path / "link.json")
    (tmp_path / "good.jsonl").write_text('{"q": "1", "a": "2"}\n')
    wrong = {"pipe.jsonl": "is a pipe", "loop.jsonl": "symbolic links", "link.json": "No such file"}
    (tmp_path / ".one").mkdir()  # hidden: not looked into
    for name, said in wrong.items():
        os.rename(tmp_path / name, tmp_path / ".one" / name)
        with pytest.raises(UserError, match=rf"{name}: .*{said}"):
            opened(tmp_path / ".one", **PAIRS)
        os.rename(tmp_path / ".one" / name, tmp_path / name)
    assert len(skipping(tmp_path, **PAIRS)[0]) == 1 and skipping(tmp_path, **PAIRS)[1] == 3
    for kind in (".txt", ".csv", ".parquet", ".json", ".jsonl.gz"):
        os.mkfifo(tmp_path / f"named{kind}")
        with pytest.raises(UserError, match="is a pipe or a device"):
            opened(tmp_path / f"named{kind}", **({} if kind == ".txt" else PAIRS))


def test_a_link_to_a_folder_above_gives_no_file_twice(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    os.symlink("..", tmp_path / "a" / "up")
    assert files.find(f"{tmp_path}/**/*.txt") == [f"{tmp_path}/a/x.txt"]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_that_changes_under_the_reader_is_no_text_of_its_own(zipped, tmp_path):
    path = tmp_path / ("a.jsonl" + ".gz" * zipped)

    def write(*texts):
        data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
        path.write_bytes(gzip.compress(data) if zipped else data)
        os.utime(path, (len(texts), len(data)))

    write("one", "two", "three")
    found, strict = opened(path, on_error="skip"), opened(path)
    write("one", "two", "three", "four")  # added at its end: what was there is there
    assert list(strict) == ["one", "two", "three"]
    write("a longer one", "two")
    assert [text for text in found if text] == [] and found.errors.count == 3
    with pytest.raises(UserError, match=r"a\.jsonl.*changed since it was opened"):
        list(strict)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl.*: cannot be read: No such file"):
        list(strict)


def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    member = zlib.compressobj(wbits=31)
    bomb = b"".join(member.compress(bytes(1 << 24)) for _ in range(12)) + member.flush()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(bomb)
    monkeypatch.setattr(host_memory, "available", lambda: 100e6)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: decompressed, it does not fit"):
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 120e6
    finally:
        tracemalloc.stop()
    path.write_bytes(gzip.compress(b'{"text": "x"}\n') + b"rubbish")
    for data in (path.read_bytes(), path.read_bytes()[:20]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: not a readable gzip file"):
            opened(path)


def test_parquet_of_other_shapes(tmp_path):
    path = tmp_path / "a.parquet"

    def write(table, **options):
        pq.write_table(table, path, **options)
        return path.read_bytes()

    good = write(pa.table({"text": [f"row {i}" for i in range(9)]}), row_group_size=3,
                 write_page_checksum=True, compression="none", use_dictionary=False)  # fmt: skip
    damaged = good.replace(b"row 4", b"row X", 1)
    path.write_bytes(damaged)
    found, skipped = skipping(path)  # the row group of it cannot be trusted
    assert found == [f"row {i}" for i in (0, 1, 2, 6, 7, 8)] and skipped == 3
    path.write_bytes(good)
    os.utime(path, (1, 1))
    before = opened(path)
    assert before[5] == "row 5"
    write(pa.table({"text": ["x"]}))
    with pytest.raises(UserError, match=r"a\.parquet: row 2: .*changed since it was opened"):
        _ = before[1]
    path.write_bytes(good[:-30])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        opened(path)
    write(pa.table({"text": pa.array([], pa.string())}))
    with pytest.raises(UserError, match=r"a\.parquet: the file has no rows"):
        opened(path)
    write(pa.table({"q": ["a"], "a": pa.array([2**60], pa.timestamp("us"))}))
    with pytest.raises(UserError, match=r"a\.parquet: row 1: cannot be read"):
        list(opened(path, **PAIRS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "O"),
        ("tokens", "9"),
        ("tokens", -1),
        ("documents", 1.0),
        ("complete", 1),
        ("x", 1),
    ],
)
def test_a_folder_of_tokens_that_says_what_it_does_not_say(field, value, tmp_path):
    with writing(str(tmp_path), BytesTokenizer()) as writer:
        writer.add(np.arange(9), np.array([4, 0, 5]), 9, 0, "")
        writer.meta.complete = True
    meta = json.loads((tmp_path / META).read_text())
    found = Tokens(str(tmp_path))
    assert [found[i].ids.tolist() for i in range(3)] == [[0, 1, 2, 3], [], [4, 5, 6, 7, 8]]
    (tmp_path / META).write_text(json.dumps(meta | {field: value}))
    with pytest.raises(UserError, match=f"{META}: damaged"):
        Tokens(str(tmp_path))


def test_tokens_that_are_damaged(tmp_path):
    tokenizer = BytesTokenizer()
    with writing(str(tmp_path), tokenizer) as writer:
        writer.add(np.arange(9), np.array([4, 0, 5]), 9, 0, "")
        writer.meta.complete = True
    found = Tokens(str(tmp_path))
    np.array([4, 3, 9], "<i8").tofile(tmp_path / ENDS)
    with pytest.raises(UserError, match="ends: damaged"):
        Tokens(str(tmp_path))
    np.array([4, 4, 9], "<i8").tofile(tmp_path / ENDS)
    np.array([0, 999, *[0] * 7], "<u2").tofile(tmp_path / IDS)
    with pytest.raises(UserError, match="ids: damaged: it holds ids that its tokenizer"):
        ids_of(found[0], tokenizer)
    os.truncate(tmp_path / IDS, 6)  # while it is open
    with pytest.raises(UserError, match="ids: ends at byte 6, before byte 8"):
        _ = found[0]
