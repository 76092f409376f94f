"""Metrics to the terminal, to JSON lines, to TensorBoard and, on request, to Weights & Biases."""

import hashlib
import json
import os
import sys
import time

from lm_jax import json_text, paths
from lm_jax.config import Config
from lm_jax.errors import UserError
from lm_jax.progress import clock
from lm_jax.training.events import Events


class Metrics:
    """Writes what one run measures. Only the first process of a job writes."""

    def __init__(self, workdir: str, config: Config, start: int, *, active: bool):
        """
        Args:
          start: the step that the run goes on from; later lines of a killed run are dropped.

        Attributes:
          measured: (kind, step) of the lines that were there.
        """
        self.measured: set[tuple[str, int]] = set()
        self._active, self._steps = active, config.training.steps
        self._bar = self._tensorboard = self._wandb = None
        if not active:
            return
        path = os.path.join(workdir, "metrics.jsonl")
        self.measured = _drop_after(path, start)
        self._file = paths.Log(path)
        if config.logging.tensorboard:
            self._tensorboard = Events(os.path.join(workdir, "tensorboard"), start)
        if config.logging.wandb:
            self._wandb = _start_wandb(workdir, config)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._steps,
                initial=start,
                dynamic_ncols=True,
                leave=False,
                bar_format="step {n}/{total} |{bar:20}| {desc}",
            )

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; `kind` is 'train', 'validation' or 'task'."""
        if not self._active:
            return
        self._file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
        if self._tensorboard:
            self._tensorboard.add({f"{kind}/{key}": v for key, v in values.items()}, step)
        if self._wandb:
            self._wandb.log({f"{kind}/{key}": v for key, v in values.items()}, step=step)

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step; what is written of later ones stays."""
        if not self._active:
            return
        self.measured = {(kind, at) for kind, at in self.measured if at <= step}
        if self._tensorboard:
            self._tensorboard.go_back(step)

    def progress(self, step: int, text: str) -> None:
        """The live line on a terminal, a line of its own elsewhere."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        else:
            self.say(f"step {step}/{self._steps} | {text}")

    def say(self, text: str) -> None:
        """A line for the reader, above the live one."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Before a checkpoint: what leads to it is logged."""
        if self._active:
            self._file.flush()

    def close(self) -> None:
        """Nothing is written afterwards."""
        if not self._active:
            return
        self._file.close()
        for other in (self._bar, self._tensorboard):
            if other is not None:
                other.close()
        if self._wandb:
            self._wandb.finish()
        self._active = False


class Stopwatch:
    """Wall time of training alone: evaluation, saving and sampling are paused out of it."""

    def __init__(self):
        self._started, self._paused, self._pause_began = time.perf_counter(), 0.0, None

    def __enter__(self) -> None:
        """Pauses."""
        self._pause_began = time.perf_counter()

    def __exit__(self, *_) -> None:
        self._paused += time.perf_counter() - self._pause_began

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds = now - self._started - self._paused
        self._started, self._paused = now, 0.0
        return seconds


def _drop_after(path: str, step: int) -> set[tuple[str, int]]:
    """Removes the lines of steps that will be run again, and a line cut off by a kill; (kind, step)
    of the others, without those that a run undid when it went back."""
    kept, there = [], set()
    if not paths.exists(path):
        return there
    for line in paths.read_bytes(path).split(b"\n"):
        try:
            record = json_text.loads(line)
            back = record.get("to")  # of kind 'rewound': the step that the run went back to
            if (record["step"] if back is None else back) > step:
                continue
            if back is not None:
                there = {(kind, at) for kind, at in there if at <= back}
            else:
                there.add((record["kind"], record["step"]))
            kept.append(line.decode() + "\n")
        except (json_text.JsonError, AttributeError, KeyError, TypeError):
            continue
    paths.write_whole(path, "".join(kept))
    return there


def _start_wandb(workdir: str, config: Config):
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging.wandb: wandb is not installed: pip install 'lm_jax[wandb]'"
        ) from None
    import dataclasses

    return wandb.init(
        project=config.logging.wandb,
        dir=None if paths.remote(workdir) else workdir,
        name=os.path.basename(paths.absolute(workdir)),
        config=dataclasses.asdict(config),
        id=hashlib.sha256(paths.absolute(workdir).encode()).hexdigest()[:16],
        resume="allow",  # the same id, so that a resumed run goes on in the same place
    )


def speed(values: dict[str, float], seconds_left: float) -> str:
    """Throughput and the time left, for a reader."""
    parts = [f"{_short(values['tokens_per_second'])} tokens/s"]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    return " | ".join([*parts, f"{clock(seconds_left)} left"])


def _short(n: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return f"{n:.0f}"
