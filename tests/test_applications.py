"""Each application from its recipe's tiny variant to a score, on examples that can be learned."""

import contextlib
import json
import os
import random
import re
import signal
import urllib.request

import commands
import pytest

from lm_jax.evaluation.metrics import score
from lm_jax.evaluators.application import evaluate_task
from lm_jax.training import answering
from lm_jax.training.loop import train

WORDS = {"dog": "hund", "cat": "katze", "man": "mann", "runs": "rennt", "sleeps": "schlaeft"}
MOODS = {"good": "positive", "bad": "negative"}


def _sentences(count):
    rng = random.Random(0)
    return [f"the {rng.choice(['dog', 'cat', 'man'])} {rng.choice(['runs', 'sleeps'])}"
            for _ in range(count)]  # fmt: skip


def _answers(count):
    return [
        {"context": s, "question": "Who?", "answers": [s.split()[1], "the " + s.split()[1]]}
        for s in _sentences(count)
    ]


def _squad(count, unanswerable):
    """Of the second version, each third question has no answer."""
    paragraphs = []
    for i, s in enumerate(_sentences(count)):
        asked = {"id": str(i), "question": "Who?"}
        asked["answers"] = [{"text": s.split()[1], "answer_start": 4}]
        if unanswerable and i % 3 == 0:
            asked |= {"question": "Where?", "answers": [], "is_impossible": True}
        paragraphs.append({"context": s, "qas": [asked]})
    return {"data": [{"title": "t", "paragraphs": paragraphs}]}


def _examples(name, count):
    sentences, rng = _sentences(count), random.Random(1)
    if name == "translate":
        return [
            {"en": s, "de": "der " + " ".join(map(WORDS.get, s.split()[1:]))} for s in sentences
        ]
    if name == "sentiment":
        moods = [rng.choice(sorted(MOODS)) for _ in sentences]
        return [{"text": f"{s}, a {m} one", "label": MOODS[m]} for s, m in zip(sentences, moods)]
    if name == "summarize":
        return [{"dialogue": f"A: {s}. B: yes.", "summary": s.split()[-1]} for s in sentences]
    return [
        {
            "messages": [
                {"role": "user", "content": s},
                {"role": "assistant", "content": " ".join(s.split()[1:])},
            ]
        }
        for s in sentences
    ]


def recipe(name, variant="tiny", **overrides):
    config = commands.loaded(f"configs/{name}.py").get_config(variant)
    config.logging.tensorboard = False
    config.tokenizer.vocab_size = 300
    for key, value in overrides.items():
        section, _, field = key.partition("__")
        assert hasattr(getattr(config, section), field), key
        setattr(getattr(config, section), field, value)
    return config


def written(folder, name, count=120, unanswerable=False):
    if name == "answer":
        path = folder / "examples.json"
        path.write_text(json.dumps(_squad(count, unanswerable)))
    else:
        path = folder / "examples.jsonl"
        path.write_text("".join(json.dumps(e) + "\n" for e in _examples(name, count)))
    return str(path)


@pytest.mark.parametrize(
    ("name", "steps", "metric", "least"),
    [
        ("translate", 50, "chrf", 80.0),
        ("sentiment", 30, "accuracy", 95.0),
        ("summarize", 35, "rougeL", 80.0),
        ("answer", 50, "f1", 80.0),
        ("answer:extract_tiny", 60, "f1", 95.0),
        ("instruct", 25, "rougeL", 80.0),
    ],
)
def test_a_recipe_learns_and_is_scored(name, steps, metric, least, tmp_path, capsys):
    name, _, variant = name.partition(":")
    unanswerable, workdir = variant == "extract_tiny", str(tmp_path / "run")
    source = written(tmp_path, name, unanswerable=unanswerable)
    config = recipe(
        name,
        variant or "tiny",
        data__sources=(source,),
        data__unanswerable=unanswerable,
        data__validation_fraction=0.2,
        training__steps=steps,
        training__evaluate_every=0,
        task__every=0,
        checkpoint__every=0,
    )
    assert train(config, workdir) == 0
    best = "/best" if config.task.keep_best else ""
    assert f"evaluate --task={name} --workdir={workdir}{best}\n" in capsys.readouterr().err
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (scored,) = [x for x in lines if x["kind"] == "task"]
    assert scored[metric] >= least, scored

    report, result = evaluate_task(workdir + best, name)
    found = report["scores"][metric]
    assert found["value"] == pytest.approx(scored[metric], abs=1e-6)
    assert found["low"] <= found["value"] <= found["high"]
    told = tmp_path / "run" / "predictions" / f"{steps}"
    assert json.loads(told.with_suffix(".report.json").read_text())["result"]["scores"] == {
        key: {k: pytest.approx(v) for k, v in s.items()} for key, s in report["scores"].items()
    }
    records = [json.loads(x) for x in told.with_suffix(".jsonl").read_text().splitlines()]
    assert [r["prediction"] for r in records] == [r["prediction"] for r in result.records]
    # Nothing that is said to all of them alike comes near.
    references = [r["references"] for r in result.records]
    for same in {several[0] for several in references}:
        assert score([metric], [same] * len(references), references)[metric].value < least - 10
    assert ("unanswerable" in report) == unanswerable
    if unanswerable:
        of_kinds = report["unanswerable"]["by_kind"]
        assert {kind: least <= x[metric] for kind, x in of_kinds.items()} == {
            "answerable": True, "unanswerable": True
        }  # fmt: skip
        assert report["unanswerable"]["best"][metric]["score"] >= scored[metric]
    if name == "instruct":
        assert talked_with(workdir) == "dog runs"


def talked_with(workdir: str) -> str:
    """What the assistant says to one who meets it at its server."""
    server = commands.start("serve", f"--workdir={workdir}", "--port=0", "--slots=1")
    try:
        address = re.search(r"serving 'run' at (http://\S+)", server.stdout.readline())[1]
        body = {"messages": [{"role": "user", "content": "the dog runs"}], "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            (choice,) = json.load(response)["choices"]
    finally:
        server.kill()
        server.communicate()
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"].strip()


def test_a_signal_while_answering_saves_and_what_is_left_is_done_later(tmp_path, monkeypatch):
    source, workdir = written(tmp_path, "sentiment", 20), tmp_path / "run"
    config = recipe(
        "sentiment",
        data__sources=(source,),
        data__validation_fraction=0.2,
        training__steps=2,
        training__evaluate_every=0,
        task__every=0,
        checkpoint__every=0,
    )

    @contextlib.contextmanager
    def interrupted(*_, **__):
        yield lambda done: os.kill(os.getpid(), signal.SIGTERM)

    def answered() -> list[int]:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [r["step"] for r in map(json.loads, lines) if r["kind"] == "task"]

    with monkeypatch.context() as patch:
        patch.setattr(answering, "progress", interrupted)
        assert train(config, str(workdir)) == signal.SIGTERM
    assert answered() == [] and os.listdir(workdir / "checkpoints") == ["2"]
    assert train(config, str(workdir)) == 0
    assert answered() == [2]
    assert os.listdir(workdir / "best" / "checkpoints") == ["2"]
    assert train(config, str(workdir)) == 0 and answered() == [2]  # it is all there
    config.task.metrics = ("f1",)
    assert train(config, str(workdir)) == 0 and answered() == [2, 2]
    report = json.loads((workdir / "predictions" / "2.report.json").read_text())
    assert [*report["result"]["scores"]] == ["f1"]
