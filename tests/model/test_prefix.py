"""Prefix attention: who sees whom, on one device and on eight; gradients; decoding."""

import dataclasses

import jax
import numpy as np
import pytest
import reference_model
from tiny_models import GPT2, LLAMA, T, V, build, on_devices, placed, quick_jit, shard

from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError
from lm_jax.generation.decoding import Rows, prefill, step
from lm_jax.generation.embedding import Pooling, embed
from lm_jax.generation.sampling import Sampling
from lm_jax.interop.config_map import choose_family, write_config
from lm_jax.interop.registry import FAMILIES
from lm_jax.model import parameters as params_lib
from lm_jax.model.attention import resolve_backend
from lm_jax.model.cache import init_cache
from lm_jax.training.loss import batch_loss

replace = dataclasses.replace
PREFIX_GPT2 = replace(GPT2, prefix_attention=True, init_std=0.3)
PREFIX_LLAMA = replace(LLAMA, prefix_attention=True)
MESHES = {"one device": None, "eight devices": (2, 2, 2)}

# Of each row: (tokens of the prefix, all tokens) of its documents; the rest is padding.
LAYOUT = [
    [(4, 9), (2, 5)],
    [(0, 6), (5, 5), (1, 4)],
    [(16, 16)],
    [(7, 8), (3, 5)],
]


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    names = ("inputs", "targets", "segments", "positions", "prefix")
    out = {name: np.zeros((len(LAYOUT), T), np.int32) for name in names}
    rng = np.random.default_rng(seed)
    for row, documents in enumerate(LAYOUT):
        start = 0
        for number, (prompt, size) in enumerate(documents, 1):
            here = slice(start, start + size)
            out["segments"][row, here], out["positions"][row, here] = number, np.arange(size)
            out["prefix"][row, start : start + prompt] = 1
            start += size
    out["inputs"], out["targets"] = rng.integers(0, V, (2, len(LAYOUT), T), dtype=np.int32)
    return out | {"weights": ((out["segments"] > 0) & (out["prefix"] == 0)).astype(np.float32)}


def seen(row: int) -> np.ndarray:
    """[T, T]: whether a token's state depends on another's, as the papers have it."""
    b, out = batch(), np.zeros((T, T), bool)
    segments, prefix = b["segments"][row], b["prefix"][row]
    for t in range(T):
        for s in range(T):
            both_in_prefix = prefix[t] and prefix[s]
            out[t, s] = segments[t] == segments[s] and (s <= t or both_in_prefix)
    return out


@quick_jit
def _logits(model, b):
    x, _ = model(
        b["inputs"],
        positions_BT=b["positions"],
        segments_BT=b["segments"],
        prefix_BT=b.get("prefix"),
    )
    return model.logits(x)


def logits(model, b, axes=None) -> np.ndarray:
    with placed(model, axes) as model:
        return np.asarray(_logits(model, b if axes is None else shard(b)))


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_a_change_of_one_token_moves_those_that_see_it_and_no_other(axes):
    """Every token of a row in turn; of prefix tokens later ones too, of no target, no neighbour."""
    for row in range(len(LAYOUT)):
        b = {name: np.repeat(x[row : row + 1], T + 4, axis=0) for name, x in batch().items()}
        for t in range(T):
            b["inputs"][t, t] = (b["inputs"][t, t] + 1) % V
        got = logits(build(PREFIX_LLAMA), b, axes)
        moved = np.abs(got[:T] - got[T]).max(axis=-1) > 1e-6  # [changed, place]
        np.testing.assert_array_equal(moved.T, seen(row))


def test_the_reference_sees_the_same():
    """Else its agreement below would say little."""
    b, config = batch(), PREFIX_GPT2
    p = params_lib.split(build(config))
    keys = ("inputs", "segments", "positions")
    for row in (0, 1):
        args = [b[k][row] for k in keys]
        before = reference_model.forward(config, p, *args, prefix=b["prefix"][row])
        args[0] = args[0].copy()
        args[0][3] += 1
        after = reference_model.forward(config, p, *args, prefix=b["prefix"][row])
        np.testing.assert_array_equal((before != after).any(axis=-1), seen(row)[:, 3])


def reference_loss(config, parameters, b) -> float:
    total = 0.0
    for row in range(len(LAYOUT)):
        args = [b[k][row] for k in ("inputs", "segments", "positions")]
        scores = reference_model.forward(config, parameters, *args, prefix=b["prefix"][row])
        nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(T), b["targets"][row]]
        total += (nll * b["weights"][row]).sum()
    return total


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_loss_and_gradients_are_those_of_the_reference(axes):
    """By its differences, in float64, along a random direction of each parameter."""
    config, b = PREFIX_GPT2, batch()
    p = {k: np.asarray(x, np.float64) for k, x in params_lib.split(build(config)).items()}
    with placed(build(config), axes) as model:

        def loss(parameters, b):
            return batch_loss(params_lib.bind(model, parameters), b).loss

        run = quick_jit(jax.value_and_grad(loss))
        got, gradients = run(params_lib.split(model), b if axes is None else shard(b))
    np.testing.assert_allclose(got, reference_loss(config, p, b), rtol=1e-5)
    without = reference_loss(config, p, b | {"prefix": np.zeros_like(b["prefix"])})
    assert abs(without - got) > 0.1
    rng = np.random.default_rng(0)
    for name in ("embedding", "blocks.attention.query", "blocks.attention.value", "blocks.mlp.up"):
        along, h = rng.standard_normal(p[name].shape), 1e-5
        ends = [reference_loss(config, p | {name: p[name] + h * s * along}, b) for s in (1, -1)]
        want = (ends[0] - ends[1]) / (2 * h)
        assert abs(want) > 0.1
        along_gradient = np.sum(np.asarray(gradients[name], np.float64) * along)
        np.testing.assert_allclose(along_gradient, want, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("config", [PREFIX_GPT2, PREFIX_LLAMA], ids=["gpt2", "llama"])
def test_nothing_in_the_prefix_is_causal_and_all_of_it_two_way(config):
    b, model = batch(), build(config)

    def as_config(**changes):
        other = build(replace(config, prefix_attention=False, **changes))
        return logits(other, {k: x for k, x in b.items() if k != "prefix"})

    causal = as_config()
    plain = {k: x for k, x in b.items() if k != "prefix"}
    np.testing.assert_array_equal(logits(model, plain), causal)
    none = logits(model, b | {"prefix": np.zeros_like(b["prefix"])})
    np.testing.assert_allclose(none, causal, atol=1e-6)
    real = b["segments"] > 0
    everything = logits(model, b | {"prefix": real.astype(np.int32)})
    np.testing.assert_allclose(everything[real], as_config(causal=False)[real], atol=1e-6)
    assert np.abs(everything[real] - causal[real]).max() > 0.1


def test_a_mark_behind_the_prefix_does_not_count():
    """It would let the prefix see, by way of the marked token, what is to be predicted."""
    b, model = batch(), build(PREFIX_LLAMA)
    marked = b["prefix"].copy()
    marked[0, [6, 8]] = 1  # of the first document, whose prefix ends at 4
    marked[1, 3] = 1  # of one without a prefix
    np.testing.assert_array_equal(logits(model, b | {"prefix": marked}), logits(model, b))
    boolean = logits(model, b | {"prefix": b["prefix"] > 0})
    np.testing.assert_array_equal(boolean, logits(model, b))


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_decoding_equals_the_full_pass_for_prompts_of_different_lengths(axes):
    """The prompt is the prefix, padding is none of it, and what is drawn stays causal."""
    config, lengths = PREFIX_LLAMA, np.array([3, 8, 1, 6], np.int32)
    prompts = np.random.default_rng(1).integers(0, V, (4, 8), dtype=np.int32)  # padded with noise
    with placed(build(config), axes) as model:
        knobs = Sampling(temperature=0.0).knobs()
        rows = Rows(*np.zeros((3, 4), np.int32), np.uint32(0), knobs)
        rows = rows._replace(position_B=lengths)
        rows, state = prefill(model, prompts, rows, None, slots=T, vocab_size=V)
        drawn = [np.asarray(rows.token_B)]
        for _ in range(T - 9):
            rows, state = step(model, rows, state, vocab_size=V)
            drawn.append(np.asarray(rows.token_B))
    drawn, causal = np.stack(drawn, axis=1), build(LLAMA)
    differs = False
    for row, n in enumerate(lengths):
        ids = np.concatenate([prompts[row, :n], drawn[row]])
        b = {
            "inputs": np.pad(ids, (0, T - len(ids)))[None],
            "segments": np.ones((1, T), np.int32),
            "positions": np.arange(T, dtype=np.int32)[None],
        }
        here = slice(n - 1, len(ids) - 1)
        prefix = (np.arange(T) < n)[None]
        np.testing.assert_array_equal(
            logits(build(config), b | {"prefix": prefix})[0, here].argmax(-1), drawn[row]
        )
        differs |= (logits(causal, b)[0, here].argmax(-1) != drawn[row]).any()
    assert differs


def test_a_text_to_embed_is_read_both_ways():
    def vectors(config):
        config = replace(config, vocab_size=259, max_length=32)
        pooling = Pooling("first", normalize=False)
        return embed(build(config), BytesTokenizer(), ["some words", "ab"], pooling)[0]

    both = vectors(replace(LLAMA, causal=False))
    np.testing.assert_allclose(vectors(PREFIX_LLAMA), both, atol=1e-5)
    assert np.abs(both - vectors(LLAMA)).max() > 0.01


def test_what_would_be_silently_wrong_is_refused():
    ids, prefix = np.zeros((1, 4), np.int32), np.ones((1, 4), bool)
    model = build(PREFIX_GPT2)
    with pytest.raises(ValueError, match="no prefix attention"):
        build(GPT2)(ids, prefix_BT=prefix)
    with pytest.raises(ValueError, match="needs its prefix_BT"):
        model(ids, cache=init_cache(PREFIX_GPT2, 1, T))
    with pytest.raises(ValueError, match="no other positions"):
        places = np.arange(4, 8, dtype=np.int32)[None]
        cache = init_cache(PREFIX_GPT2, 1, T)
        model(ids, positions_BT=places, prefix_BT=prefix, cache=cache)


def test_backends_without_it_are_refused_and_never_chosen():
    with jax.set_mesh(on_devices((2, 2, 2))):
        assert resolve_backend(PREFIX_LLAMA, 256) == "tiled"
    for backend in ("splash", "ring", "cudnn"):
        with pytest.raises(UserError, match=r"model\.prefix_attention = False"):
            resolve_backend(replace(PREFIX_LLAMA, attention=backend), 256)
    with (
        jax.set_mesh(on_devices((1, 1, 1, 2))),
        pytest.raises(UserError, match=r"mesh\.sequence: must be 1"),
    ):
        resolve_backend(PREFIX_LLAMA, 256)


@pytest.mark.parametrize("config", [GPT2, replace(LLAMA, qk_norm=False)], ids=["gpt2", "llama"])
def test_no_published_family_has_it(config):
    family = choose_family(config)
    with pytest.raises(UserError, match=r"model\.prefix_attention = True, there False"):
        choose_family(replace(config, prefix_attention=True))
    with pytest.raises(UserError, match=r"model\.prefix_attention = True, there False"):
        write_config(FAMILIES[family.model_type], replace(config, prefix_attention=True))
