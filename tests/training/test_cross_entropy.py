"""The loss: in chunks as at once, against float64 numpy, over a sharded vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import T, V, on_devices, quick_jit

from lm_jax.model.head import Head
from lm_jax.training.loss import LOGITS_A_DEVICE, chunk_length, cross_entropy

B, D = 4, 16


def head_of(weight_DV, dtype="float32") -> Head:
    return Head.of(jnp.asarray(weight_DV), None, dtype=dtype, softcap=0.0, length="length")


@pytest.fixture(scope="module")
def inputs():
    """Hidden states, head, targets and weights; a quarter of the positions does not count, and a
    third of the targets is what the scores say."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    weights = (rng.random((B, T)) < 0.75).astype(np.float32)
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    targets = np.where(rng.random((B, T)) < 1 / 3, (x @ head).argmax(-1), targets)
    return x, head, targets.astype(np.int32), weights


def reference(x, head, targets, weights) -> tuple[float, ...]:
    """(nll, z, weight, right, uniform) in float64, a position at a time."""
    nll = z = right = uniform = 0.0
    for b, t in np.ndindex(targets.shape):
        logits = x[b, t].astype(np.float64) @ head.astype(np.float64)
        log_z = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
        nll += weights[b, t] * (log_z - logits[targets[b, t]])
        z += weights[b, t] * log_z**2
        right += weights[b, t] * (logits.argmax() == targets[b, t])
        uniform += weights[b, t] * np.mean(log_z - logits)
    return nll, z, float(weights.sum()), right, uniform


@quick_jit
def _value_and_gradient(x, head, targets, weights, chunks):
    def total(x, head):
        sums = cross_entropy(x, head_of(head, x.dtype), targets, weights, chunk=T // len(chunks))
        return sums.nll + 0.3 * sums.z + 0.2 * sums.uniform, sums

    (_, sums), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, head)
    return sums[:5], gradients


def value_and_gradient(x, head, targets, weights, chunk: int = T):
    return _value_and_gradient(x, head, targets, weights, np.zeros(T // chunk))


@pytest.mark.parametrize("chunk", [T, 4, 1])
def test_sums_agree_with_float64_numpy(inputs, chunk):
    sums, _ = value_and_gradient(*inputs, chunk)
    np.testing.assert_allclose(sums, reference(*inputs), rtol=1e-6)
    assert {x.dtype for x in sums} == {np.dtype("float32")}


@pytest.mark.parametrize("chunk", [4, 1])
def test_chunks_change_no_gradient(inputs, chunk):
    _, whole = value_and_gradient(*inputs)
    _, parts = value_and_gradient(*inputs, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, parts)


def test_the_gradient_is_softmax_minus_target(inputs):
    x, head, targets, weights = inputs
    got = quick_jit(jax.grad(lambda x: cross_entropy(x, head_of(head), targets, weights).nll))(x)
    logits = x.astype(np.float64) @ head
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True) - np.eye(V)[targets]
    np.testing.assert_allclose(got, (weights[:, :, None] * p) @ head.T, atol=1e-4)


@pytest.mark.parametrize("chunk", [T, 4])
def test_a_weight_of_zero_leaves_a_position_out_exactly(inputs, chunk):
    x, head, targets, weights = inputs
    garbage = np.where(weights == 0, (targets + 7) % V, targets)
    left_out = np.where(weights[:, :, None] == 0, 100 * x, x)
    sums, (dx, dhead) = value_and_gradient(*inputs, chunk)
    other, (other_dx, other_dhead) = value_and_gradient(left_out, head, garbage, weights, chunk)
    np.testing.assert_array_equal(sums, other)
    np.testing.assert_array_equal(dhead, other_dhead)
    for gradient in (dx, other_dx):
        assert (np.asarray(gradient)[weights == 0] == 0).all()


def test_nothing_to_count_gives_zeros_and_no_nan(inputs):
    x, head, targets, weights = inputs
    sums, gradients = value_and_gradient(x, head, targets, 0 * weights, 4)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((sums, gradients)))


def test_logits_far_from_zero_do_not_overflow(inputs):
    x, head, targets, weights = inputs
    sums, gradients = value_and_gradient(1000 * x, head, targets, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, gradients)))


@pytest.mark.parametrize("chunk", [T, 4])
def test_a_sharded_vocabulary_changes_nothing(inputs, chunk):
    sums, gradients = value_and_gradient(*inputs, chunk)
    x, head, targets, weights = inputs
    with jax.set_mesh(on_devices((2, 1, 4))):
        rows = jax.P(("data", "fsdp"))
        sharded = [jax.device_put(a, rows) for a in (x, targets, weights)]
        head = jax.device_put(head, jax.P(None, "tensor"))
        got, got_gradients = value_and_gradient(sharded[0], head, *sharded[1:], chunk)
        assert got_gradients[1].sharding.spec == jax.P(None, "tensor")
    np.testing.assert_allclose(got, sums, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, got_gradients)


def test_float32_scores_of_bfloat16_states(inputs):
    """At the size of logits, bfloat16 rounds to 1/16 and more: sums must not show it."""
    x, head, targets, weights = inputs
    half = jnp.asarray(x, jnp.bfloat16)
    rounded = np.asarray(half, np.float32), np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    got, _ = value_and_gradient(half, head, targets, weights, 4)
    np.testing.assert_allclose(got, reference(*rounded, targets, weights), rtol=1e-5)


def test_chunks_are_the_longest_that_fit():
    for length, rows, vocab in (
        (1024, 8, 50_304),
        (1024, 1, 64),
        (96, 3, 2**20),
        (1000, 64, 2**25),
    ):
        chunk = chunk_length(length, rows, vocab)
        assert length % chunk == 0
        assert rows * chunk * vocab <= LOGITS_A_DEVICE or chunk == 1
        longer = [c for c in range(chunk + 1, length + 1) if length % c == 0]
        assert all(rows * c * vocab > LOGITS_A_DEVICE for c in longer)


def test_chunks_that_do_not_divide_are_refused(inputs):
    with pytest.raises(ValueError, match="chunks of 5 do not divide 16"):
        x, head, targets, weights = inputs
        cross_entropy(x, head_of(head), targets, weights, chunk=5)
