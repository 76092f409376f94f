"""Texts as vectors: the hidden states of a model, pooled over each text's tokens.

Sentence-BERT (Reimers and Gurevych 2019). B rows, T tokens, D width.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.batching import batches
from lm_jax.model.pooling import POOLINGS, pooled, text_states
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a text's tokens become one vector; as sentence-transformers' models say of themselves."""

    kind: str = "mean"  # or its first token's state (BERT's [CLS]), or its last's
    normalize: bool = True  # to length 1, so that a dot product is the cosine
    max_tokens: int | None = None  # what follows is cut off; None: the model's longest sequence


def embed(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pooling: Pooling = Pooling(),
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, int]:
    """Embeds each text; what stands beside it in a batch plays no part.

    Inside `jax.set_mesh` the rows are shared out over it.

    Args:
      batch_size: texts at a time, longest first, so that little is padding.
      on_batch: called with the number of texts done.

    Returns:
      float32 [len(texts), D], and how many texts were cut.

    Raises:
      UserError: a text has no token, or `pooling` does not fit the model.
    """
    limit = model.config.max_length
    if pooling.kind not in POOLINGS:
        raise UserError(f"pooling: '{pooling.kind}' is none of {', '.join(POOLINGS)}")
    if batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, not {batch_size}")
    if pooling.max_tokens is not None:
        if not 3 <= pooling.max_tokens <= limit:
            raise UserError(
                f"max_tokens: must be from 3 to the model's {limit}, not {pooling.max_tokens}"
            )
        limit = pooling.max_tokens
    rows, cut = [], 0
    ends = len(tokenizer.frame(np.zeros(0, np.int32)))
    for i, text in enumerate(texts):
        try:
            ids = tokenizer.encode(text)
        except UserError as e:
            raise UserError(f"text {i + 1} of {len(texts)}: {e}") from None
        cut += len(ids) > limit - ends
        ids = tokenizer.frame(ids[: limit - ends])
        if not len(ids):
            raise UserError(f"text {i + 1} of {len(texts)} is empty: it has no token to embed")
        rows.append(ids)
    out, done = np.zeros((len(rows), model.config.width), np.float32), 0
    for chosen, tokens_BT, lengths_B in batches(rows, batch_size, limit):
        found = _vectors(model, tokens_BT, lengths_B, pooling.kind, pooling.normalize)
        out[chosen] = np.asarray(found)[: len(chosen)]
        done += len(chosen)
        if on_batch:
            on_batch(done)
    return out, cut


@functools.partial(jax.jit, static_argnames=("kind", "normalize"))
def _vectors(
    model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, kind: str, normalize: bool
) -> jax.Array:
    x_BTD, lengths_B1 = text_states(model, tokens_BT, lengths_B)
    y_BD = pooled(x_BTD, lengths_B1, kind)
    if normalize:
        length_B1 = jnp.sqrt(jnp.sum(jnp.square(y_BD), axis=-1, keepdims=True))
        y_BD = y_BD / jnp.maximum(length_B1, 1e-12)
    return reshard(y_BD, activation_spec(None, None))
