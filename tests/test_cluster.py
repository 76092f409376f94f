"""Which processes make up a job: variables and flags, and what is wrong with them."""

import http.server
import os
import subprocess
import sys
import threading

import pytest

from lm_jax import cluster
from lm_jax.cluster import find_job
from lm_jax.errors import UserError

JAX = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[007-009,12],other",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x5)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
SLICE = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "1"}
SLICES = SLICE | {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
}


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
    monkeypatch.setattr(cluster, "has_tpu", lambda: False)


@pytest.mark.parametrize(
    "env, address, count, index",
    [
        (JAX, "10.0.0.1:1234", 4, 3),
        (SLURM, f"node007:{5002 % 4096 + 61440}", 5, 2),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, "node007:99", 5, 2),
        (SLURM | {"SLURM_STEP_NODELIST": "alpha,beta"}, f"alpha:{5002 % 4096 + 61440}", 5, 2),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "x:1"}, "x:1", 5, 2),
        (MPI, f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 2, 1),
        (SLICE, "a:8482", 3, 1),
        (SLICES, "first:8482", 6, 4),
        (SLICE | {"TPU_PROCESS_ADDRESSES": "p:1,q:1"}, "p:8482", 2, 1),
        # An indexed Job of Kubernetes numbers its pods.
        (
            {k: v for k, v in JAX.items() if k != "JAX_PROCESS_ID"} | {"JOB_COMPLETION_INDEX": "2"},
            "10.0.0.1:1234",
            4,
            2,
        ),
    ],
)
def test_a_job_is_known_by_its_variables(env, address, count, index):
    job = find_job(env)
    assert (job.address, job.count, job.index) == (address, count, index)


def test_flags_are_variables_by_another_name():
    job = find_job({}, "h:1", 2, 0)
    assert (job.address, job.count, job.index) == ("h:1", 2, 0)
    assert find_job(JAX, "10.0.0.1:1234", 4, 3) == find_job(JAX)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, no srun
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"JOB_COMPLETION_INDEX": "3"},
    ],
)
def test_a_process_may_be_alone(env):
    assert find_job(env) is None


def test_processes_that_share_a_host_share_its_gpus():
    shared = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2),3", "SLURM_LOCALID": "2"}
    assert find_job(SLURM).local_devices is None
    assert find_job(shared).local_devices == (2,)
    assert find_job(shared | {"CUDA_VISIBLE_DEVICES": "1"}).local_devices is None


@pytest.mark.parametrize(
    "env, flags, parts",
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {}, ["JAX_NUM_PROCESSES", "--process "]),
        ({}, {"processes": 2}, ["--coordinator", "JAX_PROCESS_ID"]),
        (JAX | {"JAX_NUM_PROCESSES": "four"}, {}, ["JAX_NUM_PROCESSES=four", "number"]),
        (JAX | {"JAX_PROCESS_ID": "4"}, {}, ["process 4 of 4", "0 to 3"]),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "host"}, {}, ["'host'", "HOST:PORT"]),
        (JAX, {"processes": 3}, ["--processes=3", "JAX_NUM_PROCESSES=4"]),
        (SLURM, {"process": 4}, ["Slurm", "process 2", "4"]),
        (SLURM | {"JAX_NUM_PROCESSES": "4"}, {}, ["Slurm", "5", "4"]),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": ""}, {}, ["Open MPI", "JAX_COORDINATOR_ADDRESS"]),
        (SLICE | {"TPU_WORKER_ID": "3"}, {}, ["TPU_WORKER_ID=3", "3"]),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, ["TPU_WORKER_ID"]),
        (SLICE | {"MEGASCALE_NUM_SLICES": "2"}, {}, ["MEGASCALE_SLICE_ID"]),
        (SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": ""}, {}, ["MEGASCALE_COORDINATOR_ADDRESS"]),
    ],
)
def test_what_is_missing_or_contradictory_is_named(env, flags, parts):
    with pytest.raises(UserError) as error:
        find_job(env, **flags)
    for part in parts:
        assert part in str(error.value)


def test_a_tpu_vm_asks_its_metadata_server(monkeypatch):
    answers = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6",
        "agent-worker-number": "1",
        "tpu-env": "ZONE: 'us-central2-b'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path.rsplit("/", 1)[1])
            right = answer is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert find_job(env) is None  # without a TPU nobody is asked
        monkeypatch.setattr(cluster, "has_tpu", lambda: True)
        job = find_job(env)
        assert (job.address, job.count, job.index) == ("10.0.0.1:8482", 4, 3)
        answers["tpu-env"] = "ZONE: 'us-central2-b'\n"
        job = find_job(env)
        assert (job.address, job.count, job.index) == ("10.0.0.5:8482", 2, 1)
        answers.clear()
        assert find_job(env) is None
        server.shutdown()


@pytest.mark.parametrize("own", [{}, {"TPU_WORKER_ID": "0"}])
def test_a_machine_without_a_tpu_is_quiet_and_variables_of_a_tpu_are_kept(own):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_PLATFORMS"))}
    code = "from lm_jax import runtime; runtime.configure(); import jax, os;"
    if own:  # as on a TPU VM, whose host libtpu finds by itself
        code += "assert 'TPU_ACCELERATOR_TYPE' not in os.environ"
    else:
        code += "jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | own, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
