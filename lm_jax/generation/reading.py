"""What a model reads of texts that it is to continue: prompts, checked, and then token by token.

B rows, T prompt length, S cache slots, D width, V vocabulary.

What is compiled is one program for a prompt and one for a token; of a `Layered` model, one for what
is before its blocks, one for a block and one for what is behind them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError
from lm_jax.model.block import Context
from lm_jax.model.cache import Cache, init_cache, lengthen
from lm_jax.model.layered import Layered
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard

Model = Transformer | Layered


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
    model: Model, tokens_BT: jax.Array, lengths_B: jax.Array, slots: int
) -> tuple[jax.Array, Cache]:
    """Reads prompts, whatever they are padded with.

    Args:
      slots: of the cache, at least T.

    Returns:
      float32 [B, V], the scores of what follows each prompt, and the cache with the prompts.
    """
    if isinstance(model, Layered):
        return _read(model, tokens_BT, lengths_B, slots, _PROMPT_APART)
    return _read_whole(model, tokens_BT, lengths_B, slots)


def advance(
    model: Model, token_B: jax.Array, position_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Puts a token of each row in the cache, which is donated.

    Args:
      token_B, position_B: int32.

    Returns:
      float32 [B, V], the scores of what follows each token, and the cache.
    """
    if isinstance(model, Layered):
        return _advance(model, token_B, position_B, cache, _TOKEN_APART)
    return _advance_whole(model, token_B, position_B, cache)


def _begin_prompt(
    outer: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, apart: bool = False
) -> tuple[jax.Array, Context, Cache]:
    B, T = tokens_BT.shape
    tokens_BT = reshard(tokens_BT, activation_spec("batch", None))
    prefix_BT = None
    if outer.config.prefix_attention:  # the prompt, without the padding behind it
        lengths_B1 = reshard(lengths_B, activation_spec("batch"))[:, None]
        prefix_BT = jnp.arange(T)[None] < lengths_B1
    # Attention over the prompt alone, not over the empty slots that follow.
    x_BTD, context = outer.begin(tokens_BT, prefix_BT=prefix_BT, slots=T)
    return x_BTD, context, init_cache(outer.config, B, T, apart)


def _end_prompt(
    outer: Transformer, x_BTD: jax.Array, lengths_B: jax.Array, cache: Cache, slots: int
) -> tuple[jax.Array, Cache]:
    lengths_B1 = reshard(lengths_B, activation_spec("batch"))[:, None]
    is_last_BT = jnp.arange(x_BTD.shape[1])[None] == lengths_B1 - 1
    # A sum of one term; an index into a sharded batch would gather the batch.
    x_BD = jnp.sum(jnp.where(is_last_BT[:, :, None], outer.finish(x_BTD), 0), axis=1)
    return outer.logits(x_BD[:, None])[:, 0], lengthen(cache, slots)


def _begin_token(
    outer: Transformer, token_B: jax.Array, position_B: jax.Array, slots: int
) -> tuple[jax.Array, Context]:
    token_B1 = reshard(token_B, activation_spec("batch"))[:, None]
    position_B1 = reshard(position_B, activation_spec("batch"))[:, None]
    return outer.begin(token_B1, positions_BT=position_B1, slots=slots)


def _end_token(outer: Transformer, x_B1D: jax.Array) -> jax.Array:
    return outer.logits(outer.finish(x_B1D))[:, 0]


Parts = tuple[Callable, Callable]  # before and behind the blocks
_PROMPT: Parts = _begin_prompt, _end_prompt
_PROMPT_APART: Parts = (
    jax.jit(functools.partial(_begin_prompt, apart=True)),
    jax.jit(_end_prompt, static_argnames="slots"),
)
_TOKEN: Parts = _begin_token, _end_token
_TOKEN_APART: Parts = jax.jit(_begin_token, static_argnames="slots"), jax.jit(_end_token)


def _read(model: Model, tokens_BT, lengths_B, slots: int, parts: Parts = _PROMPT):
    begin, end = parts
    x_BTD, context, cache = begin(model.outer, tokens_BT, lengths_B)
    x_BTD, cache = model.run_blocks(x_BTD, context, cache)
    return end(model.outer, x_BTD, lengths_B, cache, slots=slots)


def _advance(model: Model, token_B, position_B, cache: Cache, parts: Parts = _TOKEN):
    begin, end = parts
    x_B1D, context = begin(model.outer, token_B, position_B, slots=cache.length)
    x_B1D, cache = model.run_blocks(x_B1D, context, cache)
    return end(model.outer, x_B1D), cache


_read_whole = jax.jit(_read, static_argnames=("slots", "parts"))
_advance_whole = jax.jit(_advance, static_argnames="parts", donate_argnames="cache")
