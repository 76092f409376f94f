"""Attention for CPUs: the queries of a row in blocks, each with the keys that it may see.

A causal query sees nothing behind itself. In blocks, half of the scores are never computed, and
those of one block stay in the caches. The backward pass is written by hand: it takes the weights as
the forward pass left them, and the sum that the softmax's gradient needs from the output (Dao et
al. 2022, appendix B.2), which is H numbers a query and not S.

B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head width,
C queries of a block, E keys up to its end, R = B x K, Q = G x C.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Below every score that a finite model makes, and finite itself: a row that is masked out
# altogether gives a uniform distribution and no NaN.
MASKED = -1e30
_QUERIES, _BLOCKS = 64, 4  # at least so many queries in a block, at most so many blocks of a row


class _Given(NamedTuple):
    """What a row's attention is made of; the queries are scaled."""

    q_BKGTH: jax.Array
    k_RSH: jax.Array
    v_RSH: jax.Array
    mask_BTS: jax.Array | None
    kept_BKGTS: jax.Array | None  # weights that dropout keeps


def tiled_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array | None,
    kept_BKGTS: jax.Array | None,
    *,
    causal: bool,
    scale: float,
    rate: float,
) -> jax.Array:
    """As `lm_jax.model.attention.attention`, on one device.

    Args:
      mask_BTS: bool [B or 1, T, S], True where a query sees a key; None: everywhere.
      kept_BKGTS: bool, the weights that dropout leaves; None: no dropout.
      causal: no query sees a key behind itself, and T = S.
      scale: of the scores.
      rate: of the weights that dropout takes.

    Returns:
      [B, T, N, H], of the dtype of `q_BTNH`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = jnp.moveaxis((scale * q_BTNH).reshape(B, T, K, N // K, H), 1, 3)
    k_RSH, v_RSH = (jnp.moveaxis(x, 1, 2).reshape(B * K, S, H) for x in (k_BSKH, v_BSKH))
    given = _Given(q_BKGTH, k_RSH, v_RSH, mask_BTS, kept_BKGTS)
    out_BKGTH = _attend(causal, rate, given)
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(q_BTNH.shape)


def _blocks(T: int, S: int, causal: bool) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys that it sees some of."""
    if not causal:
        return [(slice(0, T), slice(0, S))]
    count = max(1, min(_BLOCKS, T // _QUERIES))
    bounds = [T * i // count for i in range(count + 1)]
    return [(slice(a, b), slice(0, b)) for a, b in itertools.pairwise(bounds)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(causal: bool, rate: float, given: _Given) -> jax.Array:
    return _forward(causal, rate, given)[0]


def _forward(causal: bool, rate: float, given: _Given):
    B, K, G, T, H = given.q_BKGTH.shape
    outs, weights = [], []
    for rows, keys in _blocks(T, given.k_RSH.shape[1], causal):
        q_RQH = given.q_BKGTH[:, :, :, rows].reshape(B * K, -1, H)
        k_REH, v_REH = given.k_RSH[:, keys], given.v_RSH[:, keys]
        scores_RQE = _product("RQH,REH->RQE", q_RQH, k_REH)
        if given.mask_BTS is not None:
            seen_BCE = given.mask_BTS[:, rows, keys]
            scores_BKGCE = scores_RQE.reshape(B, K, G, *seen_BCE.shape[1:])
            scores_BKGCE = jnp.where(seen_BCE[:, None, None], scores_BKGCE, MASKED)
            scores_RQE = scores_BKGCE.reshape(scores_RQE.shape)
        weights_RQE = jax.nn.softmax(scores_RQE, axis=-1)
        weights.append(weights_RQE)
        used_RQE = _dropped(weights_RQE, given, rows, keys, rate).astype(v_REH.dtype)
        outs.append(_product("RQE,REH->RQH", used_RQE, v_REH).reshape(B, K, G, -1, H))
    out_BKGTH = jnp.concatenate(outs, axis=3).astype(given.q_BKGTH.dtype)
    out_BKGTH = checkpoint_name(out_BKGTH, "attention")  # here: the backward pass needs it
    return out_BKGTH, (given, out_BKGTH, weights)


def _backward(causal: bool, rate: float, saved, d_out_BKGTH):
    given, out_BKGTH, weights = saved
    B, K, G, T, H = given.q_BKGTH.shape
    d_q, d_k_RSH, d_v_RSH = [], 0.0, 0.0
    moved_BKGT = jnp.sum(d_out_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32), axis=-1)
    S = given.k_RSH.shape[1]
    for (rows, keys), weights_RQE in zip(_blocks(T, S, causal), weights):
        q_RQH, d_out_RQH = (
            x[:, :, :, rows].reshape(B * K, -1, H) for x in (given.q_BKGTH, d_out_BKGTH)
        )
        k_REH, v_REH = given.k_RSH[:, keys], given.v_RSH[:, keys]
        used_RQE = _dropped(weights_RQE, given, rows, keys, rate).astype(v_REH.dtype)
        d_v_REH = _product("RQE,RQH->REH", used_RQE, d_out_RQH)
        d_weights_RQE = _product("RQH,REH->RQE", d_out_RQH, v_REH)
        d_weights_RQE = _dropped(d_weights_RQE, given, rows, keys, rate)
        moved_RQ1 = moved_BKGT[:, :, :, rows].reshape(B * K, -1, 1)
        d_scores_RQE = (weights_RQE * (d_weights_RQE - moved_RQ1)).astype(k_REH.dtype)
        d_q.append(_product("RQE,REH->RQH", d_scores_RQE, k_REH).reshape(B, K, G, -1, H))
        d_k_REH = _product("RQE,RQH->REH", d_scores_RQE, q_RQH)
        unseen = ((0, 0), (0, S - keys.stop), (0, 0))
        d_k_RSH += jnp.pad(d_k_REH, unseen)
        d_v_RSH += jnp.pad(d_v_REH, unseen)
    d_q_BKGTH = jnp.concatenate(d_q, axis=3).astype(given.q_BKGTH.dtype)
    d_k_RSH, d_v_RSH = d_k_RSH.astype(given.k_RSH.dtype), d_v_RSH.astype(given.v_RSH.dtype)
    return (_Given(d_q_BKGTH, d_k_RSH, d_v_RSH, None, None),)


_attend.defvjp(_forward, _backward)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _dropped(x_RQE: jax.Array, given: _Given, rows: slice, keys: slice, rate: float) -> jax.Array:
    """Weights, or their gradients, as dropout leaves them."""
    if given.kept_BKGTS is None:
        return x_RQE
    kept_RQE = given.kept_BKGTS[:, :, :, rows, keys].reshape(x_RQE.shape)
    return jnp.where(kept_RQE, x_RQE / (1 - rate), 0)
