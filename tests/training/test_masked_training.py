"""The masked objective in the step: loss and gradients are those of the masked tokens alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import BERT, V, build, on_devices, packed_batch, quick_jit, run_config, shard

from lm_jax.config import Config
from lm_jax.model import parameters as params_lib
from lm_jax.training.masking import Masking
from lm_jax.training.step import TrainState, make_step

MODEL = dataclasses.replace(BERT, pooler=False, layers=1)
MASK_ID, SPECIALS = V - 1, [0, 1, V - 1]
BYTES = np.ones(V, np.int32)


def masked_config(rows=8, **training) -> Config:
    data = {"objective": "masked", "mask_rate": 0.3}
    optimizer = {"warmup_steps": 0, "learning_rate": 0.01}
    return run_config(MODEL, rows, data=data, optimizer=optimizer, training=training)


def step_of(config: Config):
    special_V = np.isin(np.arange(V), SPECIALS)
    data = config.data
    return make_step(config, Masking(data.mask_rate, data.predictions, MASK_ID, special_V, None))


@functools.cache
def compiled(**training):
    """A step, and its `train` compiled."""
    step = step_of(masked_config(**training))
    return step, quick_jit(step.train)


def batch_of(rows=8, seed=0):
    batch = packed_batch(rows, seed)
    return batch | {"targets": batch["inputs"].copy()}


def start(step, model=None) -> TrainState:
    return quick_jit(step.init_from)(params_lib.split(model or build(MODEL)))


@quick_jit
def logits_of(model, batch):
    x, _ = model(batch["inputs"], positions_BT=batch["positions"], segments_BT=batch["segments"])
    return model.logits(x)


def test_loss_is_that_of_the_masked_positions():
    """Over the logits of all positions, in float64, and those that evaluation 5 masks."""
    step, model, batch = step_of(masked_config()), build(MODEL), batch_of()
    got = quick_jit(step.evaluate)(params_lib.split(model), batch, 5, BYTES)
    key = jax.random.fold_in(jax.random.key(0), 5)
    masked = jax.device_get(quick_jit(step.masking.__call__)(batch, key))
    assert (masked["inputs"] != batch["inputs"]).any()
    logits = np.asarray(logits_of(model, masked | {"targets": 0}), np.float64)
    nll = right = count = 0
    for row, slot in zip(*np.nonzero(masked["weights"]), strict=True):
        place = masked["predicted"][row, slot]
        target, scores = batch["inputs"][row, place], logits[row, place]
        nll += np.log(np.exp(scores).sum()) - scores[target]
        right += scores.argmax() == target
        count += 1
    assert count > 10
    np.testing.assert_allclose(got["nll"], nll, rtol=1e-5)
    assert (got["tokens"], got["right"], got["bytes"]) == (count, right, 0)


def test_an_evaluation_masks_by_the_place_of_the_batch_alone():
    batch, parameters = batch_of(), params_lib.split(build(MODEL))
    ways = [quick_jit(step_of(masked_config(seed=seed)).evaluate) for seed in (0, 1)]
    first, second = (float(ways[0](parameters, batch, i, BYTES)["nll"]) for i in (0, 1))
    assert first != second
    assert [float(way(parameters, batch, 1, BYTES)["nll"]) for way in ways] == [second] * 2


def test_accumulation_is_a_large_batch():
    """The rows of unequal length: their micro-batches have unequal numbers of masks."""
    batch, ends = batch_of(), []
    for accumulation in (1, 4):
        config = masked_config(accumulation=accumulation)
        config.optimizer.epsilon = 1.0  # the update is as the gradient, whatever its size
        step = step_of(config)
        state, metrics = quick_jit(step.train)(start(step), batch)
        ends.append((jax.device_get(state.parameters), jax.device_get(metrics)))
    (one, one_metrics), (four, four_metrics) = ends
    for key in ("loss", "tokens", "gradient_norm"):
        np.testing.assert_allclose(one_metrics[key], four_metrics[key], rtol=1e-5)
    for name in one:
        np.testing.assert_allclose(one[name], four[name], atol=1e-6, err_msg=name)


def test_a_step_is_the_same_on_a_mesh():
    (step, run), batch = compiled(seed=0), batch_of()
    _, alone = run(start(step), batch)
    values = params_lib.split(build(MODEL))
    with jax.set_mesh(on_devices((1, 2, 2, 2))):
        placed = {
            k: jax.device_put(values[k], x.sharding.spec)
            for k, x in jax.eval_shape(step.init).parameters.items()
        }
        _, spread = quick_jit(step.train)(quick_jit(step.init_from)(placed), shard(batch))
    for key in ("loss", "tokens", "gradient_norm"):
        np.testing.assert_allclose(alone[key], spread[key], rtol=1e-5, err_msg=key)


def test_masks_differ_from_step_to_step_and_from_seed_to_seed():
    batch, losses = batch_of(), set()
    for seed in (0, 1):
        step, run = compiled(seed=seed)
        for number in (0, 1):
            state = start(step)._replace(step=np.int32(number))
            one, again = (float(run(state, batch)[1]["loss"]) for _ in range(2))
            assert one == again
            losses.add(one)
    assert len(losses) == 4


def test_nothing_masked_is_no_loss_and_no_gradient():
    (step, run), batch = compiled(seed=0), batch_of()
    batch["inputs"] = np.where(batch["segments"] > 0, SPECIALS[1], 0).astype(np.int32)
    state = start(step)
    after, metrics = run(state, batch)
    assert (metrics["loss"], metrics["tokens"], metrics["gradient_norm"]) == (0, 0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_what_is_hidden_is_learned_from_what_is_not():
    """Each document says one of ten tokens over and over: by itself no position tells which."""
    step = step_of(masked_config(rows=16))
    run, evaluate = jax.jit(step.train), jax.jit(step.evaluate)

    def monotonous(seed):
        batch, rng = batch_of(16, seed), np.random.default_rng(seed)
        said = rng.integers(10, 20, (16, 4))
        ids = np.take_along_axis(said, batch["segments"], 1).astype(np.int32)
        return batch | {"inputs": ids, "targets": ids}

    state, held_out = start(step), monotonous(1000)
    before = evaluate(state.parameters, held_out, 0, BYTES)
    for i in range(50):
        state, _ = run(state, monotonous(i))
    after = evaluate(state.parameters, held_out, 0, BYTES)
    assert after["nll"] < 0.5 * before["nll"]
    assert after["right"] > 0.7 * after["tokens"]


def test_masks_and_objective_go_together():
    with pytest.raises(ValueError, match="masking"):
        make_step(masked_config())
    with pytest.raises(ValueError, match="masking"):
        make_step(run_config(), step_of(masked_config()).masking)
