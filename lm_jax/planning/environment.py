"""What must be set before jax is imported, to compile for devices that are not there."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from lm_jax.errors import UserError


def prepare() -> None:
    """jax sees the CPU alone; libtpu neither looks for a TPU nor for its host, and says nothing.

    libtpu's lock file keeps two processes from using one TPU. None is used here, so that several
    may compile at a time, beside one that trains. It also ends the process, without a word, at a
    flag of XLA's that it does not know, such as are for CPUs alone: those are taken out.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v6e-4",  # of the host that it would run on; any does
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": " ".join(f for f in flags if not f.startswith("--xla_cpu_")),
    }


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Without jax's cache, from which a program comes without what the compiler says of it."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache

    def set_to(enabled: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()  # else it goes on as it began

    set_to(False)
    try:
        yield
    finally:
        set_to(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what C++ writes to the terminal by itself off it; its errors are raised as exceptions
    all the same. Where one is, what was kept is shown with it, unless it is of what does not fit.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception as e:
            os.dup2(terminal, 2)
            if "RESOURCE_EXHAUSTED" not in str(e) and not isinstance(e, UserError):
                kept.seek(0)
                os.write(2, kept.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
