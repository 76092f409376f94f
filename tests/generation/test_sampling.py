"""Each step against a slow version in float64, and the draw against the distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit

from lm_jax.errors import UserError
from lm_jax.generation.sampling import (
    Sampling,
    allowed,
    knobs_of,
    next_tokens,
    penalized,
    row_keys,
)

V = 128


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities of one row, by the definitions, token by token."""
    scores = logits.astype(np.float64) / s.temperature
    kept = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if s.top_k:
        kept = kept[: s.top_k]

    def probability(ids):
        p = np.zeros(len(scores))
        p[ids] = np.exp(scores[ids] - scores.max())
        return p / p.sum()

    p, smallest = probability(kept), []
    for i in kept:
        smallest.append(i)
        if sum(p[smallest]) >= s.top_p:
            break
    kept = smallest if s.top_p < 1 else kept
    p = probability(kept)
    return probability([i for i in kept if p[i] >= s.min_p * p.max()])


def distribution(logits_BV: np.ndarray, s: Sampling) -> np.ndarray:
    """What `allowed` makes of it, as float [B, V]."""
    return np.asarray(jax.nn.softmax(jax.jit(allowed)(logits_BV, s.knobs())))


PLAIN = Sampling(top_k=0)


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        Sampling(0.5, top_k=0),
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=1000),
        Sampling(top_k=0, top_p=0.8),
        Sampling(top_k=0, top_p=1e-6),
        Sampling(top_k=0, min_p=0.1),
        Sampling(top_k=0, min_p=1.0),
        Sampling(1.7, top_k=20, top_p=0.7, min_p=0.2),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_the_definitions(sampling):
    logits_BV = np.random.default_rng(0).normal(size=(50, V), scale=2).astype(np.float32)
    ours = distribution(logits_BV, sampling)
    wanted = np.stack([reference(row, sampling) for row in logits_BV])
    np.testing.assert_array_equal(ours > 0, wanted > 0)
    np.testing.assert_allclose(ours, wanted, rtol=2e-4)


def test_rows_differ_and_do_not_depend_on_one_another():
    """Any settings side by side: what each row may draw, and what it draws, is as if alone."""
    rng, wide = np.random.default_rng(5), 1500

    def setting() -> Sampling:
        return Sampling(
            temperature=float(rng.choice([0, 0.3, 1, 2])),
            top_k=int(rng.choice([0, 1, 7, 64, 65, 1024, 1400, 10**12])),
            top_p=float(rng.choice([1, 1, 0.1, 0.9, 0.99])),
            min_p=float(rng.choice([0, 0, 0.05])),
            repetition_penalty=float(rng.choice([1, 1, 1.4])),
        )

    settings = [setting() for _ in range(32)]
    scales = rng.choice([0.5, 4.0], (32, 1))  # flat ones reach far beyond the best 1024
    logits_BV = (scales * rng.normal(size=(32, wide))).astype(np.float32)
    seen_BV = rng.random((32, wide)) < 0.5
    keys_B = row_keys(rng.integers(0, 2**32, 32, np.uint32), np.arange(32), np.arange(32))
    draw = jax.jit(next_tokens, static_argnums=4)
    together = draw(logits_BV, knobs_of(settings), keys_B, seen_BV, wide)
    for i in range(8):
        part = slice(i, i + 1)
        alone = logits_BV[part], knobs_of(settings[part]), keys_B[part], seen_BV[part]
        np.testing.assert_array_equal(draw(*alone, wide), together[part])
    allowed_BV = jax.jit(allowed)(logits_BV, knobs_of(settings)) > -np.inf
    for row, kept, s in zip(logits_BV, allowed_BV, settings):
        if s.temperature > 0:
            wanted = reference(row, s) > 0
            # Where the sum of float32 reaches top-p, and that of float64, may be one id apart.
            assert (kept != wanted).sum() <= (s.top_p < 1)


@pytest.mark.parametrize("sampling", [Sampling(top_k=5), Sampling(top_k=0, top_p=0.57)], ids=str)
def test_ties_go_to_the_lower_id(sampling):
    logits_BV = np.random.default_rng(1).integers(0, 3, (50, 16)).astype(np.float32)
    wanted = np.stack([reference(row, sampling) for row in logits_BV])
    np.testing.assert_array_equal(distribution(logits_BV, sampling) > 0, wanted > 0)


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.7, top_k=6, top_p=0.95)], ids=str)
def test_tokens_are_drawn_as_often_as_they_are_probable(sampling):
    n, logits = 20_000, np.random.default_rng(2).normal(size=10).astype(np.float32)
    rows_B = np.arange(n, dtype=np.int32)
    keys_B = row_keys(np.uint32(0), rows_B, np.zeros(n, np.int32))
    drawn_B = jax.jit(next_tokens, static_argnums=4)(
        np.tile(logits, (n, 1)), sampling.knobs(), keys_B, None, 10
    )
    frequency = np.bincount(np.asarray(drawn_B), minlength=10) / n
    wanted = reference(logits, sampling)
    assert (np.abs(frequency - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / n)).all()


ALL = Sampling(1.5, top_k=90, top_p=0.99, min_p=0.001, repetition_penalty=1.3)


@pytest.mark.parametrize("sampling", [Sampling(0.0), PLAIN, Sampling(), ALL], ids=str)
def test_padding_of_the_vocabulary_is_never_drawn(sampling):
    logits_BV = np.random.default_rng(3).normal(size=(500, V)).astype(np.float32)
    logits_BV[:, 100:] += 20
    keys_B = jax.random.split(jax.random.key(0), 500)
    seen_BV = np.zeros((500, V), bool)
    drawn_B = jax.jit(next_tokens, static_argnums=4)(
        logits_BV, sampling.knobs(), keys_B, seen_BV, 100
    )
    assert drawn_B.dtype == jnp.int32
    assert drawn_B.min() >= 0 and drawn_B.max() < 100
    if sampling.temperature == 0:
        np.testing.assert_array_equal(drawn_B, logits_BV[:, :100].argmax(axis=1))
    else:
        assert drawn_B.max() > 80  # the last real ids are


def test_repetition_penalty():
    """Seen tokens: divided if positive, multiplied if negative; the others as they were."""
    logits_BV = np.array([[2.0, -1.0, 1.9, -0.9, 0.0]], np.float32)
    seen_BV = np.array([[True, True, False, False, False]])
    sampling = dataclasses.replace(PLAIN, repetition_penalty=1.25)
    lowered_BV = penalized(logits_BV, seen_BV, sampling.knobs().repetition_penalty_B)
    np.testing.assert_allclose(lowered_BV, [[1.6, -1.25, 1.9, -0.9, 0.0]])
    greedy = dataclasses.replace(sampling, temperature=0.0).knobs()
    keys_B = jax.random.split(jax.random.key(0), 1)
    assert next_tokens(jnp.array(logits_BV), greedy, keys_B, seen_BV, 5).tolist() == [2]
    assert next_tokens(jnp.array(logits_BV), greedy, keys_B, ~seen_BV, 5).tolist() == [0]


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_no_temperature_is_too_low(scale):
    logits_BV = scale * np.random.default_rng(4).normal(size=(50, V)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(0), 50)
    for top_p in (0.9, 1.0):
        knobs = Sampling(1e-30, top_p=top_p).knobs()
        drawn_B = quick_jit(next_tokens, static_argnums=4)(logits_BV, knobs, keys_B, None, V)
        np.testing.assert_array_equal(drawn_B, logits_BV.argmax(axis=1))


def test_a_key_depends_on_seed_row_and_position_alone():
    def keys(seed, rows, positions):
        made = row_keys(np.uint32(seed), np.array(rows), np.array(positions))
        return [tuple(k) for k in np.asarray(jax.random.key_data(made)).tolist()]

    assert keys(1, [4, 7], [2, 3]) == keys(1, [4], [2]) + keys(1, [7], [3])
    every = [k for seed in range(3) for r in range(3) for k in keys(seed, [r] * 3, range(3))]
    assert len(set(every)) == 27


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(UserError, match=f"{name}.*{value}"):
        Sampling(**{name: value}).validate()
