"""Classes that a model with a head 'classify' tells of texts.

B texts of a batch, T length, C classes, D width.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lm_jax.errors import UserError
from lm_jax.generation.batching import batches
from lm_jax.model.pooling import pooled, text_states
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard


def classify(
    model: Transformer,
    rows: Sequence[np.ndarray],
    *,
    pooling: str,
    batch_size: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The probability of each class for each text, float32 [len(rows), C].

    Inside `jax.set_mesh` the rows are shared out over it.

    Args:
      rows: the ids of texts, int32 [n] each, as `text_to_classify` gives them.
      pooling: as `DataConfig.pooling`, 'first', 'last' or 'mean'.
      on_done: called with the number of texts done.

    Raises:
      UserError: the model has no such head, or a text has no token.
    """
    if model.config.head != "classify":
        raise UserError(f"model.head = '{model.config.head}': this model tells no classes apart")
    if empty := [i for i, row in enumerate(rows) if not len(row)]:
        raise UserError(f"text {empty[0] + 1} of {len(rows)} is empty: it has no token")
    out, done = np.zeros((len(rows), model.config.labels), np.float32), 0
    for chosen, tokens_BT, lengths_B in batches(rows, batch_size, model.config.max_length):
        out[chosen] = np.asarray(_probabilities(model, tokens_BT, lengths_B, pooling))[
            : len(chosen)
        ]
        done += len(chosen)
        if on_done:
            on_done(done)
    return out


@functools.partial(jax.jit, static_argnames="pooling")
def _probabilities(
    model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, pooling: str
) -> jax.Array:
    x_BTD, lengths_B1 = text_states(model, tokens_BT, lengths_B)
    x_BD = pooled(x_BTD, lengths_B1, pooling).astype(x_BTD.dtype)
    scores_BC = model.logits(x_BD[:, None])[:, 0]
    return reshard(jax.nn.softmax(scores_BC, axis=-1), activation_spec(None, None))
