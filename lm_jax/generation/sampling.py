"""From scores to the next token.

B batch, V vocabulary, C candidates: all of V, or the `top_k` of the highest score.

Every function is pure and can be jitted. What is asked for decides what is compiled: a step that
does nothing (`top_p=1`) is left out, and `top_k` is a shape. The values are traced, so that another
temperature or seed compiles nothing.
"""

import dataclasses
import math

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
        """What `next_tokens` computes with: None for each step that does nothing."""

        def unless(off: bool, value: float) -> np.float32 | None:
            return None if off else np.float32(value)

        greedy = self.temperature == 0
        return Knobs(
            temperature=unless(greedy, self.temperature),
            top_k=None if greedy or self.top_k == 0 else int(self.top_k),
            top_p=unless(greedy or self.top_p == 1, self.top_p),
            min_p=unless(greedy or self.min_p == 0, self.min_p),
            repetition_penalty=unless(self.repetition_penalty == 1, self.repetition_penalty),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """`Sampling` as jitted code sees it: None is a step left out; no temperature is greedy."""

    temperature: jax.Array | np.float32 | None
    top_p: jax.Array | np.float32 | None
    min_p: jax.Array | np.float32 | None
    repetition_penalty: jax.Array | np.float32 | None
    top_k: int | None = dataclasses.field(metadata={"static": True})


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
    # Sorting needs the whole vocabulary on each device.
    logits_BV = reshard(logits_BV, activation_spec("batch", None))
    logits_BV = without_padding(logits_BV, vocab_size)
    if knobs.repetition_penalty is not None:
        logits_BV = penalized(logits_BV, seen_BV, knobs.repetition_penalty)
    if knobs.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BC, ids_BC = candidates(logits_BV, knobs)
    place_B = jax.vmap(jax.random.categorical)(keys_B, logits_BC)
    if ids_BC is None:
        return place_B.astype(jnp.int32)
    drawn_BC = jnp.arange(ids_BC.shape[1])[None] == place_B[:, None]
    return jnp.sum(jnp.where(drawn_BC, ids_BC, 0), axis=1).astype(jnp.int32)


def candidates(logits_BV: jax.Array, knobs: Knobs) -> tuple[jax.Array, jax.Array | None]:
    """Temperature, top-k, top-p and min-p.

    Returns:
      Scores float32 [B, C] whose softmax is the distribution to draw from, -inf for what is left
      out, and their token ids [B, C]; None: the ids are 0, 1, 2 ...
    """
    V, ids_BC = logits_BV.shape[1], None
    logits_BC = tempered(logits_BV, knobs.temperature)
    if knobs.top_k is not None or knobs.top_p is not None:
        # Highest first. Of equal scores the lower id comes first, and so exactly k are kept.
        logits_BC, ids_BC = jax.lax.top_k(logits_BC, min(knobs.top_k or V, V))
    if knobs.top_p is not None:
        logits_BC = nucleus(logits_BC, knobs.top_p)
    if knobs.min_p is not None:
        logits_BC = at_least(logits_BC, knobs.min_p)
    return logits_BC, ids_BC


def without_padding(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """-inf for the ids that the tokenizer does not have."""
    ids_1V = jnp.arange(logits_BV.shape[1])[None]
    return jnp.where(ids_1V < vocab_size, logits_BV, -jnp.inf)


def penalized(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Lowers the scores of seen tokens (Keskar et al. 2019; negative ones as in Transformers)."""
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def tempered(logits_BC: jax.Array, temperature: jax.Array) -> jax.Array:
    """Scores over temperature, with the highest moved to 0: no temperature is too low for it."""
    return (logits_BC - jnp.max(logits_BC, axis=-1, keepdims=True)) / temperature


def nucleus(logits_BC: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the fewest candidates whose mass reaches `top_p` (Holtzman et al. 2020), at least one.

    Args:
      logits_BC: highest first.
    """
    mass_BC = jax.nn.softmax(logits_BC, axis=-1)
    before_BC = jnp.cumsum(mass_BC, axis=-1) - mass_BC
    first_1C = jnp.arange(logits_BC.shape[1])[None] == 0
    return jnp.where((before_BC < top_p) | first_1C, logits_BC, -jnp.inf)


def at_least(logits_BC: jax.Array, min_p: jax.Array) -> jax.Array:
    """Keeps what is at least `min_p` times as probable as the best (Nguyen et al. 2024)."""
    floor_B1 = jnp.max(logits_BC, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits_BC >= floor_B1, logits_BC, -jnp.inf)


def row_keys(seed: jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """A key for each (seed, row, position): other rows and the size of the batch play no part."""
    key = jax.random.key(seed)
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B), positions_B)
