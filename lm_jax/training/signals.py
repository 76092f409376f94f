"""SIGTERM (a preemption) and SIGINT (Ctrl-C) end a run after the step at hand, saved."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class StopSignal:
    """While entered, catches the first signal; a second one ends the process as if uncaught."""

    def __init__(self, mesh: Mesh) -> None:
        self.number = 0
        self._before: dict[int, object] = {}
        self._mesh, self._largest = mesh, jax.jit(jnp.max)
        self._sent: tuple[int, jax.Array] | None = None  # a number, on each device
        self._asked: jax.Array | None = None  # the largest of all devices, being computed

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
        return self.number if jax.process_count() == 1 else int(self._ask())

    def noticed(self) -> int:
        """As `agreed`, but what it was when this was called last: no device is waited for.

        The question is computed between two steps, and read when it is long answered.
        """
        if jax.process_count() == 1:
            return self.number
        before, self._asked = self._asked, self._ask()
        return 0 if before is None else int(before)

    def _ask(self) -> jax.Array:
        number = self.number
        with jax.transfer_guard("allow"):
            if self._sent is None or self._sent[0] != number:
                everywhere = NamedSharding(self._mesh, P(self._mesh.axis_names))
                here = np.full(len(self._mesh.local_devices), number, np.int32)
                sent = jax.make_array_from_process_local_data(everywhere, here, (self._mesh.size,))
                self._sent = number, sent
            return self._largest(self._sent[1])
