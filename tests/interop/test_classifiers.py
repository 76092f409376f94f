"""Classifiers from Transformers and back: the same probabilities, under the same names."""

import dataclasses
import json
import pathlib
import shutil

import commands
import jax
import numpy as np
import published
import published_folders
import pytest
import torch
import transformers as hf
from tiny_models import BERT, LLAMA, build, on_devices

from lm_jax.config import Config, ModelConfig, RopeScaling
from lm_jax.data.encoding import text_to_classify
from lm_jax.data.examples import Example
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.classifier import classify
from lm_jax.evaluators.application import evaluate_task
from lm_jax.evaluators.models import ModelOptions
from lm_jax.interop import pretrained
from lm_jax.interop.export import save_pretrained
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import skeleton_of
from lm_jax.training import conversion, weights
from lm_jax.training.inference import Loaded, load_for_inference
from lm_jax.training.loop import train
from lm_jax.training.published import padding_of
from lm_jax.training.weights import Source

NAMES = ("dull", "fair", "fine")
ID2LABEL = dict(enumerate(NAMES))
ROWS = ["Once more, with feeling", "no", "What a film. Twice."]
LETTERS = CharacterTokenizer(map(chr, range(32, 128)))  # 96 ids, nothing around a text
DECODER, GEMMA = published.DECODER, published.GEMMA
# Of each the name of its classes in Transformers, and its config.
CASES = {
    "bert": ("Bert", published.ENCODER),
    "roberta": ("Roberta", published.ENCODER | {"type_vocab_size": 1}),
    "gpt2": ("GPT2", published.GPT2),
    "llama": ("Llama", DECODER),
    "mistral": ("Mistral", DECODER),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", DECODER),
    "mixtral": ("Mixtral", DECODER | {"num_local_experts": 3}),
    "qwen3 moe": ("Qwen3Moe", DECODER | published.QWEN3_EXPERTS),
    "gemma 2": ("Gemma2", GEMMA | {"final_logit_softcapping": 0.5}),  # not for classes
    "gemma 3": ("Gemma3Text", GEMMA),
}
COMPUTED = ("bert", "roberta", "gpt2", "llama", "gemma 2")  # of the others the tensors are compared


def rows(texts, tokenizer, length):
    return [text_to_classify(Example(text, ()), tokenizer, length)[0] for text in texts]


def random_model(case: str, **config):
    torch.manual_seed(0)
    name, values = CASES[case]
    config = getattr(hf, name + "Config")(**values | {"id2label": ID2LABEL} | config)
    model = getattr(hf, name + "ForSequenceClassification")(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p.ndim == 1 and name.endswith("weight") and "gemma" not in case
            p.copy_(0.2 * torch.randn_like(p) + scale)
            if case == "roberta" and "position_embeddings" in name:
                p[:2] = 0  # rows that nobody looks up
    return model.eval()


def saved(case: str, folder: pathlib.Path, **config) -> pathlib.Path:
    random_model(case, **config).save_pretrained(folder)
    return folder


def read_again(folder: pathlib.Path):
    """In Transformers, as its users load it."""
    with published.silence():
        model, report = hf.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
    assert not any(report.values()), report
    return model.eval()


def probabilities(model, rows: list[np.ndarray]) -> np.ndarray:
    """By Transformers, a row at a time."""
    with torch.no_grad():
        each = [model(torch.tensor(np.asarray(ids))[None]).logits.softmax(-1) for ids in rows]
    return torch.cat(each).numpy()


def told_by(config: ModelConfig) -> str:
    return "last" if config.causal else "first"


def load(folder: pathlib.Path):
    config = pretrained.read_model_config(str(folder))
    config = dataclasses.replace(config, dtype="float32")
    return config, pretrained.load_parameters(str(folder), config, on_devices((1, 1, 1)))


@pytest.mark.parametrize("case", CASES)
def test_a_classifier_comes_and_goes(case, tmp_path):
    theirs = random_model(case)
    theirs.save_pretrained(tmp_path / "in")
    config, parameters = load(tmp_path / "in")
    assert config.head == "classify" and config.labels == len(NAMES)
    if case in COMPUTED:
        model = params_lib.bind(skeleton_of(config), parameters)
        with jax.set_mesh(on_devices((1, 1, 1))), jax.default_matmul_precision("highest"):
            got = classify(model, rows(ROWS, LETTERS, 48), pooling=told_by(config))
        want = probabilities(theirs, [LETTERS.encode(text) for text in ROWS])
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert want.std(0).max() > 0.02  # the rows are told apart

    names = pretrained.read_classes(str(tmp_path / "in")).names
    with jax.set_mesh(on_devices((1, 1, 1))):
        save_pretrained(str(tmp_path / "out"), config, parameters, labels=names)
    again = read_again(tmp_path / "out")
    assert type(again) is type(theirs)
    assert again.config.id2label == ID2LABEL
    assert again.config.label2id == {name: i for i, name in ID2LABEL.items()}
    assert again.config.problem_type == "single_label_classification"
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    atol = 1e-6 if "gemma" in case else 0  # their norms are kept as 1 + weight, which rounds
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=atol, rtol=0, err_msg=name)


def test_names_that_are_not_there_are_those_of_transformers(tmp_path):
    folder = saved("llama", tmp_path)
    edit_config(folder, id2label=None, label2id=None)
    assert pretrained.read_classes(str(folder)).names == ("LABEL_0", "LABEL_1")
    edit_config(folder, num_labels=3)
    assert pretrained.read_classes(str(folder)).names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert pretrained.read_classes(str(published.save("llama 2", tmp_path / "x"))) is None


def edit_config(folder: pathlib.Path, **values) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    "values, said",
    [
        ({"problem_type": "regression"}, "problem_type = 'regression' is not supported"),
        ({"problem_type": "multi_label_classification"}, "is of one class"),
        ({"id2label": {"0": "LABEL_0"}}, "one label is a regression"),
        ({"id2label": None, "num_labels": 1}, "one label is a regression"),
        ({"id2label": {"0": "a", "2": "b"}}, "must name the classes 0 to 1"),
        ({"id2label": {"x": "a", "y": "b"}}, "must name the classes 0 to 1"),
        ({"id2label": ["a", "b"]}, "do not say how many"),
        ({"id2label": {"0": "a", "1": 3}}, "must give each class a name"),
        ({"id2label": {"0": "a", "1": "a"}}, "calls two classes 'a'"),
        ({"num_labels": 10**12}, "do not say how many"),
        ({"num_labels": 4}, "must name the classes 0 to 3"),
        ({"id2label": {"0": "a", "1": "b"}}, "score.weight: expected [2, 32], found [3, 32]"),
    ],
    ids=str,
)
def test_what_is_no_classifier_of_ours_is_refused(values, said, tmp_path):
    folder = saved("llama", tmp_path)
    edit_config(folder, **values)
    with pytest.raises(UserError) as error:
        load(folder)
    assert said in str(error.value) and str(folder) in str(error.value)


def test_distilbert_is_refused_with_the_reason(tmp_path):
    config = hf.DistilBertConfig(**published.DISTILBERT)
    hf.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its classifier has a ReLU"):
        load(tmp_path)


# With a tokenizer: texts.


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Published classifiers, with tokenizers of their own."""
    out = {}
    for case in ("bert", "gpt2"):
        out[case] = tmp_path_factory.mktemp(case)
        published_folders.write(out[case], published_folders.FAMILIES[case]())
        count = len(hf.AutoTokenizer.from_pretrained(out[case]))
        saved(case, out[case], vocab_size=count)
    eos = hf.AutoTokenizer.from_pretrained(out["gpt2"]).eos_token_id
    edit_config(out["gpt2"], pad_token_id=eos)  # as those who train it must
    return out


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    words = ("the film was", "a book, and", "we saw")
    texts = [f"{words[i % 3]} {NAMES[i % 2]} {i}" for i in range(40)]
    path.write_text(
        "".join(json.dumps({"text": t, "label": NAMES[i % 2]}) + "\n" for i, t in enumerate(texts))
    )
    return path


def told(folder: pathlib.Path, texts: list[str]) -> np.ndarray:
    """What users of Transformers get, a text at a time and all of them padded together."""
    model, tokenizer = read_again(folder), hf.AutoTokenizer.from_pretrained(folder)
    alone = probabilities(model, [tokenizer(text).input_ids for text in texts])
    if tokenizer.pad_token is None:  # as users of a published GPT-2 do
        tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == model.config.pad_token_id
    with torch.no_grad():
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        together = model(**batch).logits.softmax(-1).numpy()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    return alone


def ours(path: pathlib.Path, texts: list[str]) -> np.ndarray:
    mesh = on_devices((1, 1, 1))
    loaded = load_for_inference(str(path), mesh, None, "float32")
    kind = loaded.config.data.pooling
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        return classify(loaded.model, rows(texts, loaded.tokenizer, 48), pooling=kind)


@pytest.mark.parametrize("case", ["bert", "gpt2"])
def test_a_published_classifier_is_evaluated_as_it_is(case, folders, reviews):
    folder = folders[case]
    report, result = evaluate_task(
        str(folder),
        "sentiment",
        ModelOptions(dtype="float32"),
        sources=(str(reviews),),
        max_examples=8,
    )
    assert report["examples"] == 8 and all(name in result.confusion() for name in NAMES)
    want = told(folder, [r["prompt"] for r in result.records])
    got = np.array([r["probabilities"] for r in result.records])
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert [r["prediction"] for r in result.records] == [NAMES[i] for i in want.argmax(1)]


def recipe() -> Config:
    """That of the documents for a published model that writes."""
    return commands.loaded("configs/sentiment.py").get_config("decoder")


def start_from(folder: pathlib.Path, reviews: pathlib.Path, labels=()) -> Config:
    config = recipe() if "gpt2" in folder.name else Config()
    config.init_from, data, training = str(folder), config.data, config.training
    data.sources, data.validation_fraction = (str(reviews),), 0.2
    data.objective, data.prompt, data.target = "classify", "{text}", "{label}"
    data.labels, data.length, data.batch_size = labels, 32, 8
    config.model.dtype = "float32"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 1
    training.steps, training.evaluate_every = 2, 0
    config.logging.tensorboard = False
    return config


@pytest.mark.parametrize(
    "case, labels, head",
    [("bert", (), "goes on"), ("gpt2", NAMES[:2], "anew")],
    ids=["same classes", "other classes"],
)
def test_fine_tuned_it_is_exported(case, labels, head, folders, reviews, tmp_path, capsys):
    config = weights.resolved(start_from(folders[case], reviews, labels), str(tmp_path / "run"))
    assert config.data.labels == (labels or NAMES)
    assert config.data.pooling == ("last" if case == "gpt2" else "first")
    given = weights.load_start(weights.find(config.init_from), config.model, on_devices((1, 1, 1)))
    assert ("head" in given) == (head == "goes on") and "embedding" in given

    assert train(start_from(folders[case], reviews, labels), str(tmp_path / "run")) == 0
    said = capsys.readouterr().err
    assert ("with a new head for 2 classes" in said) == (head == "anew")
    loaded = conversion.load(str(tmp_path / "run"))
    family, missing = conversion.to_huggingface(loaded, str(tmp_path / "out"))
    assert (family, missing) == (case, None)
    want = ours(tmp_path / "run", ROWS)
    np.testing.assert_allclose(told(tmp_path / "out", ROWS), want, atol=1e-4)
    assert want.shape == (3, len(labels or NAMES))
    assert np.abs(want - told(folders[case], ROWS)[:, : want.shape[1]]).max() > 1e-3
    comparison = conversion.compare(loaded, str(tmp_path / "out"))  # convert --verify
    assert comparison.agree() and comparison.same_choice == 1
    back = load_for_inference(str(tmp_path / "out"), on_devices((1, 1, 1)))
    assert back.config.data.labels == (labels or NAMES)


def test_the_same_classes_in_another_order_are_refused(folders, reviews, tmp_path):
    config = start_from(folders["bert"], reviews, ("Fine", "fair", "dull"))
    with pytest.raises(UserError, match="in another order"):
        weights.resolved(config, str(tmp_path))


def of_our_own(model: ModelConfig, tokenizer, **data) -> Loaded:
    """A model with a head for classes, as if it had been trained."""
    model = dataclasses.replace(
        model, head="classify", labels=3, tied_head=True, vocab_size=260, dtype="float32"
    )
    config = Config(model=model)
    config.data.objective, config.data.labels, config.data.pooling = "classify", NAMES, "first"
    for key, value in data.items():
        setattr(config.data, key, value)
    with jax.set_mesh(on_devices((1, 1, 1))):
        return Loaded(build(model), config, tokenizer, Source("run", 0))


def test_a_causal_classifier_of_our_own_and_its_padding(tmp_path):
    model = dataclasses.replace(LLAMA, qk_norm=False, rope_scaling=RopeScaling(), max_length=64)
    model = dataclasses.replace(model, init_std=0.3)
    loaded = of_our_own(model, BytesTokenizer(), pooling="last")
    family, missing = conversion.to_huggingface(loaded, str(tmp_path / "out"))
    assert (family, missing) == ("llama", None)
    with jax.set_mesh(on_devices((1, 1, 1))), jax.default_matmul_precision("highest"):
        got = classify(loaded.model, rows(ROWS, loaded.tokenizer, 32), pooling="last")
    np.testing.assert_allclose(told(tmp_path / "out", ROWS), got, atol=1e-4)
    np.testing.assert_allclose(ours(tmp_path / "out", ROWS), got, atol=1e-5)
    # Where each id is that of a character, none can be padding: Transformers takes one row then.
    assert padding_of(LETTERS) is None
    assert padding_of(BytesTokenizer()) == 256  # the other one ends a text


def test_padding_that_ends_each_text_is_refused(tmp_path, folders):
    shutil.copytree(folders["gpt2"], tmp_path / "model")
    published_folders.write(tmp_path / "tokenizer", published_folders.FAMILIES["gpt2 with bos"]())
    for path in (tmp_path / "tokenizer").iterdir():
        if path.name != "config.json":
            shutil.copy(path, tmp_path / "model" / path.name)
    (tmp_path / "model" / "tokenizer.json").unlink()
    eos = hf.AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id
    edit_config(tmp_path / "model", pad_token_id=eos)
    with pytest.raises(UserError, match="at the token before"):
        weights.settings_of(weights.find(str(tmp_path / "model")))


@pytest.mark.parametrize(
    "model, data, said",
    [
        ({"pooler": False}, {}, r"train it with model\.pooler = True"),
        ({"pooler": True}, {"pooling": "last"}, "'last': train it with 'first'"),
        ({"pooler": True}, {"pooling": "mean"}, "'mean': train it with 'first'"),
        ({"pooler": False, "position": "rope"}, {}, "no family of published models has this shape"),
        ({"pooler": True, "family": "distilbert"}, {}, "distilbert has no model with head"),
    ],
    ids=str,
)
def test_what_no_published_classifier_computes_is_refused_before_it_is_written(
    model, data, said, tmp_path
):
    loaded = of_our_own(dataclasses.replace(BERT, **model), BytesTokenizer(), **data)
    with pytest.raises(UserError, match=said):
        conversion.to_huggingface(loaded, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_pooler_is_drawn_with_the_head_on_request(reviews, tmp_path):
    folder = published.save("bert, no pooler", tmp_path / "in")
    published_folders.write(
        folder,
        {k: v for k, v in published_folders.FAMILIES["bert"]().items() if k != "config.json"},
    )
    config = start_from(folder, reviews, NAMES)
    assert not weights.resolved(config, str(tmp_path)).model.pooler
    config.model.pooler = True
    assert weights.resolved(config, str(tmp_path), ("model.pooler",)).model.pooler
    # What comes with a head of classes stays.
    config.init_from, config.model.pooler = str(saved("bert", tmp_path / "classes")), False
    published_folders.write(
        tmp_path / "classes",
        {k: v for k, v in published_folders.FAMILIES["bert"]().items() if k != "config.json"},
    )
    with pytest.raises(UserError, match=r"model\.pooler: comes with the weights"):
        weights.resolved(config, str(tmp_path), ("model.pooler",))
