"""Starts that a launch script makes, and an end of them where they make no progress.

A launch script names itself in LM_JAX_RESTARTED_BY, in the same words for all the starts that it
makes by itself. A command that a person gives has no such variable: it is not counted, and never
refused.

WORKDIR/starts.jsonl has a line for each start that is counted, the newest last:

by      the launch script, as it names itself
time    of the start
newest  the step of the newest checkpoint that it found; null: there was none
ended   how it ended, if the process lived to say so: 'done', a signal, or an error's first line.
        'refused': it was not let go on
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from typing import Any

import jax

from lm_jax import paths
from lm_jax.errors import UserError
from lm_jax.training import together

FILE = "starts.jsonl"
VARIABLE = "LM_JAX_RESTARTED_BY"
# Starts from one and the same checkpoint. A preemption or two before the next save are no sign of
# something that is wrong.
MOST = 3
_KEPT = 100  # lines
_REFUSED = "refused"


class Start:
    """
    Attributes:
      ended: what the file is to say of its end, unless an exception says it.
    """

    ended = "done"


@contextlib.contextmanager
def counted(workdir: str, newest: int | None) -> Iterator[Start]:
    """Counts this start, and how what is done within ends, if a launch script made it. To be
    entered by all processes of a job together.

    Args:
      newest: the step of the newest checkpoint, the same on all of them.

    Raises:
      UserError: on all of them, where MOST starts in a row found this checkpoint the newest.
    """
    start, by = Start(), os.environ.get(VARIABLE, "")
    if not together.said_by_first(bool(by)):
        yield start
        return
    first, message = jax.process_index() == 0, ""
    if first:
        try:
            message = _begin(workdir, by, newest)
        except (OSError, UserError) as e:  # the others wait to hear of it
            message = f"--workdir: '{workdir}' cannot be written: {e}"
    if message := together.said_by_first(message):
        raise UserError(message)
    try:
        yield start
    except BaseException as e:
        start.ended = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        raise
    finally:
        if first:
            with contextlib.suppress(OSError, UserError):  # what ended the run is to be said
                _end(workdir, start.ended)


def _begin(workdir: str, by: str, newest: int | None) -> str:
    """Writes a line; returns why this start is refused, or ''."""
    lines = _read(workdir)
    same: list[dict[str, Any]] = []
    for line in reversed(lines):
        if (line.get("by"), line.get("newest")) != (by, newest) or line.get("ended") == _REFUSED:
            break
        same.insert(0, line)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"by": by, "time": now, "newest": newest}
    refused = len(same) >= MOST
    _write(workdir, [*lines, line | {"ended": _REFUSED} if refused else line])
    if not refused:
        return ""
    found = "no checkpoint" if newest is None else f"step {newest} the newest checkpoint"
    ends = "".join(
        f"\n  {s.get('time')}: {s.get('ended', 'unknown: killed, lost with its machine, or hung')}"
        for s in same
    )
    return (
        f"no progress: {len(same)} starts in a row, by {by}, since {same[0].get('time')}, found"
        f" {found} in '{workdir}', and it is not tried again. They ended so:{ends}\nSee the log for"
        " the reason. When you give the command again, it starts again"
    )


def _end(workdir: str, ended: str) -> None:
    lines = _read(workdir)
    _write(workdir, [*lines[:-1], lines[-1] | {"ended": ended}])


def _read(workdir: str) -> list[dict[str, Any]]:
    path = os.path.join(workdir, FILE)
    if not paths.isfile(path):
        return []
    try:
        return [dict(json.loads(line)) for line in paths.read_text(path).splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove it") from None


def _write(workdir: str, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines[-_KEPT:])
    paths.write_whole(os.path.join(workdir, FILE), text)
