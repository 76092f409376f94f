"""SIGTERM (a preemption) and SIGINT (Ctrl-C) end a run after the step at hand, saved."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax import rendezvous
from lm_jax.errors import ended_by

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, catches the first signal; a second one ends the process at once.

    So does the first one where nothing is to be saved (`worth_saving`), and of several processes it
    ends all, with the exit status of that signal: the run is as it was.

    A thread reads what arrives: the main thread, in which handlers of Python run, may be inside of
    the compiler, or wait for another host, for longer than a preemption leaves.
    """

    def __init__(self, mesh: Mesh | None = None, *, worth_saving: bool = True) -> None:
        """
        Args:
          mesh: whose devices are asked in `agreed` and `noticed`.
          worth_saving: whether a step was done that is not saved; to be set as that changes.
        """
        self.number = 0
        self.worth_saving = worth_saving
        self._before: dict[int, object] = {}
        self._mesh, self._largest = mesh, jax.jit(jnp.max)
        self._sent: tuple[int, jax.Array] | None = None  # a number, on each device
        self._asked: jax.Array | None = None  # the largest of all devices, being computed

    def __enter__(self) -> "StopSignal":
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._fd_before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._caught)
        self._thread = threading.Thread(target=self._read, daemon=True, name="lm_jax-signals")
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._writes, bytes(1))  # which is no signal, and ends the thread
        self._thread.join()
        os.close(self._writes)
        os.close(self._reads)

    def _caught(self, number: int, _frame) -> None:
        self.number = self.number or number

    def _read(self) -> None:
        seen = False
        while number := os.read(self._reads, 1)[0]:
            if number not in _SIGNALS:
                continue
            if seen or not self.worth_saving:
                self._end(number, seen)
            seen, self.number = True, number
            # Not through the progress bar: the main thread may be in the middle of it.
            _say(number, "saving after this step, then stopping; once more ends it at once")

    def _end(self, number: int, again: bool) -> None:
        bond, what = rendezvous.current, "nothing was to be saved" if not again else "a second time"
        if bond is not None and not again:
            bond.claim()
        _say(number, f"{what}, ended")
        if bond is not None and not again:
            name = signal.Signals(number).name
            bond.fail(f"{name}, and {what}", ended_by(number), "was stopped")
        os._exit(ended_by(number))

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


def _say(number: int, what: str) -> None:
    os.write(2, f"\n{signal.Signals(number).name}: {what}\n".encode())
