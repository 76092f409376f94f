"""A text's class is told by one state: the same of packed rows, of a row alone, and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import BERT, GPT2, build, placed, quick_jit, shard

from lm_jax.evaluation.classifier import classify
from lm_jax.model import parameters as params_lib
from lm_jax.model.pooling import POOLINGS, document_means, pooled
from lm_jax.training.loss import batch_loss

OF_BOTH_DIRECTIONS = dataclasses.replace(BERT, head="classify", tied_head=True, labels=3)
PREFIX = dataclasses.replace(GPT2, head="classify", tied_head=True, labels=3, prefix_attention=True)
CAUSAL = dataclasses.replace(GPT2, head="classify", tied_head=True, labels=3)
SIZES, T = [[5, 9], [16], [3, 4, 6], [11]], 16  # texts of each row


def packed(pooling: str) -> tuple[dict[str, np.ndarray], list[np.ndarray], list[int]]:
    """A batch, its texts and their classes."""
    rng, texts, labels = np.random.default_rng(0), [], []
    batch = {
        name: np.zeros((len(SIZES), T), np.int32)
        for name in ("inputs", "targets", "segments", "positions")
    }
    batch["weights"] = np.zeros((len(SIZES), T), np.float32)
    for row, sizes in enumerate(SIZES):
        start = 0
        for number, size in enumerate(sizes, 1):
            here = slice(start, start + size)
            texts.append(rng.integers(0, BERT.vocab_size, size).astype(np.int32))
            labels.append(int(rng.integers(3)))
            batch["inputs"][row, here], batch["segments"][row, here] = texts[-1], number
            batch["positions"][row, here] = np.arange(size)
            place = start + (size - 1 if pooling == "last" else 0)
            batch["targets"][row, place], batch["weights"][row, place] = labels[-1], 1
            start += size
    return batch, texts, labels


@pytest.mark.parametrize("kind", POOLINGS)
def test_one_state_of_each_row(kind):
    rng = np.random.default_rng(0)
    x_BTD, lengths = rng.normal(size=(3, 8, 4)).astype(np.float32), [8, 1, 5]
    got = pooled(x_BTD, np.array(lengths, np.int32)[:, None], kind)
    for x_TD, n, y_D in zip(x_BTD, lengths, got):
        want = {"mean": x_TD[:n].mean(0), "first": x_TD[0], "last": x_TD[n - 1]}
        np.testing.assert_allclose(y_D, want[kind], atol=1e-6)


def test_the_mean_of_each_document():
    x_BTD = np.random.default_rng(0).normal(size=(1, 7, 3)).astype(np.float32)
    got = document_means(x_BTD, np.array([[1, 1, 2, 2, 2, 0, 0]], np.int32))
    parts = [x_BTD[0, :2].mean(0)] * 2 + [x_BTD[0, 2:5].mean(0)] * 3 + [np.zeros(3)] * 2
    np.testing.assert_allclose(got[0], parts, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [(OF_BOTH_DIRECTIONS, kind) for kind in POOLINGS]
    + [(c, kind) for c in (CAUSAL, PREFIX) for kind in ("last", "mean")],
    ids=lambda x: x if isinstance(x, str) else f"causal={x.causal},prefix={x.prefix_attention}",
)
def test_a_text_in_a_batch_is_told_as_it_is_alone(config, pooling):
    batch, texts, labels = packed(pooling)
    sums = quick_jit(batch_loss, static_argnames="average")(
        model := build(config), batch, average=pooling == "mean"
    )
    alone = classify(model, texts, pooling=pooling, batch_size=3)
    np.testing.assert_allclose(
        sums.nll, -sum(np.log(p[label]) for p, label in zip(alone, labels)), rtol=1e-5
    )
    assert sums.weight == len(texts)
    assert sums.right == sum(int(p.argmax()) == label for p, label in zip(alone, labels))
    others = [classify(model, texts, pooling=kind) for kind in POOLINGS if kind != pooling]
    if config is PREFIX:  # read both ways, and not by its words' order alone
        causal = build(dataclasses.replace(config, prefix_attention=False))
        others.append(classify(causal, texts, pooling=pooling))
    assert all(np.abs(alone - other).max() > 1e-2 for other in others)


@quick_jit
def gradients(model, batch):
    def loss(parameters):
        return batch_loss(params_lib.bind(model, parameters), batch, average=True).loss

    return jax.value_and_grad(loss)(params_lib.split(model))


def test_on_a_mesh_means_and_their_gradients_are_the_same():
    (batch, _, _), model = packed("mean"), build(OF_BOTH_DIRECTIONS)
    one = gradients(model, batch)
    with placed(model, (2, 2, 2)) as there:
        many = gradients(there, shard(batch))
    jax.tree.map(lambda a, g: np.testing.assert_allclose(g, a, atol=2e-6, rtol=1e-5), one, many)
