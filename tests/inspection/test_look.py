"""What is shown of a model is what it computes."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import BERT, GEMMA, LLAMA, build, logits, on_devices

from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.inspection.look import look
from lm_jax.inspection.prompt import encode
from lm_jax.model import parameters as params_lib

LETTERS = CharacterTokenizer("abcdefgh ", mask=True)
CAUSAL = dataclasses.replace(GEMMA, layers=2)  # windows, and scores that are capped
PREFIX = dataclasses.replace(LLAMA, prefix_attention=True, vocab_size=10)
MASKED = dataclasses.replace(BERT, layers=1)


def log_softmax(scores):
    scores = np.asarray(scores, np.float64)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def scores_of(model, ids, **inputs):
    return log_softmax(logits(model, np.asarray([ids], np.int32), **inputs)[0])


def check_place(scores, place, log_p, answer):
    order = np.argsort(-log_p)
    np.testing.assert_array_equal(scores.candidates_MK[place], order[:5])
    np.testing.assert_allclose(scores.probabilities_MK[place], np.exp(log_p[order[:5]]), rtol=1e-4)
    if answer is None:
        return
    assert scores.rank_T[place] == 1 + list(order).index(answer)
    np.testing.assert_allclose(scores.loss_T[place], -log_p[answer], rtol=1e-4)


def test_a_causal_model_tells_each_token_by_those_before():
    model = build(CAUSAL)
    ids = encode(CAUSAL, LETTERS, "bad head face")[0]
    seen = look(model, LETTERS, ids, top_k=5)
    log_p = scores_of(model, ids)
    assert np.isnan(seen.scores.loss_T[0]) and seen.scores.rank_T[0] == 0
    assert (seen.scores.candidates_MK[0] == -1).all()
    assert len(seen.scores.candidates_MK) == len(ids) + 1
    for t in range(len(ids)):
        answer = ids[t + 1] if t + 1 < len(ids) else None
        check_place(seen.scores, t + 1, log_p[t], answer)
    # The last row of the lens is the output.
    np.testing.assert_array_equal(seen.scores.lens_LT[-1], log_p.argmax(-1))
    np.testing.assert_allclose(
        seen.scores.lens_probabilities_LT[-1], np.exp(log_p.max(-1)), rtol=1e-4
    )
    # The first is the token's own embedding, scaled, without any block.
    p = {k: np.asarray(v, np.float64) for k, v in params_lib.split(model).items()}
    x = p["embedding"][ids] * CAUSAL.width**0.5
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CAUSAL.norm_epsilon) * p["norm.scale"]
    cap = CAUSAL.logits_softcap
    first = log_softmax(cap * np.tanh(x @ p["embedding"].T / cap))
    np.testing.assert_array_equal(seen.scores.lens_LT[0], first.argmax(-1))
    np.testing.assert_allclose(
        seen.scores.lens_probabilities_LT[0], np.exp(first.max(-1)), rtol=1e-4
    )
    # The first layer has a window of three tokens, the second none.
    back = np.subtract.outer(np.arange(len(ids)), np.arange(len(ids)))
    for layer, reach in enumerate((3, len(ids))):
        visible = (back >= 0) & (back < reach)
        assert ((seen.weights_LNTS[layer] > 0) == visible).all()


@pytest.mark.parametrize("prompt", [5, 1, None])
def test_a_prefix_is_seen_as_a_prompt_is(prompt):
    model = build(PREFIX)
    ids = encode(PREFIX, LETTERS, "bad head")[0]
    seen = look(model, LETTERS, ids, prompt=prompt, top_k=5)
    T = len(ids)
    size = prompt or T
    query, key = np.mgrid[:T, :T]
    assert ((seen.weights_LNTS > 0) == ((key <= query) | (key < size))).all()
    log_p = scores_of(model, ids, prefix_BT=(np.arange(T) < size)[None])
    told = np.arange(T + 1) >= size  # what the prompt sees is not told
    np.testing.assert_array_equal(seen.scores.candidates_MK[:, 0] >= 0, told)
    np.testing.assert_array_equal(np.isfinite(seen.scores.loss_T), told[:T])
    for t in range(size - 1, T):
        check_place(seen.scores, t + 1, log_p[t], ids[t + 1] if t + 1 < T else None)
    np.testing.assert_array_equal(seen.scores.lens_LT[-1], log_p.argmax(-1))
    if prompt is None:  # and it is what generation begins with
        first = Generator(model, LETTERS).generate([ids], max_tokens=1, sampling=Sampling(0.0))
        assert first[0].tokens == (seen.scores.candidates_MK[T, 0],)


def test_a_masked_model_tells_each_token_with_it_alone_hidden():
    model = build(MASKED)
    ids = encode(MASKED, LETTERS, "bad[MASK]h<mask>ad")[0]
    mask = LETTERS.mask_id
    assert [i == mask for i in ids] == [False] * 3 + [True, False, True, False, False]
    with jax.set_mesh(on_devices((1, 1, 1))):
        seen = look(jax.device_put(model, jax.P()), LETTERS, ids, top_k=5)
    for t, answer in enumerate(ids):
        hidden = ids.copy()
        hidden[t] = mask
        check_place(seen.scores, t, scores_of(model, hidden)[t], None if answer == mask else answer)
    np.testing.assert_array_equal(np.isnan(seen.scores.loss_T), ids == mask)
    as_it_stands = scores_of(model, ids)
    np.testing.assert_array_equal(seen.scores.lens_LT[-1], as_it_stands.argmax(-1))


def test_specials_have_no_candidates():
    tokenizer = BytesTokenizer(mask=True)
    config = dataclasses.replace(MASKED, vocab_size=259)
    ids = encode(config, tokenizer, "a")[0]
    seen = look(build(config), tokenizer, ids)
    assert ids.tolist() == [256, ord("a"), 257]
    assert (seen.scores.candidates_MK[:, 0] >= 0).tolist() == [False, True, False]
    assert np.isnan(seen.scores.loss_T).tolist() == [True, False, True]


def test_without_a_head_there_is_attention_alone():
    model = build(dataclasses.replace(MASKED, head="none"))
    seen = look(model, LETTERS, encode(model.config, LETTERS, "bad")[0])
    assert seen.scores is None
    np.testing.assert_allclose(seen.weights_LNTS.sum(-1), 1, atol=1e-5)


def test_damaged_weights_are_told():
    model = build(CAUSAL)
    parameters = params_lib.split(model)
    damaged = parameters | {"norm.scale": np.full(CAUSAL.width, np.nan, np.float32)}
    with pytest.raises(UserError, match="not finite"):
        look(params_lib.bind(model, damaged), LETTERS, encode(CAUSAL, LETTERS, "bad")[0])
