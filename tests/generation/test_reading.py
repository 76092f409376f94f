"""A model whose blocks run one by one gives what the model gives that they are of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GEMMA, GPT2, LLAMA, LORA, MOE, V, build, placed

from lm_jax.generation.reading import advance, read
from lm_jax.model.layered import Layered, for_generation


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (GPT2, None),
        (dataclasses.replace(LLAMA, dtype="bfloat16"), None),
        (dataclasses.replace(LLAMA, prefix_attention=True), None),
        (GEMMA, (1, 1, 1)),
        (MOE, None),
        (LORA, None),
    ],
    ids=["gpt2", "bfloat16", "prefix", "windows, on a mesh", "experts", "adapters"],
)
def test_blocks_apart_are_the_model(config, axes):
    lengths = np.array([3, 7, 5], np.int32)
    ids = np.random.default_rng(1).integers(0, V, (3, 8), dtype=np.int32)
    with placed(build(config), axes) as model:
        found = []
        for form in (model, Layered(model)):
            logits, cache = read(form, ids, lengths, 12)
            all_logits = [logits]
            for n in range(3):
                logits, cache = advance(form, ids[:, n], lengths + n, cache)
                all_logits.append(logits)
            found.append(np.stack(all_logits))
        close = {"atol": 1e-5} if config.dtype == "float32" else {"atol": 0.05}
        np.testing.assert_allclose(found[1], found[0], **close)
        assert np.ptp(found[0]) > 1


def test_a_model_is_apart_on_one_cpu_alone():
    model = build(GPT2)
    assert isinstance(for_generation(model), Layered)
    with placed(model, (2, 1, 1)) as shared:
        assert for_generation(shared) is shared


def test_what_shares_its_activations_is_one_product():
    apart, programs = Layered(build(LLAMA)), []
    run = apart._run

    def looked_at(*args):
        programs.append(run.lower(*args).compile().as_text())
        return run(*args)

    apart._run = looked_at
    _, cache = read(apart, np.ones((1, 8), np.int32), np.array([8], np.int32), 12)
    advance(apart, np.ones(1, np.int32), np.array([8], np.int32), cache)
    # Those of query, key and value; scores; of them and the values; out; up and gate; down.
    assert programs[-1].count(" dot(") == 6


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_given_up_for_its_copy_is_gone_and_no_other(tied):
    config = dataclasses.replace(GPT2, tied_head=tied)
    lengths, ids = np.array([3, 7], np.int32), np.ones((2, 8), np.int32)
    expected, _ = read(build(config), ids, lengths, 12)
    model = jax.tree.map(jnp.copy, build(config))  # others have that one too
    apart = for_generation(model, donate=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(model.blocks))
    np.testing.assert_allclose(read(apart, ids, lengths, 12)[0], expected, atol=1e-5)
