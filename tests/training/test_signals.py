"""A signal is answered at once, also while the main thread does not come to run its handler."""

import signal
import subprocess
import sys

import commands

from lm_jax.errors import ended_by

_STUCK = """
import ctypes
from lm_jax.training.signals import StopSignal
mutex, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
with StopSignal(worth_saving={worth_saving}):
    print("ready", flush=True)
    while True:
        library.pthread_mutex_lock(mutex)  # the second time for ever, without the interpreter
"""


def started(*, worth_saving: bool) -> subprocess.Popen:
    code = _STUCK.format(worth_saving=worth_saving)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=commands.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_that_is_stuck_ends_at_the_second_signal_and_one_with_nothing_to_save_at_the_first():
    stuck, fresh = started(worth_saving=True), started(worth_saving=False)
    with stuck, fresh:
        assert stuck.stdout.readline() == fresh.stdout.readline() == "ready\n"
        stuck.send_signal(signal.SIGTERM)
        assert stuck.stderr.readline() == "\n"
        assert "SIGTERM: saving after this step" in stuck.stderr.readline()
        assert stuck.poll() is None
        stuck.send_signal(signal.SIGINT)
        fresh.send_signal(signal.SIGTERM)
        assert stuck.wait(60) == ended_by(signal.SIGINT)
        assert fresh.wait(60) == ended_by(signal.SIGTERM)
        assert "SIGTERM: nothing was to be saved, ended" in fresh.stderr.read()
