"""What the folder of a run says of it, whether it has ended, goes on or has been killed."""

import dataclasses
import json
import math
import os
import re
from typing import Any

from lm_jax import paths
from lm_jax.config import Config
from lm_jax.training import goodput
from lm_jax.training.workdir import read_config

Series = list[tuple[int, float]]  # (step, value), a step once, in their order

_KINDS = {"train", "validation", "task"}  # of lines that measure
_EVENTS = {"skipped", "rewound"}
_MOST = 2**53  # steps; what is more, is damage


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that a run has had to do about a step.

    Attributes:
      kind: 'skipped': the step's update was left out; 'rewound': the run went back.
      to: of the latter, the step that it went back to.
      values: what else the line says of it, such as loss and gradient_norm.
    """

    kind: str
    step: int
    to: int | None
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """
    Attributes:
      measured: by kind and name, such as ('train', 'loss').
      undone: the training loss of steps that were done again after a rewind, one for each.
      events: in their order.
      samples: (step, text) in their order.
      unread: lines of metrics.jsonl that make no sense, such as one that a kill cut off.
    """

    workdir: str
    config: Config
    measured: dict[tuple[str, str], Series]
    undone: list[Series]
    events: list[Event]
    samples: list[tuple[int, str]]
    time: goodput.Totals
    unread: int

    def of(self, kind: str, name: str) -> Series:
        """The values of that name; [] where there are none."""
        return self.measured.get((kind, name), [])

    @property
    def step(self) -> int:
        """The last one that anything is known of."""
        steps = [series[-1][0] for series in self.measured.values()]
        return max([*steps, self.time.step])


def read(workdir: str) -> Run:
    """
    Raises:
      UserError: there is no run in `workdir`, or one of a config that cannot be read.
    """
    config = read_config(workdir)
    measured, undone, events, unread = _metrics(_lines(os.path.join(workdir, "metrics.jsonl")))
    return Run(
        workdir=workdir,
        config=config,
        measured=measured,
        undone=undone,
        events=events,
        samples=_samples(_lines(os.path.join(workdir, "samples.txt"))),
        time=goodput.read(workdir),
        unread=unread,
    )


def _lines(path: str) -> list[str]:
    if not paths.isfile(path):
        return []
    return paths.read_bytes(path).decode("utf-8", errors="replace").split("\n")


def _metrics(
    lines: list[str],
) -> tuple[dict[tuple[str, str], Series], list[Series], list[Event], int]:
    """`measured`, `undone`, `events` and `unread` of a Run."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    undone, events, unread = [], [], 0
    for line in filter(str.strip, lines):
        record = _parse(line)
        if record is None:
            unread += 1
            continue
        kind, step = record.pop("kind"), record.pop("step")
        to, values = record.pop("to", None), _numbers(record)
        if kind in _KINDS:
            for name, value in values.items():
                found.setdefault((kind, name), {})[step] = value
        elif kind in _EVENTS:
            to = to if _is_step(to) else None
            events.append(Event(kind, step, to, values))
            if to is not None:
                undone.append(_take_after(found, to))
    measured = {key: sorted(series.items()) for key, series in found.items() if series}
    return measured, list(filter(None, undone)), events, unread


def _take_after(found: dict[tuple[str, str], dict[int, float]], step: int) -> Series:
    """Takes out what belongs to steps after this one; returns the training loss among it."""
    taken = []
    for key, series in found.items():
        after = sorted(s for s in series if s > step)
        gone = [(s, series.pop(s)) for s in after]
        if key == ("train", "loss"):
            taken = gone
    return taken


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if _is_step(record.get("step")) else None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                numbers[name] = float(value)
            except OverflowError:
                numbers[name] = math.inf if value > 0 else -math.inf
    return numbers


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _samples(lines: list[str]) -> list[tuple[int, str]]:
    """What stands below each line '=== step 20 ==='."""
    found: list[tuple[int, list[str]]] = []
    for line in lines[:-1] if lines[-1:] == [""] else lines:  # without what is behind the last end
        if (head := re.fullmatch(r"=== step ([0-9]{1,15}) ===", line)) is not None:
            found.append((int(head[1]), []))
        elif found:
            found[-1][1].append(line)
    return [(step, "\n".join(text)) for step, text in found]
