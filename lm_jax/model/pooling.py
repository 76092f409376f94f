"""Whole texts, read as they are given; one hidden state for each: its first token's, its last's, or
the mean of all.

B rows, T length, D width.
"""

import jax
import jax.numpy as jnp

from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard

POOLINGS = ("mean", "first", "last")


def text_states(
    model: Transformer,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    types_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The hidden states [B, T, D] of rows with a text each, padded on the right, and the lengths of
    the texts, int32 [B, 1]; both shared out over the mesh. A text is read as a prompt is: both
    ways, where the model does so.

    Args:
      types_BT: as of `Transformer.forward`.
    """
    rows = activation_spec("batch", None)
    lengths_B1 = reshard(lengths_B, activation_spec("batch"))[:, None]
    segments_BT = (jnp.arange(tokens_BT.shape[1])[None] < lengths_B1).astype(jnp.int32)
    x_BTD, _ = model(
        reshard(tokens_BT, rows),
        segments_BT=segments_BT,
        types_BT=None if types_BT is None else reshard(types_BT, rows),
        prefix_BT=segments_BT > 0 if model.config.prefix_attention else None,
    )
    return x_BTD, lengths_B1


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
