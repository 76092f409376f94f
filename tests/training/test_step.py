"""The train step: neither accumulation nor the mesh changes what is learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    GPT2,
    LLAMA,
    T,
    V,
    build,
    on_devices,
    packed_batch,
    quick_jit,
    run_config,
    shard,
)

from lm_jax.config import Config
from lm_jax.model import parameters as params_lib
from lm_jax.model import transformer
from lm_jax.training.step import Step, make_step

# Spread as in a real run: at the spread that makes other tests sensitive, rounding errors grow by
# more in 20 steps than what is compared here.
SMALL = dataclasses.replace(GPT2, init_std=0.05)


def start(step: Step):
    """A state of parameters that numpy drew, on the mesh that is set."""
    abstract = jax.eval_shape(step.init).parameters
    drawn = params_lib.split(build(step.skeleton.config))
    placed = {k: jax.device_put(np.asarray(drawn[k]), x.sharding and x.sharding.spec)
              for k, x in abstract.items()}  # fmt: skip
    return quick_jit(step.init_from)(placed)


def losses(config: Config, axes: tuple[int, int, int], steps: int):
    """The losses of a run on a mesh, and its last state."""
    with jax.set_mesh(on_devices(axes)):
        step = make_step(config)
        update, state, seen = quick_jit(step.train, donate_argnums=0), start(step), []
        for i in range(steps):
            state, metrics = update(state, shard(packed_batch(seed=i)))
            seen.append(float(metrics["loss"]))
    return np.array(seen), state


FAST = {"learning_rate": 0.003, "warmup_steps": 3}


@functools.cache
def on_one_device(optimizer: str, steps: int):
    config = run_config(SMALL, optimizer=FAST | {"name": optimizer}, training={"steps": steps})
    return losses(config, (1, 1, 1), steps)[0]


@pytest.mark.parametrize(
    "axes, accumulation", [((2, 2, 2), 2), ((1, 2, 1, 2, 2), 1), ((1, 1, 2, 2, 2), 1)], ids=str
)
def test_eight_devices_learn_as_one_does(axes, accumulation):
    """Each axis is there beside each of the first three, or beside those that split lengths. With
    micro-batches, rows are dealt to them so that each device keeps its own."""
    training = {"accumulation": accumulation, "steps": 20}
    config = run_config(SMALL, optimizer=FAST, training=training)
    want = on_one_device("adamw", 20)
    got, _ = losses(config, axes, 20)
    assert want[0] - want[-1] > 0.2  # it learns
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_tokens_are_looked_up_alike_in_a_split_and_in_a_gathered_table(monkeypatch):
    assert SMALL.width < transformer._NARROWEST  # it is gathered in the test before
    monkeypatch.setattr(transformer, "_NARROWEST", 1)
    config = run_config(SMALL, optimizer=FAST, training={"steps": 20})
    got, _ = losses(config, (1, 2, 1, 2, 2), 4)
    np.testing.assert_allclose(got, on_one_device("adamw", 20)[:4], atol=1e-4)


def test_eight_devices_learn_as_one_does_with_muon():
    config = run_config(SMALL, optimizer=FAST | {"name": "muon"}, training={"steps": 8})
    got, _ = losses(config, (2, 2, 2), 8)
    np.testing.assert_allclose(got, on_one_device("muon", 8), atol=1e-4)


@functools.cache
def in_parts(accumulation: int, chunk: int):
    """Parameters after three steps without a mesh, and the metrics of each."""
    training = {"accumulation": accumulation, "loss_chunk": chunk, "z_loss": 0.01, "steps": 3}
    config = run_config(LLAMA, optimizer=FAST | {"clip_norm": 0.0}, training=training)
    step = make_step(config)
    update, state, metrics = quick_jit(step.train), start(step), []
    for i in range(3):
        state, got = update(state, packed_batch(seed=i))
        metrics.append(got)
    return state.parameters, metrics


def test_micro_batches_have_unequal_numbers_of_tokens():
    """Else the comparison below would not see a mean of means."""
    weights = packed_batch(seed=0)["weights"]
    assert len({float(weights[i::4].sum()) for i in range(4)}) > 2


@pytest.mark.parametrize("accumulation, chunk", [(4, 4), (8, T)])
def test_accumulation_and_chunks_change_nothing(accumulation, chunk):
    want, want_metrics = in_parts(1, T)
    got, metrics = in_parts(accumulation, chunk)
    for a, b in zip(metrics, want_metrics):
        assert (
            a.keys()
            == b.keys()
            == {*("loss", "gradient_norm", "learning_rate", "tokens", "z_loss")}
        )
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=3e-5, err_msg=name)


def test_metrics_are_those_of_the_batch():
    _, (first, *_) = in_parts(1, T)
    model, batch = build(LLAMA), packed_batch(seed=0)
    nll, log_z = reference_nll(model, batch)
    weights = batch["weights"]
    np.testing.assert_allclose(first["tokens"], weights.sum())
    np.testing.assert_allclose(first["loss"], (nll * weights).sum() / weights.sum(), rtol=1e-5)
    z = 0.01 * (log_z**2 * weights).sum() / weights.sum()
    np.testing.assert_allclose(first["z_loss"], z, rtol=1e-5)
    np.testing.assert_allclose(first["learning_rate"], 0.001, rtol=1e-6)


def test_what_is_learned_with_smoothing_is_the_mixture():
    training = {"label_smoothing": 0.3, "steps": 3}
    step = make_step(run_config(LLAMA, training=training))
    batch = packed_batch(seed=0)
    _, got = quick_jit(step.train)(start(step), batch)

    def mixed(parameters):
        logits = _logits.__wrapped__(params_lib.bind(step.skeleton, parameters), batch)
        share = 0.7 * jax.nn.one_hot(batch["targets"], V) + 0.3 / V
        each = -jnp.sum(share * jax.nn.log_softmax(logits), axis=-1)
        return jnp.sum(each * batch["weights"]) / batch["weights"].sum()

    gradients = quick_jit(jax.grad(mixed))(start(step).parameters)
    np.testing.assert_allclose(got["gradient_norm"], optax.tree.norm(gradients), rtol=1e-5)
    nll, _ = reference_nll(build(LLAMA), batch)  # what is reported has no smoothing
    weights = batch["weights"]
    np.testing.assert_allclose(got["loss"], (nll * weights).sum() / weights.sum(), rtol=1e-5)


@quick_jit
def _logits(model, batch):
    x, _ = model(batch["inputs"], positions_BT=batch["positions"], segments_BT=batch["segments"])
    return model.logits(x)


def reference_nll(model, batch) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each target and log Z, float64 [B, T]."""
    logits = np.asarray(_logits(model, batch), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    return log_z - np.take_along_axis(logits, batch["targets"][:, :, None], 2)[:, :, 0], log_z


def test_evaluation_sums_nats_tokens_and_bytes():
    step = make_step(run_config(LLAMA))
    model, batch = build(LLAMA), packed_batch(seed=3)
    byte_lengths = np.random.default_rng(0).integers(0, 9, V, dtype=np.int32)
    got = quick_jit(step.evaluate)(params_lib.split(model), batch, 0, byte_lengths)
    weights = batch["weights"]
    np.testing.assert_allclose(got["nll"], (reference_nll(model, batch)[0] * weights).sum(),
                               rtol=1e-5)  # fmt: skip
    assert got["tokens"] == weights.sum()
    right = np.asarray(_logits(model, batch)).argmax(-1) == batch["targets"]
    assert got["right"] == (right * weights).sum() > 0
    assert got["bytes"] == (byte_lengths[batch["targets"]] * weights).sum()


def test_a_batch_of_padding_only_changes_nothing_but_by_decay():
    step = make_step(run_config(LLAMA, optimizer=FAST | {"weight_decay": 0.0}))
    state = start(step)
    empty = jax.tree.map(np.zeros_like, packed_batch())
    after, metrics = quick_jit(step.train)(state, empty)
    assert metrics["loss"] == metrics["gradient_norm"] == metrics["tokens"] == 0
    for name, x in state.parameters.items():
        np.testing.assert_array_equal(after.parameters[name], x)
    assert after.step == 1


@pytest.mark.parametrize(
    ("optimizer", "axes"),
    [("adamw", (2, 2, 2)), ("adafactor", (1, 1, 1)), ("lion", (1, 1, 1)), ("muon", (4, 2, 1))],
)
def test_a_step_that_is_no_number_is_as_if_it_had_not_been(optimizer, axes):
    """But for the steps that are counted: the rate is that of the next one."""
    config = run_config(SMALL, optimizer=FAST | {"name": optimizer, "schedule": "constant"})
    config.optimizer.warmup_steps = 0
    with jax.set_mesh(on_devices(axes)):
        step = make_step(config)
        update, states = quick_jit(step.train), []
        bad = packed_batch(seed=9)
        bad["weights"] = bad["weights"] * np.float32(np.nan)
        for batches in ((0, None, 1), (0, 1)):
            state = start(step)
            for i in batches:
                before = state
                state, metrics = update(state, shard(bad if i is None else packed_batch(seed=i)))
                assert np.isfinite(metrics["loss"]) == (i is not None)
                if i is None:
                    jax.tree.map(np.testing.assert_array_equal, state.parameters, before.parameters)
            states.append(state)
        left_out, never = states
        assert (left_out.step, never.step) == (3, 2)
        for name, x in never.parameters.items():
            np.testing.assert_array_equal(left_out.parameters[name], x, err_msg=name)
        assert not np.array_equal(
            never.parameters["embedding"], start(step).parameters["embedding"]
        )


def test_the_rate_of_a_step_does_not_depend_on_what_was_left_out():
    config = run_config(SMALL, optimizer=FAST | {"schedule": "linear"}, training={"steps": 9})
    step = make_step(config)
    update, state = quick_jit(step.train), start(step)
    bad = packed_batch(seed=9)
    bad["weights"] = bad["weights"] * np.float32(np.nan)
    for i in range(4):
        state, _ = update(state, bad if i < 2 else packed_batch(seed=i))
    counts = [
        int(x.count)
        for x in jax.tree.leaves(
            state.optimizer, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState)
        )
        if isinstance(x, optax.ScaleByScheduleState)
    ]
    assert counts == [4]  # as state.step, of which the rate is logged


def test_dropout_is_a_function_of_seed_and_step():
    """Of nothing else: a step taken again, as after a restart, drops the same."""
    batch = packed_batch()

    def loss_at(step: Step, number: int) -> float:
        return float(updates[step](states[step]._replace(step=jnp.int32(number)), batch))

    steps = [
        make_step(run_config(dataclasses.replace(SMALL, dropout=0.5), training={"seed": seed}))
        for seed in (0, 1)
    ]
    updates = {s: quick_jit(lambda state, b, s=s: s.train(state, b)[1]["loss"]) for s in steps}
    states = {s: start(s) for s in steps}
    first, other = steps
    assert loss_at(first, 7) == loss_at(first, 7)
    assert len({loss_at(first, 7), loss_at(first, 8), loss_at(other, 7)}) == 3


def test_the_initial_state_depends_on_the_seed_and_not_on_the_mesh():
    def init(seed: int, axes=None):
        step = make_step(run_config(SMALL, training={"seed": seed}))
        if axes is None:
            return quick_jit(step.init)().parameters
        with jax.set_mesh(on_devices(axes)):
            return quick_jit(step.init)().parameters

    want, other = init(0), init(1)
    for name, x in init(0, (2, 2, 2)).items():
        np.testing.assert_allclose(x, want[name], rtol=1e-6, err_msg=name)  # to the last bit or so
    assert (want["embedding"] != other["embedding"]).any()


def test_a_donated_state_is_used_once():
    """The old arrays are gone, all of them; the new ones are whole and can be donated again."""
    step = make_step(run_config(SMALL))
    update, state = quick_jit(step.train, donate_argnums=0), start(make_step(run_config(SMALL)))
    before = state
    state, _ = update(state, packed_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    state, metrics = update(state, packed_batch(seed=1))
    assert np.isfinite(metrics["loss"]) and state.step == 2
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
