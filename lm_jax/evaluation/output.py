"""The single records of an evaluation, as JSON lines, and a report beside them.

FILE.jsonl has a record a line, written when the few batches that it was answered in are done: these
alone a kill loses. FILE.report.json says from the beginning what they are of, and at the end what
came of it. An evaluation that was stopped goes on with the records that are there, if they are of
the same model, asked in the same way.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable
from typing import Any

from lm_jax import json_text, paths
from lm_jax.errors import UserError

Record = dict[str, Any]
_KEYS = ("settings", "result")  # of a report


def report_of(path: str) -> str:
    """The report's path, of a file of records."""
    return path.removesuffix(".jsonl") + ".report.json"


def line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def report_text(settings: dict[str, Any], result: dict[str, Any] | None) -> str:
    """
    Args:
      settings: what the records depend on, fit for JSON.
      result: what came of them; None: not yet known.
    """
    values = dict(zip(_KEYS, (settings, result)))
    return json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"


def write_whole(
    path: str, records: Iterable[Record], settings: dict[str, Any], result: dict[str, Any]
) -> None:
    """Writes all of it, the report last: where that is, the records are whole."""
    paths.write_whole(path, "".join(map(line, records)))
    paths.write_whole(report_of(path), report_text(settings, result))


class Output:
    """A file that records go to. Use as a context: while it is open, no other process writes it.

    Attributes:
      records: those that are there from before.
    """

    def __init__(self, path: str, settings: dict[str, Any], flag: str = "output"):
        """
        Args:
          settings: what the records depend on, fit for JSON; of a name 'model' it is for people
            alone, and not compared.
          flag: for messages.

        Raises:
          UserError: the file holds something else, or the records of other settings; it cannot be
            written, or another process writes it.
        """
        self._path, self._flag = path, flag
        self._settings = json.loads(json.dumps(settings, default=str))
        folder = os.path.dirname(path)
        if folder and not os.path.isdir(folder):
            raise UserError(f"--{flag}: there is no folder '{folder}'")
        there = os.path.exists(path) and os.path.getsize(path) > 0
        if there or os.path.exists(report_of(path)):
            self._check_settings(there)
        try:
            self._file = open(path, "ab+")  # noqa: SIM115 (closed in __exit__)
        except OSError as e:
            raise UserError(f"--{flag}: '{path}' cannot be written: {e.strerror}") from None
        try:
            self._lock()
            self.records = self._read()
            paths.write_whole(report_of(path), report_text(self._settings, None))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, record: Record) -> None:
        self._file.write(line(record).encode())
        self._file.flush()

    def finish(self, result: dict[str, Any]) -> None:
        """Says what came of the records, all of which are there."""
        paths.write_whole(report_of(self._path), report_text(self._settings, result))

    def _check_settings(self, there: bool) -> None:
        path = report_of(self._path)
        try:
            found = json_text.loads(paths.read_bytes(path))
            before = dict(found["settings"])
            if tuple(found) != _KEYS:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            what = f"'{self._path}' is there already" if there else f"'{path}' is another file"
            raise UserError(
                f"--{self._flag}: {what}, and was not written by an evaluation: name another file"
            ) from None
        now = self._settings
        changed = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in dict.fromkeys([*before, *now])
            if key != "model" and before.get(key) != now.get(key)
        ]
        if changed:
            raise UserError(
                f"--{self._flag}: '{self._path}' was begun otherwise; name another file, or"
                " undo:\n  " + "\n  ".join(changed)
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--{self._flag}: another process is writing '{self._path}': wait for it, or name"
                " another file"
            ) from None
        except OSError:  # a file system without locks
            return

    def _read(self) -> list[Record]:
        """The records; a last line that is not whole, which a kill cut off, is removed."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        found = []
        for n, text in enumerate(data[:whole].split(b"\n")[:-1], 1):
            record = None
            with contextlib.suppress(ValueError):
                record = json_text.loads(text)
            if not isinstance(record, dict):
                raise UserError(
                    f"--{self._flag}: '{self._path}', line {n}: no record of an evaluation: name"
                    " another file"
                )
            found.append(record)
        return found
