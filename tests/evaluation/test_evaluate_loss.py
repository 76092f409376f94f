"""Loss, perplexity and bits per byte: sums of everything, divided once."""

import math

import jax.numpy as jnp
import pytest

from lm_jax.errors import UserError
from lm_jax.evaluation.loss import byte_lengths, evaluate_loss


def evaluate(*sums: tuple[float, ...], **options) -> dict[str, float]:
    """Of batches of given nll, tokens, bytes and right answers (0 where left out)."""

    def run(batch, index):
        assert sums[index] is batch
        batch = (*batch, 0.0)[:4]
        return dict(zip(("nll", "tokens", "bytes", "right"), map(jnp.float32, batch)))

    return evaluate_loss(run, sums, **options)


def test_batches_weigh_by_their_tokens():
    """By hand: 10 tokens at 1 nat and 90 at 3 nats are 100 at 2.8, and not at 2."""
    got = evaluate((10.0, 10, 40, 10), (270.0, 90, 360, 0))
    assert got["accuracy"] == pytest.approx(0.1)
    assert got["loss"] == pytest.approx(2.8)
    assert got["perplexity"] == pytest.approx(math.exp(2.8))
    # 280 nats are 280 / ln 2 = 403.95 bits, over 400 bytes.
    assert got["bits_per_byte"] == pytest.approx(403.955 / 400, rel=1e-4)
    assert (got["tokens"], got["bytes"]) == (100, 400)


def test_each_batch_counts_once_and_is_announced():
    seen = []
    assert evaluate(*[(2.0, 1, 1)] * 5, on_batch=seen.append)["tokens"] == 5
    assert seen == [1, 2, 3, 4, 5]
    assert evaluate((2.0, 1, 1))["tokens"] == 1


def test_an_interval_is_of_batches_and_narrows_with_them():
    batches = [(float(2 + i % 3), 1, 1) for i in range(240)]
    assert "perplexity_low" not in evaluate(*batches[:6])
    few, many = evaluate(*batches[:30]), evaluate(*batches)
    for got in (few, many):
        assert got["perplexity_low"] < got["perplexity"] < got["perplexity_high"]
    # The mean of n numbers, whose deviation is sqrt(2/3), plus or minus 1.96 of its own.
    assert math.log(many["perplexity_high"]) == pytest.approx(
        3 + 1.96 * (2 / 3 / 240) ** 0.5, abs=0.02
    )
    assert few["perplexity_high"] > many["perplexity_high"]


def test_sums_do_not_lose_small_batches_to_float32():
    """2^24 + 1 is no float32: a million batches must not stop counting there."""
    assert evaluate((2.0**24, 2**24, 1), *[(1.0, 1, 1)] * 3)["tokens"] == 2**24 + 3


def test_without_bytes_there_are_no_bits_per_byte():
    assert "bits_per_byte" not in evaluate((10.0, 10, 0))


def test_nothing_to_measure_is_nan_and_a_loss_beyond_floats_is_infinite_perplexity():
    assert math.isnan(evaluate()["loss"]) and math.isnan(evaluate((0.0, 0, 0))["loss"])
    assert evaluate((1000.0, 1, 1))["perplexity"] == math.inf


class Bytes:
    vocab_size = 3

    prefix_bytes = 0

    @property
    def byte_lengths(self):
        return jnp.array([1, 2, 0])


class Unknown(Bytes):
    prefix_bytes = 0

    @property
    def byte_lengths(self):
        raise UserError("nobody can tell")


def test_byte_lengths_are_padded_to_the_models_vocabulary():
    assert byte_lengths(Bytes(), 5).tolist() == [1, 2, 0, 0, 0]
    assert byte_lengths(Unknown(), 5).tolist() == [0] * 5
    prefixing = Bytes()
    prefixing.prefix_bytes = 1  # a space before each text, which is not the text's
    assert byte_lengths(prefixing, 5).tolist() == [0] * 5
