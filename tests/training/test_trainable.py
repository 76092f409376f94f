"""Freezing, rates by layer and adapters: what learns, how fast, and that nothing else moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    BERT,
    GEMMA,
    GPT2,
    LLAMA,
    LORA,
    MOE,
    build,
    on_devices,
    packed_batch,
    quick_jit,
    run_config,
    shard,
)

from lm_jax.config import Config
from lm_jax.errors import UserError
from lm_jax.model import flops, lora
from lm_jax.model import parameters as params_lib
from lm_jax.training.loss import batch_loss
from lm_jax.training.step import make_step, skeleton_of
from lm_jax.training.trainable import count, frozen_in_products, mask, rates, split

SMALL = dataclasses.replace(GPT2, init_std=0.05)
FAST = {"learning_rate": 0.01, "warmup_steps": 1, "weight_decay": 0.3}
OPTIMIZERS = ["adamw", "lion", "adafactor", "muon"]


def config_of(model=SMALL, **optimizer) -> Config:
    config = run_config(SMALL, optimizer=optimizer)
    config.model = model
    return config


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in params_lib.split(skeleton_of(model)).items()}


def rates_of(model=SMALL, **optimizer):
    return rates(shapes(model), config_of(model, **optimizer))


# Which.


@pytest.mark.parametrize(
    "patterns, frozen",
    [
        (("embedding",), {"embedding": 0}),
        (("*embedding",), {"embedding": 0, "position_embedding": 0}),
        (("blocks.attention.query",), {"blocks.attention.query": 0}),
        (("blocks.1.mlp.up",), {"blocks.mlp.up": [1, 0]}),
        (("blocks.0.mlp.up", "blocks.[1-9].mlp.up*"),
         {"blocks.mlp.up": 0, "blocks.mlp.up_bias": [1, 0]}),
        (("*.query*",), {"blocks.attention.query": 0, "blocks.attention.query_bias": 0}),
        ((), {}),
    ],
)  # fmt: skip
def test_patterns_match_names_and_names_of_layers(patterns, frozen):
    got = rates_of(freeze=patterns)
    assert got.keys() == shapes(SMALL).keys()
    for name, rate in got.items():
        np.testing.assert_array_equal(rate, frozen.get(name, 1.0), err_msg=name)


@pytest.mark.parametrize(
    "pattern, near",
    [
        ("embeding", "embedding"),
        ("blocks.2.mlp.up", "blocks.1.mlp.up"),  # there are layers 0 and 1
        ("blocks.mlp.upp", "blocks.mlp.up"),
        ("Embedding", "embedding"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_the_nearest(pattern, near):
    with pytest.raises(UserError, match=f"freeze: no parameter matches '{pattern}'.*'{near}'"):
        rates_of(freeze=("norm.scale", pattern))


def test_something_must_be_left_to_train():
    with pytest.raises(UserError, match="nothing to train"):
        rates_of(freeze=("embedding", "*"))
    with pytest.raises(UserError, match=r"each of the adapters"):
        rates_of(LORA, freeze=("*_lora.*",))
    assert rates_of(LORA, freeze=("blocks.1.*",))["blocks.mlp.up_lora.a"].tolist() == [1, 0]


def test_with_adapters_only_they_learn():
    for name, rate in rates_of(LORA).items():
        assert rate == lora.is_adapter(name), name


def test_numbers_that_learn_are_counted():
    parameters = params_lib.split(skeleton_of(SMALL))
    table = rates_of(freeze=("blocks.0.*", "embedding"))
    layer = sum(x.size // 2 for name, x in parameters.items() if name.startswith("blocks."))
    whole = sum(x.size for x in parameters.values())
    assert count(parameters, table) == whole - layer - parameters["embedding"].size


@pytest.mark.parametrize(
    "model", [SMALL, LORA, BERT, MOE], ids=["tied", "adapters", "bert", "experts"]
)
def test_what_is_frozen_needs_a_third_less_of_a_products_flops(model):
    parameters = params_lib.split(skeleton_of(model))
    some = {k: float(lora.is_adapter(k) or k.endswith(("scale", "bias"))) for k in parameters}
    none = dict.fromkeys(parameters, 1.0)
    products = 6 * flops.matrix_parameters(model)
    for table, left in ((none, 1), (some, 2 / 3)):
        frozen = frozen_in_products(parameters, table, model)
        rest = flops.training_flops_per_token(model, 16) - products
        got = flops.training_flops_per_token(model, 16, frozen=frozen) - rest
        assert got == pytest.approx(left * products)


# How fast.


@pytest.mark.parametrize("model, embedded", [(SMALL, False), (BERT, True), (GEMMA, False)])
def test_each_layer_learns_slower_than_the_one_above(model, embedded):
    L, got = model.layers, rates_of(model, layer_decay=0.5)
    for name, rate in got.items():
        if name.startswith("blocks."):
            want = [0.5 ** (L - layer) for layer in range(L)]
        elif name in ("embedding", "position_embedding", "type_embedding"):
            want = 0.5 ** (L + 1)
        elif name.startswith("norm."):  # behind the embeddings in BERT, behind the blocks else
            want = 0.5 ** (L + 1) if embedded else 1
        elif name.startswith("pooler"):  # no objective sees it
            want = 0
        else:
            assert name.startswith("head"), name
            want = 1
        np.testing.assert_allclose(rate, want, err_msg=name)


def begin(config: Config, axes=None):
    """The step, and a state of parameters that numpy drew; on a mesh, it has to be set."""
    step = make_step(config)
    abstract = jax.eval_shape(step.init).all_parameters
    drawn = jax.device_get(params_lib.split(build(config.model)))
    if axes:
        drawn = {k: jax.device_put(x, abstract[k].sharding.spec) for k, x in drawn.items()}
    return step, quick_jit(step.init_from)(drawn)


def learn(config: Config, steps: int = 2):
    """(parameters before, state after, metrics of the first step)"""
    step, state = begin(config)
    before, update, first = jax.device_get(state.all_parameters), quick_jit(step.train), None
    for i in range(steps):
        state, metrics = update(state, packed_batch(seed=i))
        first = first or metrics
    return before, state, first


def updated(config: Config):
    """(parameters before, after one update by gradients that numpy drew)"""
    step, rng = make_step(config), np.random.default_rng(0)
    before, _ = split(jax.device_get(params_lib.split(build(config.model))), step.rates)
    gradients = {k: rng.standard_normal(x.shape, np.float32) for k, x in before.items()}
    bias = before["blocks.attention.query_bias"].copy()
    bias[0] = -0.0  # where it is frozen, a zero must keep its sign
    before |= {"blocks.attention.query_bias": bias}

    @quick_jit
    def after(parameters, gradients):
        rule = step.optimizer
        masked = mask(gradients, step.rates)
        updates, _ = rule.update(masked, rule.init(parameters), parameters)
        return optax.apply_updates(parameters, updates)

    return before, jax.device_get(after(before, gradients))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_multiplies_the_whole_update(name):
    """Of any optimizer, after clipping and with the decay of weights."""
    fields = FAST | {"name": name, "clip_norm": 0.5}
    decayed = config_of(**fields, layer_decay=0.5)
    (before, even), (_, uneven) = updated(config_of(**fields)), updated(decayed)
    for k, rate in rates(shapes(SMALL), decayed).items():
        moved = even[k] - before[k]
        want = moved * np.reshape(rate, np.shape(rate) + (1,) * (moved.ndim - np.ndim(rate)))
        assert np.abs(moved).max() > 1e-4, k
        np.testing.assert_allclose(uneven[k] - before[k], want, atol=1e-6, err_msg=k)


# Nothing else moves.


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_a_frozen_layer_by_a_bit(name):
    before, after = updated(config_of(**FAST, name=name, freeze=("blocks.0.*",)))
    for k, x in before.items():
        if k.startswith("blocks."):
            np.testing.assert_array_equal(bits(after[k][0]), bits(x[0]), err_msg=k)
        assert (after[k][-1] != x[-1]).any(), k


def test_what_is_frozen_stays_to_the_bit():
    freeze = ("*embedding", "blocks.0.*", "blocks.mlp_norm.scale")
    step, state = begin(config_of(**FAST, freeze=freeze))
    # A zero with a sign must keep it.
    bias = state.parameters["blocks.attention.query_bias"].at[:].set(-0.0)
    state = state._replace(parameters=state.parameters | {"blocks.attention.query_bias": bias})
    before, update = state.all_parameters, quick_jit(step.train)
    for i in range(3):
        state, metrics = update(state, packed_batch(seed=i))
    assert np.isfinite(metrics["loss"])

    whole = {"embedding", "position_embedding", "blocks.mlp_norm.scale"}
    assert state.frozen.keys() == whole
    moments = {path[-1].key for path, x in jax.tree.flatten_with_path(state.optimizer)[0]
               if isinstance(path[-1], jax.tree_util.DictKey)}  # fmt: skip
    assert moments and not moments & whole
    for k, x in state.all_parameters.items():
        if k in whole:
            np.testing.assert_array_equal(bits(x), bits(before[k]), err_msg=k)
        elif k.startswith("blocks."):
            np.testing.assert_array_equal(bits(x[0]), bits(before[k][0]), err_msg=k)
            assert (x[1] != before[k][1]).any(), k
        else:
            assert (x != before[k]).any(), k


@functools.cache
def learned_with_frozen():
    """What `learn` gives where one layer and the embedding are frozen, and others learn slower."""
    return learn(config_of(LLAMA, **FAST, **FROZEN))


FROZEN = {"freeze": ("blocks.0.*", "embedding"), "layer_decay": 0.9}


def test_gradients_of_frozen_layers_do_not_count_in_the_norm():
    _, _, metrics = learned_with_frozen()
    batch, model = packed_batch(seed=0), build(LLAMA)

    @quick_jit
    def gradients(parameters):
        def loss(parameters):
            sums = batch_loss(params_lib.bind(skeleton_of(LLAMA), parameters), batch)
            return sums.loss / sums.weight

        return jax.grad(loss)(parameters)

    of_all = jax.device_get(gradients(jax.device_get(params_lib.split(model))))
    del of_all["embedding"]
    counted = [g[1] if k.startswith("blocks.") else g for k, g in of_all.items()]
    want = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in counted))
    np.testing.assert_allclose(metrics["gradient_norm"], want, rtol=1e-5)


def test_no_gradient_is_computed_for_what_is_frozen():
    """The program has fewer products of matrices: one less a frozen weight, at least."""

    def products(freeze: tuple[str, ...]) -> int:
        step = make_step(config_of(freeze=freeze))
        state = jax.eval_shape(step.init)
        return str(jax.make_jaxpr(step.train)(state, packed_batch())).count("dot_general")

    assert products(("blocks.mlp.up", "blocks.mlp.down")) <= products(()) - 2


@pytest.mark.parametrize(
    "model, optimizer, axes",
    [
        (LLAMA, FROZEN, (2, 2, 2)),
        # What adapters add to is split, their rank is not; and rows are in parts.
        (LORA, {}, (2, 1, 2, 2)),
    ],
    ids=["frozen", "adapters"],
)
def test_frozen_layers_and_adapters_on_a_mesh(model, optimizer, axes):
    config = config_of(model, **FAST, **optimizer)
    _, want, _ = learned_with_frozen() if optimizer else learn(config)
    with jax.set_mesh(on_devices(axes)):
        step, state = begin(config, axes)
        update = quick_jit(step.train, donate_argnums=0)
        for i in range(2):
            state, _ = update(state, shard(packed_batch(seed=i)))
    for name, x in want.all_parameters.items():
        np.testing.assert_allclose(state.all_parameters[name], x, atol=1e-4, err_msg=name)


def test_accumulation_with_frozen_parameters_changes_nothing():
    _, want, _ = learned_with_frozen()
    config = config_of(LLAMA, **FAST, **FROZEN)
    config.training.accumulation = 4
    _, got, _ = learn(config)
    for name, x in want.parameters.items():
        np.testing.assert_allclose(got.parameters[name], x, atol=1e-4, err_msg=name)


# Adapters.


def with_base(step) -> tuple[dict[str, np.ndarray], jax.Array]:
    base = jax.device_get(params_lib.split(build(LLAMA)))
    return base, quick_jit(step.init_from)(base)


@quick_jit
def logits(model, batch):
    x, _ = model(batch["inputs"], positions_BT=batch["positions"], segments_BT=batch["segments"])
    return model.logits(x)


def test_adapters_begin_with_the_base_and_alone_change():
    config = config_of(LORA, **FAST, name="muon")  # adamw learns them in the test before
    step, batch = make_step(config), packed_batch()
    base, state = with_base(step)
    assert state.frozen.keys() == base.keys()
    assert all(map(lora.is_adapter, state.parameters)) and len(state.parameters) == 14
    model = params_lib.bind(step.skeleton, state.all_parameters)
    want = logits(params_lib.bind(skeleton_of(LLAMA), base), batch)
    np.testing.assert_array_equal(logits(model, batch), want)

    before, update = state, quick_jit(step.train)
    for i in range(2):
        state, _ = update(state, packed_batch(seed=i))
    for k, x in base.items():
        np.testing.assert_array_equal(bits(state.frozen[k]), bits(x))
    for k, x in before.parameters.items():
        assert (state.parameters[k] != x).any(), k
    assert sum(x.size for x in jax.tree.leaves(state.optimizer)) < 3 * sum(
        x.size for x in state.parameters.values()
    )
    model = params_lib.bind(step.skeleton, state.all_parameters)
    assert np.abs(logits(model, batch) - want).max() > 0.01


def test_adapters_are_a_function_of_the_seed():
    def drawn(seed: int) -> jnp.ndarray:
        config = config_of(LORA)
        config.training.seed = seed
        return with_base(make_step(config))[1].parameters["blocks.mlp.gate_lora.a"]

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert (drawn(0) != drawn(1)).all()
