"""A hang is told with its stacks, and ends the process; slow work goes on."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import commands

from lm_jax.errors import AGAIN
from lm_jax.training import watchdog
from lm_jax.training.watchdog import PATIENCE, Watchdog

_PROGRAM = """
import multiprocessing, select, sys, threading, time
from lm_jax.data import worker

def begun_worker(ready, sleeps):
    worker.begin()
    ready.set()
    work_that_sleeps() if sleeps else work_without_end()

def work_that_sleeps():
    time.sleep(1000)

def work_without_end():
    with open("/dev/zero", "rb", buffering=0) as f:
        while True:
            f.read(1 << 22)

def stuck_on_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def wait_for_input():
    sys.stdin.read()

if __name__ == "__main__":
    from lm_jax import cluster, rendezvous
    from lm_jax.training.watchdog import Watchdog

    workdir, limit, work, *address = sys.argv[1:]
    if address:  # of the other process of the job
        job = cluster.Job(address[0], 2, 1, "test")
        rendezvous.current = rendezvous.meet(job, 100)[1]
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    args = ready, work != "wait_for_input"
    context.Process(target=begun_worker, args=args, daemon=True).start()
    ready.wait()
    with Watchdog(float(limit), workdir, 3) as dog:
        dog.alive("step 12")
        with dog.doing("save of step 12"):
            globals()[work]()
"""


_OTHER = """
import sys, time
from lm_jax import cluster, rendezvous
rendezvous.meet(cluster.Job(sys.argv[1], 2, 0, "test"), 100)
time.sleep(1000)
"""


def started(folder: pathlib.Path, limit: float, *args: str) -> subprocess.Popen:
    program = folder / "program.py"
    program.write_text(_PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), str(folder), str(limit), *args],
        env=os.environ | {"PYTHONPATH": str(commands.ROOT)},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_hang_is_told_with_the_stacks_of_all_processes_and_slow_work_is_waited_for(tmp_path):
    folders = [tmp_path / name for name in ("stuck", "busy", "endless")]
    for folder in folders:
        folder.mkdir()
    stuck = started(folders[0], 0.5, "stuck_on_a_lock")
    busy = started(folders[1], 1.0, "wait_for_input")  # for a worker
    endless = started(folders[2], 0.3, "work_without_end")

    _, err = stuck.communicate(timeout=100)
    assert stuck.returncode == AGAIN, err
    told = (folders[0] / "hang-3.txt").read_text()
    for text in (told, err):
        assert "process 3 hangs: save of step 12" in text
        assert re.search(r"hread 'MainThread' .*\n.*in stuck_on_a_lock", text), text
        assert "in work_that_sleeps" in text
    assert err.count("error: ") == 1 and "Traceback" not in err

    assert "slow: save of step 12" in busy.stderr.readline()
    _, err = busy.communicate("enough", timeout=100)
    assert busy.returncode == 0, err
    assert not (folders[1] / "hang-3.txt").exists()

    _, err = endless.communicate(timeout=100)
    assert endless.returncode == AGAIN and err.count("slow: ") == PATIENCE, err


def test_a_hang_ends_all_processes_of_a_job_and_each_says_whose_it_was(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as s:
        address = f"127.0.0.1:{s.getsockname()[1]}"
    stuck = started(tmp_path, 0.3, "stuck_on_a_lock", address)
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER, address],
        cwd=commands.ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for process in (stuck, other):
        _, err = process.communicate(timeout=200)
        assert process.returncode == AGAIN, err
        assert err.count("error: ") == 1 and "process 3 hangs: save of step 12" in err, err


def test_no_thread_is_left_and_none_is_there_without_a_limit(tmp_path):
    before = set(threading.enumerate())
    with Watchdog(1000.0, str(tmp_path)) as dog:
        assert set(threading.enumerate()) > before
        with dog.doing("this"):
            dog.alive("that")
    assert set(threading.enumerate()) == before
    with Watchdog(0.0, str(tmp_path)) as dog:
        dog.alive("step 1")
        assert set(threading.enumerate()) == before
    assert not list(tmp_path.iterdir())


def test_time_of_a_cpu_is_a_sign_of_work():
    before = watchdog._Work()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = watchdog._Work()
    assert "of a CPU" in after.since(before, 1.0) and not after.since(before, 100.0)
