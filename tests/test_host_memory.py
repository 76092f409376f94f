"""Memory of programs on CPUs: a step takes the pages of the one before it."""

import os
import subprocess
import sys

from lm_jax import host_memory

# Faults are counted of a function with an intermediate result of 64 MB, once it is warm.
PROGRAM = """
import resource, sys
from lm_jax import runtime
if "configured" in sys.argv:
    runtime.configure()
import jax, jax.numpy as jnp

@jax.jit
def step(x):
    wide = jnp.outer(x, x)
    return (jnp.sin(wide) @ wide[:, :8]).sum(axis=1)

x = jnp.linspace(0.0, 1.0, 4096)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(*args: str, **env: str) -> int:
    there = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], env=there | env, check=True, capture_output=True
    )
    return int(run.stdout)


def test_steps_reuse_memory():
    # 64 MB are 16,384 pages a step; fewer where the kernel makes larger ones by itself. Now and
    # then a block finds its place taken, and gets another.
    assert faults("configured") < max(faults(), 100_000) / 5


def test_those_who_tune_the_c_library_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert not host_memory.keep()
