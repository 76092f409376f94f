"""Random access to records, dicts of fields: JSON lines, CSV and SQuAD.

A record that cannot be read raises a `UserError` or, with `data.on_error='skip'`, reads as None;
see `lm_jax.data.readers`.
"""

import contextlib
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lm_jax import json_text
from lm_jax.data import files
from lm_jax.data.readers import MARK, Errors, Part, Spans
from lm_jax.errors import UserError
from lm_jax.json_text import JsonError

Record = dict[str, Any]

_SHOWN = 40  # names of fields that a message lists, and characters of each


class Records(Sequence):
    """The records of one file or data set.

    Attributes:
      noun: what a field is called there.
      fields: the names of the fields; None: each record has its own.
    """

    noun = "key"

    def __init__(self, errors: Errors, fields: Sequence[str] | None = None):
        self.errors, self.fields = errors, fields

    def __getitem__(self, i: int) -> Record | None:
        raise NotImplementedError

    def place(self, i: int) -> str:
        """Where record i stands, for messages."""
        raise NotImplementedError

    def check_text(self, key: str) -> None:
        """
        Raises:
          UserError: the field is known to hold no strings.
        """

    def bad(self, i: int, why: str) -> None:
        """Raises for record i, or counts it."""
        self.errors.handle(f"{self.place(i)}: {why}")

    def missing(self, field: str, fields: Sequence[str]) -> str:
        there = ", ".join(f"{name:.{_SHOWN}}" for name in fields[:_SHOWN]) or "none"
        there += ", ..." if len(fields) > _SHOWN else ""
        return f"no {self.noun} '{field}'; {self.noun}s: {there}"


class Column(Sequence):
    """The texts in one field of records; '' where one was skipped."""

    def __init__(self, records: Records, key: str, where: str):
        """
        Raises:
          UserError: no record has such a field, or the first one has no text there.
        """
        self.records, self.key = records, key
        if records.fields is not None and key not in records.fields:
            raise UserError(f"{where}: {records.missing(key, records.fields)}. Set data.text_key")
        records.check_text(key)
        if records.fields is None and len(records):
            self[0]  # a wrong text_key is better known now than in the middle of a run

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> str:
        record = self.records[i]
        if record is None:
            return ""
        if self.key not in record:
            why = self.records.missing(self.key, list(record))
            return self._bad(i, f"{why}. Set data.text_key")
        value = record[self.key]
        if not isinstance(value, str):
            return self._bad(i, f"'{self.key}' must be a string, not {kind(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:  # \\ud800 without its other half is JSON, but no text
            return self._bad(i, f"'{self.key}' holds half of a surrogate pair")
        return value

    def place(self, i: int) -> str:
        return self.records.place(i)

    def _bad(self, i: int, why: str) -> str:
        self.records.bad(i, why)
        return ""


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


class JsonLines(Records):
    """One JSON object a line."""

    def __init__(self, path: str, errors: Errors, part: Part | None = None):
        """`part`: as of `Spans`."""
        super().__init__(errors)
        self.lines = Spans(path, "line", errors, part)

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, i: int) -> str:
        return self.lines.place(i)

    def __getitem__(self, i: int) -> Record | None:
        text = self.lines[i]
        if not text and self.errors.skip:
            return None
        try:
            record = json_text.loads(text)
        except JsonError as e:
            where = f" at column {e.column}" if e.column else ""
            self.bad(i, f"not JSON: {str(e).removesuffix(' at')}{where}; one object a line is read")
            return None
        if not isinstance(record, dict):
            self.bad(i, f"a JSON object is wanted, not {kind(record)}")
            return None
        return record


class Listed(Records):
    """Records that were read at once, of CSV or of a whole JSON file; None where one could not."""

    def __init__(
        self,
        path: str,
        records: Sequence[Record | None],
        places: Sequence[str],
        errors: Errors,
        fields: Sequence[str] | None = None,
    ):
        super().__init__(errors, fields)
        self.path, self.records, self.places = path, records, places
        if not records:
            errors.handle(f"{path}: the file has no records")

    def __len__(self) -> int:
        return len(self.records)

    def place(self, i: int) -> str:
        return f"{self.path}{self.places[i]}"

    def __getitem__(self, i: int) -> Record | None:
        return self.records[i]


@contextlib.contextmanager
def csv_fields_of_any_length() -> Iterator[None]:
    """Where the csv module takes fields of more than its 131,072 characters."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@csv_fields_of_any_length()
def read_csv(path: str, errors: Errors) -> Listed:
    """A CSV file; its first line names the columns. With .tsv, tabs separate these, a record is a
    line, and quotes are quotes. A record that is none is told by the line that it begins in.

    Raises:
      UserError: there are no names of columns, or two are the same.
    """
    data = files.read(path)
    text = data.decode("utf-8-sig", errors="surrogateescape")
    tabs = files.suffix(path) == ".tsv"
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    names, records, places = None, [], []
    while True:
        place = f":{rows.line_num + 1}"
        try:
            row = next(rows, None)
            why = _not_text(row or ())
        except csv.Error as e:
            row, why = [""], f"not CSV: {e}"
        if row is None:
            break
        if not row:
            continue
        if names is None:
            if len(set(names := row)) < len(names):
                why = why or "two columns have the same name"
            if why:
                raise UserError(f"{path}{place}: {why}")
            continue
        if not why and len(row) != len(names):
            why = f"{len(row)} columns, and the first line has {len(names)}"
        places.append(place)
        records.append(None if why else dict(zip(names, row)))
        if why:
            errors.handle(f"{path}{place}: {why}")
    table = Listed(path, records, places, errors, names or [])
    table.noun = "column"
    return table


def _not_text(fields: Sequence[str]) -> str:
    """Why bytes that were read as text are none; '' where they are."""
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as e:
        byte = ord(e.object[e.start]) - 0xDC00  # as 'surrogateescape' has it
        return f"not UTF-8 (0x{byte:02x}): convert the file to UTF-8"
    return ""


def read_json(path: str, errors: Errors) -> Records:
    """A .json file: SQuAD's form, a list of objects, one of these under 'data', or one object a
    line.

    Raises:
      UserError: it is none of them.
    """
    data = files.read(path)
    try:
        values = json_text.loads(data.removeprefix(MARK))
    except JsonError as e:
        if _is_by_lines(data):
            return JsonLines(path, errors)
        where = f" at line {e.line}" if e.line else ""
        where += f" column {e.column}" if e.column else ""
        raise UserError(f"{path}: not JSON: {e}{where}") from None
    where = ""
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values, where = values["data"], "data: "
        if any(isinstance(article, dict) and "paragraphs" in article for article in values):
            return _squad(path, values, errors)
    if isinstance(values, dict):
        values = [values]
    if not isinstance(values, list):
        raise UserError(f"{path}: a list of objects is wanted, not {kind(values)}")
    records, places = [], []
    for i, record in enumerate(values):
        places.append(f": {where}record {i + 1}")
        records.append(record if isinstance(record, dict) else None)
        if records[-1] is None:
            errors.handle(f"{path}{places[-1]}: an object is wanted, not {kind(record)}")
    return Listed(path, records, places, errors)


def _is_by_lines(data: bytes) -> bool:
    """Whether one of the first two lines that are not blank is an object by itself, and the file no
    list of them."""
    data = data.removeprefix(MARK).lstrip()
    lines = [line for line in data.split(b"\n", 3)[:3] if line.strip()][:2]
    for line in lines if not data.startswith(b"[") else ():
        with contextlib.suppress(JsonError):
            if isinstance(json_text.loads(line), dict):
                return True
    return False


def _squad(path: str, articles: list[Any], errors: Errors) -> Listed:
    """SQuAD (Rajpurkar et al. 2016), flat: id, title, context, question, answers (a list of texts)
    and answer_starts (characters of the context)."""
    records: list[Record | None] = []
    places: list[str] = []

    def bad(where: str, why: str) -> None:
        errors.handle(f"{path}: {where}: not in the form of SQuAD ({why})")
        records.append(None)
        places.append(f": {where}")

    def inside(holder: Any, key: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a list in an object, with their places."""
        found = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(found, list):
            bad(where, f"it has no list '{key}'")
            return
        where = f"{where}.{key}" if where else key
        for n, one in enumerate(found):
            if isinstance(one, dict):
                yield f"{where}[{n}]", one
            else:
                bad(f"{where}[{n}]", f"an object is wanted, not {kind(one)}")

    for a, article in inside({"data": articles}, "data", ""):
        for p, paragraph in inside(article, "paragraphs", a):
            for q, question in inside(paragraph, "qas", p):
                try:
                    answers = question.get("answers", [])
                    record = {
                        "id": str(question.get("id", len(records))),
                        "title": str(article.get("title", "")),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": [x["text"] for x in answers],
                        "answer_starts": [x["answer_start"] for x in answers],
                    }
                except (KeyError, TypeError, AttributeError, RecursionError) as e:
                    bad(q, f"{type(e).__name__}: {e}")
                    continue
                records.append(record)
                places.append(f": {q}")
    fields = next((tuple(record) for record in records if record is not None), None)
    return Listed(path, records, places, errors, fields)
