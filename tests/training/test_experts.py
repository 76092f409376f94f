"""Training a mixture of experts: its own losses, in parts and on meshes, and its optimizers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import MOE, build, on_devices, packed_batch, quick_jit, run_config, shard

from lm_jax.config import OptimizerConfig
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import skeleton_of
from lm_jax.sharding.mesh import parameter_spec
from lm_jax.training.optimizer import make_optimizer
from lm_jax.training.step import make_step

# Steps as small as the spread, so that rounding errors do not grow into other choices of experts.
SMALL = dataclasses.replace(MOE, init_std=0.05)
LOSSES = {"balance_loss": 0.5, "router_z_loss": 0.1}


STEPS, COMPARED = 12, 2  # rounding errors grow with the steps


@functools.cache
def trained(steps: int = COMPARED, axes: tuple[int, ...] = (1, 1, 1), **training):
    """Metrics of each step, and the parameters after the first two. Plain Adam: its steps are of
    one size however small a gradient, so that whatever is missing from one is seen."""
    training = LOSSES | {"steps": STEPS} | training
    optimizer = {"learning_rate": 0.003, "warmup_steps": 1, "clip_norm": 0.0}
    step = make_step(run_config(SMALL, optimizer=optimizer, training=training))
    axes_of, metrics = params_lib.logical_axes(step.skeleton), []
    with jax.set_mesh(on_devices(axes)):
        start = {k: jax.device_put(np.asarray(x), parameter_spec(*axes_of[k]))
                 for k, x in params_lib.split(build(SMALL)).items()}  # fmt: skip
        state, update = quick_jit(step.init_from)(start), quick_jit(step.train)
        for i in range(steps):
            state, got = update(state, shard(packed_batch(seed=i)))
            metrics.append({k: float(x) for k, x in got.items()})
            if i == COMPARED - 1:
                compared = {k: np.asarray(x) for k, x in state.parameters.items()}
    return metrics, compared


def test_neither_micro_batches_nor_a_mesh_change_anything():
    """Not the load either: it is that of the whole batch."""
    got, parameters = trained(axes=(1, 2, 2, 1, 2), accumulation=2)
    want, want_parameters = trained(STEPS)
    for a, b in zip(got, want):
        assert a.keys() == b.keys() > LOSSES.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=2e-5, err_msg=key)
    for name, x in want_parameters.items():
        np.testing.assert_allclose(parameters[name], x, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name, steps", [("balance_loss", STEPS), ("router_z_loss", COMPARED)])
def test_each_loss_is_a_part_of_what_is_learned(name, steps):
    (with_it, *_), learned = trained(STEPS)
    (without, *_), other = trained(steps, **{name: 0.0})
    assert with_it["loss"] == pytest.approx(without["loss"])
    assert with_it[name] == pytest.approx(without[name]) and with_it[name] > 0  # less its weight
    assert abs(with_it["gradient_norm"] - without["gradient_norm"]) > 1e-4
    assert np.abs(learned["blocks.mlp.router"] - other["blocks.mlp.router"]).max() > 1e-3


def test_the_balance_loss_makes_the_load_even():
    last, without = trained(STEPS)[0][-1], trained(STEPS, balance_loss=0.0)[0][-1]
    least = MOE.moe.experts_per_token
    assert last["balance_loss"] - least < 0.5 * (without["balance_loss"] - least)


def test_padding_is_no_load():
    """The same rows with more padding behind have the same losses."""
    model, batch = build(MOE), packed_batch(rows=2, length=12)
    longer = {k: np.pad(x, ((0, 0), (0, 4))) for k, x in batch.items()}

    @quick_jit
    def sums(parameters, batch):
        bound = params_lib.bind(skeleton_of(MOE), parameters)
        return bound.forward(
            batch["inputs"], positions_BT=batch["positions"], segments_BT=batch["segments"]
        )[2]

    for got, want in zip(*(sums(params_lib.split(model), b) for b in (longer, batch))):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_each_expert_is_a_matrix_of_its_own(name):
    """Experts learn as the layers of a dense model would."""
    config = OptimizerConfig(name=name, warmup_steps=0, schedule="constant", clip_norm=0.0)
    rule, rng = make_optimizer(config, 10), np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((2, 3, 40, 36)) * [[[[1]], [[9]], [[80]]]], jnp.float32)
            for _ in range(2))  # fmt: skip

    @jax.jit
    def after(x, g):
        parameters, gradients = {"blocks.mlp.up": x}, {"blocks.mlp.up": g}
        updates, _ = rule.update(gradients, rule.init(parameters), parameters)
        return optax.apply_updates(parameters, updates)["blocks.mlp.up"]

    got, want = after(x, g), after(x.reshape(6, 40, 36), g.reshape(6, 40, 36))
    assert np.abs(want - x.reshape(want.shape)).max() > 1e-4
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5, atol=1e-6)
