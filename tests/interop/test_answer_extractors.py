"""Models that find answers, from Transformers and back: the same answers to the same questions."""

import functools
import json
import pathlib

import jax
import numpy as np
import published
import published_folders
import pytest
import torch
import transformers as hf
from tiny_models import on_devices

from lm_jax.config import Config
from lm_jax.data.examples import Example
from lm_jax.errors import UserError
from lm_jax.evaluation.extractor import extract
from lm_jax.evaluators.application import evaluate_task
from lm_jax.training import conversion
from lm_jax.training.inference import load_for_inference
from lm_jax.training.loop import train
from lm_jax.training.weights import resolved
from lm_jax.validation import validate

CASES = {
    "bert": ("Bert", published.ENCODER),
    "roberta": ("Roberta", published.ENCODER | {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", published.DISTILBERT),
}
# The last of them has a context of several windows.
ASKED = [
    Example("Who?", ("Ann",), context="It was Ann who came, and not Bob."),
    Example("How many, and why?", ("two",), context="Of 12 there are two."),
    Example("Where?", ("home",), context=" ".join(f"{i} went home and" for i in range(30))),
]
LENGTH, STRIDE = 48, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    return {case: written(case, tmp_path_factory.mktemp(case)) for case in CASES}


def written(case: str, out: pathlib.Path) -> pathlib.Path:
    published_folders.write(out, published_folders.FAMILIES[
        "roberta" if case == "roberta" else "bert"
    ]())  # fmt: skip
    tokenizer, (name, values) = hf.AutoTokenizer.from_pretrained(out), CASES[case]
    torch.manual_seed(0)
    config = getattr(hf, name + "Config")(**values | {"vocab_size": len(tokenizer)})
    model = getattr(hf, name + "ForQuestionAnswering")(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(0.3 * torch.randn_like(p) + (p.ndim == 1 and key.endswith("weight")))
    model.save_pretrained(out)
    return out


Found = tuple[str, float, float]  # the answer, its score, and that of no answer


def theirs(folder: pathlib.Path, most: int) -> list[Found]:
    """The best spans by Transformers, with its tokenizer and its windows."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    with published.silence():
        model, report = hf.AutoModelForQuestionAnswering.from_pretrained(
            folder, output_loading_info=True
        )
    assert not any(report.values()), report
    out = []
    for example in ASKED:
        given = tokenizer(
            example.prompt, example.context, max_length=LENGTH, stride=STRIDE,
            truncation="only_second", return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best, null = ("", -np.inf), np.inf
        for n, ids in enumerate(given["input_ids"]):
            inputs = {"input_ids": torch.tensor([ids])}
            if model.config.model_type == "bert":
                inputs["token_type_ids"] = torch.tensor([given["token_type_ids"][n]])
            with torch.no_grad():
                scores = model.eval()(**inputs)
            begin, end = scores.start_logits[0].numpy(), scores.end_logits[0].numpy()
            null = min(null, float(begin[0] + end[0]))
            places = [i for i, s in enumerate(given.sequence_ids(n)) if s == 1]
            for i in places:
                for j in places:
                    if 0 <= j - i < most and begin[i] + end[j] > best[1]:
                        span = given["offset_mapping"][n]
                        text = example.context[span[i][0] : span[j][1]].strip()
                        best = (text, float(begin[i] + end[j]))
        out.append((*best, null))
    return out


def ours(path: pathlib.Path, most: int, batch_size: int = 2) -> list[Found]:
    mesh = on_devices((1, 1, 1))
    loaded = load_for_inference(str(path), mesh, None, "float32")
    data = loaded.config.data
    data.length, data.stride = LENGTH, STRIDE
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        found = extract(
            loaded.model, loaded.tokenizer, ASKED, data, max_tokens=most, batch_size=batch_size
        )
    for example, answer in zip(ASKED, found, strict=True):
        assert example.context[answer.start :].startswith(answer.text)
    return [(answer.text, answer.score, answer.null) for answer in found]


def same(a: list[Found], b: list[Found]) -> None:
    assert [text for text, *_ in a] == [text for text, *_ in b]
    np.testing.assert_allclose([s for _, *s in a], [s for _, *s in b], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_in_transformers_and_comes_and_goes(case, folders, tmp_path):
    folder = folders[case]
    want = theirs(folder, most=6)
    assert len({text for text, *_ in want}) > 1  # of a vocabulary that is learned anew each time
    same(ours(folder, most=6), want)
    same(ours(folder, most=6, batch_size=16), want)
    loaded = conversion.load(str(folder))
    _, missing = conversion.to_huggingface(loaded, str(tmp_path / "out"))
    assert missing is None
    same(theirs(tmp_path / "out", most=6), want)
    comparison = conversion.compare(loaded, str(tmp_path / "out"))
    assert comparison.agree() and comparison.same_choice > 0.95


def test_fine_tuned_it_is_exported(folders, tmp_path):
    """As the test before exports each family: of what a run has learned there is one."""
    folder = folders["bert"]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(
        json.dumps({"question": e.prompt, "context": e.context, "answers": list(e.targets)}) + "\n"
        for e in ASKED * 8
    ))  # fmt: skip
    config = validate(resolved(_recipe(str(folder), str(path)), str(tmp_path / "run")))
    assert train(config, str(tmp_path / "run")) == 0
    _, missing = conversion.to_huggingface(
        conversion.load(str(tmp_path / "run")), str(tmp_path / "out")
    )
    want = ours(tmp_path / "run", most=6)
    assert missing is None and want != ours(folder, most=6)
    same(theirs(tmp_path / "out", most=6), want)
    report, result = evaluate_task(str(tmp_path / "out"), "answer", sources=(str(path),))
    assert set(report["scores"]) == {"f1", "exact_match"} and len(result.records) == 24


def test_a_threshold_needs_questions_without_an_answer(folders, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(
        json.dumps({"question": "who?", "context": "a dog", "answers": []}) + "\n"
        + json.dumps({"question": "who?", "context": "a dog", "answers": ["dog"]}) + "\n"
    )  # fmt: skip
    ask = functools.partial(evaluate_task, str(folders["bert"]), "answer", sources=[str(path)])
    report, result = ask(unanswerable=True, null_threshold=1e9)
    assert report["examples"] == 2 and all(r["prediction"] for r in result.records)
    _, result = ask(unanswerable=True, null_threshold=-1e9)
    assert not any(r["prediction"] for r in result.records)
    with pytest.raises(UserError, match=r"--null_threshold: .*leave it out"):
        ask(null_threshold=1.0)


def _recipe(folder: str, source: str):
    config = Config(init_from=folder)
    data, training = config.data, config.training
    data.sources, data.validation_fraction = (source,), 0.2
    data.objective, data.prompt, data.context, data.target = (
        "extract", "{question}", "{context}", "{answers}"
    )  # fmt: skip
    data.length, data.stride, data.batch_size = LENGTH, STRIDE, 8
    config.model.dtype = "float32"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 1
    training.steps, training.evaluate_every = 2, 0
    config.logging.tensorboard = False
    return config
