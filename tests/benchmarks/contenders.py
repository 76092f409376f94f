"""Contenders in processes of their own that take turns, so that a machine whose speed drifts is the
same for all.

A benchmark starts itself again as each contender, with `--contender=NAME`, and sends it numbers;
for each it gets a line of JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def begin(name: str, device: str) -> subprocess.Popen:
    """Starts this program as a contender, on 'cpu' or 'cuda'."""
    env = os.environ | {"JAX_PLATFORMS": device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.Popen(
        [sys.executable, *sys.argv, f"--contender={name}"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen) -> dict[str, Any]:
    """What a contender says next."""
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended with {process.wait()}")
    return json.loads(line)


def turn(process: subprocess.Popen, count: int) -> dict[str, Any]:
    """Sends a number, and waits for the answer."""
    print(count, file=process.stdin, flush=True)
    return told(process)


def end(process: subprocess.Popen) -> None:
    process.stdin.close()
    process.wait()


def compete(begun: dict[str, Any], take: Callable[[int], dict[str, Any]]) -> None:
    """The contender's side: says how it began, and answers numbers until there are no more."""
    print(json.dumps(begun), flush=True)
    for line in sys.stdin:
        print(json.dumps(take(int(line))), flush=True)
