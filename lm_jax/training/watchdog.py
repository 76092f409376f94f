"""Tells a hang (a dead host, a stuck reader, a store that does not answer) from slow work.

The loop says what it does. A thread looks on; where it has heard nothing for as long as
`training.hang_after`, it looks for signs of work: time of a CPU, of this process and its workers,
or bytes that they read or wrote. If there are some, it says what is slow, and waits on. Otherwise,
or after PATIENCE such times in a row, it writes down the stacks of all threads, here and in the
workers, and ends the process with the status for which it is started again: what is stuck in a
system call or on a device cannot be interrupted.

Nothing here waits for a lock that the main thread may hold, or for jax. A thread of Python does not
run while native code keeps the interpreter; so faulthandler, whose timer does not need it, prints
the stacks then, after half as long again. It does not end the process: what keeps the interpreter
computes, and what waits, waits without it.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax

from lm_jax import paths, rendezvous
from lm_jax.config import Config
from lm_jax.data import worker
from lm_jax.errors import AGAIN

# Signs of work that are believed in a row. Without an end, a thread that waits for a GPU would pass
# for one that works, as some drivers spin.
PATIENCE = 8
_LEAST_CPU = 0.1  # of a core
_LEAST_BYTES = 1_000_000  # each time; a hung process still logs a little
_LOOK_EVERY = 5.0  # seconds at most between two looks
_WRITING = 10.0  # seconds until a disk or bucket is given up, which may be what hangs


def watchdog_of(config: Config, workdir: str) -> "Watchdog":
    """The one of a run; jax knows its processes by now."""
    return Watchdog(config.training.hang_after, workdir, jax.process_index())


class Watchdog:
    """While entered, ends this process where `alive` was not called for too long."""

    def __init__(self, limit: float, workdir: str, process: int = 0):
        """
        Args:
          limit: seconds without a sign of life; 0: nothing is watched.
          process: its number in the job, for the file's name: WORKDIR/hang-PROCESS.txt.
        """
        self._limit, self._process = limit, process
        self._path = os.path.join(workdir, f"hang-{process}.txt")
        self._doing = ("the start", time.monotonic())  # what, and since when; replaced as one
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="lm_jax-watchdog")

    def __enter__(self) -> "Watchdog":
        self.alive("the start")
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._limit:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def alive(self, what: str) -> None:
        """Something moved, and `what` comes now: 'step 12'. Costs no more than an assignment."""
        self._doing = (what, time.monotonic())

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Within, `what` is done; afterwards, what was done before."""
        before, _ = self._doing
        self.alive(what)
        try:
            yield
        finally:
            self.alive(before)

    def _watch(self) -> None:
        look_every = min(self._limit / 10, _LOOK_EVERY)
        known, start, work, believed = self._doing, time.monotonic(), _Work(), 0
        while not self._over.wait(look_every):
            faulthandler.dump_traceback_later(1.5 * self._limit, file=sys.__stderr__)
            now = time.monotonic()
            if self._doing is not known:
                known, start, work, believed = self._doing, now, _Work(), 0
            elif now - start >= self._limit:
                what, since = known
                before, work = work, _Work()
                signs = work.since(before, now - start)
                believed += 1
                if not signs or believed > PATIENCE:
                    self._end(what, now - since, look_every)
                _say(f"slow: {what}, for {now - since:.0f} s now; goes on, by {signs}")
                start = now

    def _end(self, what: str, seconds: float, look_every: float) -> None:
        children = multiprocessing.active_children()
        message = (
            f"process {self._process} hangs: {what}: nothing has moved for {seconds:.0f} s"
            " (training.hang_after)"
        )
        report = [message, "", _stacks()]
        for child in children:
            report += [f"worker process {child.pid}:", worker.stacks_of(child.pid)]
        text = "\n".join(report)
        _say(text)
        _write(self._path, text + "\n")
        for child in children:
            child.kill()
        bond = rendezvous.current
        if bond is not None:
            # The others are likely to wait for this one, and are about to say where.
            time.sleep(2 * look_every)
            bond.claim()
        _say(
            f"error: {message}; the stacks are above and in {self._path}; the same command goes on"
        )
        if bond is not None:
            bond.fail(message, AGAIN, "was ended")
        os._exit(AGAIN)


class _Work:
    """What this process and its workers have done so far."""

    def __init__(self) -> None:
        self._of = {None: (time.process_time(), _bytes("self"))}
        for child in multiprocessing.active_children():
            self._of[child.pid] = (worker.cpu_seconds(child.pid), _bytes(child.pid))

    def since(self, before: "_Work", seconds: float) -> str:
        """Signs of work of the seconds between, in words; '' if there are none."""
        cpu = bytes_ = 0.0
        for process, (cpu_now, bytes_now) in self._of.items():
            cpu_then, bytes_then = before._of.get(process, (0.0, 0))
            cpu, bytes_ = cpu + cpu_now - cpu_then, bytes_ + bytes_now - bytes_then
        if cpu > _LEAST_CPU * seconds:
            return f"{cpu:.1f} s of a CPU"
        return f"{bytes_ / 1e6:.0f} MB read or written" if bytes_ > _LEAST_BYTES else ""


def _bytes(process: int | str) -> int:
    """That it read and wrote; 0 where the system does not say."""
    try:
        with open(f"/proc/{process}/io", encoding="ascii") as f:
            return sum(int(line.split()[1]) for line in f if line.startswith(("rchar", "wchar")))
    except OSError:
        return 0


def _stacks() -> str:
    """Of all threads of this process, with their names."""
    with tempfile.TemporaryFile() as f:
        faulthandler.dump_traceback(f)
        f.seek(0)
        text = f.read().decode(errors="replace")
    for thread in threading.enumerate():
        text = text.replace(f"hread 0x{thread.ident:016x} ", f"hread '{thread.name}' ")
    return text


def _write(path: str, text: str) -> None:
    def write() -> None:
        with contextlib.suppress(Exception):  # it is on stderr, in any case
            paths.write_whole(path, text)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_WRITING)


def _say(text: str) -> None:
    data = f"{text}\n".encode()
    while data:  # not by way of sys.stderr, which the main thread may hold
        data = data[os.write(2, data) :]
