"""From scores to the next token.

B batch, V vocabulary, C candidates: the best of V. M blocks of N ids make up the vocabulary.

Every function is pure and can be jitted. Each row has its own values, which are traced, so that
another temperature or top-k compiles nothing; only what none of the rows asks for is left out. A
row's token depends on its own scores, values and key, not on what stands beside it.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.errors import UserError
from lm_jax.sharding.mesh import activation_spec, reshard


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults are those of sampling in Transformers.

    The steps are applied in the order of Transformers: penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 1.0  # 0: always the highest score
    top_k: int = 50  # the so many highest scores; 0: all
    top_p: float = 1.0  # the fewest tokens whose mass reaches it; 1: all
    min_p: float = 0.0  # tokens at least so probable, relative to the most probable one; 0: all
    repetition_penalty: float = 1.0  # of tokens in the prompt or generated before; 1: none

    def validate(self) -> "Sampling":
        """Returns itself.

        Raises:
          UserError: a value is out of its range; the message names it.
        """
        for name, holds, wanted in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is off)"),
        ):
            value = getattr(self, name)
            if not holds or not math.isfinite(value):
                raise UserError(f"{name}: must be {wanted}, not {value}")
        return self

    def knobs(self) -> "Knobs":
        """One row's, which stand for all rows of a batch."""
        return knobs_of([self])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """The `Sampling` of each row as jitted code sees it; of one row: the same for all.

    None is a step that no row asks for. A temperature of 0 is a greedy row.
    """

    temperature_B: jax.Array | np.ndarray | None  # float32, as all but top_k; None: all greedy
    top_k_B: jax.Array | np.ndarray  # int32; 0: all
    top_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    repetition_penalty_B: jax.Array | np.ndarray | None
    # How many of the best scores to sort, where top-k or top-p need them; more if they do not do.
    candidates: int | None = dataclasses.field(metadata={"static": True})


_FEW, _MANY = 64, 1024  # candidates: for a usual top-k; for a usual top-p of a trained model


def knobs_of(samplings: Sequence[Sampling]) -> Knobs:
    """What `next_tokens` computes with, a row for each of `samplings`."""
    drawn = [s for s in samplings if s.temperature > 0]
    cut = [s for s in drawn if s.top_k or s.top_p < 1]

    def column(values: list[float], kind: type) -> np.ndarray:
        return np.array(values, kind)

    few = all(0 < s.top_k <= _FEW for s in cut)
    # Beyond these, scores over the temperature would be no numbers.
    temperatures = [min(max(s.temperature, 1e-30), 1e30) if s.temperature else 0 for s in samplings]
    penalties = [s.repetition_penalty for s in samplings]
    return Knobs(
        temperature_B=column(temperatures, np.float32) if drawn else None,
        top_k_B=column([min(s.top_k, 2**30) for s in samplings], np.int32),
        top_p_B=column([s.top_p for s in samplings], np.float32),
        min_p_B=column([s.min_p for s in samplings], np.float32),
        repetition_penalty_B=(
            column(penalties, np.float32) if any(p != 1 for p in penalties) else None
        ),
        candidates=None if not cut else _FEW if few else _MANY,
    )


def next_tokens(
    logits_BV: jax.Array,
    knobs: Knobs,
    keys_B: jax.Array,
    seen_BV: jax.Array | None,
    vocab_size: int,
) -> jax.Array:
    """Draws a token for each row.

    Args:
      logits_BV: float32.
      keys_B: a key a row; the row's token depends on it and on the row's scores alone.
      seen_BV: bool, tokens that `repetition_penalty` is for; None if there is no penalty.
      vocab_size: ids from here on are padding of the vocabulary, and never drawn.

    Returns:
      int32 [B].
    """
    # Sums over the vocabulary and sorting need the whole of it on each device.
    logits_BV = reshard(logits_BV, activation_spec("batch", None))
    logits_BV = without_padding(logits_BV, vocab_size)
    if knobs.repetition_penalty_B is not None:
        logits_BV = penalized(logits_BV, seen_BV, knobs.repetition_penalty_B)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if knobs.temperature_B is None:
        return best_B
    drawn_B = draw(jnp.exp(allowed(logits_BV, knobs)), keys_B)
    return jnp.where(knobs.temperature_B > 0, drawn_B, best_B)


def allowed(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Temperature, top-k, top-p and min-p.

    Returns:
      Scores float32 [B, V], 0 the highest, whose softmax is the distribution to draw from: -inf for
      what is left out. Of a greedy row they mean nothing.
    """
    logits_BV = tempered(logits_BV, knobs.temperature_B)
    if knobs.candidates is not None:
        logits_BV = jnp.where(_among_best(logits_BV, knobs), logits_BV, -jnp.inf)
    floor_B1 = jnp.log(knobs.min_p_B)[:, None]  # min-p: Nguyen et al. 2024
    return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def without_padding(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """-inf for the ids that the tokenizer does not have."""
    ids_1V = jnp.arange(logits_BV.shape[1])[None]
    return jnp.where(ids_1V < vocab_size, logits_BV, -jnp.inf)


def penalized(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Lowers the scores of seen tokens (Keskar et al. 2019; negative ones as in Transformers)."""
    penalty_B1 = penalty_B[:, None]
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def tempered(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Scores over temperature, with the highest moved to 0: no temperature is too low for it."""
    temperature_B1 = jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
    return (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B1


def _among_best(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Top-k, then top-p of what is left (Holtzman et al. 2020): bool [B, V], True if kept.

    Both keep the best so many, of equal scores those of lower ids; so it is the last one kept that
    decides. It is looked for among the best few, as sorting the vocabulary takes longer than a
    small model.
    """
    V = logits_BV.shape[1]
    C = min(knobs.candidates, V)
    (score_B1, id_B1), found = _last_kept(logits_BV, knobs, C)
    if C < V and knobs.candidates > _FEW:
        score_B1, id_B1 = jax.lax.cond(
            found, lambda: (score_B1, id_B1), lambda: _last_kept(logits_BV, knobs, V)[0]
        )
    ids_1V = jnp.arange(V)[None]
    return (logits_BV > score_B1) | ((logits_BV == score_B1) & (ids_1V <= id_B1))


def _last_kept(
    logits_BV: jax.Array, knobs: Knobs, C: int
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The score and the id, [B, 1] each, of the last one kept, and whether `C` were enough."""
    V = logits_BV.shape[1]
    top_k_B1, top_p_B1 = knobs.top_k_B[:, None], knobs.top_p_B[:, None]
    top_k_B1 = jnp.where(top_k_B1 == 0, V, jnp.minimum(top_k_B1, V))
    scores_BC, ids_BC = jax.lax.top_k(logits_BV, C)  # of equal scores the lower id comes first
    place_1C = jnp.arange(C)[None]
    mass_BC = jnp.where(place_1C < top_k_B1, jnp.exp(scores_BC), 0)
    total_B1 = jnp.where(
        top_k_B1 <= C,
        jnp.sum(mass_BC, axis=1, keepdims=True),
        jnp.sum(jnp.exp(logits_BV), axis=1, keepdims=True),
    )
    before_BC = jnp.cumsum(mass_BC, axis=1) - mass_BC
    in_nucleus_BC = (before_BC < top_p_B1 * total_B1) | (place_1C == 0) | (top_p_B1 == 1)
    kept_B1 = jnp.sum(in_nucleus_BC & (place_1C < top_k_B1), axis=1, keepdims=True)
    is_last_BC = place_1C == kept_B1 - 1
    uncut_B1 = (top_k_B1 == V) & (top_p_B1 == 1)
    score_B1 = jnp.sum(jnp.where(is_last_BC, scores_BC, 0), axis=1, keepdims=True)
    id_B1 = jnp.sum(jnp.where(is_last_BC, ids_BC, 0), axis=1, keepdims=True)
    greedy_B1 = knobs.temperature_B[:, None] == 0
    in_reach_B1 = (top_k_B1 <= C) | ((top_k_B1 == V) & (kept_B1 < C))
    found = jnp.all(uncut_B1 | greedy_B1 | in_reach_B1)
    return (jnp.where(uncut_B1, -jnp.inf, score_B1), jnp.where(uncut_B1, V, id_B1)), found


_BLOCK = 256  # about the square root of a large vocabulary


def draw(weights_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """An id a row, int32 [B], as probable as its weight says; never one without any.

    By the inverse of the cumulative distribution: two random numbers a row, where the Gumbel trick
    takes one for each id and longer than a small model. Blocks of ids come first and the ids of one
    second, so that float32 does for rare ones.
    """
    B, V = weights_BV.shape
    M = -(-V // _BLOCK)
    weights_BMN = jnp.pad(weights_BV, ((0, 0), (0, M * _BLOCK - V))).reshape(B, M, _BLOCK)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _place(jnp.sum(weights_BMN, axis=2), uniform_B2[:, 0])
    # A sum of one term; an index into a sharded batch would gather the batch.
    is_block_BM = jnp.arange(M)[None] == block_B[:, None]
    weights_BN = jnp.sum(jnp.where(is_block_BM[:, :, None], weights_BMN, 0), axis=1)
    return block_B * _BLOCK + _place(weights_BN, uniform_B2[:, 1])


def _place(weights_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The place, int32 [B], that a number from [0, 1) falls into."""
    some_BN = weights_BN > 0
    mass_BN = jnp.cumsum(weights_BN, axis=1)
    beyond_BN = some_BN & (mass_BN > uniform_B[:, None] * mass_BN[:, -1:])
    last_B = weights_BN.shape[1] - 1 - jnp.argmax(some_BN[:, ::-1], axis=1)
    # By rounding, none may be beyond.
    place_B = jnp.where(jnp.any(beyond_BN, axis=1), jnp.argmax(beyond_BN, axis=1), last_B)
    return place_B.astype(jnp.int32)


def row_keys(seeds: jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """A key for each (seed, row, position): other rows and the size of the batch play no part.

    Args:
      seeds: uint32, one for each row or one for all.
    """
    fold = jax.vmap(jax.random.fold_in)
    if jnp.ndim(seeds):
        keys_B = fold(jax.vmap(jax.random.key)(seeds), rows_B)
    else:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seeds), rows_B)
    return fold(keys_B, positions_B)
