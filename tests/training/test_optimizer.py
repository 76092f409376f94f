"""Update rules against their papers in numpy, schedules at their corners, decay by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_optimizers
import optax
import pytest
from tiny_models import quick_jit

from lm_jax.config import OptimizerConfig
from lm_jax.training.optimizer import check_rules, make_optimizer, make_schedule

SHAPES = {  # two layers of width 6, with 2 heads of 4 and 9 in the middle
    "embedding": (11, 6),
    "head": (6, 11),
    "norm.scale": (6,),
    "norm.bias": (6,),
    "blocks.attention.query": (2, 6, 2, 4),
    "blocks.attention.out": (2, 2, 4, 6),
    "blocks.attention.query_bias": (2, 2, 4),
    "blocks.mlp.up": (2, 6, 9),
    "blocks.mlp.down": (2, 9, 6),
    "blocks.mlp.down_bias": (2, 6),
    "blocks.mlp_norm.scale": (2, 6),
}
LONG = {  # what Adafactor factors: a matrix, a stacked one, one with an axis too short
    "embedding": (140, 130),
    "blocks.mlp.up": (2, 128, 131),
    "blocks.mlp.down": (2, 200, 100),
    "norm.scale": (300,),
}
STEPS = 4
CONFIG = OptimizerConfig(
    learning_rate=0.01, warmup_steps=2, schedule="linear", weight_decay=0.3, b1=0.8, b2=0.9
)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def gradients(shapes) -> list[dict[str, np.ndarray]]:
    """Of very unequal sizes: the first step is far over the clipping norm, the last one under."""
    sizes = (3.0, 0.5, 1.0, 0.01)
    return [
        {k: np.float32(size) * g for k, g in drawn(shapes, seed).items()}
        for seed, size in enumerate(sizes, start=1)
    ]


def run(config: OptimizerConfig, shapes=SHAPES) -> dict[str, np.ndarray]:
    """The parameters after `STEPS` steps."""
    optimizer = make_optimizer(config, STEPS)

    @quick_jit
    def update(gradient, state, parameters):
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    parameters = jax.tree.map(jnp.asarray, drawn(shapes, 0))
    state = optimizer.init(parameters)
    for gradient in gradients(shapes):
        parameters, state = update(gradient, state, parameters)
    return jax.tree.map(np.asarray, parameters)


run_small = functools.lru_cache(lambda *fields: run(OptimizerConfig(*fields)))


def run_cached(config: OptimizerConfig) -> dict[str, np.ndarray]:
    return run_small(*dataclasses.astuple(config))


def rates(config: OptimizerConfig, peak: float | None = None) -> list[float]:
    return [float(make_schedule(config, STEPS, peak)(i)) for i in range(STEPS)]


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_four_steps_agree_with_the_paper(name, clip_norm):
    config = dataclasses.replace(CONFIG, name=name, clip_norm=clip_norm)
    shapes = LONG if name == "adafactor" else SHAPES
    exact = lambda values: {k: x.astype(np.float64) for k, x in values.items()}  # noqa: E731
    schedules = [rates(config)]
    if name == "muon":
        schedules.append(rates(config, config.muon_learning_rate))
    want = getattr(numpy_optimizers, name)(
        exact(drawn(shapes, 0)), [exact(g) for g in gradients(shapes)], config, *schedules
    )
    got = run(config, shapes) if name == "adafactor" else run_cached(config)
    for k, start in drawn(shapes, 0).items():
        moved = np.abs(want[k] - start).max()
        assert moved > 1e-3
        np.testing.assert_allclose(got[k], want[k], atol=2e-4 * moved + 1e-6, rtol=0, err_msg=k)


def test_muons_step_does_not_mix_layers():
    """A layer's matrix is turned orthogonal by itself: another layer's gradient changes nothing."""
    optimizer = make_optimizer(dataclasses.replace(CONFIG, name="muon", clip_norm=0.0), STEPS)
    parameters, gradient = drawn(SHAPES, 0), drawn(SHAPES, 1)
    other = {k: np.concatenate([g[:1], -7 * g[1:]]) for k, g in gradient.items()}
    state, update = optimizer.init(parameters), quick_jit(optimizer.update)
    for k in ("blocks.attention.query", "blocks.mlp.up"):
        a, b = (update(g, state, parameters)[0][k] for g in (gradient, other))
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).any()


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("adamw", "learning_rate", 0.02),
        ("adamw", "schedule", "constant"),
        ("adamw", "warmup_steps", 0),
        ("adamw", "decay_steps", 3),
        ("adamw", "final_fraction", 0.5),
        ("adamw", "b1", 0.5),
        ("adamw", "b2", 0.5),
        ("adamw", "epsilon", 0.1),
        ("adamw", "weight_decay", 0.0),
        ("adamw", "clip_norm", 0.5),
        ("lion", "b1", 0.1),
        ("lion", "b2", 0.1),
        ("lion", "weight_decay", 0.0),
        ("muon", "learning_rate", 0.02),
        ("muon", "b1", 0.5),
        ("muon", "b2", 0.5),
        ("muon", "epsilon", 0.1),
        ("muon", "weight_decay", 0.0),
        ("muon", "muon_momentum", 0.5),
        ("muon", "muon_learning_rate", 0.01),
    ],
)
def test_each_field_changes_the_update(name, field, value):
    config = dataclasses.replace(CONFIG, name=name)
    before, after = run_cached(config), run_cached(dataclasses.replace(config, **{field: value}))
    assert any((before[k] != after[k]).any() for k in before)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_weights_decay_and_norms_and_biases_do_not(name):
    decaying = run_cached(dataclasses.replace(CONFIG, name=name))
    staying = run_cached(dataclasses.replace(CONFIG, name=name, weight_decay=0.0))
    for k in SHAPES:
        is_weight = not k.endswith(("scale", "bias"))
        assert (decaying[k] != staying[k]).any() == is_weight, k


def test_a_parameter_without_a_rule_is_named():
    check_rules(list(SHAPES))
    with pytest.raises(ValueError, match=r"blocks\.attention\.gadget"):
        check_rules([*SHAPES, "blocks.attention.gadget"])


# Schedules: 100 steps, 10 of warm-up, from a peak of 1 down to 0.1.


def at(steps: list[int], total: int = 100, **fields) -> list[float]:
    config = OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 10} | fields)
    schedule = make_schedule(config, total)
    return [float(schedule(i)) for i in steps]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "wsd", "constant"])
def test_the_warm_up_rises_from_its_first_part_to_the_peak(schedule):
    np.testing.assert_allclose(at([0, 4, 9, 10], schedule=schedule), [0.1, 0.5, 1, 1], rtol=1e-6)
    assert at([0], schedule=schedule, warmup_steps=0) == [1.0]
    assert at([0], schedule=schedule, warmup_steps=1) == [1.0]


@pytest.mark.parametrize(
    "schedule, wanted",
    [  # at steps 10, 55, 80, 90, 100, 1000
        ("cosine", [1, 0.55, 0.1 + 0.45 * (1 + np.cos(np.pi * 7 / 9)),
                    0.1 + 0.45 * (1 + np.cos(np.pi * 8 / 9)), 0.1, 0.1]),
        ("linear", [1, 0.55, 0.3, 0.2, 0.1, 0.1]),
        ("rsqrt", [1, (10 / 55) ** 0.5, (10 / 80) ** 0.5, (10 / 90) ** 0.5, 0.1**0.5, 0.1]),
        ("wsd", [1, 1, 1, 0.55, 0.1, 0.1]),
        ("constant", [1, 1, 1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_schedules_at_their_corners(schedule, wanted):
    got = at([10, 55, 80, 90, 100, 1000], schedule=schedule)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_decay_steps_end_the_decay_early_or_set_the_length_of_wsds():
    np.testing.assert_allclose(at([10, 30, 50, 99], schedule="linear", decay_steps=50),
                               [1, 0.55, 0.1, 0.1], rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(at([59, 60, 80, 100], schedule="wsd", decay_steps=40),
                               [1, 1, 0.55, 0.1], rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "wsd", "constant"])
def test_a_warm_up_longer_than_the_run_only_rises(schedule):
    got = at(list(range(5)), total=5, schedule=schedule)
    np.testing.assert_allclose(got, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
