"""Which tokens of a batch are masked: drawn in the step that uses them, so anew each time.

The procedure is BERT's (Devlin et al. 2018, section 3.1, and create_pretraining_data.py in
github.com/google-research/bert): of the tokens of a row a fixed share is chosen; of the chosen, 80%
become the mask token, 10% a random one, and 10% stay. Masks are drawn anew for each step, as
RoBERTa's (Liu et al. 2019, section 4.1).

The number chosen of a row is its share rounded up or down at random: on average the share is exact,
and the logits of a row exist for a fixed, small number of positions. With whole words the number
may be off by a part of a word; one with which it would exceed the room there is (which a word
longer than that always does) is not masked.

B batch, T length, S predicted positions of a row (`DataConfig.predictions`), V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.sharding.mesh import activation_spec

_MASKED, _RANDOM = 0.8, 0.1  # of the chosen; the rest stays


@dataclasses.dataclass(frozen=True, eq=False)  # arrays cannot be compared: it equals only itself
class Masking:
    """What masking knows of the data: fixed during a run."""

    rate: float
    predictions: int  # S
    mask_id: int
    special_V: np.ndarray  # bool: ids that are never masked, and that none is replaced by
    starts_word_V: np.ndarray | None  # bool: ids that begin a word; None: each token by itself

    def __call__(self, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """A batch with some inputs masked and just these predicted.

        What is drawn depends on `key` and the shape of the batch, on no mesh.

        Args:
          batch: int32 [B, T] `inputs`, `targets`, `segments` and `positions`, float32 `weights`
            (above 0: may be chosen).

        Returns:
          The batch with `inputs` corrupted, int32 [B, S] `predicted`, the positions chosen, none
          twice, and [B, S] `targets` and `weights` of these; weight 0 where fewer were chosen.
        """
        spec = activation_spec("batch", None)
        choose_key, action_key, random_key = jax.random.split(key, 3)
        inputs_BT, shape = batch["inputs"], batch["inputs"].shape
        special_BT = _look_up(self.special_V, inputs_BT)
        eligible_BT = (batch["weights"] > 0) & ~special_BT
        start_BT = self._word_starts(inputs_BT, batch["segments"], special_BT)
        chosen_BT = self._choose(choose_key, eligible_BT, start_BT)

        action_BT = jax.random.uniform(action_key, shape, out_sharding=spec)
        text = np.flatnonzero(~self.special_V).astype(np.int32)
        random_BT = _look_up(
            text, jax.random.randint(random_key, shape, 0, len(text), out_sharding=spec)
        )
        corrupted_BT = jnp.where(action_BT < _MASKED + _RANDOM, random_BT, inputs_BT)
        corrupted_BT = jnp.where(action_BT < _MASKED, self.mask_id, corrupted_BT)

        predicted_BS = jnp.argsort(~chosen_BT, axis=1, stable=True)[:, : self.predictions]
        return batch | {
            "inputs": jnp.where(chosen_BT, corrupted_BT, inputs_BT),
            "predicted": predicted_BS,
            "targets": jnp.take_along_axis(batch["targets"], predicted_BS, axis=1),
            "weights": jnp.take_along_axis(chosen_BT, predicted_BS, axis=1).astype(jnp.float32),
        }

    def _word_starts(self, inputs_BT, segments_BT, special_BT) -> jax.Array:
        """int32 [B, T]: where the word of each token begins; none reaches over a special token or
        into another segment."""
        here_1T = jnp.arange(inputs_BT.shape[1])[None]
        if self.starts_word_V is None:
            spec = activation_spec("batch", None)
            return jnp.broadcast_to(here_1T, inputs_BT.shape, out_sharding=spec)
        starts_BT = _look_up(self.starts_word_V, inputs_BT) | special_BT
        starts_BT |= _shifted(special_BT) | (segments_BT != _shifted(segments_BT))
        return jax.lax.cummax(jnp.where(starts_BT, here_1T, 0), axis=1)

    def _choose(self, key: jax.Array, eligible_BT: jax.Array, start_BT: jax.Array) -> jax.Array:
        """bool [B, T]: the tokens of the words chosen, at most S of a row.

        The words of a row are laid on a circle in random order; those that begin on an arc of the
        row's share are chosen. So each is with the same probability, whatever its length.
        """
        B, T = eligible_BT.shape
        order_key, turn_key, round_key = jax.random.split(key, 3)
        draw_BT = jax.random.uniform(order_key, (B, T), out_sharding=activation_spec("batch", None))
        draw_BT = jnp.take_along_axis(draw_BT, start_BT, axis=1)  # one for the tokens of a word
        order_BT = jnp.argsort(jnp.where(eligible_BT, draw_BT, 2.0), axis=1, stable=True)
        place_BT = jnp.argsort(order_BT, axis=1) - (jnp.arange(T)[None] - start_BT)  # of its start
        total_B1 = jnp.sum(eligible_BT, axis=1, keepdims=True)
        turn_B1, round_B1 = (
            jax.random.uniform(k, (B, 1), out_sharding=activation_spec("batch", None))
            for k in (turn_key, round_key)
        )
        turn_B1 = (turn_B1 * total_B1).astype(jnp.int32)
        place_BT = (place_BT + turn_B1) % jnp.maximum(total_B1, 1)
        arc_B1 = jnp.minimum(jnp.floor(self.rate * total_B1 + round_B1), self.predictions)
        chosen_BT = eligible_BT & (place_BT < arc_B1)
        fits_B1 = jnp.sum(chosen_BT, axis=1, keepdims=True) <= self.predictions
        last_B1 = jnp.max(jnp.where(chosen_BT, place_BT, -1), axis=1, keepdims=True)
        return chosen_BT & (fits_B1 | (place_BT != last_B1))


def _look_up(table: np.ndarray, ids_BT: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[ids_BT].get(out_sharding=activation_spec("batch", None))


def _shifted(x_BT: jax.Array) -> jax.Array:
    """What stands before each place; zero before the first."""
    return jnp.pad(x_BT, ((0, 0), (1, 0)))[:, :-1]


def make_masking(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> Masking | None:
    """The masking of a run; None where its objective has none.

    Args:
      vocab_size: the model's, which may be larger than the tokenizer's.

    Raises:
      UserError: the tokenizer has no mask token, or cannot tell words that are to be masked whole.
    """
    if config.objective != "masked":
        return None
    if tokenizer.mask_id is None:
        raise UserError(
            f"data.objective 'masked' needs a mask token, and this tokenizer ({tokenizer.kind}) has"
            " none: name one that has (BERT's, RoBERTa's), or let the run train one"
        )
    special_V = np.ones(vocab_size, bool)
    special_V[: tokenizer.vocab_size] = False
    special_V[list(tokenizer.specials)] = True
    if special_V.all():
        raise UserError("data.objective 'masked': the tokenizer has no token that stands for text")
    starts_word_V = None
    if config.mask_whole_words:
        starts_word_V = np.pad(tokenizer.starts_word, (0, vocab_size - tokenizer.vocab_size))
    return Masking(
        config.mask_rate, config.predictions, tokenizer.mask_id, special_V, starts_word_V
    )
