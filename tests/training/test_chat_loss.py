"""What an assistant says costs in training what it is improbable by when the model is asked."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import LLAMA, build, quick_jit

from lm_jax.config import DataConfig
from lm_jax.data.encoding import by_turn, prompt_within
from lm_jax.data.loader import train_stream
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.generation.reading import advance, read
from lm_jax.training.loss import batch_loss

BYTES = BytesTokenizer()
SAID = ("hello", "Good day.", "who is it?", "It is me.", "ah", "Yes")
MODEL = dataclasses.replace(LLAMA, vocab_size=258, max_length=128)


begin = quick_jit(read, static_argnames="slots")
go_on = quick_jit(advance)


def log_p(model, prompts, answers) -> np.ndarray:
    """Of each answer after its prompt, as a model that is asked has it."""
    B, longest = len(prompts), max(map(len, prompts))
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.array([np.pad(p, (0, longest - len(p))) for p in prompts], np.int32)
    logits, cache = begin(model, tokens, lengths, slots=128)
    total = np.zeros(B)
    for n in range(max(map(len, answers))):
        told = np.array([a[min(n, len(a) - 1)] for a in answers], np.int32)
        step = np.asarray(jax.nn.log_softmax(logits))[np.arange(B), told]
        total += np.where([n < len(a) for a in answers], step, 0.0)
        logits, cache = go_on(model, told, lengths + n, cache)
    return total


@pytest.mark.parametrize(
    ("prefix", "turns"), [(False, "together"), (False, "apart"), (True, "apart")]
)
def test_a_turn_is_learned_as_it_is_asked_for(prefix, turns, tmp_path):
    """Of each turn of a conversation: the same tokens see one another."""
    path, model = tmp_path / "a.jsonl", build(dataclasses.replace(MODEL, prefix_attention=prefix))
    roles = ("user", "assistant") * 3
    talk = [{"role": r, "content": c} for r, c in zip(roles, SAID, strict=True)]
    path.write_text(json.dumps({"messages": talk}) + "\n")
    config = DataConfig(
        (str(path),), objective="chat", prompt="{messages}", turns=turns, length=128, batch_size=2,
        lanes=1, epochs=1, validation_sources=(str(path),),
    )  # fmt: skip
    with train_stream(config, BYTES, seed=0) as stream:
        (batch,) = stream
    (example,) = documents(config, "train")
    asked = by_turn(example)
    prompts = [prompt_within(one, BYTES, 128)[0] for one in asked]
    answers = [[*f" {said}".encode(), BYTES.eos_id] for said in SAID[1::2]]
    assert batch["weights"].sum() == sum(map(len, answers))
    got = quick_jit(batch_loss)(model, batch).nll
    np.testing.assert_allclose(got, -log_p(model, prompts, answers).sum(), rtol=1e-5)
