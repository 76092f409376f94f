"""Runs that start from weights: where their shape comes from, and what adapters are saved with."""

import copy
import dataclasses
import json
import pathlib
import shutil

import commands
import jax
import numpy as np
import pytest
import tokenizers
from commands import environment, kill_after, losses, stored_arrays, tiny

from lm_jax.config import NOT_OF_THE_WEIGHTS, Config, LoraConfig, MeshConfig, ModelConfig
from lm_jax.data.tokenizer import load_tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluators.loss import evaluate_model
from lm_jax.interop.export import save_pretrained
from lm_jax.model import parameters as params_lib
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training import weights
from lm_jax.training.inference import load_for_inference
from lm_jax.training.loop import train
from lm_jax.training.workdir import read_config

SHAPE = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 64, "max_length": 64}
ADAPTERS = {
    "model__lora": LoraConfig(rank=2, targets=("query", "out", "down")),
    "optimizer__learning_rate": 0.1,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return commands.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def recipe(corpus: pathlib.Path, **changes) -> Config:
    """A run of two steps; 'section__field' -> value. Its model is GPT-2's if nothing says more."""
    config = Config()
    fields = {
        "data__sources": (str(corpus),),
        "data__length": 32,
        "data__batch_size": 16,
        "data__validation_fraction": 0.1,
        "tokenizer__kind": "bytes",
        "model__dtype": "float32",
        "optimizer__learning_rate": 0.01,
        "optimizer__warmup_steps": 1,
        "optimizer__schedule": "constant",  # of any number of steps: compiled once
        "training__steps": 2,
        "training__evaluate_every": 0,
        "logging__tensorboard": False,
    }
    for key, value in (fields | changes).items():
        section, _, field = key.rpartition("__")
        target = getattr(config, section) if section else config
        assert hasattr(target, field), key
        setattr(target, field, value)
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus) -> str:
    """A finished run."""
    workdir = str(tmp_path_factory.mktemp("runs") / "base")
    shape = {f"model__{name}": value for name, value in SHAPE.items()}
    train(recipe(corpus, **shape), workdir)
    return workdir


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, corpus, base) -> str:
    """A finished run of adapters to `base`, which has a shape that its recipe does not say."""
    workdir = str(tmp_path_factory.mktemp("runs") / "adapted")
    train(recipe(corpus, init_from=base, training__evaluate_every=2, **ADAPTERS), workdir)
    return workdir


def loaded(workdir: str) -> dict[str, np.ndarray]:
    """The parameters that inference sees."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return jax.device_get(params_lib.split(load_for_inference(workdir, mesh).model))


def size(folder: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def copied(workdir: str, to: pathlib.Path) -> str:
    return str(shutil.copytree(workdir, to))


# The shape of the model.


def test_the_shape_comes_with_the_weights_and_is_written_down(corpus, base, tmp_path):
    config = recipe(corpus, init_from=base, model__dropout=0.2, model__remat="full")
    before = copy.deepcopy(config)
    train(config, str(tmp_path / "run"))
    assert config == before
    model, want = read_config(tmp_path / "run").model, read_config(base).model
    for name, value in SHAPE.items():
        assert getattr(model, name) == value
    want = dataclasses.replace(want, vocab_size=258, dropout=0.2, remat="full")
    assert model == want
    assert losses(tmp_path / "run")[1] < losses(pathlib.Path(base))[1] - 0.3


def test_a_run_goes_on_without_the_weights_it_started_from(corpus, base, tmp_path):
    source, workdir = copied(base, tmp_path / "source"), str(tmp_path / "run")
    config = recipe(corpus, init_from=source, optimizer__freeze=("blocks.0.*", "*embedding"))
    train(config, workdir)
    shutil.rmtree(source)
    config.training.steps = 4
    train(config, workdir)
    assert sorted(losses(pathlib.Path(workdir))) == [1, 2, 3, 4]
    before, after = loaded(base), loaded(workdir)
    for name in ("embedding", "position_embedding"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(after["blocks.mlp.up"][0], before["blocks.mlp.up"][0])
    assert (after["blocks.mlp.up"][1] != before["blocks.mlp.up"][1]).any()


def test_what_comes_with_the_weights_cannot_be_overridden(corpus, base):
    config = recipe(corpus, init_from=base, model__layers=3, model__width=32, model__dropout=0.1)
    keys = {"model.layers", "model.width", "model.dropout", "tokenizer.kind", "data.length"}
    with pytest.raises(UserError) as error:
        weights.resolved(config, "nowhere", keys)
    (line,) = str(error.value).splitlines()[1:]
    assert line.strip() == f"model.layers: comes with the weights of {base} (2): leave it out"
    got = weights.resolved(config, "nowhere", keys - {"model.layers"})
    assert got.model.layers == 2 and got.model.dropout == 0.1

    config.tokenizer.kind = "characters"
    with pytest.raises(UserError, match=r"tokenizer\.kind: comes with the weights"):
        weights.resolved(config, "nowhere", keys - {"model.layers"})


def test_the_rest_must_fit_the_shape(corpus, base):
    with pytest.raises(UserError, match=r"data\.length: 65 tokens a row.*max_length = 64"):
        weights.resolved(recipe(corpus, init_from=base, data__length=65), "nowhere")


def test_what_is_not_of_the_weights_is_the_models_own():
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(NOT_OF_THE_WEIGHTS) <= names


def test_a_folder_without_weights(corpus, base, tmp_path):
    def message(path: pathlib.Path) -> str:
        with pytest.raises(UserError) as error:
            weights.resolved(recipe(corpus, init_from=str(path)), "nowhere")
        return str(error.value)

    assert "there is no folder" in message(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"hidden": 3}')
    assert "neither the workdir of a run nor a Hugging Face folder" in message(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "neither the workdir of a run" in message(tmp_path)
    shutil.copy(pathlib.Path(base) / "config.json", tmp_path)
    shutil.copytree(pathlib.Path(base) / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        train(recipe(corpus, init_from=str(tmp_path)), str(tmp_path / "run"))


# Published models.


@pytest.fixture(scope="module")
def published(tmp_path_factory, base) -> str:
    """The weights of `base` as a Hugging Face folder, with a tokenizer of 64 ids."""
    folder = str(tmp_path_factory.mktemp("published") / "model")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = load_for_inference(base, mesh).model
    with jax.set_mesh(mesh):
        save_pretrained(folder, model.config, params_lib.split(model))
    words = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz ."]
    words += [f"more{i}" for i in range(64 - len(words))]
    hf = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, words[0])
    )
    hf.add_special_tokens(words[:1])
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    hf.save(f"{folder}/tokenizer.json")
    return folder


def test_a_published_model_is_trained_on(corpus, base, published, tmp_path):
    source, workdir = copied(published, tmp_path / "source"), str(tmp_path / "run")
    config = recipe(corpus, init_from=source, optimizer__freeze=("blocks.mlp.*",))
    train(config, workdir)
    shutil.rmtree(source)  # all of it is in the workdir now
    config.training.steps = 3
    train(config, workdir)
    before, after = loaded(base), loaded(workdir)
    for name in before:
        assert (before[name] == after[name]).all() == name.startswith("blocks.mlp."), name
    written = read_config(workdir)
    assert (written.model.layers, written.model.vocab_size) == (2, 258)
    assert (written.tokenizer.kind, written.tokenizer.path) == ("file", source)
    assert load_tokenizer(f"{workdir}/tokenizer").vocab_size == 64


def test_adapters_of_a_published_model(corpus, base, published, tmp_path):
    source, workdir = copied(published, tmp_path / "source"), str(tmp_path / "run")
    config = recipe(corpus, init_from=source, **ADAPTERS)
    train(config, workdir)
    before, after = loaded(base), loaded(workdir)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {"blocks.attention.query", "blocks.attention.out", "blocks.mlp.down"}
    assert json.loads((tmp_path / "run" / "base.json").read_text())["step"] is None

    file = pathlib.Path(source) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"oops")
    with pytest.raises(UserError, match="what lies there now is not what it was"):
        loaded(workdir)
    file.unlink()
    with pytest.raises(UserError, match="which cannot be read"):
        loaded(workdir)
    file.write_bytes(content)
    jax.tree.map(np.testing.assert_array_equal, loaded(workdir), after)


# Adapters.


def test_adapters_are_saved_alone(adapted, base):
    found = stored_arrays(pathlib.Path(adapted), 2)
    parameters = {name: x for name, x in found.items() if name.startswith("['parameters']")}
    assert len(parameters) == 6 and all("_lora." in name for name in parameters)
    saved, whole = (size(pathlib.Path(w) / "checkpoints" / "2") for w in (adapted, base))
    assert saved < whole / 3
    assert sum(x.size for x in found.values()) < 20_000 < loaded(base)["blocks.mlp.up"].size * 5


def test_inference_sees_the_sum_of_base_and_adapters(adapted, base):
    before, after = loaded(base), loaded(adapted)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert before.keys() == after.keys()
    assert changed == {"blocks.attention.query", "blocks.attention.out", "blocks.mlp.down"}
    records = (pathlib.Path(adapted) / "metrics.jsonl").read_text().splitlines()
    (validation,) = [r for r in map(json.loads, records) if r["kind"] == "validation"]
    got = evaluate_model(adapted)
    assert got["tokens"] == validation["tokens"]
    np.testing.assert_allclose(got["loss"], validation["loss"], rtol=1e-5)
    assert abs(got["loss"] - evaluate_model(base)["loss"]) > 0.01


def test_a_run_may_start_from_merged_adapters(corpus, adapted, tmp_path):
    config = recipe(corpus, init_from=adapted, optimizer__freeze=("blocks.*",))
    train(config, str(tmp_path / "run"))
    want, got = loaded(adapted), loaded(str(tmp_path / "run"))
    for name in ("blocks.attention.query", "blocks.mlp.down"):
        np.testing.assert_array_equal(got[name], want[name])
    assert read_config(tmp_path / "run").model.lora.rank == 0

    # Or with more of them: its base is then itself one with adapters.
    config = recipe(corpus, init_from=adapted, **ADAPTERS)
    train(config, str(tmp_path / "more"))
    again = loaded(str(tmp_path / "more"))
    assert (again["blocks.mlp.down"] != want["blocks.mlp.down"]).any()
    np.testing.assert_array_equal(again["blocks.mlp.up"], want["blocks.mlp.up"])


def test_the_base_must_be_there_and_the_same(corpus, base, tmp_path):
    source, workdir = copied(base, tmp_path / "source"), str(tmp_path / "run")
    config = recipe(corpus, init_from=source, **ADAPTERS)
    train(config, workdir)
    want, config.training.steps = loaded(workdir), 3

    def refused() -> str:
        said = set()
        for attempt in (lambda: loaded(workdir), lambda: train(config, workdir)):
            with pytest.raises(UserError) as error:
                attempt()
            said.add(str(error.value))
        (message,) = said
        return message

    moved = shutil.move(source, tmp_path / "moved")
    assert f"belong to the weights of {source}, step 2, which cannot be read" in refused()
    note = tmp_path / "run" / "base.json"
    note.write_text(note.read_text().replace(source, str(moved)))
    jax.tree.map(np.testing.assert_array_equal, loaded(workdir), want)
    shutil.move(moved, source)
    note.write_text(note.read_text().replace(str(moved), source))

    # The base's run trains on: what the adapters belong to stays, until it is removed.
    further = recipe(corpus, training__steps=3, checkpoint__keep=2)
    further.model = read_config(source).model
    train(further, source)
    jax.tree.map(np.testing.assert_array_equal, loaded(workdir), want)
    checkpoints = pathlib.Path(source) / "checkpoints"
    shutil.rmtree(checkpoints / "2")
    assert "no checkpoint of step 2" in refused()
    shutil.copytree(checkpoints / "3", checkpoints / "2")
    assert "what lies there now is not what it was" in refused()
    note.unlink()
    with pytest.raises(UserError, match=r"base\.json cannot be read"):
        loaded(workdir)


def test_a_killed_run_of_adapters_resumes_bit_for_bit(corpus, base, tmp_path):
    env, whole, killed = environment(), tmp_path / "whole", tmp_path / "killed"
    flags = tiny(corpus, init_from=base, model__lora__rank=2, training__steps=commands.STEPS)
    commands.train(*flags, f"--workdir={whole}", env=env)
    kill_after(10, killed, [*flags, f"--workdir={killed}"], env)
    commands.train(*flags, f"--workdir={killed}", env=env)
    commands.assert_same_run(whole, killed)
