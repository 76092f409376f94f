"""The config: what is refused, what is derived, what a resumed run may change, JSON and back."""

import ast
import dataclasses
import json
import pathlib
import typing

import pytest

import lm_jax
from lm_jax.config import Config
from lm_jax.config_json import from_json, to_json
from lm_jax.config_keys import differences, nearest_key, walk
from lm_jax.errors import UserError
from lm_jax.model.activations import ACTIVATIONS
from lm_jax.model.remat import REMAT_POLICIES
from lm_jax.sharding.mesh import AXES
from lm_jax.validation import validate

KEYS = [key for key, _, _ in walk(Config())]


def config(**changes) -> Config:
    """A usable config, but for `changes`: 'section__field' -> value."""
    out = Config()
    out.data.sources = ("python:",)
    for key, value in changes.items():
        *path, name = key.split("__")
        section = out
        for part in path:
            section = getattr(section, part)
        assert hasattr(section, name), key
        setattr(section, name, value)
    return out


MASKED = {"data__objective": "masked", "model__causal": False, "model__head": "masked_lm"}
ADAPTERS = {"model__lora__rank": 4, "init_from": "runs/base"}

PREFIX = {"model__prefix_attention": True}

EXPERTS = {"model__moe__experts": 4, "model__mlp_bias": False}

WRONG = [
    ("model.moe.experts", {"model__moe__experts": -1}),
    ("model.moe.experts_per_token", EXPERTS | {"model__moe__experts_per_token": 5}),
    ("model.moe.experts_per_token", EXPERTS | {"model__moe__experts_per_token": 0}),
    ("model.mlp_bias", EXPERTS | {"model__mlp_bias": True}),
    ("training.balance_loss", EXPERTS | {"training__balance_loss": -1.0}),
    ("training.balance_loss", {"training__balance_loss": 0.01}),  # of no router
    ("training.router_z_loss", EXPERTS | {"training__router_z_loss": -1.0}),
    ("training.router_z_loss", {"training__router_z_loss": 0.01}),
    ("model.layers", {"model__layers": 0}),
    ("model.heads", {"model__heads": 7}),
    ("model.kv_heads", {"model__kv_heads": 5}),
    ("model.head_width", {"model__head_width": 0}),
    ("model.head_width", {"model__head_width": 7, "model__position": "rope"}),
    ("model.vocab_size", {"model__vocab_size": 0}),
    ("model.dropout", {"model__dropout": 1.0}),
    ("model.norm", {"model__norm": "batchnorm"}),
    ("model.remat", {"model__remat": "most"}),
    ("model.windows", {"model__windows": (4, -1)}),
    ("model.windows", MASKED | {"model__windows": (4,)}),
    ("model.prefix_attention", MASKED | PREFIX),
    ("model.windows", PREFIX | {"model__windows": (4, 0)}),
    ("model.attention", PREFIX | {"model__attention": "splash"}),
    ("model.attention", PREFIX | {"model__attention": "ring"}),
    ("model.attention", PREFIX | {"model__attention": "cudnn"}),
    ("mesh.sequence", PREFIX | {"mesh__sequence": 2}),
    ("mesh.sequence", PREFIX | {"mesh__sequence": -1, "mesh__data": 1}),
    ("data.attend_across_documents", PREFIX | {"data__attend_across_documents": True}),
    ("model.head", {"model__head": "lm"}),
    ("model.head", {"model__head": "none"}),
    ("model.head model.tied_head", {"model__head": "none", "model__tied_head": False}),
    ("model.head", MASKED | {"model__head": "linear"}),
    ("model.head", {"model__head": "masked_lm"}),
    ("model.causal", MASKED | {"model__causal": True}),
    ("model.causal", {"model__causal": False}),
    ("model.token_types", {"model__token_types": -1}),
    ("model.attention_scale", {"model__attention_scale": 0.0}),
    ("model.attention_softcap", {"model__attention_softcap": -1.0}),
    ("model.logits_softcap", {"model__logits_softcap": -1.0}),
    ("model.window_rope_theta", {"model__window_rope_theta": 0.0}),
    ("model.dtype", {"model__dtype": "float16"}),
    ("model.attention", {"model__attention": "flash"}),
    ("model.norm_epsilon", {"model__norm_epsilon": 0.0}),
    ("model.rope_theta", {"model__rope_theta": float("nan")}),
    ("model.rope_scaling.kind", {"model__rope_scaling__kind": "yarn"}),
    ("model.rope_scaling.factor", {"model__rope_scaling__factor": 0.0}),
    (
        "model.rope_scaling.high_frequency_factor",
        {"model__rope_scaling__high_frequency_factor": 1.0},
    ),
    ("tokenizer.kind", {"tokenizer__kind": "words"}),
    ("tokenizer.path", {"tokenizer__kind": "file"}),
    ("tokenizer.vocab_size", {"tokenizer__vocab_size": 0}),
    ("data.sources", {"data__sources": ()}),
    ("data.weights", {"data__weights": (1.0, 2.0)}),
    ("data.weights", {"data__weights": (0.0,)}),
    ("data.weights", {"data__weights": (1.0,), "data__packing": "crop"}),
    ("data.epochs", {"data__weights": (1.0,), "data__epochs": 1}),
    ("data.epochs", {"data__epochs": 0}),
    ("data.epochs", {"data__epochs": 1, "data__packing": "crop"}),
    ("data.validation_fraction", {"data__validation_fraction": 1.0}),
    ("data.length", {"data__length": 2048}),
    ("data.length", MASKED | {"data__length": 2}),
    ("data.mask_rate", MASKED | {"data__mask_rate": 0.0}),
    ("data.mask_rate", MASKED | {"data__mask_rate": 1.0}),
    ("data.mask_whole_words", {"data__mask_whole_words": True}),
    ("data.objective", {"data__objective": "next_sentence"}),
    ("data.lanes", {"data__lanes": 3}),
    ("data.workers", {"data__workers": -1}),
    ("data.workers", {"data__workers": 3}),
    ("data.packing_bins", {"data__packing_bins": 0}),
    ("training.accumulation", {"training__accumulation": 3}),
    ("training.loss_chunk", {"training__loss_chunk": 0}),
    ("training.seed", {"training__seed": -1}),
    ("training.steps", {"training__steps": -1}),
    ("training.evaluate_batches", {"training__evaluate_batches": 0}),
    ("training.evaluate_every", {"training__evaluate_every": -1}),
    ("training.sample_every", {"training__sample_every": -1}),
    ("training.sample_tokens", {"training__sample_tokens": -1}),
    ("training.sample_prompt", MASKED | {"training__sample_tokens": 3}),
    ("training.z_loss", {"training__z_loss": -0.1}),
    ("training.hang_after", {"training__hang_after": -1.0}),
    ("training.hang_after", {"training__hang_after": float("nan")}),
    ("optimizer.name", {"optimizer__name": "sgd"}),
    ("optimizer.learning_rate", {"optimizer__learning_rate": 0.0}),
    ("optimizer.learning_rate", {"optimizer__learning_rate": float("inf")}),
    ("optimizer.muon_learning_rate", {"optimizer__muon_learning_rate": -1.0}),
    ("optimizer.warmup_steps", {"optimizer__warmup_steps": -1}),
    ("optimizer.decay_steps", {"optimizer__decay_steps": 0}),
    ("optimizer.final_fraction", {"optimizer__final_fraction": 1.5}),
    ("optimizer.b1", {"optimizer__b1": 1.0}),
    ("optimizer.b2", {"optimizer__b2": -0.1}),
    ("optimizer.muon_momentum", {"optimizer__muon_momentum": 1.0}),
    ("optimizer.weight_decay", {"optimizer__weight_decay": -0.1}),
    ("optimizer.clip_norm", {"optimizer__clip_norm": -1.0}),
    ("optimizer.layer_decay", {"optimizer__layer_decay": 0.0}),
    ("optimizer.layer_decay", {"optimizer__layer_decay": 1.1}),
    ("optimizer.freeze", {"optimizer__freeze": ("embedding", "")}),
    ("model.lora.rank", {"model__lora__rank": -1}),
    ("model.lora.rank", {"model__lora__rank": 4}),  # of no weights
    ("model.lora.alpha", ADAPTERS | {"model__lora__alpha": 0.0}),
    ("model.lora.targets", ADAPTERS | {"model__lora__targets": ()}),
    ("model.lora.targets", ADAPTERS | {"model__lora__targets": ("query", "query")}),
    ("model.lora.targets", ADAPTERS | {"model__lora__targets": ("query", "head")}),
    ("model.lora.targets", ADAPTERS | {"model__lora__targets": ("gate",)}),  # and not gated
    ("model.lora.targets", ADAPTERS | EXPERTS | {"model__lora__targets": ("up",)}),
    ("model.lora.targets", ADAPTERS | EXPERTS | {"model__lora__targets": ("all",)}),
    ("mesh", {"mesh__data": 0}),
    ("mesh", {"mesh__data": -1, "mesh__fsdp": -1}),
    ("checkpoint.keep", {"checkpoint__keep": 0}),
    ("checkpoint.every", {"checkpoint__every": -1}),
    ("checkpoint.keep_every", {"checkpoint__keep_every": 0}),
    ("logging.every", {"logging__every": 0}),
    ("logging.profile_steps", {"logging__profile_steps": (5,)}),
    ("logging.profile_steps", {"logging__profile_steps": (5, 4)}),
]


@pytest.mark.parametrize("key, changes", WRONG, ids=[str(c) for _, c in WRONG])
def test_what_cannot_work_is_refused_by_name(key, changes):
    validate(config())
    validate(config(**ADAPTERS))
    validate(config(**PREFIX, model__attention="xla"))
    validate(
        config(**EXPERTS, **ADAPTERS, training__balance_loss=0.01, training__router_z_loss=1.0)
    )
    with pytest.raises(UserError) as error:
        validate(config(**changes))
    lines = str(error.value).splitlines()[1:]
    assert {line.strip().partition(":")[0] for line in lines} == set(key.split())


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as error:
        validate(config(model__kv_heads=5, data__lanes=3, optimizer__clip_norm=-1.0))
    for key in ("model.kv_heads", "data.lanes", "optimizer.clip_norm"):
        assert key in str(error.value)


def test_what_is_left_out_is_derived():
    c = validate(config(data__batch_size=24, training__accumulation=2))
    assert (c.model.kv_heads, c.model.head_width, c.model.mlp_width) == (12, 64, 3072)
    assert (c.data.lanes, c.training.evaluate_batch_size) == (12, 12)
    assert validate(config(model__head_width=100)).model.head_width == 100
    assert to_json(validate(c)) == to_json(c)  # twice is as once


def test_choices_are_those_that_the_model_has():
    choices = {key: field.metadata.get("choices") for key, _, field in walk(Config())}
    assert set(choices["model.remat"]) == REMAT_POLICIES.keys()
    assert set(choices["model.activation"]) == ACTIVATIONS.keys()


def test_every_field_is_read_outside_of_the_config():
    """A field that nobody reads does nothing."""
    folder = pathlib.Path(lm_jax.__file__).parent
    read = set(AXES)  # by their names: make_mesh
    for path in folder.rglob("*.py"):
        if path.name not in ("config.py", "validation.py", "model_validation.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
    assert {key for key in KEYS if key.rpartition(".")[2] not in read} == set()


def altered(value, field) -> object:
    """Another value of the same kind."""
    if choices := field.metadata.get("choices"):
        return next(c for c in choices if c != value)
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (*value, typing.get_args(field.type)[0](1))
        case None:
            return 3


@pytest.mark.parametrize("key", KEYS)
def test_json_and_back_and_what_a_resumed_run_may_change(key):
    old, new = config(), config()
    (value, field), *path = next((v, f) for k, v, f in walk(new) if k == key), *key.split(".")
    section = new
    for part in path[:-1]:
        section = getattr(section, part)
    setattr(section, path[-1], altered(value, field))

    assert from_json(to_json(new)) == new != old
    told = [] if field.metadata.get("resumable") else [f"{key}: {value!r} -> "]
    got = differences(old, new)
    assert len(got) == len(told) and all(map(str.startswith, got, told))


def test_what_the_model_has_learned_may_not_be_changed_on_resuming():
    """Said the other way round, by hand: these name how a run computes, reports, or how long."""
    free = {key for key, _, field in walk(Config()) if field.metadata.get("resumable")}
    sections = {key.partition(".")[0] for key in free}
    assert sections == {
        "model",
        "data",
        "task",
        "training",
        "mesh",
        "checkpoint",
        "faults",
        "logging",
    }
    assert {key for key in free if key.startswith("model.")} == {
        f"model.{name}" for name in ("dtype", "float8", "remat", "scan_layers", "attention")
    }
    fixed = {"training.seed", "training.accumulation", "training.z_loss", "init_from"}
    assert not free & fixed


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("optimizer.learing_rate", "optimizer.learning_rate"),
        ("model.learning_rate", "optimizer.learning_rate"),
        ("model.rope_scaling.factr", "model.rope_scaling.factor"),
        ("batch_size", "data.batch_size"),
        ("hyperparameters.b1", "optimizer.b1"),
        ("zzz", None),
    ],
)
def test_a_typo_is_told_what_was_meant(typo, meant):
    assert nearest_key(typo) == meant


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_nearest_to_itself(key):
    assert nearest_key(key) == key


def test_a_key_that_has_another_name_by_now_is_read():
    values = dataclasses.asdict(config())
    values["data"]["label_token"] = values["data"].pop("pooling")
    assert from_json(json.dumps(values)) == config()
    values["data"]["label_token"] = "last"
    assert from_json(json.dumps(values)).data.pooling == "last"


def test_a_run_of_conversations_goes_on_as_it_was_begun():
    """Older ones do not say how, and learned all answers of one together."""
    chat = validate(config(data__objective="chat", data__prompt="{messages}"))
    assert chat.data.turns == "together"
    values = dataclasses.asdict(chat)
    del values["data"]["turns"]
    assert differences(from_json(json.dumps(values)), chat) == []
    chat.data.turns = "apart"
    assert differences(from_json(json.dumps(values)), chat) == ["data.turns: 'together' -> 'apart'"]
    # With prefix attention that is not learned any more.
    values["model"]["prefix_attention"] = True
    before = from_json(json.dumps(values))
    now = validate(from_json(json.dumps(values)))
    assert differences(before, now) == ["data.turns: None -> 'apart'"]


def test_json_of_another_version_or_none_at_all():
    values = dataclasses.asdict(config())
    values["optimizer"]["learing_rate"] = 1.0
    with pytest.raises(UserError, match=r"run\.json: .*learing_rate.*did you mean"):
        from_json(json.dumps(values), "run.json")
    with pytest.raises(UserError, match=r"run\.json:2: not JSON"):
        from_json("{\n oops", "run.json")
    with pytest.raises(UserError, match="'model' must be a section"):
        from_json('{"model": 3}', "run.json")
    with pytest.raises(UserError, match="section"):
        from_json("[]", "run.json")
