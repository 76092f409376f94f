"""What every entry point sets in jax before it does anything else."""

import logging
import os

import jax


def configure() -> None:
    """Joins the other processes of the job, if there are any, and turns on the persistent
    compilation cache, so that a second start compiles nothing.

    A job of several processes is known by JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, by the variables of Slurm, or by those of a Cloud TPU slice of several hosts.
    The cache lies where JAX_COMPILATION_CACHE_DIR says, or else in the user's cache folder.
    """
    env = os.environ
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        jax.distributed.initialize(address, count, index)
    elif int(env.get("SLURM_NTASKS", "1")) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()  # finds them by itself
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "lm_jax", "jax"))
    # Orbax and jax report each step of each save and each backend that is not there; what a reader
    # needs, this package says itself.
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Of several files that cannot be read, one is reported.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
