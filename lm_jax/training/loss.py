"""The loss of a batch of packed rows.

B batch, T length, S predicted positions of a row, D width.
"""

import jax
import jax.numpy as jnp

from lm_jax.model.head import HEADS_WITHOUT_WORDS
from lm_jax.model.pooling import document_means
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, dividing, reshard
from lm_jax.training.cross_entropy import cross_entropy
from lm_jax.training.spans import span_sums, types_of
from lm_jax.training.sums import LossSums


def batch_loss(
    model: Transformer,
    batch: dict[str, jax.Array],
    *,
    chunk: int | None = None,
    sparse: bool = False,
    average: bool = False,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> LossSums:
    """The sums for a batch of packed rows: int32 [B, T] `inputs`, `targets`, `segments` and
    `positions`, float32 `weights`.

    `prefix`, [B, T], marks the tokens of each document's prefix, see `Transformer.forward`; without
    it, a model with prefix attention reads as such what stands up to the first target that counts.

    With `predicted`, int32 [B, S], the head works for these positions of each row alone, and
    `targets` and `weights` are [B, S], theirs.

    Of a model with a head 'span' it is the loss of the answers' places: `lm_jax.training.spans`.

    Args:
      chunk, sparse, z_loss, label_smoothing: as of `lm_jax.training.cross_entropy`.
      average: the head takes the mean of a document's hidden states in place of each of them.
    """
    x_BTD, router = _forward(model, batch, dropout_key)
    if model.config.head == "span":
        scores_BT2 = model.logits(x_BTD)
        sums = span_sums(scores_BT2, batch["targets"], batch["segments"], z_loss)
        return sums._replace(router=router)
    if average:
        x_BTD = document_means(x_BTD, batch["segments"])
    if "predicted" in batch:
        x_BTD = reshard(x_BTD, activation_spec("batch", None, "embed"))
        x_BTD = jnp.take_along_axis(x_BTD, batch["predicted"][:, :, None], axis=1)
    sums = cross_entropy(
        model.head_input(x_BTD),
        model.output_head(dividing("length", batch["targets"].shape[1])),
        batch["targets"],
        batch["weights"],
        chunk=chunk,
        sparse=sparse,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
    return sums._replace(router=router)


def router_load(
    model: Transformer, batch: dict[str, jax.Array], dropout_key: jax.Array | None = None
) -> jax.Array:
    """How many real tokens of a batch choose each expert: float32 [L, E]."""
    return _forward(model, batch, dropout_key)[1].load_E


def _forward(model, batch, dropout_key):
    x_BTD, _, router = model.forward(
        batch["inputs"],
        positions_BT=batch["positions"],
        segments_BT=batch["segments"],
        types_BT=types_of(model.config.head, model.config.token_types, batch["targets"]),
        prefix_BT=_prefix(model, batch),
        dropout_key=dropout_key,
    )
    return x_BTD, router


def _prefix(model: Transformer, batch: dict[str, jax.Array]) -> jax.Array | None:
    """Which inputs are given and no target that counts: bool [B, T]."""
    if not model.config.prefix_attention or "prefix" in batch:
        return batch.get("prefix")
    if model.config.head in HEADS_WITHOUT_WORDS:  # the whole text is given
        return batch["segments"] > 0
    counts_BT = jnp.pad(batch["weights"][:, :-1] > 0, ((0, 0), (1, 0)))  # as a target before
    return (batch["positions"] == 0) | ~counts_BT
