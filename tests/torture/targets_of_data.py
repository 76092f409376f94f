"""Text, JSON, CSV, Parquet, gzip and folders of tokens, each against a simple reader."""

import contextlib
import csv
import gzip
import io
import json
import pathlib
import re
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzzing import Target

from lm_jax.config import DataConfig
from lm_jax.data import encoded
from lm_jax.data.encoded import Tokens, ids_of
from lm_jax.data.examples import SKIPPED, Example
from lm_jax.data.sources import all_documents
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError

BLANK = b" \t\r\n\v\f"


def opened(path: pathlib.Path, **fields) -> tuple[list, int]:
    """The documents that were not skipped, and how many were."""
    found = all_documents(DataConfig((str(path),), on_error="skip", **fields))
    documents = [
        (document.prompt, document.targets) if isinstance(document, Example) else document
        for document in found
        if document and document != SKIPPED
    ]
    return documents, found.errors.count


def first_error(path: pathlib.Path, **fields) -> str:
    """What is said where nothing is skipped; '' if nothing is."""
    try:
        list(all_documents(DataConfig((str(path),), **fields)))
    except UserError as e:
        assert str(path) in str(e), e
        return str(e)
    return ""


def agree(path: pathlib.Path, good: list, bad: list[int], **fields) -> bool:
    """Checks that all that is good comes through, that as many are skipped as are bad, and that the
    first of these is named with its line."""
    try:
        documents, skipped = opened(path, **fields)
    except UserError:
        assert not good
        return False
    assert documents == good, (documents[:3], good[:3], len(documents), len(good))
    assert skipped == len(bad), (skipped, bad)
    said = first_error(path, **fields)
    assert bool(said) == bool(bad), said
    if bad:
        # Of a table, rows that are none are told before those that are no examples.
        named = bad if path.suffix in (".csv", ".tsv") else bad[:1]
        assert any(f"{path}:{line}:" in said for line in named), (said, bad)
    return bool(documents)


def lines_of(data: bytes) -> list[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; without a byte order mark."""
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    return [(n, line) for n, line in lines if line.strip(BLANK)]


def text(data: bytes, folder: pathlib.Path) -> bool:
    path = folder / "a.txt"
    path.write_bytes(data)
    done = False
    whole = data.removeprefix(b"\xef\xbb\xbf")
    parts = re.split(rb"\n(?:[ \t\r]*\n)+", whole)
    units = {
        "line": [line for _, line in lines_of(data)],
        "paragraph": parts,
        "file": [whole],
    }
    for unit, pieces in units.items():
        good, bad = [], 0
        for piece in pieces:
            try:
                good.append(piece.decode())
            except UnicodeDecodeError:
                bad += 1
        good = [document for document in good if document.strip(BLANK.decode())]
        if not good:
            try:
                documents, _ = opened(path, document=unit)
            except UserError:
                continue
            assert not "".join(documents).strip(), documents
            continue
        documents, skipped = opened(path, document=unit)
        assert [d for d in documents if d.strip(BLANK.decode())] == good, (unit, documents, good)
        assert skipped == bad, (unit, skipped, bad)
        said = first_error(path, document=unit)
        assert bool(said) == bool(bad), said
        done = True
    return done


def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("twice")
    return found


def record_of(line: bytes | str):
    """What a line says by itself; None: no object."""
    try:
        text = line.decode() if isinstance(line, bytes) else line
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_text(value) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def jsonl(data: bytes, folder: pathlib.Path) -> bool:
    path = folder / "a.jsonl"
    path.write_bytes(data)
    good, bad = [], []
    for n, line in lines_of(data):
        record = record_of(line)
        if record is not None and is_text(record.get("text")):
            good += [record["text"]] if record["text"] else []
        else:
            bad.append(n)
    return agree(path, good, bad)


def value_of(record, name: str):
    """A field as text, if it is text or a number; else None."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if is_text(str(value)) else None


PAIRS = {"objective": "complete", "prompt": "{q}: ", "target": "{a}"}


def pair_of(record):
    """(prompt, targets) of a record; None where it is no example."""
    q, a = (None, None) if record is None else (value_of(record, "q"), value_of(record, "a"))
    if record is not None and isinstance(record.get("a"), list):
        several = [value_of({"a": one}, "a") for one in record["a"]]
        if q is None or None in several or not any(s.strip() for s in several):
            return None
        return f"{q}: ", tuple(dict.fromkeys(s for s in several if s.strip()))
    return None if q is None or a is None or not a.strip() else (f"{q}: ", (a,))


def examples(data: bytes, folder: pathlib.Path) -> bool:
    """Records as examples, of JSON lines."""
    path = folder / "b.jsonl"
    path.write_bytes(data)
    good, bad = [], []
    for n, line in lines_of(data):
        record = record_of(line)
        target = [] if record is None else record.get("a")
        if any(isinstance(x, dict) for x in (target, *(target if type(target) is list else ()))):
            return True  # objects of lists, or lists of objects: what data sets nest
        if record is not None and isinstance(record.get("q"), dict | list):
            record = None
        pair = pair_of(record)
        if pair is None:
            bad.append(n)
        else:
            good.append(pair)
    return agree(path, good, bad, **PAIRS)


def conversations(data: bytes, folder: pathlib.Path) -> bool:
    path = folder / "c.jsonl"
    path.write_bytes(data)
    fields = {"objective": "chat", "prompt": "{messages}"}
    found = all_documents(DataConfig((str(path),), on_error="skip", **fields))
    lines = lines_of(data)
    read = [d for d in found if d != SKIPPED]
    assert len(read) + found.errors.count == len(lines) == len(found)
    for document in read:
        assert document.messages[-1]["role"] == "assistant"
        assert all(is_text(v) for m in document.messages for v in m.values())
    return bool(read)


def answers(data: bytes, folder: pathlib.Path) -> bool:
    """SQuAD's form, and the other forms of a JSON file."""
    path = folder / "d.json"
    path.write_bytes(data)
    fields = {"objective": "extract", "prompt": "{question}", "context": "{context}"}
    fields |= {"target": "{answers}", "answer_starts": "answer_starts", "unanswerable": True}
    found = all_documents(DataConfig((str(path),), on_error="skip", **fields))
    read = [d for d in found if d != SKIPPED]
    for document in read:
        if document.targets[0] and not document.misplaced:
            assert document.context.startswith(document.targets[0], document.start)
    return bool(read)


def squad_questions(data: bytes, folder: pathlib.Path) -> bool:
    """Each question that is in order by itself comes through, whatever those beside it are."""
    answers(data, folder)
    values, good = json.loads(data), 0
    articles = values.get("data") if isinstance(values, dict) else []
    for article in articles if isinstance(articles, list) else []:
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else []
        for paragraph in paragraphs if isinstance(paragraphs, list) else []:
            if not isinstance(paragraph, dict) or not isinstance(paragraph.get("context"), str):
                continue
            for q in paragraph["qas"] if isinstance(paragraph.get("qas"), list) else []:
                if (
                    isinstance(q, dict)
                    and is_text(q.get("question"))
                    and is_text(paragraph["context"])
                ):
                    a = q.get("answers")
                    good += isinstance(a, list) and all(
                        isinstance(x, dict)
                        and is_text(x.get("text"))
                        and type(x.get("answer_start")) is int
                        for x in a
                    )
    fields = {"objective": "extract", "prompt": "{question}", "context": "{context}"}
    fields |= {"target": "{answers}", "answer_starts": "answer_starts", "unanswerable": True}
    path = folder / "d.json"
    found = all_documents(DataConfig((str(path),), on_error="skip", **fields))
    read = sum(d != SKIPPED for d in found)
    assert read >= good, (read, good)
    return True


def tables(name: str):
    def check(data: bytes, folder: pathlib.Path) -> bool:
        path = folder / name
        path.write_bytes(data)
        good, bad = rows_of(data, "\t" if name.endswith("tsv") else ",")
        if good is None:
            assert first_error(path, **PAIRS)
            return False
        return agree(path, good, bad, **PAIRS)

    return check


def rows_of(data: bytes, comma: str):
    """The examples of a table, and the lines at which rows begin that are none; (None, []) where
    there are none at all."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    quoting = csv.QUOTE_MINIMAL if comma == "," else csv.QUOTE_NONE
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=comma, quoting=quoting, strict=True)
    names, good, bad = None, [], []
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error:
            if names is None:
                return None, []
            bad.append(line)
            continue
        if not row:
            continue
        if names is None:
            names = row
            if len(set(names)) < len(names) or not {"q", "a"} <= set(names):
                return None, []
            if not all(map(is_text, names)):
                return None, []
            continue
        pair = None
        if len(row) == len(names) and all(map(is_text, row)):
            pair = pair_of(dict(zip(names, row)))
        if pair is None:
            bad.append(line)
        else:
            good.append(pair)
    return (good, bad) if good else (None, [])


def zipped(data: bytes, folder: pathlib.Path) -> bool:
    path = folder / "e.jsonl.gz"
    path.write_bytes(data)
    inside, left = b"", data
    while left.strip(b"\0") or (not inside and left):
        member = zlib.decompressobj(31)
        try:
            inside += member.decompress(left)
        except zlib.error as e:
            inside = None
            if re.search("header (flags|crc)", str(e)):  # at which Python's gzip does not look
                with contextlib.suppress(OSError, EOFError, zlib.error):
                    inside = gzip.decompress(data)
            break
        if not member.eof:
            inside = None
            break
        left = member.unused_data.lstrip(b"\0")
    if inside is None:
        assert "gzip" in first_error(path)
        return False
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    (plain / "e.jsonl").write_bytes(inside)
    try:
        expected = opened(plain / "e.jsonl")
    except UserError:
        assert "gzip" not in first_error(path)
        return False
    assert opened(path) == expected
    return True


def parquet(data: bytes, folder: pathlib.Path) -> bool:
    path = folder / "f.parquet"
    path.write_bytes(data)
    found = all_documents(DataConfig((str(path),), on_error="skip"))
    documents = [document for document in found if document]
    try:
        column = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return bool(documents)  # a part of it may be damaged
    expected = [text for text in column if text]
    assert documents == expected or found.errors.count, (documents[:3], expected[:3])
    return bool(documents)


def tokens(data: bytes, folder: pathlib.Path) -> bool:
    """The description of a folder of tokens, then a zero byte, and where its documents end."""
    tokenizer, inner = BytesTokenizer(), folder / "tokens"
    inner.mkdir()
    np.arange(40).astype("<u2").tofile(inner / encoded.IDS)
    meta, _, ends = data.partition(b"\0")
    (inner / encoded.META).write_bytes(meta.replace(b"FINGERPRINT", tokenizer.fingerprint.encode()))
    (inner / encoded.ENDS).write_bytes(ends)
    found = Tokens(str(inner))
    stored = (inner / encoded.IDS).read_bytes()
    joined = [ids_of(found[i], tokenizer) for i in range(min(len(found), 1000))]
    width = np.dtype(found.meta.dtype).itemsize
    expected = np.frombuffer(stored[: len(stored) // width * width], found.meta.dtype)
    total = np.concatenate([np.zeros(0, np.int32), *joined])
    np.testing.assert_array_equal(total, expected[: len(total)])
    assert all(0 <= i < tokenizer.vocab_size for i in total)
    return True


def _parquet_seed(**options) -> bytes:
    out = io.BytesIO()
    table = pa.table({"text": ["one", "", None, "four é"] * 3, "n": list(range(12))})
    pq.write_table(table, out, row_group_size=5, **options)
    return out.getvalue()


def _gzip(data: bytes) -> bytes:
    member = zlib.compressobj(wbits=31)
    return member.compress(data) + member.flush()


_LINES = (
    b'{"text": "one"}\n\n{"text": "two \\u00e9", "n": 1}\r\n{"text": 3}\n{"text": "\xc3\xa9"}\n'
)
_META = json.dumps({
    "fingerprint": "FINGERPRINT", "dtype": "<u2", "documents": 3, "tokens": 40, "text_bytes": 40,
    "skipped": 0, "blocks": 1, "digest": "d", "complete": True,
})  # fmt: skip
_SQUAD = json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": [
    {"context": "a cat sat", "qas": [
        {"id": "1", "question": "who?", "answers": [{"text": "a cat", "answer_start": 0}]},
        {"id": "2", "question": "what?", "answers": []},
        {"id": "3", "question": "did?", "answers": [{"text": "sat", "answer_start": 6}]},
    ]}, {"context": "x", "qas": []}]}]}).encode()  # fmt: skip
_CHAT = b"".join(
    json.dumps({"messages": m}).encode() + b"\n"
    for m in (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q", "name": "n"},
            {"role": "assistant", "content": "a", "weight": 1},
            {"role": "user", "content": "x"},
        ],
    )
)
_FIELDS = (
    b'"q"',
    b'"a"',
    b'"text"',
    b"null",
    b"true",
    b'"',
    b'""',
    b"q,a\n",
    b"q\ta\n",
    b",",
    b"\n",
)

DATA = {
    "text": Target(
        text, (b"one\ntwo\n\nthree \xc3\xa9\r\n\r\n \n", b"\xef\xbb\xbfx\n", b"a\xffb\nc\n")
    ),
    "jsonl": Target(jsonl, (_LINES, _LINES * 3), _FIELDS),
    "json_record": Target(jsonl, (b'{"text": "one", "n": [1, {"text": 2}]}',), _FIELDS, True),
    "examples": Target(
        examples,
        (b'{"q": "who", "a": "cat"}\n{"q": 1.5, "a": ["x", "", "y"], "z": null}\n',),
        _FIELDS,
    ),
    "example": Target(examples, (b'{"q": "who", "a": ["cat", 2]}',), _FIELDS, True),
    "conversations": Target(conversations, (_CHAT,), (b'"role"', b'"weight"', b"assistant")),
    "conversation": Target(conversations, _CHAT.splitlines(), (), True),
    "json": Target(
        answers, (_SQUAD, b'[{"question": "q", "context": "c", "answers": "c"}]'), (), True
    ),
    "squad": Target(squad_questions, (_SQUAD,), (), True),
    "csv": Target(
        tables("g.csv"), (b'q,a,z\r\nwho,cat,\r\n"a ""b""\nc",d,e\r\n', b"q,a\n\nx,y\nz\n"), _FIELDS
    ),
    "tsv": Target(tables("g.tsv"), (b'q\ta\nwho\t"cat\n\nx\ty\n', b"a\tq\nx\ty\nz\n"), _FIELDS),
    "gzip": Target(zipped, (_gzip(_LINES), _gzip(_LINES) + _gzip(b'{"text": "z"}\n') + b"\0\0")),
    "parquet": Target(
        parquet, (_parquet_seed(), _parquet_seed(compression="none", use_dictionary=False))
    ),
    "tokens": Target(
        tokens,
        (_META.encode() + b"\0" + np.array([10, 10, 40], "<i8").tobytes(),),
        (b'"<i4"', b'"O"', b'"|V0"', b"true", b"false", b"-1", b"[]"),
    ),
}
