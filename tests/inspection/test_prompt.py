"""A text becomes the tokens that were asked for."""

import dataclasses
import re

import numpy as np
import pytest
from tiny_models import BERT, GEMMA, T, V

from lm_jax.config import ModelConfig
from lm_jax.data.chat import chat_template_for
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.inspection.prompt import check, encode

LETTERS = CharacterTokenizer("abcdefgh ", mask=True)
BYTES = BytesTokenizer(mask=True)
CAUSAL = dataclasses.replace(GEMMA, vocab_size=259)
MASKED = dataclasses.replace(BERT, vocab_size=259)
A, B = 97, 98


@pytest.mark.parametrize(
    "config, text, how, ids, size",
    [
        (CAUSAL, "a", {}, [256, A], 2),
        (CAUSAL, "a", {"continuation": "b</s>"}, [256, A, B, *b"</s>"], 2),
        (CAUSAL, "a</s>", {}, [256, A, *b"</s>"], 6),
        (CAUSAL, "a</s>", {"special_tokens": True}, [A, 257], 2),
        (CAUSAL, "a", {"special_tokens": True, "continuation": "b</s>"}, [A, B, 257], 1),
        (MASKED, "a[MASK]", {}, [256, A, 258, 257], 4),
        (MASKED, "<s>a<mask>", {"special_tokens": True}, [256, A, 258], 3),
    ],
)
def test_specials_stand_where_they_should(config, text, how, ids, size):
    got, prompt = encode(config, BYTES, text, **how)
    assert (got.tolist(), prompt, got.dtype) == (ids, size, np.int32)


def test_a_chat_is_what_is_generated_from():
    said = [{"role": "user", "content": "a"}]
    template = chat_template_for(BYTES, "chat")
    wanted = template.encode(BYTES, said, add_generation_prompt=True)
    got, size = encode(CAUSAL, BYTES, "a", chat="chat", continuation="b")
    assert got.tolist() == [*wanted, B] and size == len(wanted)


@pytest.mark.parametrize(
    "config, how, message",
    [
        (CAUSAL, {"chat": "next_token"}, "--chat: this model has no chat template"),
        (MASKED, {"chat": "masked"}, "--chat: this model fills in"),
        (MASKED, {"continuation": "b"}, "--continuation: this model fills in"),
    ],
)
def test_what_a_model_cannot_do_is_refused(config, how, message):
    with pytest.raises(UserError, match=message):
        encode(config, BYTES, "a", **how)


FEW = dataclasses.replace(CAUSAL, vocab_size=7)
LONG = ModelConfig(vocab_size=V, layers=96, width=8, heads=96, max_length=1024)


@pytest.mark.parametrize(
    "config, prompt, limit, message",
    [
        (CAUSAL, "a" * (T + 1), 128, f"has {T + 1} tokens.*takes at most {T}"),
        (CAUSAL, "aaaa", 3, "has 4 tokens.*--max_tokens=3"),
        (LONG, "a" * 1000, 1000, "4608 million"),
        (dataclasses.replace(LONG, prefix_attention=True), "a" * 1000, 1000, "9216 million"),
        (CAUSAL, "", 9, "no token"),
        (FEW, "abh", 9, "8 is no token of this model: ids are from 0 to 6"),
        (CAUSAL, "xyz", 9, re.escape("'x' (U+0078)")),
    ],
)
def test_a_prompt_that_cannot_be_shown_is_refused(config, prompt, limit, message):
    with pytest.raises(UserError, match=message):
        check(config, LETTERS, encode(config, LETTERS, prompt)[0], limit)
