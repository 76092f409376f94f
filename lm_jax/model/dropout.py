"""Dropout (Srivastava et al. 2014)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a part of `x` and scales the rest up; does nothing without a key.

    Each device draws its own part of the mask; what is drawn does not depend on the mesh.
    """
    if key is None or rate == 0:
        return x
    on_a_mesh = not jax.sharding.get_abstract_mesh().empty
    spec = jax.typeof(x).sharding.spec if on_a_mesh else None
    return jnp.where(kept(x.shape, rate, key, spec), x / (1 - rate), 0)


def kept(shape: tuple[int, ...], rate: float, key: jax.Array, spec: P | None) -> jax.Array:
    """bool, of this shape and sharding: False where dropout zeroes."""
    return jax.random.bernoulli(key, 1 - rate, shape, out_sharding=spec)
