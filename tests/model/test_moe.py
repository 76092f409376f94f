"""Experts: the routing against a loop over them, in value and gradient, and on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MOE, T, build, on_devices, packed_batch, quick_jit, shard

from lm_jax.config import MoeConfig
from lm_jax.model import moe
from lm_jax.model import parameters as params_lib
from lm_jax.model.block import ACTIVATIONS
from lm_jax.model.transformer import skeleton_of
from lm_jax.sharding.mesh import check_parameters, parameter_spec

replace = dataclasses.replace
EIGHT = replace(MOE, moe=MoeConfig(experts=8, experts_per_token=3))


def layer(config) -> moe.Experts:
    """The experts of a model's first layer."""
    return jax.tree.map(lambda x: x[0], build(config).blocks.mlp)


@quick_jit
def routed(experts: moe.Experts, x_BTD, real_BT):
    return experts(x_BTD, real_BT, None)


def dense(config, p: dict[str, jax.Array], x_BTD, real_BT):
    """Every expert works on every token; then those that were not chosen count for nothing."""
    probabilities = jax.nn.softmax(jnp.einsum("BTD,DE->BTE", x_BTD, p["router"]))
    ranks = jnp.argsort(jnp.argsort(-probabilities))
    gates = jnp.where(ranks < config.moe.experts_per_token, probabilities, 0)
    if config.moe.normalize_weights:
        gates = gates / gates.sum(-1, keepdims=True)
    h = jnp.einsum("BTD,EDF->BTEF", x_BTD, p["up"])
    if config.gated_mlp:
        gate = jnp.einsum("BTD,EDF->BTEF", x_BTD, p["gate"])
        h = ACTIVATIONS[config.activation](gate) * h
    else:
        h = ACTIVATIONS[config.activation](h)
    y = jnp.einsum("BTEF,EFD,BTE->BTD", h, p["down"], gates)
    return jnp.where(real_BT[:, :, None], y, 0)


def loss_of(function):
    @quick_jit
    def value_and_gradient(p, x_BTD, real_BT):
        def loss(p, x_BTD):
            y_BTD = function(p, x_BTD, real_BT)
            return jnp.sum(jnp.sin(3 * y_BTD)), y_BTD

        (_, y_BTD), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(p, x_BTD)
        return y_BTD, gradients

    return value_and_gradient


@pytest.mark.parametrize(
    "config",
    [MOE, EIGHT, replace(EIGHT, gated_mlp=False, moe=MoeConfig(8, 8)),
     replace(MOE, moe=MoeConfig(5, 1, normalize_weights=False))],
    ids=["2 of 4", "3 of 8", "all of 8, not gated", "1 of 5, by probability"],
)  # fmt: skip
def test_values_and_gradients_are_those_of_a_loop_over_all_experts(config):
    padded = config is not EIGHT
    rng, experts = np.random.default_rng(0), layer(config)
    x_BTD = rng.standard_normal((3, T, config.width), np.float32)
    real_BT = rng.random((3, T)) < 0.6 if padded else np.ones((3, T), bool)
    p = params_lib.split(experts)

    def sparse(p, x_BTD, real_BT):
        return params_lib.bind(experts, p)(x_BTD, real_BT if padded else None, None)[0]

    got, got_gradients = loss_of(sparse)(p, x_BTD, real_BT)
    want, want_gradients = loss_of(functools.partial(dense, config))(p, x_BTD, real_BT)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(want_gradients)):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_what_unused_rows_hold_reaches_nothing():
    """A kernel leaves them as it finds them: here, not a number."""
    chosen_NK = jnp.array([[0, 2], [3, 1], [4, 4], [2, 3]])  # of 4; 4: padding
    order = moe.sorted_by_expert(chosen_NK, 2, 2)
    assert order.sizes_G.tolist() == [2, 2] and order.used_M.sum() == 4 < order.used_M.size
    rows_MD = jnp.where(order.used_M[:, None], order.token_M[:, None] + 1.0, jnp.nan)
    got, back = jax.vjp(lambda rows: moe.combine(rows, order), rows_MD)
    assert got[:, 0].tolist() == [1, 2, 0, 8]  # tokens are numbered from 1 on; the last came twice
    assert jnp.isfinite(back(got)[0]).all()
    _, back = jax.vjp(lambda x: moe.dispatch(x, order), got)
    np.testing.assert_array_equal(back(rows_MD)[0], got)


@functools.partial(quick_jit, static_argnums=0)
def value_and_vjp(function, x, d):
    value, back = jax.vjp(function, x)
    return value, back(d)[0]


def test_every_gather_has_the_gradient_that_jax_would_give_it():
    rng = np.random.default_rng(0)
    chosen_NK = jnp.asarray(np.argsort(rng.random((9, 6)))[:, :3], jnp.int32)
    order = moe.sorted_by_expert(chosen_NK, 1, 4)
    x_ND, values_NK = rng.standard_normal((9, 5)), rng.standard_normal((9, 3))
    used_M = np.asarray(order.used_M)
    rows_MD = rng.standard_normal((used_M.size, 5))
    plain = {
        moe.dispatch: (lambda x: x[order.token_M], x_ND, used_M[:, None]),
        moe.pick: (lambda v: v.reshape(-1)[order.choice_M], values_NK, used_M),
        moe.combine: (
            lambda rows: jnp.sum(
                rows[order.row_NK], axis=1, where=np.asarray(order.here_NK)[:, :, None]
            ),
            rows_MD,
            True,
        ),
    }
    for ours, (theirs, x, counted) in plain.items():
        x = x.astype(np.float32)
        shape = jax.eval_shape(theirs, x).shape
        d = np.where(counted, rng.standard_normal(shape), 0).astype(np.float32)
        (got, gradient), (want, gradient_of_plain) = (
            value_and_vjp(f, x, d) for f in (lambda x, ours=ours: ours(x, order), theirs)
        )
        np.testing.assert_allclose(got * counted, want * counted, rtol=1e-6)
        np.testing.assert_allclose(gradient, gradient_of_plain, rtol=1e-5)


def test_no_token_is_dropped_where_all_want_the_same():
    config = replace(MOE, moe=MoeConfig(4, 1))
    experts = layer(config)
    one = jnp.zeros_like(experts.router.get_value()).at[:, 2].set(1.0)
    p = params_lib.split(experts) | {"router": one}
    x_BTD = jnp.abs(np.random.default_rng(0).standard_normal((2, T, config.width), np.float32))
    y_BTD, sums = routed(params_lib.bind(experts, p), x_BTD, None)
    assert sums.load_E.tolist() == [0, 0, 2 * T, 0]
    np.testing.assert_allclose(y_BTD, dense(config, p, x_BTD, np.ones((2, T), bool)), atol=1e-5)


# Balance.


def test_the_balance_loss_is_least_where_all_experts_are_used_alike():
    even = moe.RouterSums(jnp.full((2, 4), 50.0), jnp.full((2, 4), 25.0), jnp.zeros(2))
    assert even.balance_loss(even.load_E, 100.0) == 2  # 2 of 4 chosen
    worst = jnp.zeros((2, 4)).at[:, 0].set(100.0)
    assert moe.RouterSums(worst, worst, jnp.zeros(2)).balance_loss(worst, 100.0) == 4


def test_the_sums_are_those_of_real_tokens():
    experts, rng = layer(EIGHT), np.random.default_rng(0)
    x_BTD = rng.standard_normal((2, T, EIGHT.width), np.float32)
    real_BT = rng.random((2, T)) < 0.5
    _, some = routed(experts, x_BTD, real_BT)
    _, alone = routed(experts, x_BTD[real_BT][None], None)
    for got, want in zip(some, alone):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert some.load_E.sum() == 3 * real_BT.sum()


# Meshes: data x fsdp x tensor x sequence x expert.


@quick_jit
def value_and_gradient(skeleton, parameters, batch):
    def loss(parameters):
        x_BTD, _, router = params_lib.bind(skeleton, parameters).forward(
            batch["inputs"], positions_BT=batch["positions"], segments_BT=batch["segments"]
        )
        balance = router.balance_loss(router.load_E, 100.0) + router.z_loss(100.0)
        return 0.01 * jnp.sum(jnp.sin(x_BTD) * batch["weights"][:, :, None]) + balance, router

    (value, router), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    return value, router, gradients


@functools.cache
def on_one_device():
    return value_and_gradient(skeleton_of(EIGHT), params_lib.split(build(EIGHT)), packed_batch())


@pytest.mark.parametrize(
    "axes",
    [(1, 1, 1, 1, 8), (1, 2, 2, 1, 2), (1, 1, 2, 2, 2)],
    ids=str,
)
def test_eight_devices_compute_what_one_does(axes):
    want, want_router, want_gradients = on_one_device()
    again = {"remat": "full", "scan_layers": False} if axes[3:] == (2, 2) else {}
    skeleton, mesh = skeleton_of(replace(EIGHT, **again)), on_devices(axes)
    logical, parameters = params_lib.logical_axes(skeleton), params_lib.split(build(EIGHT))
    check_parameters({k: x.shape for k, x in parameters.items()}, logical, mesh)
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(np.asarray(x), parameter_spec(*logical[k]))
                  for k, x in parameters.items()}  # fmt: skip
        got, router, gradients = value_and_gradient(skeleton, placed, shard(packed_batch()))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(router.load_E, want_router.load_E)
    for name, x in want_gradients.items():
        assert gradients[name].sharding == placed[name].sharding, name
        np.testing.assert_allclose(
            gradients[name], x, atol=3e-5 * np.abs(x).max(), err_msg=name, rtol=0
        )
    parts = placed["blocks.mlp.up"].sharding.shard_shape(parameters["blocks.mlp.up"].shape)
    assert np.prod(parts) * 8 == parameters["blocks.mlp.up"].size * axes[0]


def test_a_row_too_short_to_be_split_is_routed_as_well():
    """One token a row, as in decoding, where `mesh.sequence` has nothing to split."""
    skeleton, axes = skeleton_of(EIGHT), (1, 1, 2, 2, 2)
    logical, parameters = params_lib.logical_axes(skeleton), params_lib.split(build(EIGHT))
    ids = np.arange(4, dtype=np.int32)[:, None]

    @quick_jit
    def logits(parameters, ids):
        model = params_lib.bind(skeleton, parameters)
        return model.logits(model(ids)[0])

    want = logits(parameters, ids)
    with jax.set_mesh(on_devices(axes)):
        placed = {k: jax.device_put(np.asarray(x), parameter_spec(*logical[k]))
                  for k, x in parameters.items()}  # fmt: skip
        np.testing.assert_allclose(logits(placed, shard(ids)), want, atol=1e-4)
