"""Eight simulated CPU devices for every test, and no silent rank promotion."""

import gc
import os
import pathlib

import quick_compiler

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count=8 {quick_compiler.FLAGS}"
).strip()

import jax

pytest_plugins = ["browser"]
jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8, "the tests need 8 simulated devices"


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
