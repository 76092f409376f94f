"""Ring attention (Liu et al. 2023): rows in parts, whose keys and values go from device to device.

No device ever holds the keys and values of a whole row, nor the scores of more than one pair of
parts. The softmax is kept up to date as the parts come by (Milakov and Gimelshein 2018); the
backward pass goes round once more, with the gradients of keys and values as passengers.

B batch, T and S length of a part, N query heads, K key/value heads, G = N / K, H head width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax.model.attention import MASKED, attention_mask
from lm_jax.sharding.mesh import activation_spec, reshard, shards

_AXIS = "sequence"  # of the mesh


class _Keys(NamedTuple):
    """What goes round."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    segments_BS: jax.Array | None


class _Softmax(NamedTuple):
    """The softmax over the keys that came by so far, all float32."""

    most_BKGT: jax.Array  # the highest score
    sum_BKGT: jax.Array  # of exp(score - most)
    out_BTKGH: jax.Array  # of exp(score - most) times the values


def ring_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    causal: bool,
    window: int = 0,
    length: str | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """As `lm_jax.model.attention.attention`, without dropout; see `splash_attention` for arguments.

    Under a causal mask, a device has nothing to do for the parts that come after its own: the last
    one sets the pace.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    split = shards(length)
    pair = _Pair(causal, window, T // split, H**-0.5 if scale is None else scale, softcap)

    def local(q_BTNH, k_BSKH, v_BSKH, segments_BT):
        B, T, n, _ = q_BTNH.shape
        q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
        keys = _Keys(k_BSKH, v_BSKH, segments_BT)
        out_BTKGH = _ring(pair, split, q_BTKGH, keys, segments_BT)
        return out_BTKGH.reshape(B, T, n, H)

    if split > 1 or not jax.sharding.get_abstract_mesh().empty:
        q_spec = activation_spec("batch", length, "heads", "head_width")
        k_spec = activation_spec("batch", length, "kv_heads", "head_width")
        k_BSKH, v_BSKH = reshard(k_BSKH, k_spec), reshard(v_BSKH, k_spec)
        spec = None
        if segments_BT is not None:
            spec = activation_spec("batch", length)
            segments_BT = reshard(segments_BT, spec)
        specs = q_spec, k_spec, k_spec, spec
        local = jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)
    return local(q_BTNH, k_BSKH, v_BSKH, segments_BT)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """How queries of one part see keys of another, `apart` parts before them."""

    causal: bool
    window: int
    T: int  # of a part
    scale: float
    softcap: float

    def scores(self, q_BTKGH, keys: _Keys, segments_BT, apart) -> jax.Array:
        """float32 [B, K, G, T, S]."""
        scores_BKGTS = self.scale * jnp.einsum(
            "BTKGH,BSKH->BKGTS", q_BTKGH, keys.k_BSKH, preferred_element_type=jnp.float32
        )
        if self.softcap:
            scores_BKGTS = self.softcap * jnp.tanh(scores_BKGTS / self.softcap)
        mask_BTS = attention_mask(
            causal=self.causal,
            query_index=(apart * self.T + jnp.arange(self.T))[None],
            key_length=self.T,
            query_segments=segments_BT,
            key_segments=keys.segments_BS,
            window=self.window,
        )
        if mask_BTS is None:
            return scores_BKGTS
        return jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)

    def sees(self, apart) -> jax.Array | bool:
        """Whether there is anything to see."""
        if not self.causal:
            return True
        within = (apart - 1) * self.T + 1 < self.window if self.window else True
        return (apart >= 0) & within

    def if_seen(self, apart, work: Callable, rest):
        """`work(rest)` where there is something to see, else `rest` as it is."""
        return jax.lax.cond(self.sees(apart), work, lambda rest: rest, rest)


def _round(keys, split: int):
    """Each device's goes to the next."""
    if split == 1:
        return keys
    to_next = [(i, (i + 1) % split) for i in range(split)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, _AXIS, to_next), keys)


def _apart(step, split: int):
    """How many parts before the device's own those are that came to it after `step` rounds."""
    if split == 1:
        return jnp.int32(0)
    mine = jax.lax.axis_index(_AXIS)
    return mine - (mine - step) % split


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(pair: _Pair, split: int, q_BTKGH, keys: _Keys, segments_BT) -> jax.Array:
    return _forward(pair, split, q_BTKGH, keys, segments_BT)[0]


def _forward(pair, split, q_BTKGH, keys, segments_BT):
    def add(softmax: _Softmax, keys: _Keys, apart) -> _Softmax:
        scores_BKGTS = pair.scores(q_BTKGH, keys, segments_BT, apart)
        most_BKGT = jnp.maximum(softmax.most_BKGT, jnp.max(scores_BKGTS, axis=-1))
        weights_BKGTS = jnp.exp(scores_BKGTS - most_BKGT[..., None])
        shrink_BKGT = jnp.exp(softmax.most_BKGT - most_BKGT)
        out_BTKGH = _weighted(weights_BKGTS, keys.v_BSKH)
        return _Softmax(
            most_BKGT,
            shrink_BKGT * softmax.sum_BKGT + jnp.sum(weights_BKGTS, axis=-1),
            _by_token(shrink_BKGT)[..., None] * softmax.out_BTKGH + out_BTKGH,
        )

    def step(carry, i):
        keys, softmax = carry
        keys, apart = _round(keys, split), _apart(i, split)
        softmax = pair.if_seen(apart, lambda softmax: add(softmax, keys, apart), softmax)
        return (keys, softmax), None

    B, T, K, G, H = q_BTKGH.shape
    nothing = _Softmax(
        jnp.full((B, K, G, T), MASKED, jnp.float32),
        jnp.zeros((B, K, G, T), jnp.float32),
        jnp.zeros((B, T, K, G, H), jnp.float32),
    )
    # A device's own keys come first: after them, every query has seen one, itself at least.
    softmax = add(nothing, keys, _apart(0, split))
    (_, softmax), _ = jax.lax.scan(step, (keys, softmax), jnp.arange(1, split))
    out_BTKGH = softmax.out_BTKGH / _by_token(softmax.sum_BKGT)[..., None]
    log_sum_BKGT = softmax.most_BKGT + jnp.log(softmax.sum_BKGT)
    out_BTKGH = out_BTKGH.astype(q_BTKGH.dtype)
    out_BTKGH, log_sum_BKGT = checkpoint_name((out_BTKGH, log_sum_BKGT), "attention")
    return out_BTKGH, (q_BTKGH, keys, segments_BT, out_BTKGH, log_sum_BKGT)


def _backward(pair, split, saved, d_out_BTKGH):
    """The gradients of out = A / L at A = sum of exp(score - c) v and L = sum of exp(score - c),
    with c such that L = 1: those of A are `d_out_BTKGH`, those of L its product with -out."""
    q_BTKGH, keys, segments_BT, out_BTKGH, log_sum_BKGT = saved
    d_out_BTKGH = d_out_BTKGH.astype(jnp.float32)
    d_sum_BKGT = jnp.moveaxis(-jnp.sum(d_out_BTKGH * out_BTKGH, axis=-1), 1, 3)

    def add(grads, keys: _Keys, apart):
        def sums(q_BTKGH, k_BSKH, v_BSKH):
            these = keys._replace(k_BSKH=k_BSKH)
            scores_BKGTS = pair.scores(q_BTKGH, these, segments_BT, apart)
            weights_BKGTS = jnp.exp(scores_BKGTS - log_sum_BKGT[..., None])
            return _weighted(weights_BKGTS, v_BSKH), jnp.sum(weights_BKGTS, axis=-1)

        _, back = jax.vjp(sums, q_BTKGH, keys.k_BSKH, keys.v_BSKH)
        more = back((d_out_BTKGH, d_sum_BKGT))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, more)

    def step(carry, i):
        keys, (d_q, *d_keys) = carry
        apart = _apart(i, split)
        grads = pair.if_seen(apart, lambda g: add(g, keys, apart), (d_q, *d_keys))
        keys, d_keys = _round(keys, split), _round(grads[1:], split)  # the last round is home
        return (keys, (grads[0], *d_keys)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BTKGH, keys.k_BSKH, keys.v_BSKH))
    (_, (d_q, d_k, d_v)), _ = jax.lax.scan(step, (keys, zeros), jnp.arange(split))
    d_keys = _Keys(d_k.astype(keys.k_BSKH.dtype), d_v.astype(keys.v_BSKH.dtype), None)
    return d_q.astype(q_BTKGH.dtype), d_keys, None


_ring.defvjp(_forward, _backward)


def _weighted(weights_BKGTS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """float32 [B, T, K, G, H]."""
    return jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        weights_BKGTS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )


def _by_token(x_BKGT: jax.Array) -> jax.Array:
    return jnp.moveaxis(x_BKGT, 3, 1)
