"""The memory of the host: how much there is, and that a CPU that computes keeps what it has.

XLA takes one block for all intermediate results of a program and frees it when the program ends.
The C library returns so large a block to the kernel at once, which then clears and maps each of its
pages anew in the next step: of a small model on two cores, a tenth to a third of the time.
"""

import contextlib
import ctypes
import math
import os
import pathlib
import platform

_CGROUP = "/sys/fs/cgroup/memory"  # version 2: what a container may have, and has

# Of malloc.h, glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def available() -> float:
    """Bytes that this process may still take; infinite where the system does not tell."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        text = pathlib.Path("/proc/meminfo").read_text()
        lines = dict(line.split(":") for line in text.splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # without a limit, it says 'max'
        most, now = (pathlib.Path(f"{_CGROUP}.{x}").read_text() for x in ("max", "current"))
        found.append(int(most) - int(now))
    return min(found)


def keep() -> bool:
    """Has the C library keep what is freed, from now on and for all threads that begin later.

    Returns:
      Whether it does: with glibc alone, and not where MALLOC_* variables or GLIBC_TUNABLES say how
      it is to behave.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if told or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    # Large blocks come from the one heap, whose end stays where it is.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(library.mallopt(option, value) == 1 for option, value in settings)
