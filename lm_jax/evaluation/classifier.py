"""Classes that a model with a head 'classify' tells of texts.

B texts of a batch, T length, C classes, D width.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.data.encoding import text_to_classify
from lm_jax.data.examples import Example
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.reading import by_length, padded
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard, shards


def classify(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    length: int,
    batch_size: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The probability of each class for each example's prompt, float32 [len(examples), C].

    Inside `jax.set_mesh` the rows are shared out over it.

    Args:
      length: tokens of a prompt that are read, at most the model's longest.
      on_done: called with the number of examples done.

    Raises:
      UserError: the model has no such head, or a prompt has no token or cannot be shortened.
    """
    if model.config.head != "classify":
        raise UserError(f"model.head = '{model.config.head}': this model tells no classes apart")
    longest = min(length, model.config.max_length)
    rows = [text_to_classify(example, tokenizer, longest)[0] for example in examples]
    if empty := [i for i, row in enumerate(rows) if not len(row)]:
        raise UserError(f"text {empty[0] + 1} of {len(rows)} is empty: it has no token")
    parts, done = shards("batch"), 0
    B = -(-min(batch_size, max(len(rows), 1)) // parts) * parts
    out = np.zeros((len(rows), model.config.labels), np.float32)
    for chosen in by_length([len(row) for row in rows], B):
        tokens_BT, lengths_B = padded([rows[i] for i in chosen], B, longest)
        out[chosen] = np.asarray(_probabilities(model, tokens_BT, lengths_B))[: len(chosen)]
        done += len(chosen)
        if on_done:
            on_done(done)
    return out


@jax.jit
def _probabilities(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    tokens_BT = reshard(tokens_BT, activation_spec("batch", None))
    lengths_B1 = reshard(lengths_B, activation_spec("batch"))[:, None]
    place_1T = jnp.arange(tokens_BT.shape[1])[None]
    x_BTD, _ = model(tokens_BT, segments_BT=(place_1T < lengths_B1).astype(jnp.int32))
    told_BT = place_1T == (lengths_B1 - 1 if model.config.causal else 0 * lengths_B1)
    x_BD = jnp.sum(jnp.where(told_BT[:, :, None], x_BTD, 0), axis=1)
    scores_BC = model.logits(x_BD[:, None])[:, 0]
    return reshard(jax.nn.softmax(scores_BC, axis=-1), activation_spec(None, None))
