"""Every family against Transformers: imported, it computes the same; exported, so do they."""

import dataclasses
import json

import jax
import numpy as np
import published
import pytest
import transformers
from tiny_models import GPT2, LLAMA, MOE, build, on_devices, quick_jit

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop import pretrained
from lm_jax.interop.config_map import choose_family, write_config
from lm_jax.interop.export import save_pretrained
from lm_jax.interop.registry import FAMILIES
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import skeleton_of
from lm_jax.sharding.mesh import activation_spec

replace = dataclasses.replace
LENGTHS = (20, 13, 5, 17)  # of the rows of a padded batch
# data x fsdp x tensor x sequence x expert, of the cases that are not on one device.
AXES = dict.fromkeys(("gpt2", "llama 3", "gemma 3", "bert", "qwen3"), (2, 2, 2))
AXES |= {"mixtral": (1, 1, 2, 1, 2), "qwen3 moe": (1, 2, 1, 1, 2)}
IDS = np.random.default_rng(0).integers(3, 96, (4, 20), dtype=np.int32)
MASK = (np.arange(20) < np.array(LENGTHS)[:, None]).astype(np.int32)


def load(folder, axes=(1, 1, 1)):
    """(config in float32, parameters on a mesh)."""
    config = replace(pretrained.read_model_config(str(folder)), dtype="float32")
    return config, pretrained.load_parameters(str(folder), config, on_devices(axes))


@quick_jit
def _outputs(model, ids, segments):
    x, _ = model(ids, segments_BT=segments)
    return x if model.config.head == "none" else model.logits(x)


def outputs(config: ModelConfig, parameters, mask: np.ndarray | None = None) -> np.ndarray:
    mesh = next(iter(parameters.values())).sharding.mesh
    model = params_lib.bind(skeleton_of(config), parameters)
    with jax.set_mesh(mesh):
        rows = activation_spec("batch")
        segments = None if mask is None else jax.device_put(mask, rows)
        return np.asarray(_outputs(model, jax.device_put(IDS, rows), segments))


def read_again(case: str, folder):
    """The exported model in Transformers, by the class its config.json names."""
    more = {"add_pooling_layer": False} if case == "bert, no pooler" else {}
    with published.silence():
        found = json.loads((folder / "config.json").read_text())["architectures"][0]
        assert found == type(published.model(case)).__name__
        model, report = getattr(transformers, found).from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", **more
        )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("case", published.CASES)
def test_imported_and_exported_it_computes_what_transformers_does(case, tmp_path):
    theirs = published.model(case)
    axes = AXES.get(case, (1, 1, 1))
    config, parameters = load(published.save(case, tmp_path / "in"), axes)
    want = {"unpadded": published.outputs(theirs, IDS)}
    want["padded"] = published.outputs(theirs, IDS, MASK)
    real = {"unpadded": np.ones_like(MASK, bool), "padded": MASK > 0}
    assert 0.3 < want["padded"].std() < 3 and np.abs(want["unpadded"] - want["padded"]).max() > 0.1
    whole = None if case in AXES else np.ones_like(MASK)  # of one segment: not compiled again
    for kind, mask in (("unpadded", whole), ("padded", MASK)):
        got = outputs(config, parameters, mask)
        np.testing.assert_allclose(got[real[kind]], want[kind][real[kind]], atol=1e-4, rtol=0)

    with jax.set_mesh(on_devices(axes)):
        save_pretrained(str(tmp_path / "out"), config, parameters, max_shard_bytes=20_000)
    again = published.outputs(read_again(case, tmp_path / "out"), IDS, MASK)
    # Gemma's norms are kept as 1 + weight, which rounds.
    atol = 1e-5 if "gemma" in case else 0
    np.testing.assert_allclose(again[MASK > 0], want["padded"][MASK > 0], atol=atol, rtol=0)


@pytest.mark.parametrize("case", ["smollm2", "gpt2", "gemma 2", "gemma 3", "bert", "mixtral"])
def test_rounded_weights_are_what_transformers_reads(case, tmp_path):
    """bfloat16 in the file, float32 here: nothing is lost on the way in, and nothing more out."""
    theirs = published.CASES[case]()
    theirs.load_state_dict(published.model(case).state_dict())
    theirs.bfloat16().save_pretrained(tmp_path / "in")
    config, parameters = load(tmp_path / "in")
    with jax.set_mesh(on_devices((1, 1, 1))):
        save_pretrained(str(tmp_path / "out"), config, parameters, dtype="bfloat16")
    back = type(theirs).from_pretrained(tmp_path / "out").state_dict()
    for name, x in theirs.state_dict().items():
        assert back[name].dtype == x.dtype and (back[name] == x).all(), name


def test_what_bert_learned_beside_masked_tokens_is_no_part_of_its_export(tmp_path):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**published.ENCODER))
    theirs.save_pretrained(tmp_path / "in")
    config, parameters = load(tmp_path / "in")
    assert config.pooler and config.head == "masked_lm"
    save_pretrained(str(tmp_path / "out"), config, parameters)
    with published.silence():
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")


def test_a_head_beside_the_embedding_it_is_tied_to_must_be_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = published.save("smollm2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    config, _ = load(folder)
    assert config.tied_head
    tensors["lm_head.weight"][95, 31] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight and model\.embed_tokens\.weight"):
        load(folder)


def test_roberta_counts_positions_by_an_id_that_the_tokenizer_must_have(tmp_path):
    config, parameters = load(published.save("roberta", tmp_path / "in"))
    with pytest.raises(UserError, match=r"pad_token_id = 1.* has 0"):
        save_pretrained(str(tmp_path / "out"), config, parameters, token_ids={"pad_token_id": 0})


# What older versions wrote.


@pytest.mark.parametrize(
    "case, old", [("gpt2", {"num_attention_heads": "n_head", "hidden_size": "n_embd"}),
                  ("distilbert", {"num_attention_heads": "n_heads", "hidden_size": "dim"})]
)  # fmt: skip
def test_other_names_of_a_key_are_read_as_transformers_reads_them(case, old, tmp_path):
    folder = published.save(case, tmp_path)
    path, want = folder / "config.json", pretrained.read_model_config(str(folder))
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(UserError, match="num_attention_heads = 8"):
        pretrained.read_model_config(str(folder))
    for other, key in old.items():
        config[other] = config.pop(key)
    path.write_text(json.dumps(config))
    assert pretrained.read_model_config(str(folder)) == want


@pytest.mark.parametrize("case", ["smollm2", "gemma 3"])
def test_rope_scaling_goes_before_rope_parameters(case, tmp_path):
    folder = published.save(case, tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}))
    scaling = pretrained.read_model_config(str(folder)).rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


@pytest.mark.parametrize("case", ["gpt2", "bert, base model", "llama, base model", "distilbert"])
def test_weights_saved_without_the_prefix_are_found(case, tmp_path):
    folder = published.save(case, tmp_path)
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    _, parameters = load(folder)
    base = getattr(published.model(case), family.prefix.rstrip("."), published.model(case))
    base.save_pretrained(folder / "base")
    _, same = load(folder / "base")
    for name in same:
        np.testing.assert_array_equal(parameters[name], same[name], err_msg=name)


def test_norms_called_gamma_and_beta_are_found(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = published.save("bert", tmp_path)
    _, want = load(folder)
    old = {}
    for name, x in load_file(folder / "model.safetensors").items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[name] = x
    save_file(old, folder / "model.safetensors")
    _, got = load(folder)
    assert all((got[name] == want[name]).all() for name in want)


OLD_KEYS = {
    "llama 3": {
        "rope_theta": 100.0,
        "rope_scaling": {k: v for k, v in published.LLAMA3_ROPE.items() if k != "rope_theta"},
    },
    "gemma 2": {"rope_theta": 10000.0},
    "gemma 3": {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
    },
    "qwen3": {"rope_theta": 10000.0},
    "mixtral": {"rope_theta": 1000000.0},
    "qwen3 moe": {"rope_theta": 10000.0},
}


@pytest.mark.parametrize("case", OLD_KEYS)
def test_a_config_of_version_4_reads_as_one_of_version_5(case, tmp_path):
    folder = published.save(case, tmp_path)
    want, path = pretrained.read_model_config(str(folder)), folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern"):
        config.pop(key, None)
    path.write_text(json.dumps(config | OLD_KEYS[case]))
    assert pretrained.read_model_config(str(folder)) == want


@pytest.mark.parametrize("case", published.CASES)
def test_what_config_json_leaves_out_is_what_transformers_takes(case, tmp_path):
    """Its own defaults are left out where it is asked to write differences only."""
    folder = published.save(case, tmp_path)
    full, path = pretrained.read_model_config(str(folder)), folder / "config.json"
    theirs, bare = json.loads(path.read_text()), {}
    default = type(published.model(case).config)().to_dict()
    for key, value in theirs.items():
        if key in ("model_type", "architectures") or default.get(key, key) != value:
            bare[key] = value
    path.write_text(json.dumps(bare))
    assert len(bare) < len(theirs)
    assert pretrained.read_model_config(str(folder)) == full


def test_experts_are_counted_by_either_key(tmp_path):
    """Transformers writes one, the models that were published have the other."""
    for case in ("mixtral", "qwen3 moe"):
        path = published.save(case, tmp_path / case) / "config.json"
        want, config = pretrained.read_model_config(str(path.parent)), json.loads(path.read_text())
        config["num_experts"] = config.pop("num_local_experts")
        path.write_text(json.dumps(config))
        assert pretrained.read_model_config(str(path.parent)) == want


# Which family a model is exported as.


def test_a_model_of_our_own_is_exported_as_the_first_family_of_its_shape(tmp_path):
    parameters = params_lib.split(build(LLAMA))
    assert choose_family(replace(LLAMA, qk_norm=False)).model_type == "llama"
    assert choose_family(GPT2).model_type == "gpt2"
    save_pretrained(str(tmp_path), LLAMA, parameters)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    model, ids = build(LLAMA), IDS[:, :16] % 64
    got = quick_jit(lambda model: model.logits(model(ids)[0]))(model)
    np.testing.assert_allclose(got, published.outputs(theirs, ids), atol=1e-4)


def test_experts_of_our_own_are_exported_as_the_first_family_of_their_shape():
    assert choose_family(MOE).model_type == "qwen3_moe"
    assert choose_family(replace(MOE, qk_norm=False)).model_type == "mixtral"


def test_a_shape_that_no_family_has_is_refused_by_field():
    with pytest.raises(UserError, match="nearest") as error:
        choose_family(replace(LLAMA, mlp_bias=True, qkv_bias=True, position="learned"))
    assert "model." in str(error.value)
    with pytest.raises(UserError, match=r"model\.family"):
        choose_family(replace(GPT2, family="gpt3"))
    with pytest.raises(UserError, match=r"model\.qk_norm = True, there False"):
        write_config(FAMILIES["llama"], LLAMA)
