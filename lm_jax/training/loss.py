"""Cross-entropy over the vocabulary, in float32 and in chunks of positions.

B batch, T length, C positions of a chunk, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from lm_jax.model.head import Head
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, dividing, reshard, shards
from lm_jax.training.spans import span_sums, types_of
from lm_jax.training.sums import LossSums

# Logits that one device holds at a time where the chunk is left to be chosen: 2^27 float32 numbers,
# 512 MiB, and as much again for their gradient. Each chunk adds to the whole gradient of the head:
# with a quarter of this, that was a twentieth of the step of a model of 8B on TPUs.
LOGITS_A_DEVICE = 2**27


def chunk_length(length: int, rows: int, vocab: int, parts: int = 1) -> int:
    """The largest divisor of `length` whose logits stay under `LOGITS_A_DEVICE`.

    Args:
      length: of a row, which is split in `parts` parts; each chunk has as much of each.
      rows, vocab: of one device.
    """
    own = length // parts
    fits = [c for c in range(1, own + 1) if own % c == 0 and rows * c * vocab <= LOGITS_A_DEVICE]
    return parts * max(fits, default=1)


def cross_entropy(
    x_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int | None = None,
) -> LossSums:
    """Weighted sums of -log p(target), of log(Z)^2, of right answers and of the mean of -log p.

    With a chunk, logits exist for `chunk` positions of each row at a time and are computed again
    for the gradient, so that [B, T, V] is never held.

    Args:
      x_BTD: what the head takes, see `Transformer.head_input`.
      weights_BT: float32; 0 leaves a position out.
      chunk: divides T, and the parts that the mesh splits a row in divide it; None: all at once.
    """
    T = x_BTD.shape[1]
    length = dividing("length", T)
    inputs = tuple(
        reshard(x, activation_spec("batch", length, *(None,) * (x.ndim - 2)))
        for x in (x_BTD, targets_BT, weights_BT)
    )
    if chunk is None or chunk >= T:
        return _sums(inputs[0], head, *inputs[1:])
    split = shards(length)  # parts of a row; a chunk has as much of each, so that none has to move
    if chunk % split or T % chunk:
        raise ValueError(f"chunks of {chunk} do not divide {T} positions in {split} part(s)")

    def chunks_first(x):
        B, rest = x.shape[0], x.shape[2:]
        x = jax.lax.reshape(
            x,
            (B, split, T // chunk, chunk // split, *rest),
            out_sharding=activation_spec("batch", length, *(None,) * x.ndim),
        )
        return jax.lax.reshape(
            jnp.moveaxis(x, 2, 0),
            (T // chunk, B, chunk, *rest),
            out_sharding=activation_spec(None, "batch", length, *(None,) * len(rest)),
        )

    def add(total, part):
        return jax.tree.map(jnp.add, total, _sums(part[0], head, *part[1:])), None

    parts = tuple(map(chunks_first, inputs))
    return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), LossSums.zero(), parts)[0]


def _sums(x_BTD, head, targets_BT, weights_BT) -> LossSums:
    logits_BTV = head.logits(x_BTD)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A masked sum and no gather: it stays local where the vocabulary is sharded.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[:, :, None]
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return LossSums(
        nll=jnp.sum((log_z_BT - target_BT) * weights_BT),
        z=jnp.sum(jnp.square(log_z_BT) * weights_BT),
        weight=jnp.sum(weights_BT),
        right=jnp.sum((jnp.argmax(logits_BTV, axis=-1) == targets_BT) * weights_BT),
        uniform=jnp.sum((log_z_BT - jnp.mean(logits_BTV, axis=-1)) * weights_BT),
    )


def batch_loss(
    model: Transformer,
    batch: dict[str, jax.Array],
    *,
    chunk: int | None = None,
    dropout_key: jax.Array | None = None,
) -> LossSums:
    """The sums for a batch of packed rows: int32 [B, T] `inputs`, `targets`, `segments` and
    `positions`, float32 `weights`.

    `prefix`, [B, T], marks the tokens of each document's prefix, see `Transformer.forward`; without
    it, a model with prefix attention reads as such what stands up to the first target that counts.

    With `predicted`, int32 [B, S], the head works for these positions of each row alone, and
    `targets` and `weights` are [B, S], theirs.

    Of a model with a head 'span' it is the loss of the answers' places: `lm_jax.training.spans`.
    """
    x_BTD, router = _forward(model, batch, dropout_key)
    if model.config.head == "span":
        scores_BT2 = model.logits(x_BTD)
        return span_sums(scores_BT2, batch["targets"], batch["segments"])._replace(router=router)
    if "predicted" in batch:
        x_BTD = reshard(x_BTD, activation_spec("batch", None, "embed"))
        x_BTD = jnp.take_along_axis(x_BTD, batch["predicted"][:, :, None], axis=1)
    sums = cross_entropy(
        model.head_input(x_BTD),
        model.output_head(dividing("length", batch["targets"].shape[1])),
        batch["targets"],
        batch["weights"],
        chunk=chunk,
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
    counts_BT = jnp.pad(batch["weights"][:, :-1] > 0, ((0, 0), (1, 0)))  # as a target before
    return (batch["positions"] == 0) | ~counts_BT
