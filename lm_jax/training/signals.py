"""SIGTERM (a preemption) and SIGINT (Ctrl-C) end a run after the step at hand, saved."""

import os
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignal:
    """While entered, catches the first signal; a second one ends the process as if uncaught."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _frame) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        # Not through the progress bar: the handler may have interrupted it.
        os.write(
            sys.stderr.fileno(),
            f"\n{signal.Signals(number).name}: saving after this step, then stopping;"
            " once more ends it at once\n".encode(),
        )

    def agreed(self) -> int:
        """The signal that some process has caught, or 0: the same answer on all processes."""
        if jax.process_count() == 1:
            return self.number
        with jax.transfer_guard("allow"):
            return int(np.max(multihost_utils.process_allgather(np.array(self.number))))
