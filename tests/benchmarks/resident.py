"""Resident memory of this process, or of another, on Linux.

A peak is VmHWM of /proc/self/status, which is set back through /proc/self/clear_refs.
"""

import argparse
import ctypes
import gc
import os
import pathlib
import time
from collections.abc import Callable


def check(parser: argparse.ArgumentParser) -> None:
    """Ends with the parser's message where a peak cannot be set back."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        parser.error("this system has no /proc/self/clear_refs to set the peak back with")


def resident(key: str, process: int | str = "self") -> int:
    """Bytes: 'VmRSS' is resident now, 'VmHWM' was at most."""
    lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(action: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and bytes by which the peak is above what was resident before."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # what is free, but kept for later
        trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    action()
    return time.perf_counter() - start, resident("VmHWM") - before
