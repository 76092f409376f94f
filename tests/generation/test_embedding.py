"""Texts as vectors: against Transformers' states pooled by hand, and free of their neighbours."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tokenizers
from tiny_models import BERT, LLAMA, build, on_devices, quick_jit

from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.data.tokenizer_published import HuggingFaceTokenizer
from lm_jax.errors import UserError
from lm_jax.generation.embedding import Pooling, embed
from lm_jax.interop.sentence import read_pooling
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import skeleton_of

SHAPE = {"vocab_size": 259, "max_length": 64}
TOKENIZER = BytesTokenizer(mask=True)
MODEL = dataclasses.replace(BERT, **SHAPE)
TEXTS = ["a", "some more words", "ünï", "", "x" * 70, "a b c d e f g h i j k l m n o p"]


hidden_states = quick_jit(lambda model, ids: model(ids)[0])


@functools.cache
def states(text: str) -> np.ndarray:
    """The hidden states of one text alone: [bos] + bytes + [eos], at most 64 tokens, as of a
    model that is to fill in."""
    ids = np.array([[256, *text.encode()[:62], 257]], np.int32)
    return np.asarray(hidden_states(build(MODEL), ids)[0])


POOLED = {
    "mean": lambda x: x.mean(axis=0),
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
}


@pytest.mark.parametrize("kind", POOLED)
def test_each_text_is_pooled_as_if_it_were_alone(kind):
    want = np.stack([POOLED[kind](states(text)) for text in TEXTS])
    pooling = Pooling(kind=kind, normalize=False)
    got, cut = embed(build(MODEL), TOKENIZER, TEXTS, pooling, batch_size=4)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert cut == 1 and got.dtype == np.float32
    unit, _ = embed(build(MODEL), TOKENIZER, TEXTS, dataclasses.replace(pooling, normalize=True))
    np.testing.assert_allclose(unit, want / np.linalg.norm(want, axis=1)[:, None], atol=1e-5)


def test_eight_devices_give_what_one_does():
    want, _ = embed(build(MODEL), TOKENIZER, TEXTS)
    mesh = on_devices((4, 2, 1))
    with jax.set_mesh(mesh):
        abstract = params_lib.split(skeleton_of(MODEL))
        spread = {
            name: jax.device_put(x, abstract[name].sharding.spec)
            for name, x in params_lib.split(build(MODEL)).items()
        }
        model = params_lib.bind(skeleton_of(MODEL), spread)
        got, _ = embed(model, TOKENIZER, TEXTS, batch_size=3)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_causal_model_can_be_pooled_too():
    model = build(dataclasses.replace(LLAMA, **SHAPE))
    got, _ = embed(model, BytesTokenizer(), ["ab"], Pooling("last", normalize=False))
    want = hidden_states(model, np.array([[256, 97, 98]], np.int32))[0, -1]
    np.testing.assert_allclose(got[0], want, atol=1e-5)


@pytest.mark.parametrize(
    "fields, texts, message",
    [
        ({"kind": "max"}, ["a"], "'max' is none of mean"),
        ({"max_tokens": 65}, ["a"], "max_tokens: must be from 3 to the model's 64"),
        ({}, ["a", "\ud800"], "text 2 of 2"),
    ],
)
def test_what_cannot_be_embedded_is_said(fields, texts, message):
    with pytest.raises(UserError, match=message):
        embed(build(MODEL), TOKENIZER, texts, Pooling(**fields))


def test_what_goes_around_a_text_is_what_its_tokenizer_says():
    """Of a published one the post-processor: here a token behind the text, and none before."""
    hf = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "a": 1, "b": 2}, "b"))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    hf.post_processor = tokenizers.processors.TemplateProcessing("$A <end>", None, [("<end>", 0)])
    tokenizer = HuggingFaceTokenizer(hf.to_str(), eos_id=2)
    model = build(dataclasses.replace(LLAMA, **SHAPE))
    got, _ = embed(model, tokenizer, ["ab"], Pooling("last", normalize=False))
    want = model(np.array([[*hf.encode("ab").ids]], np.int32))[0][0, -1]
    np.testing.assert_allclose(got[0], want, atol=1e-5)


# What a sentence-transformers folder says.

MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
]
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}


def folder(tmp_path, modules: object, **pooling: object) -> str:
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    return str(tmp_path)


@pytest.mark.parametrize(
    "modules, pooling, want",
    [
        ([*MODULES, NORMALIZE], {"pooling_mode_mean_tokens": True}, ("mean", True)),
        (MODULES, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
         ("first", False)),
        (MODULES, {"pooling_mode_lasttoken": True}, ("last", False)),
        (MODULES, {"pooling_mode": "cls"}, ("first", False)),
    ],
)  # fmt: skip
def test_a_folder_says_how_it_is_pooled(modules, pooling, want, tmp_path):
    got = Pooling(**read_pooling(folder(tmp_path, modules, **pooling)))
    assert (got.kind, got.normalize) == want and got.max_tokens == 32


def test_a_folder_that_says_nothing_leaves_the_defaults(tmp_path):
    assert read_pooling(str(tmp_path)) == {}


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "whole number, not 'long'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default_prompt_name"),
    ],
)
def test_a_setting_that_is_not_followed_is_refused(name, settings, message, tmp_path):
    path = folder(tmp_path, MODULES, pooling_mode="mean")
    (tmp_path / name).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        read_pooling(path)


@pytest.mark.parametrize(
    "modules, pooling, message",
    [
        ("Transformer", {}, "modules.json"),
        ([{"type": "x"}], {}, "modules.json"),
        ([{"type": "a.Dense", "path": "2_Dense"}], {}, "Dense is not supported"),
        ([{"type": "a.Pooling", "path": "../1_Pooling"}], {}, "leads out of the folder"),
        (MODULES, {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "1_Pooling"),
    ],
)
def test_a_folder_that_asks_for_more_is_refused(modules, pooling, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_pooling(folder(tmp_path, modules, **pooling))
