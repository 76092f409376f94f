"""What a model lets be seen of itself is what Transformers shows of the same model."""

import dataclasses

import jax
import numpy as np
import published
import pytest
import torch
from tiny_models import LLAMA, on_devices, quick_jit

from lm_jax.interop import pretrained
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import Transformer, skeleton_of

IDS = np.random.default_rng(0).integers(3, 96, (2, 14), dtype=np.int32)


@quick_jit
def _captured(model, ids):
    x, streams, weights = model.capture(ids)
    return x, model(ids)[0], streams, model.finish(streams[-1]), weights


@pytest.mark.parametrize("case", ["gpt2", "llama 3", "gemma 2", "mixtral", "bert"])
def test_weights_and_residual_streams_are_those_of_transformers(case, tmp_path):
    model = published.model(case)
    with torch.no_grad():
        want = model(torch.tensor(IDS), output_attentions=True, output_hidden_states=True)
    folder = str(published.save(case, tmp_path))
    config = dataclasses.replace(pretrained.read_model_config(folder), dtype="float32")
    mesh = on_devices((1, 1, 2))
    parameters = pretrained.load_parameters(folder, config, mesh)
    with jax.set_mesh(mesh):
        got = _captured(params_lib.bind(skeleton_of(config), parameters), IDS)
    x, plain, streams, finished, weights = map(np.asarray, got)
    np.testing.assert_allclose(x, plain, atol=1e-5)
    np.testing.assert_allclose(finished, plain, atol=1e-5)
    np.testing.assert_allclose(weights, torch.stack(want.attentions), atol=1e-5)
    *before, last = want.hidden_states  # the last one has been through the final norm
    np.testing.assert_allclose(streams[:-1], torch.stack(before), atol=1e-4)
    np.testing.assert_allclose(finished, last, atol=1e-4)


def test_a_blockwise_backend_is_passed_over():
    config = dataclasses.replace(LLAMA, attention="splash")  # which needs a TPU
    seen = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)).capture(IDS))
    assert [x.shape for x in seen] == [(2, 14, 32), (3, 2, 14, 32), (2, 2, 4, 14, 14)]
