"""Prompts on their way into a model: checked, and read into a cache.

B rows, T prompt length, S cache slots, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError
from lm_jax.model.cache import Cache, init_cache, lengthen
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard


def check_ids(ids: np.ndarray, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """A model would take another token for one that it does not have.

    Raises:
      UserError: one of the ids is no token of both.
    """
    size = min(config.vocab_size, tokenizer.vocab_size)
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        named = tokenizer.specials.get(int(wrong[0]))
        raise UserError(
            f"{wrong[0]}{f' ({named})' if named else ''} is no token of this model: ids are from 0"
            f" to {size - 1}"
        )


def read(
    model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, slots: int
) -> tuple[jax.Array, Cache]:
    """Reads prompts, whatever they are padded with.

    Args:
      slots: of the cache, at least T.

    Returns:
      The hidden states [B, D] of the last tokens of the prompts, and the cache with the prompts.
    """
    B, T = tokens_BT.shape
    tokens_BT = reshard(tokens_BT, activation_spec("batch", None))
    lengths_B1 = reshard(lengths_B, activation_spec("batch"))[:, None]
    place_1T = jnp.arange(T)[None]
    prefix_BT = None
    if model.config.prefix_attention:  # the prompt, without the padding behind it
        prefix_BT = place_1T < lengths_B1
    # Attention over the prompt alone, not over the empty slots that follow.
    x_BTD, cache = model(tokens_BT, prefix_BT=prefix_BT, cache=init_cache(model.config, B, T))
    is_last_BT = place_1T == lengths_B1 - 1
    # A sum of one term; an index into a sharded batch would gather the batch.
    x_BD = jnp.sum(jnp.where(is_last_BT[:, :, None], x_BTD, 0), axis=1)
    return x_BD, lengthen(cache, slots)
