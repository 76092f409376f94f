"""Loss, perplexity, accuracy and bits per byte of a text."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError


def evaluate_loss(
    evaluate_batch: Callable[[Any, int], dict[str, jax.Array]],
    batches: Iterable[Any],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Sums over all batches, then divides once: batches of unequal size weigh by their tokens.

    Args:
      evaluate_batch: batch and its index -> sums `nll` (nats), `tokens`, `right` and `bytes`.
      on_batch: called with the number of batches dispatched so far.

    Returns:
      loss: nats a token. perplexity: e^loss. accuracy: the share of tokens whose most probable
      candidate is right. bits_per_byte: the whole negative log-likelihood, ends
      of documents included, in bits over UTF-8 bytes of text; absent where the tokenizer cannot
      tell bytes, and of masked tokens. tokens, bytes: what it was measured on.
    """
    total = dict.fromkeys(("nll", "tokens", "right", "bytes"), 0.0)
    pending = None
    for i, batch in enumerate(batches):
        sums = evaluate_batch(batch, i)
        if pending is not None:
            _add(total, pending)  # read one batch late: the device does not wait
        pending = sums
        if on_batch:
            on_batch(i + 1)
    if pending is not None:
        _add(total, pending)
    loss = total["nll"] / total["tokens"] if total["tokens"] else math.nan
    out = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "accuracy": total["right"] / total["tokens"] if total["tokens"] else math.nan,
    }
    if total["bytes"]:
        out["bits_per_byte"] = total["nll"] / math.log(2) / total["bytes"]
    return out | {"tokens": int(total["tokens"]), "bytes": int(total["bytes"])}


def _add(total: dict[str, float], sums: dict[str, jax.Array]) -> None:
    for key, value in jax.device_get(sums).items():
        total[key] += float(np.float64(value))


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes of each id, int32 [V]; zeros, and so no bits per byte, where nobody can tell."""
    try:
        lengths = tokenizer.byte_lengths
    except UserError:
        lengths = np.zeros(tokenizer.vocab_size, np.int32)
    if tokenizer.prefix_bytes:  # a space that is not in the text would count with each document
        lengths = np.zeros_like(lengths)
    lengths = lengths[:vocab_size]  # what is beyond the model is never encoded
    return np.pad(lengths, (0, vocab_size - len(lengths)))
