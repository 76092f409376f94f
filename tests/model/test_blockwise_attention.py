"""Splash attention (its kernel interpreted) and ring attention against the plain one: outputs and
gradients, packed and not, with grouped heads and windows, whole rows and rows in parts."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT2, LLAMA, on_devices, packed_batch, quick_jit, run_config

from lm_jax.errors import UserError
from lm_jax.model.attention import attention, attention_mask, resolve_backend
from lm_jax.model.ring import ring_attention
from lm_jax.model.splash import splash_attention
from lm_jax.sharding.mesh import activation_spec
from lm_jax.training.step import make_step

B, T, N, H = 4, 256, 4, 32
BACKENDS = {
    "splash": functools.partial(splash_attention, interpret=True),
    "ring": ring_attention,
}
# None: outside of any mesh; else data x fsdp x tensor x sequence.
MESHES = {"no mesh": None, "tensor": (2, 2, 2, 1), "sequence": (1, 1, 1, 2), "all": (2, 1, 2, 2)}
KINDS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 50, "softcap": 5.0, "scale": 0.3},
    "bidirectional": {"causal": False},
}


def inputs(kv_heads: int, packed: bool):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, kv_heads, kv_heads)
    )
    # Documents of unequal length; the last rows end with padding, which is segment 0.
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    segments[2:, -40:] = 0
    return (q, k, v), segments if packed else None


def value_and_gradients(attend, qkv, segments):
    """Of a function that no symmetry makes insensitive, where there is text."""
    counts = 1.0 if segments is None else (segments > 0)[:, :, None, None].astype(np.float32)

    def scalar(q, k, v, segments):
        out = attend(q, k, v, segments)
        return jnp.sum(jnp.sin(3 * out) * counts), out

    run = quick_jit(jax.grad(scalar, (0, 1, 2), has_aux=True))
    gradients, out = run(*qkv, segments)
    return np.asarray(out) * counts, *map(np.asarray, gradients)


@functools.cache
def reference(kind: str, kv_heads: int, packed: bool):
    def plain(q, k, v, segments, *, causal, window=0, **rest):
        mask = attention_mask(
            causal=causal,
            query_index=jnp.arange(T)[None],
            key_length=T,
            query_segments=segments,
            key_segments=segments,
            window=window,
        )
        return attention(q, k, v, mask, **rest)

    attend = functools.partial(plain, **KINDS[kind])
    return value_and_gradients(attend, *inputs(kv_heads, packed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mesh, kind, kv_heads, packed",
    [
        ("no mesh", "causal", 4, False),
        ("no mesh", "causal", 2, True),
        ("no mesh", "window", 2, True),
        ("no mesh", "bidirectional", 2, True),
        ("tensor", "causal", 2, True),
        ("sequence", "causal", 1, False),
        ("sequence", "window", 1, True),
        ("all", "causal", 2, True),
        ("all", "window", 2, True),
        ("all", "bidirectional", 2, True),
    ],
)
def test_blockwise_attention_is_attention(backend, mesh, kind, kv_heads, packed):
    qkv, segments = inputs(kv_heads, packed)
    axes = MESHES[mesh]
    with contextlib.nullcontext() if axes is None else jax.set_mesh(on_devices(axes)):
        if axes is not None:
            qkv = [
                jax.device_put(x, activation_spec("batch", "length", heads, None))
                for x, heads in zip(qkv, ("heads", "kv_heads", "kv_heads"))
            ]
            if segments is not None:
                segments = jax.device_put(segments, activation_spec("batch", None))
        attend = functools.partial(BACKENDS[backend], length="length", **KINDS[kind])
        got = value_and_gradients(attend, qkv, segments)
    want = reference(kind, kv_heads, packed)
    for name, a, b in zip(("out", "q", "k", "v"), got, want, strict=True):
        assert np.abs(b).max() > 0.1, name
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=name)


def test_a_ring_never_holds_the_keys_of_a_whole_row():
    with jax.set_mesh(on_devices((1, 1, 1, 8))):
        spec = activation_spec("batch", "length", None, None)
        qkv = [jax.ShapeDtypeStruct((B, T, 2, H), jnp.float32, sharding=spec) for _ in range(3)]

        def scalar(q, k, v):
            return jnp.sum(ring_attention(q, k, v, None, causal=True, length="length"))

        text = jax.jit(jax.grad(scalar, (0, 1, 2))).lower(*qkv).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text
    assert f"[{B},{T}," not in text


@pytest.mark.parametrize(
    "model, attention, axes",
    [
        (LLAMA, "ring", (2, 1, 2, 2)),
        (dataclasses.replace(GPT2, windows=(5, 0)), "auto", (1, 1, 1, 4)),
    ],
    ids=["llama", "windows"],
)
def test_a_model_with_a_ring_is_the_model(model, attention, axes):
    """In training, over layers of two kinds, and chosen by itself where rows are in parts."""
    batch = packed_batch()

    def loss_and_norm(axes, attention):
        config = run_config(dataclasses.replace(model, attention=attention))
        with jax.set_mesh(on_devices(axes)):
            assert (resolve_backend(config.model, 16) == "ring") == (attention != "xla")
            step = make_step(config)
            _, metrics = quick_jit(step.train)(
                quick_jit(step.init)(), jax.device_put(batch, activation_spec("batch"))
            )
        return float(metrics["loss"]), float(metrics["gradient_norm"])

    want = loss_and_norm((1, 1, 1, 1), "xla")
    np.testing.assert_allclose(loss_and_norm(axes, attention), want, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, length, why",
    [
        ({"attention": "splash"}, 256, "a TPU, and this is cpu"),
        ({"attention": "ring"}, 256, "mesh.sequence above 1"),
    ],
)
def test_what_cannot_be_had_is_refused(changes, length, why):
    with pytest.raises(UserError, match=why):
        resolve_backend(dataclasses.replace(LLAMA, **changes), length)


def test_rows_in_parts_that_dropout_forbids_a_ring_are_gathered():
    with jax.set_mesh(on_devices((1, 1, 1, 4))):
        dropping = dataclasses.replace(LLAMA, dropout=0.1)
        assert resolve_backend(dropping, 16) == "xla"
        with pytest.raises(UserError, match=r"model\.dropout = 0"):
            resolve_backend(dataclasses.replace(dropping, attention="ring"), 16)
