"""What every entry point sets in jax, and joins, once it has imported what it needs."""

import atexit
import glob
import logging
import os
import sys

import jax

from lm_jax import cluster, host_memory, rendezvous
from lm_jax.errors import WRONG, UserError

_CACHED_FROM = 0.1  # seconds to compile; jax's own is 1, and a small model's parts take less
_JOIN_SECONDS = 300  # that the processes of a job wait for one another to start


def configure(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes of the job, if there are any, turns on the persistent compilation
    cache, so that a second start compiles nothing, and on CPUs keeps memory from step to step.

    A job of several processes is known by the arguments, by variables or by a TPU VM's metadata:
    see `cluster.find_job`. They wait for one another as many seconds as LM_JAX_JOIN_SECONDS says.
    The cache lies where JAX_COMPILATION_CACHE_DIR says, or else in the user's cache folder.

    Args:
      coordinator, processes, process: the flags of these names: HOST:PORT, how many, which.

    Raises:
      UserError: what is known of the job is contradictory; `Interrupted`: a process is missing.
    """
    # Orbax and jax report each step of each save and each backend that is not there; what a reader
    # needs, this package says itself.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.ERROR)
    # Of several files that cannot be read, one is reported.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    job = cluster.find_job(os.environ, coordinator, processes, process)
    _quiet_without_tpu()
    if job is not None:
        _join(job)
    if _computes_on_cpu() and host_memory.keep():
        # A program that is dispatched while another runs would take a second block.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_FROM)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "lm_jax", "jax"))


def _computes_on_cpu() -> bool:
    """Before jax itself looks, which is when it starts the threads that compute."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not (cluster.has_tpu() or glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/kfd"))


def _join(job: cluster.Job) -> None:
    seconds = float(os.environ.get("LM_JAX_JOIN_SECONDS") or _JOIN_SECONDS)
    address, bond = rendezvous.meet(job, seconds)
    rendezvous.current = bond
    # Its handler would swallow a SIGTERM that comes before the training loop has its own.
    jax.config.update("jax_enable_preemption_service", False)
    local, port = job.local_devices, rendezvous.split_address(address)[1]
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "[::]:0").rpartition(":")[0]
    jax.distributed.initialize(
        address,
        job.count,
        job.index,
        None if local is None else list(local),
        cluster_detection_method="deactivate",  # it was detected
        coordinator_bind_address=f"{bind}:{port}",
    )
    atexit.register(_leave)  # before jax's own end, which waits for the others


def _leave() -> None:
    """A program that is no command of this package ends; see `cli.run` for those that are."""
    bond, error = rendezvous.current, getattr(sys, "last_value", None)
    if bond is None:
        return
    if error is None:
        bond.leave()
    else:  # printed by now; jax would wait for the others to end
        bond.claim()
        status = error.status if isinstance(error, UserError) else WRONG
        bond.fail(f"{type(error).__name__}: {error}", status)
        os._exit(status)


def _quiet_without_tpu() -> None:
    """Keeps an installed libtpu from looking for the TPU of a machine that has none, in vain and at
    length. Nothing is touched where there are a TPU's files or variables."""
    there = {name for name in os.environ if name.startswith("TPU_")}
    # jax itself sets these when it is imported: where it finds no chip, and where a libtpu.
    if cluster.has_tpu() or there - {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}:
        return
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v6e-4"
