"""Products of 8-bit floats: of what the operands and gradients are rounded to, and nothing else."""

import dataclasses
import types

import jax
import jax.flatten_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tiny_models import GPT2, LLAMA, LORA, MOE, T, V, build, placed, quick_jit

from lm_jax.errors import UserError
from lm_jax.model.float8 import Rounded, multiplies_float8
from lm_jax.model.projection import project
from lm_jax.model_validation import validate_model

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def by_numpy(x, dtype):
    """The least power of two by which the largest number fits, and what is then the nearest."""
    largest = float(np.abs(x).max())
    scale = 1.0
    while largest and largest / scale >= LARGEST[dtype]:
        scale *= 2
    while largest and 2 * largest / scale < LARGEST[dtype]:
        scale /= 2
    return ((x / scale).astype(dtype).astype(np.float64) * scale).astype(np.float32)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 3e4])
def test_numbers_are_rounded_to_the_nearest(dtype, size):
    x = (size * np.random.default_rng(0).standard_normal((64, 64))).astype(np.float32)
    found = np.asarray(Rounded.of(jnp.asarray(x), jnp.dtype(dtype)).wide())
    np.testing.assert_array_equal(found, by_numpy(x, dtype))
    assert np.isfinite(found).all()
    assert size == 0 or 0 < np.abs(found - x).max() <= np.abs(x).max() / 8


def test_both_passes_multiply_what_is_rounded():
    rng = np.random.default_rng(1)
    x, w, d_y = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 8), (8, 6), (2, 4, 6)))

    def product(x, w):
        return project(x, nnx.Param(w, axes=("embed", "mlp")), None, "batch", None, "mlp",
                       float8=True)  # fmt: skip

    y, backward = jax.vjp(product, jnp.asarray(x), jnp.asarray(w))
    d_x, d_w = backward(jnp.asarray(d_y))
    x, w, d_y = by_numpy(x, E4M3), by_numpy(w, E4M3), by_numpy(d_y, E5M2)
    np.testing.assert_allclose(y, x @ w, atol=1e-5)
    np.testing.assert_allclose(d_x, d_y @ w.T, atol=1e-5)
    np.testing.assert_allclose(d_w, np.einsum("BTK,BTO->KO", x, d_y), atol=1e-5)


def score_and_gradients(model):
    @quick_jit
    def of(model):
        def score(model):
            out = model.logits(model(jnp.asarray(IDS))[0])
            target = jnp.where(jnp.arange(V)[None, None] == 7, out, 0)
            return jnp.mean(jax.nn.logsumexp(out, -1) - jnp.sum(target, -1))

        return jax.value_and_grad(score)(model)

    return jax.device_get(of(model))


IDS = np.random.default_rng(0).integers(0, V, (8, T), dtype=np.int32)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_it_is_close_to_the_model_and_not_it(config):
    plain = score_and_gradients(build(config))
    found = score_and_gradients(build(dataclasses.replace(config, float8=True)))
    assert 0 < abs(found[0] - plain[0]) < 0.1 * abs(plain[0])
    a, b = (jax.flatten_util.ravel_pytree(gradients)[0] for gradients in (found[1], plain[1]))
    assert 0.9 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 0.9999


def test_eight_devices_round_as_one():
    """Adapters are not rounded; rows are split, and products recomputed."""
    config = dataclasses.replace(LORA, dtype="bfloat16", float8=True, remat="dots")
    one = score_and_gradients(build(config))
    with placed(build(config), (1, 2, 2, 2)) as model:
        eight = score_and_gradients(model)
    assert eight[0] == pytest.approx(one[0], rel=2e-2)
    a, b = (jax.flatten_util.ravel_pytree(gradients)[0] for gradients in (eight[1], one[1]))
    # A sum in another order is now and then rounded to the next number.
    assert np.linalg.norm(a - b) < 0.2 * np.linalg.norm(b)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_both_passes_convert_both_operands(remat):
    """Where a product is computed, in whatever loop, XLA is to see what its operands are."""
    config = dataclasses.replace(LLAMA, dtype="bfloat16", float8=True, remat=remat)

    def loss(model):
        return jnp.sum(model(jnp.asarray(IDS))[0].astype(jnp.float32))

    found = jax.make_jaxpr(jax.grad(loss))(build(config)).jaxpr.eqns
    forward, backward = (str(e.params["jaxpr"]) for e in found if e.primitive.name == "scan")
    # Seven products; two operands of each, and the gradient of its result.
    assert forward.count("f8_e4m3fn") >= 14 and "f8_e5m2" not in forward
    assert backward.count("f8_e4m3fn") >= 14 and backward.count("f8_e5m2") >= 7


def test_experts_have_none():
    with pytest.raises(UserError, match="float8: experts"):
        validate_model(dataclasses.replace(MOE, float8=True), "here")


@pytest.mark.parametrize(
    ("platform", "capability", "has"),
    [("gpu", "9.0", True), ("gpu", "8.9", True), ("gpu", "8.0", False), ("gpu", "12.0", True),
     ("gpu", "gfx942", False), ("tpu", None, False), ("cpu", None, False)],
)  # fmt: skip
def test_which_devices_multiply_them(platform, capability, has):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert multiplies_float8(device) is has
