"""A published model on a mesh over two processes: each has a part of it, and the first writes."""

import os
import socket
import subprocess
import sys

import commands
import numpy as np
import published
import pytest

from lm_jax.interop.safetensors import open_weights

# data x fsdp x tensor: the copies of the model in a process each, or parts of it in both.
CASES = {"gpt2": (2, 2, 2), "llama 3": (1, 4, 2)}

PROGRAM = """
import sys
from lm_jax import runtime
runtime.configure()
import jax
from lm_jax.config import MeshConfig
from lm_jax.interop.export import save_pretrained
from lm_jax.interop.pretrained import load_parameters, read_model_config
from lm_jax.sharding.mesh import make_mesh

assert (jax.process_count(), jax.local_device_count()) == (2, 4)
source, target, *axes = sys.argv[1:]
mesh, model = make_mesh(MeshConfig(*map(int, axes))), read_model_config(source)
parameters = load_parameters(source, model, mesh)
assert not parameters["embedding"].is_fully_addressable
with jax.set_mesh(mesh):
    save_pretrained(f"{target}{jax.process_index()}", model, parameters, max_shard_bytes=20_000)
"""


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_what_they_read(case, tmp_path):
    source = published.save(case, tmp_path / "in")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    arguments = [str(source), str(tmp_path / "out"), *map(str, CASES[case])]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=commands.ROOT,
            env=commands.environment(4) | job | {"JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err
    finally:
        for process in processes:  # where one failed, the other waits for it
            process.kill()
    assert sorted(os.listdir(tmp_path)) == ["in", "out0"]
    before, after = open_weights(source), open_weights(tmp_path / "out0")
    assert before.names() == after.names()
    for name in before.names():
        got, want = after.read(name), before.read(name)
        np.testing.assert_array_equal(got, want, err_msg=name, strict=True)
