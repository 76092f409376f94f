"""A step's time is its own, whether dispatching it does it, as on a CPU, or begins it."""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT2, on_devices, run_config

from lm_jax.training.steplog import Done, StepLog


class Lines:
    """In place of `Metrics`."""

    def __init__(self):
        self.written: dict[int, dict[str, float]] = {}

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.written[step] = values

    def progress(self, step: int, text: str) -> None:
        pass


class Later:
    """A loss on a device, which is there a second after that of the step before."""

    def __init__(self, clock: "Clock", step: int):
        self._clock, self._step = clock, step

    def is_ready(self) -> bool:
        return self._clock.now >= self._step

    def __array__(self, *_):
        self._clock.now = max(self._clock.now, self._step)
        return np.float32(1.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("at_once", [True, False])
def test_each_interval_has_the_time_of_its_own_steps(monkeypatch, at_once, every):
    clock, lines = Clock(), Lines()
    monkeypatch.setattr(time, "perf_counter", clock)
    config = run_config(GPT2)
    config = dataclasses.replace(
        config,
        logging=dataclasses.replace(config.logging, every=every),
        training=dataclasses.replace(config.training, steps=8),
    )
    log = StepLog(config, on_devices((1, 1, 1)), lines, 0, 1.0)
    for step in range(1, 9):
        if at_once:
            clock.now += 1
            loss = jnp.float32(1)
        else:
            loss = Later(clock, step)
        done = Done(step, {"loss": loss}, 5.0 * step)
        log.add(done)
        if at_once and step == 5:
            with log.paused():
                clock.now += 100
    log.end(done)
    assert list(lines.written) == sorted({1, 8, *range(every, 9, every)})
    assert {values["seconds_per_step"] for values in lines.written.values()} == {1.0}
    rates = [values["tokens_per_second"] for step, values in lines.written.items() if step > 1]
    assert set(rates) == {5.0}
