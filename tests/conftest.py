"""Eight simulated CPU devices for every test, and no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Optimizing machine code for tiny models takes longer than running them as it comes.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()

import jax

pytest_plugins = ["browser"]
jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8, "the tests need 8 simulated devices"
