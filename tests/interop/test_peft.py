"""Adapters written in peft's format: peft loads them and computes what we do."""

import dataclasses
import json

import jax
import numpy as np
import peft
import published
import pytest
from test_families import IDS, load, outputs

from lm_jax.config import LoraConfig
from lm_jax.errors import UserError
from lm_jax.interop.peft import save_adapters
from lm_jax.model import lora
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import skeleton_of

ALL = ("query", "key", "value", "out", "up", "gate", "down")
TARGETS = {
    "gpt2": [ALL, ("query", "value"), ("key",)],
    "llama 3": [ALL, ("query", "value")],
    "gemma 2": [("out", "gate")],
    "bert": [("query", "down")],
    "bert, base model": [("out",)],
}


PAIRS = [(case, targets) for case, several in TARGETS.items() for targets in several]


@pytest.mark.parametrize("case, targets", PAIRS)
def test_peft_computes_what_we_do(case, targets, tmp_path):
    config, base = load(published.save(case, tmp_path / "base"))
    config = dataclasses.replace(config, lora=LoraConfig(rank=2, alpha=3.0, targets=targets))
    rng, parameters = np.random.default_rng(0), dict(base)
    for name, x in params_lib.split(skeleton_of(config)).items():
        if lora.is_adapter(name):
            parameters[name] = jax.device_put(
                rng.standard_normal(x.shape).astype(np.float32) / 4,
                jax.NamedSharding(base["embedding"].sharding.mesh, jax.P(*[None] * x.ndim)),
            )
    adapters = {name: x for name, x in parameters.items() if lora.is_adapter(name)}
    save_adapters(str(tmp_path / "adapter"), config, adapters, str(tmp_path / "base"))
    theirs = published.CASES[case]()
    theirs.load_state_dict(published.model(case).state_dict())
    plain = published.outputs(theirs.eval(), IDS)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    got, want = outputs(config, parameters), published.outputs(theirs, IDS)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    config_json = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config_json["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_model_without_adapters_has_none_to_write(tmp_path):
    config, _ = load(published.save("gpt2", tmp_path / "base"))
    with pytest.raises(UserError, match="no adapters"):
        save_adapters(str(tmp_path / "adapter"), config, {}, "base")
