"""One hidden state for a whole text: its first token's, its last's, or the mean of all.

B rows, T length, D width.
"""

import jax
import jax.numpy as jnp

from lm_jax.sharding.mesh import activation_spec, reshard

POOLINGS = ("mean", "first", "last")


def pooled(x_BTD: jax.Array, lengths_B1: jax.Array, kind: str) -> jax.Array:
    """float32 [B, D], of rows with a text each, padded on the right.

    Args:
      lengths_B1: int32, of the texts, at least 1.
      kind: one of `POOLINGS`.
    """
    place_1T = jnp.arange(x_BTD.shape[1])[None]
    match kind:
        case "mean":
            weights_BT = (place_1T < lengths_B1) / lengths_B1
        case "first":
            weights_BT = (place_1T == 0) & (lengths_B1 > 0)
        case "last":
            weights_BT = place_1T == lengths_B1 - 1
        case _:
            raise ValueError(f"pooling {kind!r} is none of {POOLINGS}")
    weights_BT1 = weights_BT.astype(jnp.float32)[:, :, None]
    return jnp.sum(jnp.where(weights_BT1 > 0, x_BTD.astype(jnp.float32) * weights_BT1, 0), axis=1)


def document_means(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """In place of each hidden state, the mean of its document's, in the dtype of `x_BTD`; it is
    taken in float32. Where there is padding, 0.

    Args:
      segments_BT: int32 ids of the documents that stand in a row, 0 for padding.
    """
    x_BTD = reshard(x_BTD, activation_spec("batch", None, "embed"))
    segments_BT = reshard(segments_BT, activation_spec("batch", None))
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT > 0)[:, None, :]
    count_BT = jnp.maximum(jnp.sum(same_BTS, axis=-1), 1)
    share_BTS = same_BTS / count_BT[:, :, None].astype(jnp.float32)
    means_BTD = jnp.einsum("bts,bsd->btd", share_BTS, x_BTD, preferred_element_type=jnp.float32)
    return means_BTD.astype(x_BTD.dtype)
