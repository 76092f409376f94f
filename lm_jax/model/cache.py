"""The key/value cache: goes into the model, comes out of it, and nothing is changed behind.

L layers, B batch, S slots, K key/value heads, H head width. A token at position p of its row is
kept in slot p, so that rows of different lengths sit side by side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.config import ModelConfig
from lm_jax.sharding.mesh import activation_spec

AXES = ("layers", "batch", "length", "kv_heads", "head_width")


class Cache(NamedTuple):
    k_LBSKH: jax.Array
    v_LBSKH: jax.Array

    @property
    def length(self) -> int:
        """Slots a row."""
        return self.k_LBSKH.shape[2]


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache, of the compute dtype."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_width)
    zeros = jnp.zeros(shape, config.dtype, out_sharding=activation_spec(*AXES))
    return Cache(zeros, zeros)


def update(
    cache: Cache, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Writes one layer's keys and values at their positions.

    Positions past the last slot are dropped.

    Returns:
      The new cache, and the layer's keys and values: [B, S, K, H] each.
    """

    def write(all_LBSKH: jax.Array, new_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        all_LBSKH = all_LBSKH.at[layer, rows_B1, positions_BT].set(
            new_BTKH.astype(all_LBSKH.dtype), mode="drop", out_sharding=activation_spec(*AXES)
        )
        return all_LBSKH, all_LBSKH[layer]

    k_LBSKH, k_BSKH = write(cache.k_LBSKH, k_BTKH)
    v_LBSKH, v_BSKH = write(cache.v_LBSKH, v_BTKH)
    return Cache(k_LBSKH, v_LBSKH), k_BSKH, v_BSKH
