"""Answers to examples: what is told of them is what a direct computation says."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from tiny_models import BERT, LLAMA, build, placed, quick_jit

from lm_jax.config import DataConfig, TaskConfig
from lm_jax.data.examples import Example
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation import tasks
from lm_jax.evaluation.tasks import Stopped, run_task

MODEL = dataclasses.replace(LLAMA, vocab_size=260, max_length=32)
BYTES = BytesTokenizer()
EXAMPLES = [
    Example("a dog:", ("ein Hund",)),
    Example("cat:", ("Katze", "eine Katze")),
    Example("a long prompt that leaves no room for more", ("kurz",)),
]
COMPLETE = DataConfig(objective="complete")
CLASSES = DataConfig(objective="classify", labels=("bad", "good"), length=32, pooling="first")


def run(model, examples=EXAMPLES, data=COMPLETE, tokenizer=BYTES, **task):
    stop = task.pop("stop", None)
    known, told = task.pop("known", ()), []
    task = TaskConfig(**{"name": "translate", "max_tokens": 5} | task)
    result = run_task(
        model, tokenizer, examples, data, task, batch_size=2, known=known, on_record=told.append,
        stop=stop,
    )  # fmt: skip
    return result, told


@pytest.mark.parametrize("prefix", [False, True])
def test_perplexity_is_that_of_the_right_answer_after_its_prompt(prefix):
    model = build(dataclasses.replace(MODEL, prefix_attention=prefix))

    @quick_jit
    def scores(model, ids, prefix_BT):
        x_BTD, _ = model(ids, prefix_BT=prefix_BT if prefix else None)
        return jax.nn.log_softmax(model.logits(x_BTD))[0]

    nll, tokens = 0.0, 0
    for example in EXAMPLES[:2]:
        before = BYTES.encode_prompt(example.prompt)
        told = [*BYTES.encode(example.targets[0]), BYTES.eos_id]
        ids = np.zeros((1, 32), np.int32)  # what comes after a text plays no part in it
        ids[0, : len(before) + len(told)] = [*before, *told]
        found = scores(model, ids, np.arange(32)[None] < len(before))
        nll -= sum(float(found[len(before) + k - 1, i]) for k, i in enumerate(told))
        tokens += len(told)
    result, records = run(model, EXAMPLES[:2], metrics=("perplexity",))
    got = result.scores["perplexity"]
    assert got.value == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert sum(r["tokens"] for r in records) == tokens
    assert not any("prediction" in r for r in records)  # nothing else was asked for
    if not prefix:
        with placed(model, (2, 2, 2)) as on_mesh:
            result, _ = run(on_mesh, EXAMPLES[:2], metrics=("perplexity",))
        assert result.values()["perplexity"] == pytest.approx(got.value, rel=1e-4)


def test_what_does_not_fit_is_counted():
    result, records = run(build(MODEL), metrics=("chrf", "perplexity"))
    assert [r.get("shortened", False) for r in records] == [False, False, True]
    report = result.report()
    assert report["shortened"] == 1 and report["examples"] == 3
    assert report["unfinished"] == sum(r["finish_reason"] == "length" for r in records) > 0
    # What was told is not asked again.
    again, more = run(build(MODEL), known=records[:2], metrics=("chrf", "perplexity"))
    assert [r["index"] for r in more] == [2] and again.records[:2] == records[:2]
    assert again.report() | {"scores": {}} == report | {"scores": {}}
    assert again.values() == pytest.approx(result.values(), rel=1e-4)


def test_perplexity_of_classes_is_their_cross_entropy():
    bert = dataclasses.replace(BERT, vocab_size=260, max_length=32, head="classify", labels=2)
    examples = [Example(f"text {i}", (CLASSES.labels[i % 2],), i % 2) for i in range(4)]
    metrics = ("accuracy", "perplexity")
    result, records = run(build(bert), examples, CLASSES, name="sentiment", metrics=metrics)
    p = [r["probabilities"][i % 2] for i, r in enumerate(records)]
    want = math.exp(-sum(map(math.log, p)) / 4)
    assert result.scores["perplexity"].value == pytest.approx(want, rel=1e-4)
    assert "good" in result.confusion()


def test_examples_that_are_skipped_are_counted(tmp_path):
    file = tmp_path / "examples.jsonl"
    lines = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}, {"text": ""}, {}]
    lines += [{"text": "", "label": "good"}]  # begin and end are tokens too
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    data = dataclasses.replace(
        CLASSES, prompt="{text}", target="{label}", validation_sources=(str(file),), on_error="skip"
    )
    bert = dataclasses.replace(BERT, vocab_size=260, max_length=32, head="classify", labels=2)
    examples = list(documents(data, "validation"))
    result, records = run(build(bert), examples, data, name="sentiment")
    assert [r["index"] for r in records] == [0, 1, 4]
    report = result.report()
    assert (report["skipped"], report["examples"]) == (2, 3)
    result, _ = run(build(bert), examples[:2], data, name="sentiment")
    assert "skipped" not in result.report()


def test_what_cannot_be_asked_is_skipped_or_said(tmp_path):
    """An empty prompt where no token begins a text, which is known only then."""
    file, tokenizer = tmp_path / "examples.jsonl", CharacterTokenizer("abc")
    asked = ["a", "", "b", "c"]
    file.write_text("".join(json.dumps({"text": x, "said": "ab"}) + "\n" for x in asked))
    data = dataclasses.replace(
        COMPLETE, prompt="{text}", target="{said}", validation_sources=(str(file),)
    )
    model = build(dataclasses.replace(MODEL, vocab_size=3))
    for metric in ("chrf", "perplexity"):
        with pytest.raises(UserError, match=r"examples\.jsonl:2: an example's prompt is empty"):
            run(model, list(documents(data, "validation")), data, tokenizer, metrics=(metric,))
    data.on_error, metrics = "skip", ("chrf", "perplexity")
    examples = list(documents(data, "validation"))
    result, records = run(model, examples, data, tokenizer, metrics=metrics)
    assert [r["index"] for r in records] == [0, 2, 3]
    assert [r["prompt"] for r in records] == ["a", "b", "c"]
    assert result.report()["skipped"] == 1
    # Each answer is that of its own example.
    _, others = run(model, [examples[i] for i in (0, 2, 3)], data, tokenizer, metrics=metrics)
    assert len({r["nll"] for r in records}) == 3
    for one, record in zip(others, records, strict=True):
        assert one["nll"] == pytest.approx(record["nll"], rel=1e-4)
        assert one | {"index": 0, "nll": 0} == record | {"index": 0, "nll": 0}
    with pytest.raises(UserError, match="there are no examples"):
        run(model, examples[1:2], data, tokenizer, metrics=metrics)


def test_whoever_does_not_want_more_gets_nothing(monkeypatch):
    def never(*_):
        raise AssertionError("asked")

    for name in ("_texts", "_told"):
        monkeypatch.setattr(tasks, name, never)
    with pytest.raises(Stopped):
        run(build(MODEL), stop=lambda: True)
    asked = iter([False, True])  # before the first kind of answers, and before the second
    monkeypatch.setattr(tasks, "_texts", lambda *_: [{}] * len(EXAMPLES))
    with pytest.raises(Stopped):
        run(build(MODEL), metrics=("chrf", "perplexity"), stop=lambda: next(asked))


def test_whoever_stops_keeps_all_but_the_last_batches():
    examples, told, done = EXAMPLES[:2] * 5, [], []
    task = TaskConfig(name="translate", max_tokens=1)
    with pytest.raises(Stopped):
        run_task(
            build(MODEL), BYTES, examples, COMPLETE, task, batch_size=2, on_record=told.append,
            on_done=done.append, stop=lambda: bool(done) and done[-1] >= 9,
        )  # fmt: skip
    assert done == [*range(1, 10)]
    assert [r["index"] for r in told] == [*range(len(told))] and 9 - len(told) <= 4


def test_what_has_no_likelihood_is_refused():
    with pytest.raises(UserError, match="perplexity: an answer that is looked for in a text"):
        run(
            build(MODEL),
            data=DataConfig(objective="extract"),
            name="answer",
            metrics=("perplexity",),
        )
    with pytest.raises(UserError, match="no metric 'perplexit'; did you mean 'perplexity'"):
        run(build(MODEL), metrics=("perplexit",))
