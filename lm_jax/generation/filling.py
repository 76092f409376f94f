"""What a masked language model makes of a text some tokens of which are hidden."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.data.packing import with_ends
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard, shards


class Filled(NamedTuple):
    text: str  # with the model's most probable tokens in the hidden places
    guesses: list[tuple[str, str]]  # a hidden token and its guess, readable, in the text's order


def fill_in(
    model: Transformer, tokenizer: Tokenizer, text: str, *, hidden: int, seed: int = 0
) -> Filled:
    """Hides tokens of `text` and fills each in by itself.

    Works on the mesh that is set, otherwise on one device.

    Args:
      hidden: how many, or as many as there are; which ones depends on the text and `seed`.

    Raises:
      UserError: the text is empty or too long for the model.
    """
    ids = with_ends(tokenizer, tokenizer.encode(text))
    special_V = np.ones(model.config.vocab_size, bool)
    special_V[: tokenizer.vocab_size] = False
    special_V[list(tokenizer.specials)] = True
    places = np.flatnonzero(~special_V[ids])
    if not len(places) or len(ids) > model.config.max_length:
        raise UserError(
            f"the text to fill in has {len(ids)} tokens, its ends included: the model takes at most"
            f" {model.config.max_length}, and one or more must be of text"
        )
    draw = np.random.default_rng(seed)
    places = np.sort(draw.choice(places, min(hidden, len(places)), replace=False))
    masked, filled = ids.copy(), ids.copy()
    masked[places] = tokenizer.mask_id
    filled[places] = jax.device_get(_most_probable(model, masked, special_V))[places]
    guesses = [(tokenizer.piece(int(ids[i])), tokenizer.piece(int(filled[i]))) for i in places]
    return Filled(tokenizer.decode(filled), guesses)


def encode_with_masks(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a whole text in which '[MASK]', or the tokenizer's own name for it, hides a token.

    Spaces before a mask are part of what it hides where tokens begin with their space. What goes
    around a text stands around it (`Tokenizer.frame`).

    Returns:
      int32 [T]
    """
    parts = [text]
    if tokenizer.mask_id is not None:
        names = {"[MASK]", tokenizer.specials[tokenizer.mask_id]}
        parts = re.split("|".join(map(re.escape, names)), text)
    if tokenizer.kind not in ("bytes", "characters"):
        parts[:-1] = [part.rstrip(" ") for part in parts[:-1]]
    ids = list(tokenizer.encode(parts[0]))
    for part in parts[1:]:
        ids += [tokenizer.mask_id, *tokenizer.encode(part)]
    return tokenizer.frame(np.array(ids, np.int32))


@jax.jit
def _most_probable(model: Transformer, ids_T: jax.Array, special_V: jax.Array) -> jax.Array:
    """int32 [T]: the id of text that scores highest in each place."""
    rows = shards("batch")  # one a device, all alike
    tokens_BT = jnp.broadcast_to(
        ids_T[None], (rows, len(ids_T)), out_sharding=activation_spec("batch", None)
    )
    x_BTD, _ = model(tokens_BT)
    scores_BTV = jnp.where(special_V, -jnp.inf, model.logits(x_BTD))
    best_BT = jnp.argmax(scores_BTV, axis=-1)
    return reshard(best_BT, activation_spec(None, None))[0]
