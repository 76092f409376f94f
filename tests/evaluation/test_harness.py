"""Tasks of lm-evaluation-harness: what it says of a model is what a direct computation says."""

import contextlib
import dataclasses
import json
import math

import datasets
import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from tiny_models import BERT, LLAMA, build, quick_jit

from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation import harness
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.generation.scoring import Scorer

SHAPE = {"vocab_size": 260, "max_length": 32}
MODEL = dataclasses.replace(LLAMA, **SHAPE)
DOCUMENTS = [
    {"question": f"{'say ' * (i % 3)}what{i}?", "choices": [f"no{i}", f"yes{i}"], "answer": i % 2}
    for i in range(8)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata:
  version: 1.0
"""
KINDS = {
    "choices": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "answers": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Task files and their data; nothing is read or written elsewhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    (tmp_path / "tasks").mkdir()
    for name, rest in KINDS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + rest)
    return str(tmp_path / "tasks")


def test_tasks_score_as_a_direct_computation_does(folder):
    scorer, told = Scorer(build(MODEL), BytesTokenizer()), []
    tasks = harness.load_tasks([*KINDS], folder)
    harness.set_shots(tasks, None)
    result, samples = harness.run(harness.HarnessModel(scorer, on_answer=told.append), tasks)

    @quick_jit
    def scores(model, ids):
        return jax.nn.log_softmax(model.logits(model(ids)[0]))[0]

    def log_p(context: str, text: str) -> float:
        ids = np.zeros((1, 32), np.int32)  # what comes after a text plays no part in it
        own = [256, *(context + text).encode()]
        ids[0, : len(own)] = own
        found = np.asarray(scores(scorer.model, ids), np.float64)
        return sum(found[k - 1, own[k]] for k in range(1 + len(context), len(own)))

    chosen = [
        int(np.argmax([log_p(d["question"], f" {choice}") for choice in d["choices"]]))
        for d in DOCUMENTS
    ]
    right = [c == d["answer"] for c, d in zip(chosen, DOCUMENTS)]
    assert result["results"]["choices"]["acc,none"] == np.mean(right)
    assert 0 < np.mean(right) < 1
    assert [s["acc"] for s in samples if s["task"] == "choices"] == right
    total = sum(log_p("", d["question"]) for d in DOCUMENTS)
    size = sum(len(d["question"].encode()) for d in DOCUMENTS)
    got = result["results"]["texts"]["byte_perplexity,none"]
    assert got == pytest.approx(math.exp(-total / size), rel=1e-4)
    follows = Generator(scorer.model, scorer.tokenizer).generate(
        [d["question"] for d in DOCUMENTS],
        max_tokens=5,
        stop=["e"],
        sampling=Sampling(temperature=0.0),
    )
    answers = [s["resps"][0][0] for s in samples if s["task"] == "answers"]
    assert answers == [c.text for c in follows]
    assert result["n-samples"]["choices"]["effective"] == 8 and "shortened" not in result
    # Of what was told before, nothing is asked again, and the same is found.
    assert len(told) == 16 + 8 + 8
    told, more = json.loads(json.dumps(told)), []
    model = harness.HarnessModel(scorer, known=told[5:], on_answer=more.append)
    again, _ = harness.run(model, tasks)
    assert [m["request"] for m in more] == [t["request"] for t in told[:5]]
    for task, values in result["results"].items():
        numbers = {key: v for key, v in values.items() if isinstance(v, float)}
        found = again["results"][task]
        assert {key: found[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    # The first three alone, after one that is solved.
    with pytest.raises(UserError, match="'choices' is to be asked without examples"):
        harness.set_shots(tasks, 1)
    harness.set_shots(tasks := harness.load_tasks([*KINDS], folder), 1)
    few, samples = harness.run(harness.HarnessModel(scorer), tasks, limit=3)
    assert few["n-samples"]["choices"]["effective"] == 3 and few["n-shot"]["answers"] == 1
    assert sum(s["task"] == "texts" for s in samples) == 3
    solved = [s["arguments"][0][0] for s in samples if s["task"] == "answers"]
    assert all(any(f"{d['question']} {d['choices'][0]}" in s for d in DOCUMENTS) for s in solved)


def request(*args) -> Instance:
    return Instance("generate_until", {}, args, 0)


def test_what_does_not_fit_is_shortened_from_its_beginning():
    model = harness.HarnessModel(Scorer(build(MODEL), BytesTokenizer()))
    text = "".join(chr(97 + i * i % 26) for i in range(40))
    settings = {"until": "\n\n", "max_gen_toks": 4}
    texts = [text[-27:], text, "x", "y", "é" * 20, "a", "b", "c"]  # as many as before
    whole, cut, *_ = model.generate_until([request(t, settings) for t in texts])
    assert whole == cut and model.shortened == 2
    model.loglikelihood([Instance("loglikelihood", {}, (text, "!"), 0)])
    assert model.shortened == 3


def test_it_says_how_far_it_has_come_and_keeps_all_but_the_last_batches(monkeypatch):
    done, told = [], []

    @contextlib.contextmanager
    def killed(*_, **__):
        def count(n: int) -> None:
            done.append(n)
            if n == 9:
                raise KeyboardInterrupt

        yield count

    monkeypatch.setattr(harness, "progress", killed)
    scorer = Scorer(build(MODEL), BytesTokenizer(), batch_size=2)
    model = harness.HarnessModel(scorer, on_answer=told.append)
    with pytest.raises(KeyboardInterrupt):
        model.generate_until([request(f"text {i}", {"max_gen_toks": 1}) for i in range(10)])
    assert sorted({*done}) == [*range(1, 10)] and 9 - len(told) <= 4
    done.clear()
    model.loglikelihood([Instance("loglikelihood", {}, (f"a{i}", "b"), i) for i in range(6)])
    assert done[:3] == [2, 4, 6]
    done.clear()
    model.loglikelihood_rolling([Instance("", {}, (f"text {i}",), i) for i in range(6)])
    assert done[:3] == [2, 4, 6]
    done.clear()
    model.generate_until([request("a", {"max_gen_toks": 1, "temperature": 1.0})] * 3)
    assert done[:3] == [1, 2, 3]


def test_messages_name_the_document():
    model = harness.HarnessModel(Scorer(build(MODEL), BytesTokenizer(), batch_size=2))
    where = {"metadata": ("piqa", 17, 1)}
    for kind, args in (
        ("loglikelihood", ("a", "")),
        ("loglikelihood_rolling", ("\ud800",)),
        ("generate_until", ("\ud800", {"max_gen_toks": 1})),
    ):
        with pytest.raises(UserError, match="task 'piqa', doc_id 17: "):
            getattr(model, kind)([Instance(kind, {}, args, 0, **where)])


def test_generation_settings():
    settings = harness._settings
    assert settings({"until": ["a", ""]}) == (("a",), 256, Sampling(0.0, top_k=0))
    assert settings({"until": "b", "max_gen_toks": 3, "temperature": 0.7})[1:] == (
        3,
        Sampling(0.7, top_k=0),
    )
    assert settings({"do_sample": True, "top_p": 0.5})[2] == Sampling(1.0, top_k=0, top_p=0.5)
    assert settings({"do_sample": False, "temperature": 0.7})[2].temperature == 0
    with pytest.raises(UserError, match="num_beams: not supported"):
        settings({"num_beams": 4})


def test_what_cannot_be_run_is_told(folder, tmp_path, monkeypatch):
    manager = harness.TaskManager  # without the thousands that come with the harness
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, include_defaults=True: manager(
            include_path=include_path, include_defaults=False
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="no task 'choice'; did you mean 'choices'"):
        harness.load_tasks(["choice"], folder)
    with pytest.raises(UserError, match="no folder 'nowhere'"):
        harness.load_tasks(["choices"], "nowhere")
    (tmp_path / "documents.jsonl").unlink()
    with pytest.raises(UserError, match="choices cannot be loaded"):
        harness.load_tasks(["choices"], folder)
    (tmp_path / "tasks" / "bad.yaml").write_text("task: bad\noutput_type: none\n")
    with pytest.raises(UserError, match="bad cannot be loaded"):
        harness.load_tasks(["bad"], folder)
    bert = Scorer(build(dataclasses.replace(BERT, **SHAPE)), BytesTokenizer(mask=True))
    with pytest.raises(UserError, match=r"model.causal = False"):
        harness.HarnessModel(bert)
    model = harness.HarnessModel(Scorer(build(MODEL), BytesTokenizer()))
    with pytest.raises(UserError, match="a task generates 32 tokens, and the model takes 32"):
        model.generate_until([request("a", {"max_gen_toks": 32})])
