"""Published folders to runs and back, as a user does it, and what is refused."""

import json
import pathlib
import shutil

import commands
import jax
import numpy as np
import peft
import pytest
import tiny_models
import tokenizers
import torch
import transformers

from lm_jax.config import Config, LoraConfig
from lm_jax.errors import UserError
from lm_jax.evaluators.loss import evaluate_model
from lm_jax.evaluators.models import ModelOptions
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.model import parameters as params_lib
from lm_jax.training import conversion
from lm_jax.training.inference import load_for_inference
from lm_jax.training.loop import train

WORDS = ["</s>", *"abcdefghijklmnopqrstuvwxyz .\n!?"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
    """A tiny Llama with a tokenizer of letters, saved by Transformers."""
    folder = tmp_path_factory.mktemp("published") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    hf = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, WORDS[0])
    )
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    hf.decoder = tokenizers.decoders.Fuse()
    hf.add_special_tokens(WORDS[:1])
    transformers.PreTrainedTokenizerFast(tokenizer_object=hf, eos_token="</s>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return commands.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, published, corpus) -> pathlib.Path:
    """A run of adapters to the published model."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    config = Config(init_from=str(published))
    config.data.sources, config.data.length, config.data.batch_size = (str(corpus),), 32, 8
    config.data.validation_fraction = 0.1
    config.model.dtype, config.model.lora = "float32", LoraConfig(rank=2, targets=("all",))
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 0.05, 1
    config.training.steps, config.training.evaluate_every = 20, 0
    config.logging.tensorboard = False
    train(config, str(workdir))
    return workdir


def logits(model) -> np.ndarray:
    """Of Transformers, for a fixed row of ids."""
    ids = torch.arange(24)[None] % 30
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.numpy()


def ours(path: pathlib.Path) -> np.ndarray:
    mesh = tiny_models.on_devices((1, 1, 1))
    loaded = load_for_inference(str(path), mesh, None, "float32")
    ids = (np.arange(24)[None] % 30).astype(np.int32)
    with jax.set_mesh(mesh):
        return np.asarray(tiny_models.logits(loaded.model, ids))


def run(command: str, *args: object) -> str:
    code, out, err = commands.run(command, *map(str, args))
    assert code == 0, err
    return out


def test_there_and_back_nothing_is_lost(published, tmp_path):
    said = run("convert", f"--model={published}", f"--output={tmp_path / 'run'}", "--verify")
    assert "wrote a workdir" in said and "largest difference" in said
    said = run("convert", f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'back'}")
    assert "wrote a llama model" in said
    before, after = (
        transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
        for folder in (published, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    text = "what it was, it is"
    first, again = (
        transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
        for folder in (published, tmp_path / "back")
    )
    assert first == again


def test_a_published_folder_is_used_as_it_is(published, corpus):
    said = run(
        "generate", f"--model={published}", "--prompt=ab", "--max_tokens=8", "--temperature=0"
    )
    hf = transformers.LlamaForCausalLM.from_pretrained(published)
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    ids = tokenizer("ab", return_tensors="pt").input_ids

    def check(said: str, **how: object) -> None:
        want = hf.generate(ids, max_new_tokens=8, do_sample=False, **how)[0]
        text = tokenizer.decode(want, skip_special_tokens=True).replace(" ", "")
        assert said.replace(" ", "").strip() == text.strip()

    check(said)
    search = "--beams=3", "--length_penalty=2"
    searched = run("generate", f"--model={published}", "--prompt=ab", "--max_tokens=8", *search)
    check(searched, num_beams=3, length_penalty=2.0)
    assert searched != said
    result = evaluate_model(str(published), sources=(str(corpus),), max_batches=1)
    assert result["step"] is None and 1 < result["loss"] < 10


def test_a_published_model_is_used_in_eight_bits(published, corpus):
    mesh = tiny_models.on_devices((1, 1, 1))
    whole = params_lib.split(load_for_inference(str(published), mesh).model)
    found = params_lib.split(load_for_inference(str(published), mesh, quantize="int8").model)
    few = {name.removesuffix(".values") for name in found if name.endswith(".values")}
    kinds = {name.rpartition(".")[2] for name in few}
    assert kinds >= {"embedding", "query", "key", "value", "out", "up", "gate", "down"}
    for name in set(whole) - few:
        np.testing.assert_array_equal(found[name], whole[name])
    steps = np.asarray(found["embedding.scale"])[:, None]
    far = np.abs(found["embedding.values"] * steps - whole["embedding"])
    assert (far <= 0.5001 * steps).all() and far.max() > 0
    sample = {"sources": (str(corpus),), "max_batches": 1}
    exact = evaluate_model(str(published), **sample)
    rough = evaluate_model(str(published), ModelOptions(quantize="int8"), **sample)
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert rough["loss"] != exact["loss"]


def test_whatever_ends_a_published_models_text_ends_it_here_and_after(published, tmp_path):
    """An id of generation_config.json, and one beyond the model that its tokenizer only names."""
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    hf.add_special_tokens({"additional_special_tokens": ["<image>"]})
    hf.save_pretrained(folder)
    ids = hf("ab", return_tensors="pt").input_ids
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 2:].tolist()
    stop = next(i for i in free[2:] if i not in free[:2])
    model.generation_config.eos_token_id = [0, stop]
    model.save_pretrained(folder)
    want = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 2:].tolist()
    assert 2 < len(want) < 8 and want[-1] == stop
    mesh = tiny_models.on_devices((1, 1, 1))
    loaded = load_for_inference(str(folder), mesh)
    assert loaded.tokenizer.vocab_size == 33 > loaded.model.config.vocab_size
    conversion.to_huggingface(loaded, str(tmp_path / "again"))
    for path in (folder, tmp_path / "again"):
        loaded = load_for_inference(str(path), mesh)
        with jax.set_mesh(mesh):
            (got,) = Generator(loaded.model, loaded.tokenizer).generate(
                ["ab"], max_tokens=8, sampling=Sampling(temperature=0.0)
            )
        assert list(got.tokens) == want and got.finish_reason == "eos"
    exported = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [0, stop]


def test_adapters_merged_and_by_themselves_are_one_model(published, adapted, corpus, tmp_path):
    base = transformers.LlamaForCausalLM.from_pretrained(published)
    want, before = ours(adapted), logits(base)
    assert np.abs(want - before).max() > 0.5
    loaded = conversion.load(str(adapted))
    assert conversion.to_huggingface(loaded, str(tmp_path / "merged")) == ("llama", None)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged), want, atol=1e-4)
    assert conversion.to_peft(str(adapted), str(tmp_path / "peft")) == str(published)
    apart = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    np.testing.assert_allclose(logits(apart), want, atol=1e-4)
    with jax.default_matmul_precision("highest"):
        losses = {
            evaluate_model(str(path), sources=(str(corpus),), length=32)["loss"]
            for path in (adapted, tmp_path / "merged")
        }
    assert max(losses) - min(losses) < 1e-4
    unadapted = evaluate_model(str(published), sources=(str(corpus),), length=32)["loss"]
    assert max(losses) < unadapted - 0.5


def test_what_cannot_be_converted_is_said(published, adapted, tmp_path):
    def refused(**flags: object) -> str:
        args = [f"--{key}={value}" for key, value in flags.items()]
        code, _, err = commands.run("convert", *args)
        assert code == 1 and "Traceback" not in err
        return err

    new = tmp_path / "new"
    assert "name a new folder" in refused(model=adapted, output=published)
    assert "no run with adapters" in refused(model=published, output=new, to="peft")
    assert not new.exists()


def test_a_family_that_cannot_express_the_model_is_refused(adapted, tmp_path):
    loaded = conversion.load(str(adapted))
    with pytest.raises(UserError, match=r"no gpt2 model has:(.|\n)*model\.norm"):
        conversion.to_huggingface(loaded, str(tmp_path / "x"), family="gpt2")
    with pytest.raises(UserError, match="is none of gpt2, llama"):
        conversion.to_huggingface(loaded, str(tmp_path / "x"), family="gpt4")
    with pytest.raises(UserError, match="is there already"):
        conversion.to_workdir(loaded, str(adapted))


def test_what_is_verified_can_fail(published, tmp_path):
    loaded = conversion.load(str(published))
    assert conversion.compare(loaded, str(published)).agree()
    other = transformers.LlamaForCausalLM.from_pretrained(published)
    with torch.no_grad():
        other.model.norm.weight[3] += 0.1
    other.save_pretrained(tmp_path / "other")
    comparison = conversion.compare(loaded, str(tmp_path / "other"))
    assert not comparison.agree() and comparison.largest > 1e-3
    (tmp_path / "other" / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with pytest.raises(UserError, match="Transformers cannot load"):
        conversion.compare(loaded, str(tmp_path / "other"))
