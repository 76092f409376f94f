"""The loss of finding answers: which token of a window is the first, and which the last.

B batch, T length; several windows stand in a row, each a segment.
"""

import jax
import jax.numpy as jnp

from lm_jax.data.spans import CONTEXT, FIRST, LAST
from lm_jax.training.sums import LossSums


def span_sums(
    scores_BT2: jax.Array, targets_BT: jax.Array, segments_BT: jax.Array, z_loss: float = 0.0
) -> LossSums:
    """Sums over windows of the mean of two cross-entropies, each over all tokens of a window, as
    BERT has it (Devlin et al. 2018); right are the windows with both places right.

    Args:
      targets_BT: int32, see `lm_jax.data.spans`.
      segments_BT: int32, 0 for padding.
      z_loss: weight of log(Z)^2.
    """
    real_BT = segments_BT > 0
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & real_BT[:, None, :]
    nll = z = jnp.zeros((), jnp.float32)
    right_BT = jnp.zeros(targets_BT.shape, jnp.int32)
    for place, of_BT in enumerate((targets_BT & FIRST > 0, targets_BT & LAST > 0)):
        of_BT = of_BT & real_BT
        scores_BT = scores_BT2[:, :, place]
        all_BTS = jnp.where(same_BTS, scores_BT[:, None, :], -jnp.inf)
        highest_BT = jax.lax.stop_gradient(jnp.max(all_BTS, axis=-1))
        # Rows of padding see no token: there, 0 in place of -inf - -inf.
        highest_BT = jnp.where(real_BT, highest_BT, 0.0)
        total_BT = jnp.sum(jnp.exp(all_BTS - highest_BT[:, :, None]), axis=-1)
        log_z_BT = highest_BT + jnp.log(jnp.where(real_BT, total_BT, 1.0))
        nll += jnp.sum(jnp.where(of_BT, log_z_BT - scores_BT, 0.0)) / 2
        z += jnp.sum(jnp.where(of_BT, jnp.square(log_z_BT), 0.0)) / 2
        right_BT += (of_BT & (scores_BT == highest_BT)).astype(jnp.int32)
    # How many of its two places each token's window has right.
    both_BT = jnp.sum(jnp.where(same_BTS, right_BT[:, None, :], 0), axis=-1) == 2
    first_BT = (targets_BT & FIRST > 0) & real_BT
    return LossSums(
        loss=nll + z_loss * z,
        nll=nll,
        z=z,
        weight=jnp.sum(first_BT.astype(jnp.float32)),
        right=jnp.sum((first_BT & both_BT).astype(jnp.float32)),
    )


def types_of(head: str, token_types: int, targets_BT: jax.Array) -> jax.Array | None:
    """Token types of windows: 0 up to the context, 1 from it on, where a model tells types."""
    if head != "span" or token_types < 2:
        return None
    return (targets_BT & CONTEXT > 0).astype(jnp.int32)
