"""What is shown of a model is what it computes."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from tiny_models import BERT, GEMMA, T, V, build, on_devices

from lm_jax.config import ModelConfig
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.inspection.look import encode, look
from lm_jax.model import parameters as params_lib

LETTERS = CharacterTokenizer("abcdefgh ", mask=True)
CAUSAL = dataclasses.replace(GEMMA, layers=2)  # windows, and scores that are capped
MASKED = dataclasses.replace(BERT, layers=1)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def scores_of(model, ids):
    return log_softmax(model.logits(model(np.asarray([ids], np.int32))[0])[0])


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
    ids = encode(CAUSAL, LETTERS, "bad head face", 16)
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


def test_a_masked_model_tells_each_token_with_it_alone_hidden():
    model = build(MASKED)
    ids = encode(MASKED, LETTERS, "bad[MASK]h<mask>ad", 16)
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
    ids = encode(config, tokenizer, "a", 16)
    seen = look(build(config), tokenizer, ids)
    assert ids.tolist() == [256, ord("a"), 257]
    assert (seen.scores.candidates_MK[:, 0] >= 0).tolist() == [False, True, False]
    assert np.isnan(seen.scores.loss_T).tolist() == [True, False, True]


def test_without_a_head_there_is_attention_alone():
    model = build(dataclasses.replace(MASKED, head="none"))
    seen = look(model, LETTERS, encode(model.config, LETTERS, "bad", 16))
    assert seen.scores is None
    np.testing.assert_allclose(seen.weights_LNTS.sum(-1), 1, atol=1e-5)


def test_damaged_weights_are_told():
    model = build(CAUSAL)
    parameters = params_lib.split(model)
    damaged = parameters | {"norm.scale": np.full(CAUSAL.width, np.nan, np.float32)}
    with pytest.raises(UserError, match="not finite"):
        look(params_lib.bind(model, damaged), LETTERS, encode(CAUSAL, LETTERS, "bad", 16))


LONG = ModelConfig(vocab_size=V, layers=96, width=8, heads=96, max_length=1024)


@pytest.mark.parametrize(
    "config, prompt, limit, message",
    [
        (CAUSAL, "a" * (T + 1), 128, f"has {T + 1} tokens.*takes at most {T}"),
        (CAUSAL, "aaaa", 3, "has 4 tokens.*--max_tokens=3"),
        (LONG, "a" * 1000, 1000, "4608 million"),
        (CAUSAL, "", 9, "no token"),
        (CAUSAL, "xyz", 9, re.escape("'x' (U+0078)")),
    ],
)
def test_a_prompt_that_cannot_be_shown_is_refused(config, prompt, limit, message):
    with pytest.raises(UserError, match=message):
        encode(config, LETTERS, prompt, limit)
