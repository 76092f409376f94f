"""Folders that are not what they should be: one message, with file, tensor, expected and found."""

import copy
import json
import pathlib
import random

import numpy as np
import published
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import on_devices

from lm_jax.errors import UserError
from lm_jax.interop import pretrained


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return published.save("llama 3", tmp_path)


def complaint(folder: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        config = pretrained.read_model_config(str(folder))
        pretrained.load_parameters(str(folder), config, on_devices((1, 1, 1)))
    return str(error.value)


def with_tensors(folder: pathlib.Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def with_config(folder: pathlib.Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NAME = "model.layers.1.mlp.up_proj.weight"


def test_each_tensor_that_is_missing_unknown_or_of_another_shape_is_named(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors[NAME] = tensors[NAME][:5]
        tensors["model.layers.0.mlp.router.weight"] = np.zeros((4, 32), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)

    with_tensors(folder, change)
    said = complaint(folder)
    assert str(folder) in said and "llama" in said
    assert "model.norm.weight: expected [32], found nothing" in said
    assert f"{NAME}: expected [48, 32], found [5, 32]" in said
    assert "model.layers.0.mlp.router.weight: expected nothing, found [4, 32]" in said
    assert "lm_head.weight: expected" in said and "found int32" in said
    assert len(said.splitlines()) == 5


def test_of_very_many_the_first_are_named_and_the_others_counted(folder):
    with_config(folder, hidden_size=64)
    said = complaint(folder)
    assert "more" in said and len(said.splitlines()) <= 12


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "mamba"}, ["'mamba'", "supported: gpt2, llama"]),
        ({"model_type": None, "architectures": ["T5Model"]}, ["T5Model", "supported"]),
        ({"architectures": ["LlamaForTokenClassification"]}, ["LlamaForTokenClassification"]),
        ({"hidden_act": "quick_gelu"}, ["'quick_gelu'", "silu"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["'yarn'", "llama3"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "llama3"]),
        ({"hidden_size": "wide"}, ["config.json"]),
        ({"hidden_size": -32}, ["config.json"]),
        ({"num_attention_heads": 0}, ["config.json"]),
        ({"num_attention_heads": 5, "head_dim": None}, ["config.json"]),
        ({"num_hidden_layers": 4}, ["model.layers.3."]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        ({"rms_norm_eps": float("nan")}, ["config.json"]),
        ({"tie_word_embeddings": "yes"}, ["config.json"]),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported_says_what_and_what_would_be(folder, values, words):
    with_config(folder, **values)
    said = complaint(folder)
    assert "config.json" in said or "model.layers.3." in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    "case, key, value",
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("bert", "is_decoder", True),
        ("bert", "position_embedding_type", "relative_key"),
        ("qwen3 moe", "decoder_sparse_step", 2),
        ("qwen3 moe", "mlp_only_layers", [0]),
        ("gemma 3", "use_bidirectional_attention", True),
        ("gemma 3", "attn_logit_softcapping", 2.0),
        ("roberta", "hidden_act", "relu"),
        ("roberta", "pad_token_id", 0),
    ],
)
def test_a_setting_that_would_change_what_is_computed_is_refused(case, key, value, tmp_path):
    folder = published.save(case, tmp_path)
    with_config(folder, **{key: value})
    assert f"{key} = {value!r} is not supported" in complaint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"gpt2"', b"\xff\xfe", b"{}"])
def test_a_config_that_is_no_config(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in complaint(folder)


def test_a_missing_key_is_named(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["intermediate_size"]
    path.write_text(json.dumps(config))
    assert "'intermediate_size' is missing" in complaint(folder)


def test_pickled_weights_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = complaint(folder)
    assert "pytorch_model.bin" in said and "code" in said


def test_a_truncated_file_names_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    said = complaint(folder)
    assert "model.safetensors" in said and len(said.splitlines()) == 1


def test_a_missing_shard_is_named(tmp_path):
    folder = published.save("llama 3", tmp_path, max_shard_size="20KB")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in complaint(folder)


@pytest.mark.parametrize("number", [0, 10**6, "4", None])
def test_a_number_of_experts_that_no_model_has(number, tmp_path):
    folder = published.save("mixtral", tmp_path)
    with_config(folder, num_local_experts=number)
    assert f"num_local_experts = {number!r}" in complaint(folder)


def test_each_tensor_of_an_expert_is_named(tmp_path):
    folder, name = published.save("mixtral", tmp_path), "model.layers.2.block_sparse_moe.experts.3"
    with_tensors(folder, lambda tensors: tensors.pop(f"{name}.w2.weight"))
    assert f"{name}.w2.weight: expected [32, 48], found nothing" in complaint(folder)
    with_config(folder, num_local_experts=3)
    assert f"{name}.w1.weight: expected nothing, found [48, 32]" in complaint(folder)


STRANGE = [None, True, -1, 0, 1, 7, 1e400, float("nan"), 2**31, 10**30, "", "x", [], {}, [1], ["x"],
           {"rope_type": 3}, {"rope_theta": "x"}, 0.5, [None], [["sliding_attention"]]]  # fmt: skip


@pytest.mark.parametrize("case", ["gpt2", "llama 3", "qwen2, upper layers windowed", "gemma 3",
                                  "mixtral", "qwen3 moe", "bert", "roberta",
                                  "distilbert"])  # fmt: skip
def test_whatever_stands_in_config_json_there_is_a_message_or_a_model(case, tmp_path):
    folder = published.save(case, tmp_path)
    path, rng = folder / "config.json", random.Random(0)
    good, refused = json.loads(path.read_text()), 0
    for _ in range(75):
        bad = copy.deepcopy(good)
        for key in rng.sample(sorted(good), rng.choice((1, 1, 2))):
            bad[key] = rng.choice(STRANGE)
            if rng.random() < 0.2:
                del bad[key]
        path.write_text(json.dumps(bad))
        try:
            config = pretrained.read_model_config(str(folder))
            pretrained.check(str(folder), config)
        except UserError as e:
            refused += 1
            assert str(folder) in str(e)
    assert 15 < refused < 75
