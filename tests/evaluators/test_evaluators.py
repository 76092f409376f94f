"""What an evaluation is asked: it is taken as a config of its own would be, or refused by its flag,
and of the records of another model nothing is gone on with."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import published_folders
import pytest
import random_llama
from tiny_models import BERT

from lm_jax.data import columnar
from lm_jax.data.sources import documents
from lm_jax.data.spans import windows, with_length
from lm_jax.data.tokenizer import load_tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluators.application import evaluate_task
from lm_jax.evaluators.loss import evaluate_model
from lm_jax.evaluators.models import identity
from lm_jax.training.inference import describe

TALKS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def write(folder, name, model, **more):
    tokenizer = published_folders.FAMILIES[name]()
    published_folders.write(folder, tokenizer | more)
    size = load_tokenizer(folder).vocab_size
    random_llama.write(folder, dataclasses.replace(model, vocab_size=size), "float32", 1 << 30)
    return str(folder)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> str:
    """A published model that chats."""
    model = random_llama.llama(width=64, layers=1, mlp_width=64, vocab_size=1)
    folder = tmp_path_factory.mktemp("talker")
    return write(folder, "smollm2", model, **{"chat_template.jinja": TALKS})


@pytest.fixture(scope="module")
def finder(tmp_path_factory) -> str:
    """A published model that finds answers in texts."""
    model = dataclasses.replace(BERT, head="span", pooler=False, max_length=128)
    return write(tmp_path_factory.mktemp("finder"), "bert", model)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    text = "the topic is " * 60
    records = [{"question": "which?", "context": text, "answers": ["topic"]}] * 2
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_a_model_that_computes_otherwise_is_another(talker):
    before = identity(describe(talker))
    path = f"{talker}/config.json"
    with open(path) as f:
        text = f.read()
    values = json.loads(text)
    rope = values.get("rope_parameters", values)
    rope["rope_theta"] *= 2
    with open(path, "w") as f:
        json.dump(values, f)
    after = identity(describe(talker))
    with open(path, "w") as f:
        f.write(text)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"model.rope_theta"}
    assert before == identity(describe(talker))


@pytest.mark.parametrize(
    ("task", "flags", "said"),
    [
        ("instruct", {"unanswerable": True}, "--unanswerable: objective 'chat' has no answers by"),
        ("instruct", {"context": "{a}"}, "--context: objective 'chat' has none: leave it out"),
        ("instruct", {"prompt": "Say {a}"}, "--prompt: without --target it names the field of a"),
        ("instruct", {"length_penalty": 2.0}, "--length_penalty: there is one beam"),
        ("answer", {"null_threshold": 1.0}, "--null_threshold: each question has an answer"),
        ("answer", {"target": "{a"}, r"--target: '\{a'"),
        ("answer", {"beams": 0}, "--beams: must be at least 1"),
        ("translate", {}, "--prompt: say which field of a record"),
        ("sentiment", {}, "--task=sentiment: this model was not trained to tell classes apart"),
    ],
)
def test_what_would_change_nothing_or_does_not_fit_is_refused(talker, task, flags, said):
    with pytest.raises(UserError, match="^" + said):
        evaluate_task(talker, task, sources=["none.jsonl"], **flags)


def test_what_fits_another_objective_is_refused(finder, questions):
    for flags, said in (
        ({"beams": 2}, "--beams: a model of objective 'extract' writes no answers"),
        ({"context": "no field"}, "--context: say which field of a record"),
    ):
        with pytest.raises(UserError, match="^" + said):
            evaluate_task(finder, "answer", sources=[questions], **flags)
    with pytest.raises(UserError, match=r"^--task: 'translate' is about examples of objective"):
        evaluate_task(finder, "translate", sources=[questions])
    for flags, said in (
        ({"text_key": "content"}, "--text_key: this model learned from records"),
        ({"document": "line"}, "--document: this model learned from records"),
        ({"length": 31}, "--length: a question and a part of its context need 32 tokens"),
        ({"length": 129}, "--length: 129 tokens a row, but model.max_length = 128"),
    ):
        with pytest.raises(UserError, match="^" + said):
            evaluate_model(finder, sources=[questions], **flags)


def test_what_a_data_set_has_to_train_on_is_not_taken_unasked(talker, finder, monkeypatch):
    def builder(name):
        splits = {s: SimpleNamespace(num_examples=2) for s in name.split("_")}
        info = SimpleNamespace(splits=splits, features={"text": None})
        return SimpleNamespace(info=info, as_data_source=lambda split: [{"text": b"a dog"}] * 2)

    monkeypatch.setattr(columnar, "_tfds_builder", builder)
    ask = functools.partial(evaluate_model, talker, length=8)
    with pytest.raises(UserError, match=r"'tfds:train' has neither .* say 'tfds:train\[train\]'"):
        ask(sources=["tfds:train"])
    with pytest.raises(UserError, match=r"say 'tfds:train\[train\]'"):
        evaluate_task(finder, "answer", sources=["tfds:train"])
    found = ask(sources=["tfds:train_test", "tfds:train[train]"])
    assert found["sources"] == ["tfds:train_test[test]", "tfds:train[train]"]


def test_a_question_about_nothing_is_skipped_or_said(finder, tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"question": "who?", "context": c, "answers": ["dog"]} for c in ("", "a dog")]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(UserError, match=r"a\.jsonl:1: its context is empty"):
        evaluate_task(finder, "answer", sources=[str(path)])
    report, result = evaluate_task(finder, "answer", sources=[str(path)], on_error="skip")
    assert (report["examples"], report["skipped"]) == (1, 1)
    assert [r["index"] for r in result.records] == [1]


def test_shorter_windows_hold_the_whole_of_a_text(finder, questions):
    described = describe(finder)
    data = with_length(described.config.data, 60)
    data.validation_sources = (questions,)
    assert data.stride == 30 < described.config.data.stride
    example, _ = documents(data, "validation")
    made = list(windows(example, described.tokenizer, data))
    assert len(made) > 2
    assert evaluate_model(finder, sources=[questions], length=60)["tokens"] == 2 * len(made)
