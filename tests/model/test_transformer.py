"""The forward pass: against the papers in numpy, and what no token may see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from tiny_models import BERT, GEMMA, GPT2, LLAMA, LORA, MOE, T, V, build, quick_jit

from lm_jax.config import MoeConfig, RopeScaling
from lm_jax.errors import UserError
from lm_jax.model import lora
from lm_jax.model import parameters as params_lib
from lm_jax.model.cache import init_cache
from lm_jax.model.transformer import Transformer
from lm_jax.training.step import skeleton_of

replace = dataclasses.replace


@quick_jit
def _logits(model, tokens, segments, positions):
    return model.logits(model(tokens, segments_BT=segments, positions_BT=positions)[0])


def logits(model: Transformer, tokens, segments=None, positions=None) -> np.ndarray:
    """[B, T, V]; by default one document a row."""
    ones, places = np.ones_like(tokens), np.arange(tokens.shape[1], dtype=np.int32)[None]
    segments = ones if segments is None else segments
    positions = places * ones if positions is None else positions
    return np.asarray(_logits(model, tokens, segments, positions))


def tokens(rows: int, seed: int = 0, length: int = T) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (rows, length), dtype=np.int32)


PACKED_SEGMENTS = np.array([[1] * 5 + [2] * 7 + [3] * 4], np.int32)
PACKED_POSITIONS = np.array([[*range(5), *range(7), *range(4)]], np.int32)

FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "linear rope": replace(LLAMA, rope_scaling=RopeScaling("linear", factor=3.0), qk_norm=False),
    "biased swiglu, tied": replace(
        LLAMA, mlp_bias=True, qkv_bias=True, out_bias=True, tied_head=True
    ),
    "bert": BERT,
    "post-norm, causal, no norm bias": replace(BERT, causal=True, norm_bias=False),
    "gemma": GEMMA,
    "a window of all layers, unrolled": replace(GPT2, windows=(4,), scan_layers=False),
    "windows of two sizes, unrolled": replace(GPT2, windows=(4, 2), scan_layers=False),
    "biases of queries, keys and values alone": replace(LLAMA, qkv_bias=True),
    "adapters": LORA,
    "experts": MOE,
    "experts by their probability, not gated": replace(
        MOE, layers=1, gated_mlp=False, moe=MoeConfig(5, 3, normalize_weights=False)
    ),
    "relu": replace(GPT2, activation="relu", layers=1, head_width=6),
    "relu squared": replace(GPT2, activation="relu_squared", layers=1, mlp_bias=False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_agrees_with_the_papers(name):
    config = FAMILIES[name]
    model, ids = build(config), tokens(1)
    got = logits(model, ids, PACKED_SEGMENTS, PACKED_POSITIONS)[0]
    want = reference_model.forward(
        config, params_lib.split(model), ids[0], PACKED_SEGMENTS[0], PACKED_POSITIONS[0]
    )
    assert np.std(want) > 0.3  # else agreement would say nothing
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("config", [GPT2, LLAMA, GEMMA], ids=["gpt2", "llama", "gemma"])
def test_a_later_token_changes_no_earlier_logit(config):
    model, ids = build(config), tokens(1)
    changed = ids.copy()
    changed[0, 9] = (ids[0, 9] + 1) % V
    before, after = logits(model, ids)[0], logits(model, changed)[0]
    np.testing.assert_array_equal(before[:9], after[:9])
    assert (before[9:] != after[9:]).any(axis=-1).all()


def test_bidirectional_sees_both_ways_within_the_document_only():
    model, ids = build(replace(LLAMA, causal=False)), tokens(1)
    before = logits(model, ids, PACKED_SEGMENTS, PACKED_POSITIONS)[0]
    changed = ids.copy()
    changed[0, 8] = (ids[0, 8] + 1) % V  # inside of the second document, places 5 to 11
    after = logits(model, changed, PACKED_SEGMENTS, PACKED_POSITIONS)[0]
    moved = (before != after).any(axis=-1)
    np.testing.assert_array_equal(moved, PACKED_SEGMENTS[0] == 2)


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
def test_a_packed_row_equals_its_documents_alone(config):
    model, ids = build(config), tokens(1)
    packed = logits(model, ids, PACKED_SEGMENTS, PACKED_POSITIONS)[0]
    here = PACKED_SEGMENTS[0] == 2
    alone = quick_jit(lambda model, ids: model.logits(model(ids)[0]))(model, ids[:, here])[0]
    np.testing.assert_allclose(packed[here], alone, atol=2e-5)


@pytest.mark.parametrize("config", [GPT2, BERT], ids=["causal", "bidirectional"])
def test_no_gradient_crosses_documents(config):
    """Every token has an id of its own, so that embedding rows tell the documents apart."""
    model = build(replace(config, tied_head=False))
    ids = np.random.default_rng(0).permutation(V)[None, :T].astype(np.int32)

    @quick_jit
    def gradient(parameters, segment):
        def loss(parameters):
            bound = params_lib.bind(model, parameters)
            x, _ = bound(ids, segments_BT=PACKED_SEGMENTS, positions_BT=PACKED_POSITIONS)
            picked = (segment == PACKED_SEGMENTS)[:, :, None]
            return jnp.sum(jnp.where(picked, jnp.sin(bound.logits(x)), 0))

        return jax.grad(loss)(parameters)["embedding"]

    parameters = params_lib.split(model)
    for segment in (1, 2, 3):
        rows = np.asarray(gradient(parameters, segment))
        touched = np.abs(rows[ids[0]]).sum(axis=-1) > 0
        np.testing.assert_array_equal(touched, PACKED_SEGMENTS[0] == segment)


@pytest.mark.parametrize(
    "config", [GPT2, LLAMA, GEMMA, MOE], ids=["gpt2", "llama", "gemma", "experts"]
)
def test_cached_decoding_equals_the_full_pass_for_rows_of_different_lengths(config):
    """Rows of 3, 7 and 5 tokens go on together; slots past a row's own hold what was padding."""
    model, ids, lengths = build(config), tokens(3, seed=1), np.array([3, 7, 5])
    full = logits(model, ids)

    @quick_jit
    def advance(model, ids, positions, cache):
        x, cache = model(ids, positions_BT=positions, cache=cache)
        return model.logits(x), cache

    prompt = lengths.max()
    places = np.broadcast_to(np.arange(prompt), (3, prompt)).astype(np.int32)
    places = np.where(places < lengths[:, None], places, T).astype(np.int32)  # T: dropped
    got, cache = advance(model, ids[:, :prompt], np.asarray(places), init_cache(config, 3, T))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(got[row, :n], full[row, :n], atol=2e-5)
    for i in range(T - prompt):
        at = (lengths + i)[:, None].astype(np.int32)
        got, cache = advance(model, np.take_along_axis(ids, at, 1), at, cache)
        want = np.take_along_axis(full, at[:, :, None], 1)
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_token_types_are_those_given():
    model, ids = build(BERT), tokens(1)
    types = np.arange(T, dtype=np.int32)[None] // 9
    got = quick_jit(lambda model: model.logits(model(ids, types_BT=types)[0]))(model)[0]
    want = reference_model.forward(BERT, params_lib.split(model), ids[0], types=types[0])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    with pytest.raises(ValueError, match="token types"):
        build(GPT2)(ids, types_BT=types)


def test_the_pooler_sees_the_first_token():
    model, x = build(BERT), np.random.default_rng(0).standard_normal((2, T, BERT.width), np.float32)
    want = np.tanh(x[:, 0] @ np.asarray(model.pooler) + np.asarray(model.pooler_bias))
    np.testing.assert_allclose(model.pool(jnp.asarray(x)), want, atol=1e-5)


def test_a_model_without_a_head_gives_no_scores():
    model = build(replace(BERT, head="none"))
    x, _ = model(tokens(1))
    assert x.shape == (1, T, BERT.width)
    with pytest.raises(UserError, match="head"):
        model.logits(x)


def test_adapters_merged_into_their_weights_change_no_logit():
    model, ids = build(LORA), tokens(2)
    config, merged = lora.merge(LORA, params_lib.split(model))
    assert not any(lora.is_adapter(name) for name in merged) and config.lora.rank == 0
    got = logits(params_lib.bind(skeleton_of(config), merged), ids)
    np.testing.assert_allclose(got, logits(model, ids), atol=2e-5)


def test_adapters_start_as_nothing():
    model = quick_jit(functools.partial(Transformer, LORA))(jax.random.key(0))
    ids = tokens(1)
    all_of_it = params_lib.split(model)
    base = {name: x for name, x in all_of_it.items() if not lora.is_adapter(name)}
    assert len(all_of_it) - len(base) == 2 * len(LORA.lora.targets)
    plain = params_lib.bind(skeleton_of(lora.base_config(LORA)), base)
    np.testing.assert_array_equal(logits(model, ids), logits(plain, ids))


def test_a_cache_does_not_combine_with_packing_or_two_way_attention():
    with pytest.raises(ValueError, match="causal"):
        build(GPT2)(tokens(1), segments_BT=PACKED_SEGMENTS, cache=init_cache(GPT2, 1, T))
    with pytest.raises(ValueError, match="causal"):
        build(BERT)(tokens(1), cache=init_cache(BERT, 1, T))


def test_learned_positions_count_within_the_document():
    model, ids = build(GPT2), tokens(1)
    assert (logits(model, ids) != logits(model, ids, positions=PACKED_POSITIONS)).any()
