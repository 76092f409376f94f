"""What every entry point sets in jax before it does anything else."""

import logging
import os

import jax


def configure() -> None:
    """Turns the persistent compilation cache on, so that a second start compiles nothing.

    It lies where JAX_COMPILATION_CACHE_DIR says, or else in the user's cache folder.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "lm_jax", "jax"))
    # Orbax and jax report each step of each save and each backend that is not there; what a reader
    # needs, this package says itself.
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
