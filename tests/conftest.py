"""Eight simulated CPU devices for every test, and no silent rank promotion."""

import gc
import os
import pathlib
import shutil
import tempfile

import quick_compiler

os.environ["JAX_PLATFORMS"] = "cpu"
# What a test has compiled, or a command that it ran, no other compiles again. Workers of xdist
# inherit the folder.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="lm_jax_compiled_")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count=8 {quick_compiler.FLAGS}"
).strip()

import jax

pytest_plugins = ["browser"]
jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8, "the tests need 8 simulated devices"


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_finish():
    """What is imported stays: looking through it for garbage again and again takes a tenth of the
    time that tracing does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Files that run commands take longest: begun last, one would keep a single worker busy."""
    here = pathlib.Path(__file__).parent
    items.sort(key=lambda item: (item.path.name != "test_readme.py", item.path.parent != here))
