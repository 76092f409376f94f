"""The key/value cache: goes into the model, comes out of it, and nothing is changed behind.

L layers, B batch, K key/value heads, S slots, H head width. A token at position p of its row is
kept in slot p, so that rows of different lengths sit side by side. A head's slots lie together, in
the order in which attention reads them: with heads inside of slots XLA transposes all keys and
values of every layer in every step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.config import ModelConfig
from lm_jax.sharding.mesh import activation_spec, platform

AXES = ("layers", "batch", "kv_heads", "length", "head_width")


class Cache(NamedTuple):
    """Of all layers, or for each layer one with L = 1: then both are tuples."""

    k_LBKSH: jax.Array | tuple[jax.Array, ...]
    v_LBKSH: jax.Array | tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        """Slots a row."""
        return jax.tree.leaves(self.k_LBKSH)[0].shape[3]

    def apart(self) -> "list[Cache]":
        """That of each layer."""
        return list(map(Cache, self.k_LBKSH, self.v_LBKSH))


def together(caches: Sequence[Cache]) -> Cache:
    """The inverse of `Cache.apart`."""
    return Cache(*zip(*caches))


def init_cache(config: ModelConfig, batch: int, length: int, apart: bool = False) -> Cache:
    """An empty cache, of the compute dtype.

    Args:
      apart: whether each layer has its own.
    """

    def zeros(layers: int) -> jax.Array:
        shape = (layers, batch, config.kv_heads, length, config.head_width)
        return jnp.zeros(shape, config.dtype, out_sharding=activation_spec(*AXES))

    if apart:
        return together([Cache(zeros(1), zeros(1)) for _ in range(config.layers)])
    return Cache(zeros(config.layers), zeros(config.layers))


def lengthen(cache: Cache, length: int) -> Cache:
    """The same cache with empty slots behind, `length` in all."""
    more = [(0, length - cache.length if axis == "length" else 0) for axis in AXES]
    return jax.tree.map(lambda x_LBKSH: jnp.pad(x_LBKSH, more), cache)


def update(
    cache: Cache,
    layer: jax.Array | int,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Writes one layer's keys and values at their positions.

    Positions past the last slot are dropped.

    Returns:
      The new cache, and the layer's keys and values: [B, K, S, H] each.
    """
    B, T, K, _ = k_BTKH.shape
    rows_B1 = jnp.arange(B)[:, None]
    where = layer, rows_B1, slice(None), positions_BT
    if B * T == 1 and platform() == "cpu":
        # For a single place, XLA's CPU backend makes six copies of all slots instead of a scatter.
        where = layer, rows_B1[:, :, None], jnp.arange(K), positions_BT[:, :, None]

    def write(all_LBKSH: jax.Array, new_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        all_LBKSH = all_LBKSH.at[where].set(
            new_BTKH.astype(all_LBKSH.dtype), mode="drop", out_sharding=activation_spec(*AXES)
        )
        return all_LBKSH, all_LBKSH[layer]

    k_LBKSH, k_BKSH = write(cache.k_LBKSH, k_BTKH)
    v_LBKSH, v_BKSH = write(cache.v_LBKSH, v_BTKH)
    return Cache(k_LBKSH, v_LBKSH), k_BKSH, v_BKSH
