"""Where the wall time of a run goes, over all its lives: a process that is started again goes on
with the same run, and is another life of it.

WORKDIR/time.jsonl has a line from time to time:

life     an id of the process
began    when it was started, in seconds since 1970
from     the step that it goes on from; 0: afresh
step     the last step that is done
time     when this was written, in seconds since 1970
seconds  by cause, since `began`; see CAUSES

Durations are of a clock that never goes back. The clock on the wall, which may, tells what no
process has seen: the time before this file was imported, and that between two lives.
"""

import dataclasses
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from lm_jax import paths
from lm_jax.progress import clock

FILE = "time.jsonl"
# What a process may spend time on. None of it is counted twice.
CAUSES = {
    "step": "training: steps that are in the model",
    "data": "waiting for a batch",
    "start": "from the start of the process to its first step, without what has a cause of its own",
    "restore": "the state, made anew or from a checkpoint or a published model",
    "compile": "programs, before they run for the first time",
    "save": "checkpoints, as far as training waits for them",
    "evaluate": "validation, and the answers of a task",
    "sample": "what the model writes to be looked at",
    "lost": "steps that were done again after a kill or a rewind, and what was done between them",
}
# What a life costs, whatever becomes of its steps. The rest goes the way of the steps.
_OVERHEAD = {"start", "restore", "compile"}
_LONGEST = 1e12  # seconds or steps; what is more, is damage


@dataclasses.dataclass(frozen=True)
class Totals:
    """
    Attributes:
      seconds: by cause, of all lives; the keys are those of CAUSES.
      down: seconds between the last line of a life and the start of the next, in which no process
        is known to have run. The run may have been left alone on purpose, so that this is no part
        of `seconds`.
      lives: how many there were; 0: nothing is known.
      step: the last one that is done.
    """

    seconds: dict[str, float]
    down: float
    lives: int
    step: int

    @property
    def whole(self) -> float:
        """Seconds of all lives."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of `whole` in which the steps that are in the model were done; NaN: of
        nothing."""
        return self.seconds["step"] / self.whole if self.whole else math.nan

    def text(self) -> str:
        """For a reader, in a line. Causes of less than half a second are left out."""
        lives = f"{self.lives} lives" if self.lives > 1 else "one life"
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        said = ", ".join(f"{cause} {clock(s)}" for cause, s in parts if s >= 0.5)
        share = f"{self.goodput:.1%}" if self.whole else "nothing"
        line = f"goodput {share} of {clock(self.whole)} in {lives}" + (f": {said}" if said else "")
        return line + (f"; down between them {clock(self.down)}" if self.lives > 1 else "")


class Ledger:
    """Keeps the books of one process, in one thread. Process 0 of a job writes; the others are not
    `active`, and touch no file."""

    def __init__(self, workdir: str, *, active: bool, began: float):
        """Touches nothing yet: that waits until it is known that the workdir is this process's.

        Args:
          began: `time.time()` when the process started.
        """
        self._path, self._active, self._began = os.path.join(workdir, FILE), active, began
        self._log: paths.Log | None = None
        self._life, self._from = secrets.token_hex(4), None
        self._seconds = dict.fromkeys(CAUSES.keys() - {"lost"}, 0.0)
        self._seconds["start"] = max(0.0, time.time() - began)
        self._cause, self._since = "start", time.perf_counter()

    def spent(self, cause: str) -> "_Spent":
        """What is done `with` it is of this cause, but for what is done with another one within.

        Outside, time is of 'step', and of 'start' before `resumed`.

        Raises:
          KeyError: there is no such cause.
        """
        self._seconds[cause]  # raises
        return _Spent(self, cause)

    def turn(self, cause: str) -> str:
        """From now on, time is of this cause; returns what it was of."""
        now, before = time.perf_counter(), self._cause
        self._seconds[before] += now - self._since
        self._cause, self._since = cause, now
        return before

    def resumed(self, step: int) -> None:
        """The run goes on from this step; 0: afresh. Steps after it that were done before, by this
        life or another, are lost.

        Where this life itself goes back, `record` comes first, with the step that it has come to.
        """
        if self._from is None:
            self._from = step
            self.turn("step")
        self.record(step)

    def record(self, step: int) -> None:
        """Writes how things stand, `step` being done.

        Where a run goes on from a step between two records, the time between them is shared out by
        their steps. So it is exact where one is written of each step that is saved, after what else
        is done at it.

        Raises:
          ValueError: `resumed` comes first.
        """
        if self._from is None:
            raise ValueError("a record before it is known which step the run goes on from")
        self.turn(self._cause)
        if not self._active:
            return
        if self._log is None:
            _mend(self._path)
            self._log = paths.Log(self._path)
        line = {
            "life": self._life,
            "began": self._began,
            "from": self._from,
            "step": step,
            "time": time.time(),
            "seconds": {cause: round(s, 6) for cause, s in self._seconds.items() if s},
        }
        self._log.write(json.dumps(line) + "\n")

    def end(self, step: int) -> None:
        """The last record of this life; none, if it has not come to `resumed`."""
        if self._from is None:
            return
        self.record(step)
        if self._log is not None:
            self._log.close()
            self._log = None

    def summary(self) -> str:
        """How all of the run's time was spent, as far as it is recorded; '' if not active."""
        if not self._active:
            return ""
        if self._log is not None:
            self._log.flush()
        return read(os.path.dirname(self._path)).text()


class _Spent:
    def __init__(self, ledger: Ledger, cause: str):
        self._ledger, self._cause = ledger, cause

    def __enter__(self) -> None:
        self._outer = self._ledger.turn(self._cause)

    def __exit__(self, *_) -> None:
        self._ledger.turn(self._outer)


def read(workdir: str) -> Totals:
    """What time.jsonl says, if it is there. Lines that are damaged are passed over."""
    return _add_up(record for _, record in _records(os.path.join(workdir, FILE)))


@dataclasses.dataclass(frozen=True)
class _Record:
    """A line of time.jsonl; `start` is its 'from'."""

    life: str
    began: float
    start: int
    step: int
    time: float
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Work:
    """What was spent on steps `first` + 1 to `last`, and at them, by cause."""

    first: int
    last: int
    seconds: dict[str, float]


def _add_up(records: Iterable[_Record]) -> Totals:
    seconds, down = dict.fromkeys(CAUSES, 0.0), 0.0
    done: list[_Work] = []  # what is in the model, in the order of its steps
    newest: dict[str, _Record] = {}  # by life
    last: _Record | None = None

    def undo(step: int) -> None:
        while done and done[-1].last > step:
            work = done.pop()
            kept = 0.0
            if work.first < step:
                kept = (step - work.first) / (work.last - work.first)
                part = {cause: kept * s for cause, s in work.seconds.items()}
                done.append(_Work(work.first, step, part))
            seconds["lost"] += (1 - kept) * sum(work.seconds.values())

    for record in records:
        before = newest.get(record.life)
        if before is None:
            undo(record.start)
            if last is not None:
                down += max(0.0, record.began - last.time)
            before = dataclasses.replace(record, step=record.start, seconds={})
        spent = {c: max(0.0, s - before.seconds.get(c, 0.0)) for c, s in record.seconds.items()}
        for cause in spent.keys() & _OVERHEAD:
            seconds[cause] += spent.pop(cause)
        if record.step < before.step:
            undo(record.step)
            seconds["lost"] += sum(spent.values())
        else:
            done.append(_Work(before.step, record.step, spent))
        newest[record.life] = last = record
    for work in done:
        for cause, s in work.seconds.items():
            seconds[cause] += s
    return Totals(seconds, down, len(newest), last.step if last else 0)


def _mend(path: str) -> None:
    """Takes out of the file what a kill cut off, lest the next line be joined to it."""
    if not paths.exists(path):
        return
    whole = "".join(line + "\n" for line, _ in _records(path))
    if whole.encode() != paths.read_bytes(path):
        paths.write_whole(path, whole)


def _records(path: str) -> Iterator[tuple[str, _Record]]:
    """The lines of the file that can be read, and what they say."""
    if not paths.isfile(path):
        return
    for line in paths.read_bytes(path).decode("utf-8", errors="replace").split("\n"):
        record = _parse(line)
        if record is not None:
            yield line, record


def _parse(line: str) -> _Record | None:
    try:
        values = json.loads(line)
        record = _Record(
            values["life"],
            values["began"],
            values["from"],
            values["step"],
            values["time"],
            values["seconds"],
        )
        numbers = [record.began, record.time, record.start, record.step]
        ok = (
            isinstance(record.life, str)
            and isinstance(record.start, int)
            and isinstance(record.step, int)
            and record.seconds.keys() <= CAUSES.keys() - {"lost"}
            and all(map(_is_amount, [*numbers, *record.seconds.values()]))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if ok else None


def _is_amount(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < _LONGEST
