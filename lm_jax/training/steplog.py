"""What a run logs of its steps: a line of numbers now and then, and how fast it goes."""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lm_jax.config import Config
from lm_jax.model.flops import peak_flops
from lm_jax.training.metrics import Metrics, Stopwatch, speed


class Done(NamedTuple):
    """A step that was dispatched."""

    step: int
    metrics: dict[str, jax.Array]  # read when the next step is on its way
    tokens: float  # real ones, of all steps of this process's life up to this one


class StepLog:
    """Logs each `logging.every`-th step, the first one and the last, while the next one runs."""

    def __init__(
        self, config: Config, mesh: Mesh, metrics: Metrics, start: int, flops_per_token: float
    ):
        self._config, self._metrics, self._flops_per_token = config, metrics, flops_per_token
        self._peak = peak_flops(mesh.devices.flat[0].device_kind) * mesh.size
        self._watch = Stopwatch()
        self._first = start + 1
        self._logged, self._waiting = Done(start, {}, 0.0), None
        self._took: float | None = None  # seconds, of what waits and was done when it came

    def add(self, done: Done) -> None:
        """Logs what waits; `done` waits from now on, if it is one that is logged."""
        self.settle()
        due = done.step % self._config.logging.every == 0
        if due or done.step in (self._first, self._config.training.steps):
            # On a CPU, dispatching a step can be doing it: the next one's time is not this one's.
            self._took = self._watch.lap() if done.metrics["loss"].is_ready() else None
            self._waiting = done

    def end(self, done: Done | None) -> None:
        """Logs the last step, `done`, whichever it is."""
        self.settle()
        if done is not None and done.step > self._logged.step:
            self._waiting, self._took = done, None
            self.settle()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what is done inside out of the time of the steps."""
        self.settle()
        with self._watch:
            yield

    def settle(self) -> None:
        """Logs what waits to be."""
        if self._waiting is None:
            return
        done, self._waiting = self._waiting, None
        values = {key: float(value) for key, value in jax.device_get(done.metrics).items()}
        seconds, steps = self._took, done.step - self._logged.step
        if seconds is None:
            seconds = self._watch.lap()
        values["seconds_per_step"] = seconds / steps
        note = f"first step in {seconds:.1f} s, compilation included"
        if done.step > self._first:  # of the first, the time says nothing about the next
            rate = (done.tokens - self._logged.tokens) / seconds
            flops = rate * self._flops_per_token
            values |= {"tokens_per_second": rate, "model_flops_per_second": flops}
            if not math.isnan(self._peak):
                values["mfu"] = flops / self._peak
            left = (self._config.training.steps - done.step) * seconds / steps
            note = speed(values, left)
        self._logged = done
        if all(map(math.isfinite, values.values())):  # others are told, and are no measure
            self._metrics.write("train", done.step, values)
        self._metrics.progress(done.step, f"loss {values['loss']:.4f} | {note}")
