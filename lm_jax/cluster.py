"""Which processes make up this job: what flags, environment variables and Cloud TPU's metadata say.

The first that applies: flags and JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; then,
for what they leave open, Open MPI, Slurm, and Cloud TPU (a slice or several of them, by the
variables of GKE or by the metadata of a TPU VM).
"""

import dataclasses
import glob
import re
import urllib.error
import urllib.request
from collections.abc import Mapping

from lm_jax.errors import UserError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_TPU_PORT = 8482
_FIRST_PORT, _PORTS = 61440, 4096  # where the port of a Slurm job or of Open MPI is taken from


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of several processes, and which of them this one is."""

    address: str  # HOST:PORT of process 0
    count: int
    index: int
    origin: str  # who said so
    local_devices: tuple[int, ...] | None = None  # GPUs of this process; None: all of the host's


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a cluster's variables say."""

    name: str
    count: int
    index: int
    address: str | None = None
    local_devices: tuple[int, ...] | None = None


def find_job(
    env: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Job | None:
    """The job of this process; None if it is alone.

    Args:
      env: environment variables.
      coordinator, processes, process: of the flags that are called so.

    Raises:
      UserError: something is missing, no number, or contradicts something else.
    """
    address = _one_of(env, "coordinator", coordinator, _ADDRESS)
    count = _one_of(env, "processes", processes, _COUNT)
    index = _one_of(env, "process", process, _INDEX)
    cluster = _open_mpi(env) or _slurm(env) or _tpu(env)
    if (address, count, index) == (None, None, None):
        if cluster is None or cluster.count == 1:
            return None
        if cluster.address is None:
            raise UserError(
                f"{cluster.name} started {cluster.count} processes and does not say where the first"
                f" one is: set {_ADDRESS}=HOST:PORT, the host of process 0 and a free port of it"
            )
        return _job(cluster.address, cluster.count, cluster.index, cluster)
    if cluster is not None and cluster.count > 1:
        for name, said, known in (("count", count, cluster.count), ("index", index, cluster.index)):
            if said is not None and said != known:
                raise UserError(
                    f"several hosts: {cluster.name} says that the {name} of this process's job is"
                    f" {known}, and --processes, --process or JAX_* variables say {said}: unset one"
                    if name == "count"
                    else f"several hosts: {cluster.name} says that this is process {known}, and"
                    f" --process or {_INDEX} says {said}: unset one"
                )
        address = address or cluster.address
        count, index = cluster.count, cluster.index
    if index is None and "JOB_COMPLETION_INDEX" in env:  # of an indexed Job of Kubernetes
        index = _number(env, "JOB_COMPLETION_INDEX")
    missing = [
        f"--{flag} or {name}"
        for flag, name, value in (
            ("coordinator", _ADDRESS, address),
            ("processes", _COUNT, count),
            ("process", _INDEX, index),
        )
        if value is None
    ]
    if count == 1 and index in (None, 0):
        return None
    if missing:
        raise UserError(
            "several hosts: the address of process 0, the number of processes and the index of this"
            f" one belong together; missing: {', '.join(missing)}"
        )
    return _job(address, count, index, cluster)


def _job(address: str, count: int, index: int, cluster: _Found | None) -> Job:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"several hosts: '{address}' is not HOST:PORT, as in 10.0.0.2:8476")
    if not 0 <= index < count:
        raise UserError(
            f"several hosts: process {index} of {count}: they are numbered from 0 to {count - 1}"
        )
    origin = cluster.name if cluster else "flags or JAX_* variables"
    return Job(address, count, index, origin, cluster.local_devices if cluster else None)


def _one_of(env: Mapping[str, str], flag: str, value, variable: str):
    """What the flag or the variable says; both may, if they agree."""
    if not env.get(variable):
        return value
    said = env[variable] if variable == _ADDRESS else _number(env, variable)
    if value is not None and value != said:
        raise UserError(f"several hosts: --{flag}={value}, but {variable}={said}: unset one")
    return said


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise UserError(f"several hosts: {name} is not set, and what it belongs to is") from None
    except ValueError:
        raise UserError(f"several hosts: {name}={env[name]} is not a number") from None


def _open_mpi(env: Mapping[str, str]) -> _Found | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    address = None  # from version 5 on, it does not say where it was started
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    if (host := re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)) and uri.split(".")[
        0
    ].isdigit():
        port = int(uri.split(".")[0]) // 4096 % _PORTS + _FIRST_PORT
        address = f"{host[1] or host[2]}:{env.get('JAX_COORDINATOR_PORT', port)}"
    here = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    return _Found(
        "Open MPI",
        _number(env, "OMPI_COMM_WORLD_SIZE"),
        _number(env, "OMPI_COMM_WORLD_RANK"),
        address,
        _own_gpu(env, here, env.get("OMPI_COMM_WORLD_LOCAL_RANK")),
    )


def _slurm(env: Mapping[str, str]) -> _Found | None:
    """A task that srun started; a process of the batch script, or of a shell there, is alone."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= env.keys():
        return None
    # 'node[001-015,020],other' begins with node001.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", env["SLURM_STEP_NODELIST"])[0]
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
    step = env.get("SLURM_STEP_ID", "0")  # steps may run side by side
    port = (_number(env, "SLURM_JOB_ID") + (int(step) if step.isdigit() else 0)) % _PORTS
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    # '2(x3),1' is 2, 2, 2, 1
    tasks = [
        int(n)
        for n, times in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")
        )
        for _ in range(int(times or 1))
    ]
    node = int(env.get("SLURM_NODEID", "0"))
    here = tasks[node] if node < len(tasks) else 1
    return _Found(
        "Slurm",
        _number(env, count),
        _number(env, "SLURM_PROCID"),
        f"{host}:{env.get('JAX_COORDINATOR_PORT', port + _FIRST_PORT)}",
        _own_gpu(env, here, env.get("SLURM_LOCALID")),
    )


def _own_gpu(env: Mapping[str, str], here: int, rank: str | None) -> tuple[int, ...] | None:
    """Of several processes on a host each takes one GPU, unless it can see no other anyway."""
    if here < 2 or rank is None or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if env.get(name) and "," not in env[name]:
            return None
    return (int(rank),)


def _tpu(env: Mapping[str, str]) -> _Found | None:
    """The hosts of a slice, or of several, as GKE's variables or a TPU VM's metadata list them."""
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if not hosts:
        if env.get("TPU_SKIP_MDS_QUERY") or not has_tpu():
            return None
        env = _metadata(env)
        hosts = env.get("TPU_WORKER_HOSTNAMES")
        if not hosts:
            return None
    names = hosts.split(",")
    worker = _number(env, "TPU_WORKER_ID") if len(names) > 1 else 0
    slices, slice_index, first = 1, 0, names[0]
    if env.get("MEGASCALE_NUM_SLICES"):
        slices = _number(env, "MEGASCALE_NUM_SLICES")
    if slices > 1:
        slice_index = _number(env, "MEGASCALE_SLICE_ID")
        first = env.get("MEGASCALE_COORDINATOR_ADDRESS", "")
        if not first:
            raise UserError(
                f"several hosts: MEGASCALE_NUM_SLICES={slices} slices need"
                " MEGASCALE_COORDINATOR_ADDRESS, the first host of the first"
            )
    for name, value, many in (
        ("TPU_WORKER_ID", worker, len(names)),
        ("MEGASCALE_SLICE_ID", slice_index, slices),
    ):
        if not 0 <= value < many:
            raise UserError(f"several hosts: {name}={value}, but there are {many} of them")
    return _Found(
        "Cloud TPU",
        len(names) * slices,
        slice_index * len(names) + worker,
        f"{first.split(':')[0]}:{env.get('JAX_COORDINATOR_PORT', _TPU_PORT)}",
    )


def has_tpu() -> bool:
    """Whether this machine shows a TPU's device files."""
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _metadata(env: Mapping[str, str]) -> dict[str, str]:
    """What the metadata server of a TPU VM says, under the names that GKE has for it; {} if none.

    Format: https://cloud.google.com/tpu/docs (worker-network-endpoints is a list of hosts or of
    name:id:address; tpu-env has lines KEY: 'value').
    """
    base = f"http://{env.get('GCE_METADATA_IP', 'metadata.google.internal')}"

    def read(key: str) -> str:
        url = f"{base}/computeMetadata/v1/instance/attributes/{key}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=10) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, OSError):
            return ""

    endpoints = read("worker-network-endpoints")
    if not endpoints:  # no TPU VM, or a container that cannot see its server
        return {}
    hosts = [part.split(":")[2] if part.count(":") == 2 else part for part in endpoints.split(",")]
    out = dict(re.findall(r"^(\w+)\s*:\s*'?([^'\n]*?)'?\s*$", read("tpu-env"), re.MULTILINE))
    out |= {k: v for k, v in env.items() if k.startswith(("JAX_", "MEGASCALE_"))}
    out |= {"TPU_WORKER_HOSTNAMES": ",".join(hosts)}
    if number := read("agent-worker-number").strip():
        out["TPU_WORKER_ID"] = number
    return out
