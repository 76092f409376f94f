"""Precision, dropout, rematerialization, initialization, RoPE, attention, parameters by name."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from jax._src.cudnn import fused_attention_stablehlo
from tiny_models import (
    BERT,
    GEMMA,
    GPT2,
    LLAMA,
    LORA,
    MOE,
    T,
    V,
    build,
    on_devices,
    packed_batch,
    placed,
    quick_jit,
    run_config,
    shard,
)

from lm_jax.config import RopeScaling
from lm_jax.errors import UserError
from lm_jax.model import flops, parameters, transformer
from lm_jax.model.attention import attention, attention_mask, resolve_backend
from lm_jax.model.cache import init_cache, update
from lm_jax.model.dropout import dropout
from lm_jax.model.remat import REMAT_POLICIES
from lm_jax.model.rope import apply_rope, rope_frequencies, rope_tables
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import PARAMETER_RULES
from lm_jax.training.loss import batch_loss
from lm_jax.training.optimizer import check_rules
from lm_jax.training.step import make_step, skeleton_of

replace = dataclasses.replace
IDS = np.random.default_rng(0).integers(0, V, (2, T), dtype=np.int32)


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def equations(jaxpr):
    """All equations of a jaxpr, those of its loops and calls as well."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def quick_key(seed: int) -> jax.Array:
    """A key of a generator that XLA compiles in a tenth of the time that threefry takes on CPU."""
    return jax.random.key(seed, impl="unsafe_rbg")


# Attention


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_queries_equal_full_attention_with_repeated_keys_and_values(causal):
    q, k, v = normal(2, T, 6, 8), normal(2, T, 2, 8, seed=1), normal(2, T, 2, 8, seed=2)
    mask = attention_mask(causal=causal, query_index=jnp.arange(T)[None], key_length=T)
    grouped = attention(q, k, v, mask)
    full = attention(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2), mask)
    np.testing.assert_allclose(grouped, full, atol=1e-6)


def test_a_row_that_sees_nothing_is_finite_and_so_is_its_gradient():
    q, k, v = (normal(1, 4, 2, 8, seed=i) for i in range(3))
    mask = jnp.zeros((1, 4, 4), bool)
    out, gradient = jax.value_and_grad(lambda q: jnp.sum(attention(q, k, v, mask)))(q)
    assert jnp.isfinite(out) and jnp.isfinite(gradient).all()


def test_attention_drops_weights_at_the_rate_and_scales_the_rest_up():
    """Values that are unit vectors make the weights themselves the output."""
    q, k = normal(4, 64, 4, 64), normal(4, 64, 4, 64, seed=1)
    v = jnp.broadcast_to(jnp.eye(64)[None, :, None, :], (4, 64, 4, 64))
    run = functools.partial(attention, 0.3 * q, k, v, None, dropout_rate=0.25)
    whole, dropped = np.asarray(run()), np.asarray(run(dropout_key=jax.random.key(0)))
    kept = dropped > 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.75, rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 0.01  # 65536 draws: 6 standard deviations


HALF = replace(GPT2, dtype="bfloat16")


def test_cudnn_needs_a_gpu_and_says_so():
    asked = replace(HALF, attention="cudnn")
    with pytest.raises(UserError, match=r"cudnn.*needs an NVIDIA GPU.*cpu"):
        resolve_backend(asked, T)
    assert resolve_backend(HALF, T) == "tiled"
    assert resolve_backend(replace(HALF, attention="xla"), T) == "xla"
    model = parameters.bind(skeleton_of(asked), parameters.split(build(GPT2)))
    with pytest.raises(UserError, match="cudnn"):
        model(IDS)


@pytest.mark.parametrize(
    "changes, length, why",
    [
        ({"dtype": "float32"}, T, "bfloat16"),
        ({"dropout": 0.1}, T, "dropout"),
        ({"head_width": 20}, T, "head_width.*20"),
        ({"head_width": 256}, T, "head_width.*256"),
        ({}, 15, "even number.*15"),
    ],
)
def test_on_a_gpu_auto_takes_cudnn_where_it_can(changes, length, why, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert resolve_backend(HALF, T) == "cudnn"
    assert resolve_backend(replace(HALF, **changes), length) == "xla"
    with pytest.raises(UserError, match=why):
        resolve_backend(replace(HALF, attention="cudnn", **changes), length)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_cudnn_is_in_the_program_that_trains_on_gpus(axes, monkeypatch):
    """The program is built and not run; that cuDNN is installed is pretended."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(transformer, "resolve_backend", lambda config, length: "cudnn")
    config = run_config(replace(LLAMA, dtype="bfloat16"))
    with jax.set_mesh(on_devices(axes)):
        step = make_step(config)
        state, batch = jax.eval_shape(step.init), shard(packed_batch())
        lowered = jax.jit(step.train).trace(state, batch).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "cudnn$fmha" in text.lower() and "backward" in text.lower()


@pytest.mark.parametrize("mask_rows", [None, 1, 4])
def test_cudnn_gets_each_devices_rows_and_heads(mask_rows, monkeypatch):
    """With jax's own attention in place of the kernel, eight devices compute what one does."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain(*a, **k)
    )
    qkv = normal(4, T, 4, 8), normal(4, T, 2, 8, seed=1), normal(4, T, 2, 8, seed=2)
    mask = None if mask_rows is None else np.tril(np.ones((mask_rows, T, T), bool))
    want = attention(*qkv, mask, scale=0.3)
    with jax.set_mesh(on_devices((2, 2, 2))):
        spec = jax.P(("data", "fsdp"), None, "tensor", None)
        qkv = [jax.device_put(x, spec) for x in qkv]
        if mask_rows == 4:
            mask = jax.device_put(mask, jax.P(("data", "fsdp")))
        got = quick_jit(functools.partial(attention, backend="cudnn", scale=0.3))(*qkv, mask)
        assert got.sharding.spec == spec
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_full_cache_drops_what_comes_after_its_last_slot(rows):
    empty, new = init_cache(GPT2, rows, T), normal(rows, 1, 4, 8)
    for last, at in (("written", 3), ("dropped", T)):
        places = jnp.array([[3], [at]])[2 - rows :]
        filled, k, v = update(empty, jnp.int32(1), new, -new, places)
        wanted = np.zeros((rows, 4, T, 8), np.float32)
        for row in range(rows if last == "written" else rows - 1):
            wanted[row, :, 3] = new[row, 0]
        np.testing.assert_array_equal(k, wanted)
        np.testing.assert_array_equal(v, -wanted)
        np.testing.assert_array_equal(filled.k_LBKSH[1], wanted)
        assert not filled.k_LBKSH[0].any()


# Rotary positions


def test_rotated_scores_depend_on_the_difference_of_positions_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(at_q: int, at_k: int) -> float:
        turned = (
            apply_rope(x, rope_tables(LLAMA, jnp.full((1, 1), p)))
            for x, p in ((q, at_q), (k, at_k))
        )
        return float(jnp.vdot(*turned))

    near, moved = score(3, 1), score(40, 38)
    assert abs(near - moved) < 1e-4
    assert abs(near - score(3, 2)) > 1e-2


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling("linear", factor=4.0),
        RopeScaling("llama3", factor=8.0),  # Llama 3.1
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        RopeScaling("llama3", 8.0, 2.0, 16.0, 4096),
    ],
)
def test_frequencies_follow_the_published_formula(scaling):
    config = replace(LLAMA, head_width=128, rope_theta=500_000.0, rope_scaling=scaling)
    np.testing.assert_allclose(
        rope_frequencies(config), reference_model.frequencies(config), rtol=1e-6
    )


# Precision


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_bfloat16_stays_close_to_float32(config):
    model = build(config)
    half = parameters.bind(skeleton_of(replace(config, dtype="bfloat16")), parameters.split(model))
    run = quick_jit(lambda model: model.logits(model(IDS)[0]))
    exact, rounded = run(model), run(half)
    assert rounded.dtype == jnp.float32
    # bfloat16 has 8 bits: single roundings are off by up to 2^-9, those of 2 layers add up.
    assert 0 < jnp.std(rounded - exact) < 0.03 * jnp.std(exact)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_softmax_norms_and_logits_are_float32_in_a_bfloat16_model(config):
    skeleton = skeleton_of(replace(config, dtype="bfloat16"))
    batch = packed_batch(2)
    traced = jax.make_jaxpr(lambda p: batch_loss(parameters.bind(skeleton, p), batch, chunk=4))(
        parameters.split(skeleton)
    )
    sensitive = [e for e in equations(traced.jaxpr) if e.primitive.name in ("exp", "rsqrt", "log")]
    assert {e.primitive.name for e in sensitive} == {"exp", "rsqrt", "log"}
    assert {v.aval.dtype for e in sensitive for v in e.invars} == {np.dtype("float32")}
    wide = [
        e.outvars[0].aval.dtype
        for e in equations(traced.jaxpr)
        if e.primitive.name == "dot_general" and e.outvars[0].aval.shape[-1] == V
    ]
    assert wide and set(wide) == {np.dtype("float32")}


# Scan and rematerialization


@functools.cache
def loss_and_gradient(config, axes=None):
    model, batch = build(replace(config, remat="none", scan_layers=True)), packed_batch(2)
    skeleton = skeleton_of(config)

    def loss(p):
        return batch_loss(parameters.bind(skeleton, p), batch, dropout_key=quick_key(1)).loss

    with placed(model, axes) as model:
        return quick_jit(jax.value_and_grad(loss))(parameters.split(model))


WITH_DROPOUT = replace(LLAMA, dropout=0.1)  # what is computed again must drop the same


@pytest.mark.parametrize(
    "remat, scan", [*itertools.product(REMAT_POLICIES, [True]), ("none", False), ("full", False)]
)
def test_scan_and_remat_change_neither_loss_nor_gradient(remat, scan):
    loss, gradient = loss_and_gradient(WITH_DROPOUT)
    config = replace(WITH_DROPOUT, remat=remat, scan_layers=scan)
    # Some products are then sums over devices.
    got, got_gradient = loss_and_gradient(config, (1, 1, 2) if scan else None)
    assert abs(got - loss) < 1e-4 * loss
    for name, x in gradient.items():
        scale = float(jnp.abs(x).max())
        np.testing.assert_allclose(got_gradient[name], x, atol=2e-5 * scale, err_msg=name)


def test_each_remat_policy_computes_more_again_than_the_one_before():
    def products(remat: str) -> int:
        skeleton, batch = skeleton_of(replace(LLAMA, remat=remat)), packed_batch(2)
        loss = lambda p: batch_loss(parameters.bind(skeleton, p), batch).loss  # noqa: E731
        traced = jax.make_jaxpr(jax.grad(loss))(parameters.split(skeleton))
        return sum(e.primitive.name == "dot_general" for e in equations(traced.jaxpr))

    none, all_dots, dots, heads, attention, full, offload = map(products, REMAT_POLICIES)
    assert none == all_dots < dots < heads < attention < full == offload


def test_offloaded_inputs_of_blocks_lie_in_the_hosts_memory():
    def spaces(remat: str) -> set[str]:
        skeleton, batch = skeleton_of(replace(LLAMA, remat=remat)), packed_batch(2)
        loss = lambda p: batch_loss(parameters.bind(skeleton, p), batch).loss  # noqa: E731
        traced = jax.make_jaxpr(jax.grad(loss))(parameters.split(skeleton))
        arrays = (v.aval for e in equations(traced.jaxpr) for v in e.outvars)
        return {str(a.memory_space) for a in arrays if a.ndim == 4 and a.shape[-1] == LLAMA.width}

    assert spaces("full") < spaces("offload")


# Dropout


def test_dropout_zeroes_at_the_rate_and_scales_the_rest_up():
    x = normal(100, 1000)
    got = np.asarray(dropout(x, 0.2, jax.random.key(0)))
    kept = got != 0
    assert abs(kept.mean() - 0.8) < 0.01  # 8 standard deviations
    np.testing.assert_allclose(got[kept], np.asarray(x)[kept] / 0.8, rtol=1e-6)
    np.testing.assert_array_equal(got, dropout(x, 0.2, jax.random.key(0)))
    assert (got != dropout(x, 0.2, jax.random.key(1))).any()


def test_no_key_no_dropout_and_the_key_decides():
    plain = build(GPT2)
    dropping = parameters.bind(skeleton_of(replace(GPT2, dropout=0.5)), parameters.split(plain))
    run = quick_jit(lambda model, key: model(IDS, dropout_key=key)[0])
    np.testing.assert_array_equal(run(plain, None), run(dropping, None))
    once, again = run(dropping, quick_key(1)), run(dropping, quick_key(1))
    np.testing.assert_array_equal(once, again)
    assert (once != run(dropping, quick_key(2))).any()


def test_each_branch_of_each_layer_drops_on_its_own():
    """With all weights 0 and the branches' last biases 1, a feature counts the branches kept."""
    rate, branches = 0.4, 4
    config = replace(GPT2, width=512, dropout=rate, norm="rmsnorm")
    skeleton = skeleton_of(config)
    values = {
        name: jnp.full(x.shape, 1.0 if name.endswith(("out_bias", "down_bias", "scale")) else 0.0)
        for name, x in parameters.split(skeleton).items()
    }
    x, _ = parameters.bind(skeleton, values)(IDS, dropout_key=quick_key(0))
    # The final norm divides each token by one number; the most that a feature holds is 4 kept.
    counts = np.rint(np.asarray(x / x.max(axis=-1, keepdims=True)) * branches).astype(int)
    found = np.bincount(counts.ravel(), minlength=5) / counts.size
    p = 1 - rate
    want = [1 * rate**4, 4 * p * rate**3, 6 * p**2 * rate**2, 4 * p**3 * rate, p**4]
    np.testing.assert_allclose(found, want, atol=0.02)  # 16384 draws: 5 standard deviations


# Parameters


@pytest.fixture(scope="module")
def initialized():
    config = replace(
        LLAMA,
        width=128,
        mlp_bias=True,
        qkv_bias=True,
        out_bias=True,
        position="learned",
        norm="layernorm",
        layers=3,
        init_std=0.02,
    )
    return config, parameters.split(
        quick_jit(functools.partial(Transformer, config))(jax.random.key(0))
    )


def test_initial_spread_of_each_kind_of_parameter(initialized):
    config, values = initialized
    for name, x in values.items():
        leaf = name.rpartition(".")[2]
        if leaf == "scale":
            assert (x == 1).all(), name
        elif leaf.endswith("bias"):
            assert (x == 0).all(), name
        else:
            # GPT-2, section 2.3: what ends in the residual stream starts smaller.
            want = 0.02 / (2 * config.layers) ** 0.5 if leaf in ("out", "down") else 0.02
            assert abs(float(jnp.std(x)) / want - 1) < 0.05, name
            assert abs(float(jnp.mean(x))) < 0.1 * want, name
        assert x.dtype == jnp.float32, name


def test_no_two_weights_start_from_the_same_numbers(initialized):
    _, values = initialized
    starts = [
        np.asarray(layer).ravel()[:8]
        for name, x in values.items()
        if not name.endswith(("scale", "bias"))
        for layer in (x if name.startswith("blocks.") else [x])
    ]
    for a, b in itertools.combinations(starts, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.999


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_parameters_by_name_and_back(config):
    skeleton = skeleton_of(config)
    values = {
        name: jnp.full(x.shape, i, x.dtype)
        for i, (name, x) in enumerate(parameters.split(skeleton).items())
    }
    back = parameters.split(parameters.bind(skeleton, values))
    assert list(back) == list(values)
    assert all((back[name] == values[name]).all() for name in values)
    with pytest.raises(KeyError):
        parameters.bind(skeleton, {k: v for k, v in values.items() if k != "embedding"})


SWITCHES = {
    "position": ["learned", "rope"],
    "norm": ["layernorm", "rmsnorm"],
    "norm_placement": ["pre", "post", "both"],
    "gated_mlp": [False, True],
    "tied_head": [False, True],
    "qkv_bias": [False, True],
    "out_bias": [False, True],
    "mlp_bias": [False, True],
    "qk_norm": [False, True],
    "kv_heads": [2, 4],
}


def test_each_axis_of_each_parameter_of_each_family_has_its_rules():
    seen = set()
    for base in (GPT2, LLAMA, BERT, GEMMA, LORA, MOE):
        for name, values in SWITCHES.items():
            for value in values:
                skeleton = skeleton_of(replace(base, **{name: value}))
                shapes = {k: x.shape for k, x in parameters.split(skeleton).items()}
                axes = parameters.logical_axes(skeleton)
                assert {k: len(a) for k, a in axes.items()} == {
                    k: len(s) for k, s in shapes.items()
                }
                assert {a for named in axes.values() for a in named} <= set(PARAMETER_RULES)
                assert all((a[0] == "layers") == k.startswith("blocks.") for k, a in axes.items())
                check_rules(list(shapes))
                seen |= shapes.keys()
    assert {"blocks.attention.query_norm.scale", "blocks.mlp.gate_bias", "head"} <= seen


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
def test_matrix_parameters_are_those_of_the_model(config):
    sizes = {name: x.size for name, x in parameters.split(skeleton_of(config)).items()}
    head = "embedding" if config.tied_head else "head"
    matrices = {"query", "key", "value", "out", "up", "gate", "down", "head_dense", head}
    assert flops.matrix_parameters(config) == sum(
        n for name, n in sizes.items() if name.rpartition(".")[2] in matrices
    )


def test_matrix_parameters_of_experts_are_those_that_work_for_a_token():
    sizes = {name: x.size for name, x in parameters.split(skeleton_of(MOE)).items()}
    experts = sum(sizes[f"blocks.mlp.{name}"] for name in ("up", "gate", "down"))
    matrices = {"query", "key", "value", "out", "router", "head"}
    others = sum(n for name, n in sizes.items() if name.rpartition(".")[2] in matrices)
    assert flops.matrix_parameters(MOE) == others + experts * 2 / 4
    assert flops.idle_parameters(MOE) == experts * 2 / 4
    assert flops.idle_parameters(LLAMA) == 0


def test_training_flops_are_three_times_those_that_xla_counts_forward():
    config = replace(
        GPT2,
        width=128,
        head_width=32,
        mlp_width=512,
        causal=False,
        vocab_size=256,
        scan_layers=False,
    )
    skeleton = skeleton_of(config)
    forward = quick_jit(lambda m, ids: m.logits(m(ids)[0])).lower(skeleton, IDS)
    counted = forward.cost_analysis()["flops"] / IDS.size
    assert flops.training_flops_per_token(config, T) == pytest.approx(3 * counted, rel=0.1)
    half = flops.training_flops_per_token(replace(config, causal=True), T)
    scores = 2 * config.layers * 2 * config.heads * config.head_width * T  # multiply, add
    assert flops.training_flops_per_token(config, T) - half == 3 * scores / 2


def test_peaks_are_those_of_the_device_and_unknown_elsewhere():
    assert flops.peak_flops("TPU v5 lite") == 197e12 < flops.peak_flops("TPU v5p") == 459e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA L4") < flops.peak_flops("NVIDIA L40S")
    assert np.isnan(flops.peak_flops("cpu"))
