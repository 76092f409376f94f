"""The loss of finding answers against a plain loop; a mesh and packing change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT, GPT2, build, placed, quick_jit, shard

from lm_jax.model import parameters as params_lib
from lm_jax.training.loss import batch_loss
from lm_jax.training.spans import span_sums

SPAN = dataclasses.replace(BERT, head="span", tied_head=True)
CAUSAL_CLASSIFIER = dataclasses.replace(GPT2, head="classify", tied_head=True, labels=3)
LAYOUT = [[5, 9], [16], [3, 4, 6], [11]]  # tokens of the windows of each row


def batch(T: int = 16):
    rng = np.random.default_rng(0)
    names = ("inputs", "targets", "segments", "positions")
    out = {name: np.zeros((len(LAYOUT), T), np.int32) for name in names}
    out["weights"] = np.zeros((len(LAYOUT), T), np.float32)
    for row, sizes in enumerate(LAYOUT):
        start = 0
        for number, size in enumerate(sizes, 1):
            here = slice(start, start + size)
            first = int(rng.integers(size))
            last = int(rng.integers(first, size))
            out["inputs"][row, here] = rng.integers(0, BERT.vocab_size, size)
            out["segments"][row, here], out["positions"][row, here] = number, np.arange(size)
            out["targets"][row, here] = 4 * (np.arange(size) >= size // 2)
            out["targets"][row, start + first] += 1
            out["targets"][row, start + last] += 2
            out["weights"][row, start + first] = 1
            start += size
    return out


def test_it_is_the_sum_over_windows():
    b = batch()
    scores = np.random.default_rng(1).normal(size=(*b["inputs"].shape, 2)).astype(np.float32)
    nll, z, right, count = 0.0, 0.0, 0, 0
    for row, sizes in enumerate(LAYOUT):
        start = 0
        for size in sizes:
            here, hits = slice(start, start + size), 0
            for place in range(2):
                s = scores[row, here, place].astype(np.float64)
                target = int(np.flatnonzero(b["targets"][row, here] & (1 << place))[0])
                log_z = np.log(np.exp(s).sum())
                nll, z = nll + (log_z - s[target]) / 2, z + log_z**2 / 2
                hits += int(s.argmax()) == target
            right, count, start = right + (hits == 2), count + 1, start + size
    scores[0, 0] += 50  # its window is right with certainty, or wrong
    changed = span_sums(jnp.asarray(scores), b["targets"], b["segments"])
    scores[0, 0] -= 50
    sums = span_sums(jnp.asarray(scores), b["targets"], b["segments"])
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(sums.z, z, rtol=1e-5)
    assert (float(sums.right), float(sums.weight)) == (right, count)
    assert float(changed.nll) != float(sums.nll)


def test_right_is_what_is_right():
    b = batch()
    scores = np.stack([b["targets"] & 1, (b["targets"] & 2) > 0], -1).astype(np.float32)
    sums = span_sums(jnp.asarray(scores), b["targets"], b["segments"])
    assert float(sums.right) == float(sums.weight) == sum(map(len, LAYOUT))


@quick_jit
def gradients(model, b):
    def loss(parameters):
        sums = batch_loss(params_lib.bind(model, parameters), b)
        return sums.loss / sums.weight, sums

    return jax.grad(loss, has_aux=True)(params_lib.split(model))


def test_packed_windows_learn_as_each_alone_does_and_types_are_told():
    model, b = build(SPAN), batch()
    total, sums = gradients(model, b)
    nll, alone = 0.0, jax.tree.map(np.zeros_like, total)
    for row, sizes in enumerate(LAYOUT):
        start = 0
        for size in sizes:
            one = {k: np.zeros((1, 16), v.dtype) for k, v in b.items()}
            for k, v in b.items():
                one[k][0, :size] = v[row, start : start + size]
            one["segments"] = np.minimum(one["segments"], 1)
            part, s = gradients(model, one)
            nll, start = nll + float(s.nll), start + size
            alone = jax.tree.map(lambda a, g: a + np.asarray(g) / 7, alone, part)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-5)
    jax.tree.map(lambda a, g: np.testing.assert_allclose(g, a, atol=2e-6), alone, total)
    assert np.abs(np.asarray(total["type_embedding"])[1]).max() > 0


@pytest.mark.parametrize("config", [SPAN, CAUSAL_CLASSIFIER], ids=["span", "classify"])
def test_eight_devices_learn_as_one_does(config):
    b = batch()
    b["targets"] %= CAUSAL_CLASSIFIER.labels if config is CAUSAL_CLASSIFIER else 8
    model = build(config)
    one, _ = gradients(model, b)
    with placed(model, (2, 2, 2)) as there:
        many, _ = gradients(there, shard(b))
    jax.tree.map(lambda a, g: np.testing.assert_allclose(g, a, atol=2e-6), one, many)
