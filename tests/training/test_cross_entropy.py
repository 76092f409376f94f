"""The loss: in chunks as at once, against float64 numpy, over a sharded vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import T, V, on_devices, quick_jit

from lm_jax.model.head import Head
from lm_jax.sharding.mesh import activation_spec, parameter_spec
from lm_jax.training.cross_entropy import _LOGITS_OF_A_CPU, chunk_of, cross_entropy

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
    """(loss, nll, z, weight, right) in float64, a position at a time."""
    nll = z = right = uniform = 0.0
    for b, t in np.ndindex(targets.shape):
        logits = x[b, t].astype(np.float64) @ head.astype(np.float64)
        log_z = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
        nll += weights[b, t] * (log_z - logits[targets[b, t]])
        z += weights[b, t] * log_z**2
        right += weights[b, t] * (logits.argmax() == targets[b, t])
        uniform += weights[b, t] * np.mean(log_z - logits)
    loss = nll + 0.2 * (uniform - nll) + 0.3 * z
    return loss, nll, z, float(weights.sum()), right


@functools.partial(quick_jit, static_argnums=(4, 5))
def _value_and_gradient(x, head, targets, weights, chunk, sparse):
    def total(x, head):
        sums = cross_entropy(
            x,
            head_of(head, x.dtype),
            targets,
            weights,
            chunk=chunk,
            sparse=sparse,
            z_loss=0.3,
            label_smoothing=0.2,
        )
        return 2 * sums.loss, sums

    (_, sums), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, head)
    return sums[:5], gradients


def value_and_gradient(x, head, targets, weights, chunk: int = B * T, sparse: bool = False):
    return _value_and_gradient(x, head, targets, weights, chunk, sparse)


# All at once, in parts, in parts that do not divide, one by one; as they come, and gathered.
CHUNKS = [(B * T, False), (8, False), (7, False), (1, False), (8, True), (7, True)]


@pytest.mark.parametrize("chunk, sparse", CHUNKS)
def test_sums_agree_with_float64_numpy(inputs, chunk, sparse):
    sums, _ = value_and_gradient(*inputs, chunk, sparse)
    np.testing.assert_allclose(sums, reference(*inputs), rtol=1e-6)
    assert {x.dtype for x in sums} == {np.dtype("float32")}


@pytest.mark.parametrize("chunk, sparse", CHUNKS[1:])
def test_chunks_change_no_gradient(inputs, chunk, sparse):
    _, whole = value_and_gradient(*inputs)
    _, parts = value_and_gradient(*inputs, chunk, sparse)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, parts)


def test_the_gradient_is_softmax_minus_target(inputs):
    x, head, targets, weights = inputs
    got = quick_jit(jax.grad(lambda x: cross_entropy(x, head_of(head), targets, weights).loss))(x)
    logits = x.astype(np.float64) @ head
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True) - np.eye(V)[targets]
    np.testing.assert_allclose(got, (weights[:, :, None] * p) @ head.T, atol=1e-4)


@pytest.mark.parametrize("chunk, sparse", CHUNKS)
def test_a_weight_of_zero_leaves_a_position_out_exactly(inputs, chunk, sparse):
    x, head, targets, weights = inputs
    garbage = np.where(weights == 0, (targets + 7) % V, targets)
    left_out = np.where(weights[:, :, None] == 0, 100 * x, x)
    sums, (dx, dhead) = value_and_gradient(*inputs, chunk, sparse)
    other, (other_dx, other_dhead) = value_and_gradient(
        left_out, head, garbage, weights, chunk, sparse
    )
    np.testing.assert_array_equal(sums, other)
    np.testing.assert_array_equal(dhead, other_dhead)
    for gradient in (dx, other_dx):
        assert (np.asarray(gradient)[weights == 0] == 0).all()


def test_nothing_to_count_gives_zeros_and_no_nan(inputs):
    x, head, targets, weights = inputs
    for sparse in (False, True):
        sums, gradients = value_and_gradient(x, head, targets, 0 * weights, 4, sparse)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves((sums, gradients)))


def test_logits_far_from_zero_do_not_overflow(inputs):
    x, head, targets, weights = inputs
    sums, gradients = value_and_gradient(1000 * x, head, targets, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, gradients)))


@pytest.mark.parametrize(
    "axes, chunk, sparse",
    [
        ((2, 1, 4, 1), 4, False),
        ((2, 2, 1, 2), B * T, False),
        ((1, 2, 2, 2), 3, False),
        ((2, 1, 4, 1), 3, True),
        ((1, 2, 2, 2), 3, True),
    ],
)
def test_a_mesh_changes_nothing(inputs, axes, chunk, sparse):
    sums, gradients = value_and_gradient(*inputs)
    x, head, targets, weights = inputs
    with jax.set_mesh(on_devices(axes)):
        rows = activation_spec("batch", "length")
        sharded = [jax.device_put(a, rows) for a in (x, targets, weights)]
        spec = parameter_spec("embed", "vocab")
        head = jax.device_put(head, spec)
        got, got_gradients = value_and_gradient(sharded[0], head, *sharded[1:], chunk, sparse)
        assert got_gradients[1].sharding.spec == spec
    np.testing.assert_allclose(got, sums, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, got_gradients)


def test_float32_scores_of_bfloat16_states(inputs):
    """At the size of logits, bfloat16 rounds to 1/16 and more: sums must not show it."""
    x, head, targets, weights = inputs
    half = jnp.asarray(x, jnp.bfloat16)
    rounded = np.asarray(half, np.float32), np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    got, _ = value_and_gradient(half, head, targets, weights, 4)
    np.testing.assert_allclose(got, reference(*rounded, targets, weights), rtol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("vocab", [2, 64, 50_304, 2**20, 2**25])
@pytest.mark.parametrize("positions", [1, 97, 1000, 8192])
def test_chunks_fit_and_are_not_many(positions, vocab, sparse):
    chunk = chunk_of(positions, vocab, sparse=sparse)
    assert 1 <= chunk <= positions
    assert chunk * vocab <= _LOGITS_OF_A_CPU or chunk == 1
    count, least = -(-positions // chunk), -(-positions * vocab // _LOGITS_OF_A_CPU)
    assert count >= min(positions, 8 if sparse else 1)
    assert count <= min(positions, 2 * max(least, 8 if sparse else 1))


def test_logits_of_all_positions_are_never_there(inputs):
    for chunk, there in ((B * T, True), (8, False)):
        text = _value_and_gradient.lower(*inputs, chunk, True).compile().as_text()
        assert (f"[{B},{T},{V}]" in text or f"[{B * T},{V}]" in text) == there


def test_of_other_sums_no_gradient_is_given(inputs):
    x, head, targets, weights = inputs
    for wrap in (lambda f: f, jax.jit):
        loss = wrap(lambda x: cross_entropy(x, head_of(head), targets, weights).nll)
        with pytest.raises(ValueError, match="'loss' has a gradient, and 'nll' has none"):
            jax.grad(loss)(x)
