"""A trace of the steps that `logging.profile_steps` names, in WORKDIR/profile."""

import contextlib
import os
from typing import Any

import jax

from lm_jax import paths


class Tracing:
    """Traces the steps from the first to the last of a pair, or none of ()."""

    def __init__(self, workdir: str, steps: tuple[int, ...]):
        self._folder = os.path.join(workdir, "profile")
        self._first, self._last = steps or (0, 0)
        self._on, self._traces = False, contextlib.ExitStack()

    def before(self, step: int | None, newest: Any) -> None:
        """Begins or ends the trace before a step, or (None) at the end of the run.

        Args:
          newest: arrays of the step before, which belongs to the trace.
        """
        wanted = step is not None and self._first <= step <= self._last
        if wanted and not self._on:
            folder = self._traces.enter_context(paths.folder_for_writing(self._folder))
            jax.profiler.start_trace(folder)
        elif self._on and not wanted:
            jax.block_until_ready(newest)
            jax.profiler.stop_trace()
            self._traces.close()
        self._on = wanted
