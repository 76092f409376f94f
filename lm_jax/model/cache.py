"""The key/value cache: goes into the model, comes out of it, and nothing is changed behind.

L layers, B batch, K key/value heads, S slots, H head width. A token at position p of its row is
kept in slot p, so that rows of different lengths sit side by side. A head's slots lie together, in
the order in which attention reads them: with heads inside of slots XLA transposes all keys and
values of every layer in every step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.config import ModelConfig
from lm_jax.sharding.mesh import activation_spec

AXES = ("layers", "batch", "kv_heads", "length", "head_width")


class Cache(NamedTuple):
    k_LBKSH: jax.Array
    v_LBKSH: jax.Array

    @property
    def length(self) -> int:
        """Slots a row."""
        return self.k_LBKSH.shape[3]


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache, of the compute dtype."""
    shape = (config.layers, batch, config.kv_heads, length, config.head_width)
    zeros = jnp.zeros(shape, config.dtype, out_sharding=activation_spec(*AXES))
    return Cache(zeros, zeros)


def lengthen(cache: Cache, length: int) -> Cache:
    """The same cache with empty slots behind, `length` in all."""
    more = [(0, length - cache.length if axis == "length" else 0) for axis in AXES]
    return Cache(jnp.pad(cache.k_LBKSH, more), jnp.pad(cache.v_LBKSH, more))


def update(
    cache: Cache, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Writes one layer's keys and values at their positions.

    Positions past the last slot are dropped.

    Returns:
      The new cache, and the layer's keys and values: [B, S, K, H] each.
    """

    def write(all_LBKSH: jax.Array, new_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        all_LBKSH = all_LBKSH.at[layer, rows_B1, :, positions_BT].set(
            new_BTKH.astype(all_LBKSH.dtype), mode="drop", out_sharding=activation_spec(*AXES)
        )
        return all_LBKSH, jnp.swapaxes(all_LBKSH[layer], 1, 2)

    k_LBKSH, k_BSKH = write(cache.k_LBKSH, k_BTKH)
    v_LBKSH, v_BSKH = write(cache.v_LBKSH, v_BTKH)
    return Cache(k_LBKSH, v_LBKSH), k_BSKH, v_BSKH
