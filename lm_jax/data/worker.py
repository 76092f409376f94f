"""What processes that work for this one have in common."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time

_STACKS = "lm_jax-stacks"  # what the file is called that they are told in
_TELLING = 2.0  # seconds


def begin(*ignored: signal.Signals) -> None:
    """Makes this process one that ends with its parent, and tells its stacks to `stacks_of`.

    Args:
      ignored: signals that are sent to a whole group of processes, and are the parent's affair.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    shared = hasattr(os, "memfd_create")
    faulthandler.register(signal.SIGUSR1, os.memfd_create(_STACKS) if shared else sys.stderr)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # killed outright, the parent could not tell its workers to stop

    threading.Thread(target=follow_parent, daemon=True).start()


def stacks_of(process: int) -> str:
    """The stacks of all threads of a worker that has begun, whatever it is stuck in.

    Where no file can be shared (not on Linux), they go to stderr.
    """
    try:
        if not hasattr(os, "memfd_create"):
            os.kill(process, signal.SIGUSR1)
            return "(on stderr)"
        told = _file_of(process)
        if told is None:
            return "(it has not begun)"
        os.kill(process, signal.SIGUSR1)
        deadline, before = time.monotonic() + _TELLING, b""
        while time.monotonic() < deadline:  # until nothing more comes
            time.sleep(0.05)
            with open(told, "rb") as f:
                now = f.read()
            if now and now == before:
                break
            before = now
        return before.decode(errors="replace") or "(it does not answer)"
    except OSError as e:
        return f"(not to be had: {e})"


def _file_of(process: int) -> str | None:
    folder = f"/proc/{process}/fd"
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if _STACKS in os.readlink(path):
                return path
    return None


def cpu_seconds(process: int) -> float:
    """The time of a CPU that a worker has used; 0 if it is gone.

    Where the system does not say (not on Linux), the time that has passed: it counts as work.
    """
    if not os.path.isdir("/proc/self"):
        return time.monotonic()
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()  # its name may have spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0
