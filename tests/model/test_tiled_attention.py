"""Tiled attention against the plain one: outputs and gradients, whatever the mask, on a mesh and
off it, with dropout and without."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import LLAMA, on_devices, quick_jit

from lm_jax.errors import UserError
from lm_jax.model.attention import attention, attention_mask, prefix_of, resolve_backend
from lm_jax.model.tiled import _blocks
from lm_jax.sharding.mesh import activation_spec

B, N, H = 4, 4, 16
KINDS = {
    "causal": {"causal": True},
    "packed": {"causal": True, "packed": True},
    "window": {"causal": True, "packed": True, "window": 50, "scale": 0.3},
    "prefix": {"causal": True, "packed": True, "prefix": True},
    "bidirectional": {"causal": False, "packed": True},
    "everything seen": {"causal": False},
}


def given(T: int, kv_heads: int, *, causal, packed=False, prefix=False, window=0, scale=None):
    """Queries, keys and values, their mask, and what else `attention` is told."""
    rng = np.random.default_rng(0)
    qkv = [rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, kv_heads, kv_heads)]
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32) if packed else None
    marked = rng.random((B, T)) < 0.9
    mask = attention_mask(
        causal=causal,
        query_index=jnp.arange(T)[None],
        key_length=T,
        query_segments=segments,
        key_segments=segments,
        key_prefix=prefix_of(jnp.asarray(marked), jnp.asarray(segments)) if prefix else None,
        window=window,
    )
    return qkv, mask, {"causal": causal and not prefix, "scale": scale}


def run(qkv, mask, backend: str, rate: float, options: dict):
    attend = functools.partial(attention, backend=backend, dropout_rate=rate, **options)

    def scalar(q, k, v, mask):
        out = attend(q, k, v, mask, dropout_key=jax.random.key(1) if rate else None)
        return jnp.sum(jnp.sin(3 * out)), out

    gradients, out = quick_jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(*qkv, mask)
    return {name: np.asarray(x) for name, x in zip("oqkv", (out, *gradients), strict=True)}


@pytest.mark.parametrize(
    "kind, T, kv_heads, rate, axes",
    [
        ("causal", 256, 4, 0.0, None),
        ("causal", 200, 2, 0.3, None),  # blocks of unlike size
        ("causal", 3, 4, 0.0, None),
        ("packed", 256, 2, 0.3, (2, 2, 2, 1)),
        ("packed", 256, 1, 0.0, None),
        ("window", 256, 2, 0.0, (2, 2, 2, 1)),
        ("prefix", 130, 2, 0.3, None),
        ("bidirectional", 130, 2, 0.3, (2, 2, 2, 1)),
        ("everything seen", 130, 4, 0.0, None),
    ],
)
def test_it_is_attention(kind, T, kv_heads, rate, axes):
    qkv, mask, options = given(T, kv_heads, **KINDS[kind])
    want = run(qkv, mask, "xla", rate, options)
    with contextlib.nullcontext() if axes is None else jax.set_mesh(on_devices(axes)):
        if axes is not None:
            qkv = [
                jax.device_put(x, activation_spec("batch", None, heads, None))
                for x, heads in zip(qkv, ("heads", "kv_heads", "kv_heads"))
            ]
            rows = "batch" if mask.shape[0] > 1 else None
            mask = jax.device_put(mask, activation_spec(rows, None, None))
        got = run(qkv, mask, "tiled", rate, options)
    for name in want:
        assert np.abs(want[name]).max() > 0.1, name
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=2e-5, err_msg=name)


def test_half_precision_is_about_as_near_to_the_truth_as_the_plain_one():
    qkv, mask, options = given(256, 2, **KINDS["packed"])
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    exact = run([x.astype(jnp.float32) for x in half], mask, "xla", 0.0, options)
    for name, true in exact.items():
        errors = [
            np.abs(run(half, mask, backend, 0.0, options)[name].astype(np.float32) - true).mean()
            for backend in ("tiled", "xla")
        ]
        assert errors[0] <= 1.3 * errors[1], (name, errors)


@pytest.mark.parametrize("T", [1, 63, 64, 127, 128, 200, 1000])
def test_the_blocks_are_all_of_a_row_and_see_all_there_is_before(T):
    blocks = _blocks(T, T, causal=True)
    assert [row for rows, _ in blocks for row in range(T)[rows]] == list(range(T))
    assert all(keys == slice(0, rows.stop) for rows, keys in blocks)
    assert len(blocks) == (1 if T < 128 else min(4, T // 64))


def test_scores_that_no_query_sees_are_not_computed():
    qkv, mask, options = given(256, 4, **KINDS["causal"])
    scores = jax.jit(
        lambda *inputs: attention(*inputs, backend="tiled", **options)
    ).lower(*qkv, mask).as_text()  # fmt: skip
    assert "16x64x64x" in scores or "16x64x64xf32" in scores
    assert "16x256x256" not in scores


@pytest.mark.parametrize(
    "changes, axes, why",
    [
        ({"attention_softcap": 5.0}, (1, 1, 1, 1), r"model\.attention_softcap = 0"),
        ({}, (1, 1, 1, 4), r"mesh\.sequence = 1, not 4"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, axes, why):
    config = dataclasses.replace(LLAMA, attention="tiled", **changes)
    with jax.set_mesh(on_devices(axes)), pytest.raises(UserError, match=why):
        resolve_backend(config, 16)


def test_cpus_take_it_by_themselves():
    assert resolve_backend(LLAMA, 16) == "tiled"
