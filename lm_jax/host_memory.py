"""The memory of a CPU that computes: kept for the next step, not given back after each one.

XLA takes one block for all intermediate results of a program and frees it when the program ends.
The C library returns so large a block to the kernel at once, which then clears and maps each of its
pages anew in the next step: of a small model on two cores, a tenth to a third of the time.
"""

import ctypes
import os
import platform

# Of malloc.h, glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


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
