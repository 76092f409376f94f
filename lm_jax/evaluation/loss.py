"""Loss, perplexity, accuracy and bits per byte of a text."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.likelihoods import Likelihood
from lm_jax.evaluation.metrics import score

LEAST_BATCHES = 20  # of an interval; with fewer, it would be too narrow


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
      tell bytes, and of masked tokens. tokens, bytes: what it was measured on. perplexity_low,
      perplexity_high: what 95% of samples drawn anew from the same batches have, of `LEAST_BATCHES`
      or more. (A batch is drawn as a whole since the parts of a long document, which stand near one
      another, are alike: Künsch 1989.)
    """
    total = dict.fromkeys(("nll", "tokens", "right", "bytes"), 0.0)
    pending, parts = None, []
    for i, batch in enumerate(batches):
        sums = evaluate_batch(batch, i)
        if pending is not None:
            parts.append(_add(total, pending))  # one batch late: the device does not wait
        pending = sums
        if on_batch:
            on_batch(i + 1)
    if pending is not None:
        parts.append(_add(total, pending))
    loss = total["nll"] / total["tokens"] if total["tokens"] else math.nan
    out = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "accuracy": total["right"] / total["tokens"] if total["tokens"] else math.nan,
    }
    if len(parts) >= LEAST_BATCHES and all(part.tokens for part in parts):
        interval = score(["perplexity"], (), (), likelihoods=parts)["perplexity"]
        out |= {"perplexity_low": interval.low, "perplexity_high": interval.high}
    if total["bytes"]:
        out["bits_per_byte"] = total["nll"] / math.log(2) / total["bytes"]
    return out | {"tokens": int(total["tokens"]), "bytes": int(total["bytes"])}


def _add(total: dict[str, float], sums: dict[str, jax.Array]) -> Likelihood:
    """Adds a batch's sums, and gives those of its likelihood."""
    found = {key: float(np.float64(value)) for key, value in jax.device_get(sums).items()}
    for key, value in found.items():
        total[key] += value
    return Likelihood(found["nll"], int(found["tokens"]))


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
