"""What a model computes on its way from a prompt to its scores.

T tokens, S keys, K candidates, L layers, N heads, D width, V vocabulary, B rows (one), M places.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.model.transformer import Transformer

_SCORES = ("linear", "masked_lm")  # heads that give scores of tokens


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model with a head says of tokens. Candidates are the most probable first.

    Of a causal model, place t is that of token t as those before it tell it: place 0 has no
    candidates, nor has a prefix, whose tokens are seen by those before them; place T, with which
    M = T + 1, is what would follow. Of a masked model, place t is token t as it is told when it
    alone is hidden, M = T; specials have no candidates.
    """

    vocab_size: int
    loss_T: np.ndarray  # float32, nats: -log of the token's probability; NaN where there is none
    rank_T: np.ndarray  # int32: 1 for the most probable of all; 0 where there is none
    candidates_MK: np.ndarray  # int32 ids; -1 where there is none
    probabilities_MK: np.ndarray  # float32; NaN where there is none
    # What the final norm and the head make of the residual stream (nostalgebraist 2020): before the
    # first block, after it, and so on to the last. Of the prompt as it stands.
    lens_LT: np.ndarray  # int32 [L + 1, T], the most probable id
    lens_probabilities_LT: np.ndarray  # float32 [L + 1, T]


@dataclasses.dataclass(frozen=True)
class Look:
    """A model's insides on one prompt."""

    ids_T: np.ndarray  # int32
    causal: bool
    prefix: int  # of a causal model, how many of the first tokens see one another; 0: none
    weights_LNTS: np.ndarray  # float32: how much each token attends to each
    scores: Scores | None  # None: the model has no head that scores tokens


def look(
    model: Transformer,
    tokenizer: Tokenizer,
    ids_T: np.ndarray,
    *,
    prompt: int | None = None,
    top_k: int = 10,
) -> Look:
    """Runs the model on a prompt, on one device or the mesh that is set.

    A masked model runs once more for each token, with that one hidden.

    Args:
      prompt: how many of the tokens are the prompt, which a model with `prefix_attention` reads
        both ways; those behind continue it. None: all of them.
      top_k: candidates a place.

    Raises:
      UserError: the model computes numbers that are not finite, or is masked and the tokenizer has
        no mask.
    """
    config, scores = model.config, None
    T, k = len(ids_T), min(top_k, config.vocab_size)
    prefix = 0
    if config.prefix_attention:
        prefix = T if prompt is None else prompt
    weights_LNTS, rest, of_place = jax.device_get(_captured(model, ids_T, prefix, k))
    if config.head in _SCORES:
        if config.head == "masked_lm":
            if tokenizer.mask_id is None:
                raise UserError("this tokenizer has no mask token, which a masked model needs")
            hidden_T = ids_T == tokenizer.mask_id
            places_M = np.flatnonzero(~np.isin(ids_T, list(tokenizer.specials)) | hidden_T)
            of_place = jax.device_get(_when_hidden(model, ids_T, places_M, tokenizer.mask_id, k))
            places, answered_M = T, ~hidden_T[places_M]
        else:
            places, places_M = T + 1, np.arange(max(prefix, 1), T + 1)
            answered_M = places_M < T
            of_place = [x[places_M - 1] for x in of_place]
        loss_M, rank_M, ids_MK, probabilities_MK = of_place
        scores = Scores(
            config.vocab_size,
            _spread(loss_M[answered_M], places_M[answered_M], T, np.nan),
            _spread(rank_M[answered_M], places_M[answered_M], T, 0),
            _spread(ids_MK, places_M, places, -1),
            _spread(probabilities_MK, places_M, places, np.nan),
            *rest,
        )
        rest = [*rest, *of_place]
    if not all(np.isfinite(x).all() for x in (weights_LNTS, *rest)):
        raise UserError("the model computes numbers that are not finite: its weights are damaged")
    return Look(ids_T, config.causal, prefix, weights_LNTS, scores)


def _spread(values: np.ndarray, places: np.ndarray, size: int, missing: float) -> np.ndarray:
    """Rows at their places among `size`, and `missing` in the others."""
    out = np.full((size, *values.shape[1:]), missing, values.dtype)
    out[places] = values
    return out


@functools.partial(jax.jit, static_argnames="k")
def _captured(model: Transformer, ids_T: jax.Array, prefix: int, k: int):
    """The weights of attention; of a model with a head, what the lens shows in each place; and, if
    it tells the next token, `_told` of those after each, the last one's answer being none."""
    prefix_BT = None
    if model.config.prefix_attention:
        prefix_BT = jnp.arange(len(ids_T))[None] < prefix
    x_BTD, streams_LBTD, weights_LBNTS = model.capture(ids_T[None], prefix_BT=prefix_BT)
    if model.config.head not in _SCORES:
        return weights_LBNTS[:, 0], (), None

    def best(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_TV = model.logits(model.finish(x_BTD))[0]
        score_T = jnp.max(logits_TV, axis=-1)
        chance_T = jnp.exp(score_T - jax.nn.logsumexp(logits_TV, axis=-1))
        return jnp.argmax(logits_TV, axis=-1).astype(jnp.int32), chance_T

    told = None
    if model.config.head == "linear":
        told = _told(model.logits(x_BTD)[0], jnp.roll(ids_T, -1), k)
    return weights_LBNTS[:, 0], jax.lax.map(best, streams_LBTD), told  # a layer at a time


@functools.partial(jax.jit, static_argnames="k")
def _when_hidden(
    model: Transformer, ids_T: jax.Array, places_M: jax.Array, mask_id: int, k: int
) -> tuple[jax.Array, ...]:
    """See `_told`: of tokens that are hidden, one at a time."""

    def hidden(place: jax.Array) -> tuple[jax.Array, ...]:
        x_BTD, _ = model(jnp.where(jnp.arange(len(ids_T)) == place, mask_id, ids_T)[None])
        x_BTD = jax.lax.dynamic_slice_in_dim(x_BTD, place, 1, axis=1)
        told = _told(model.logits(x_BTD)[0], jax.lax.dynamic_slice_in_dim(ids_T, place, 1), k)
        return jax.tree.map(lambda x: x[0], told)

    return jax.lax.map(hidden, places_M)


def _told(logits_MV: jax.Array, answers_M: jax.Array, k: int) -> tuple[jax.Array, ...]:
    """The answers' losses and ranks, [M] each, and the k best ids with probabilities, [M, K]."""
    total_M = jax.nn.logsumexp(logits_MV, axis=-1)
    score_M = jnp.take_along_axis(logits_MV, answers_M[:, None], axis=-1)[:, 0]
    rank_M = 1 + jnp.sum(logits_MV > score_M[:, None], axis=-1, dtype=jnp.int32)
    scores_MK, ids_MK = jax.lax.top_k(logits_MV, k)
    return total_M - score_M, rank_M, ids_MK, jnp.exp(scores_MK - total_M[:, None])
