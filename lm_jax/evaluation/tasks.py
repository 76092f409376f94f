"""Applications: how answers to examples are obtained of a model, and how they are scored."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lm_jax.applications import find
from lm_jax.config import OWN_HEADS, DataConfig, TaskConfig
from lm_jax.data.encoding import encode_example, prompt_within, text_to_classify
from lm_jax.data.examples import Example
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation import unanswerable
from lm_jax.evaluation.classes import confusion, confusion_table
from lm_jax.evaluation.classifier import classify
from lm_jax.evaluation.extractor import extract
from lm_jax.evaluation.likelihoods import Likelihood
from lm_jax.evaluation.metrics import METRICS, Score, check_names, score
from lm_jax.evaluation.output import Record
from lm_jax.generation.batching import GENERATED, READ, portions
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.generation.scoring import Scorer
from lm_jax.model.transformer import Transformer

_GREEDY = Sampling(temperature=0.0)

OnDone = Callable[[int], None]


class Stopped(Exception):
    """Whoever asked for answers does not want them any more."""


def metrics_of(task: TaskConfig, objective: str) -> tuple[str, ...]:
    """The metrics of a task, the most telling one first.

    Raises:
      UserError: there is no such task or metric, or the objective has none such.
    """
    names = task.metrics or find(task.name).metrics
    check_names(names)
    if objective == "extract" and (wrong := [n for n in names if _reads_likelihoods(n)]):
        raise UserError(
            f"{wrong[0]}: an answer that is looked for in a text has no tokens of its own, and so"
            " no likelihood: leave it out of the metrics"
        )
    return names


def _reads_likelihoods(name: str) -> bool:
    return METRICS[name].reads == "likelihoods"


def most_tokens(task: TaskConfig) -> int:
    """Of an answer."""
    return task.max_tokens or find(task.name).max_tokens


def settings_of(data: DataConfig, task: TaskConfig) -> dict[str, Any]:
    """What predictions depend on, beside the model and the examples; fit for JSON."""
    out = {"task": task.name, "objective": data.objective}
    out |= {"prompt": data.prompt, "target": data.target}
    told = {_reads_likelihoods(name) for name in metrics_of(task, data.objective)}
    out |= {"predictions": False in told, "likelihoods": True in told}
    match data.objective:
        case "classify":
            return out | {"labels": list(data.labels), "length": data.length}
        case "extract":
            out |= {"context": data.context, "length": data.length, "stride": data.stride}
            if data.unanswerable:
                out["null_threshold"] = task.null_threshold
            return out | {"max_tokens": most_tokens(task)}
    out |= {"max_tokens": most_tokens(task), "beams": task.beams}
    return out | ({"length_penalty": task.length_penalty} if task.beams > 1 else {})


@dataclasses.dataclass(frozen=True)
class Result:
    """
    Attributes:
      records: for each example what was asked, what would be right, and the prediction.
      labels: of classes, their names.
      skipped: examples that could not be read or asked, as `data.on_error` has it.
    """

    scores: dict[str, Score]
    records: list[Record]
    labels: tuple[str, ...] = ()
    skipped: int = 0

    def values(self) -> dict[str, float]:
        return {name: s.value for name, s in self.scores.items()}

    def notes(self) -> dict[str, int]:
        """How many examples are not what they seem, of each kind that there is.

        `skipped` are not in the scores, `shortened` did not fit into the model as they are, and the
        answers of `unfinished` were not at their end when there was no room for more.
        """
        found = {
            "skipped": self.skipped,
            "shortened": sum("shortened" in r for r in self.records),
            "unfinished": sum(r.get("finish_reason") == "length" for r in self.records),
        }
        return {name: n for name, n in found.items() if n}

    def report(self) -> dict[str, Any]:
        """All but the records, fit for JSON; `notes` are a part of it."""
        out: dict[str, Any] = {"examples": len(self.records)} | self.notes()
        if self.scores.keys() & unanswerable.METRICS:
            out |= unanswerable.report(self.records)
        out["scores"] = {name: dataclasses.asdict(s) for name, s in self.scores.items()}
        if self.labels:
            table_CC = confusion_table(*self._classes(), self.labels)
            out["confusion"] = {"labels": list(self.labels), "table": table_CC.tolist()}
        return out

    def confusion(self) -> str:
        """Of classes, a table for a person; of others ''."""
        return confusion(*self._classes(), self.labels) if self.labels else ""

    def _classes(self) -> tuple[list[str], list[str]]:
        """Those that were predicted, and the right ones."""
        return [r["prediction"] for r in self.records], [r["references"][0] for r in self.records]


def run_task(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    data: DataConfig,
    task: TaskConfig,
    *,
    batch_size: int = 8,
    known: Sequence[Record] = (),
    on_record: Callable[[Record], None] | None = None,
    on_done: OnDone | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Asks a model what the examples ask, and scores its answers.

    Inside `jax.set_mesh` it works on that mesh. Of several processes, all of them call this with
    the same arguments, and each gets all of the result.

    Args:
      known: records of examples that were answered before, by their `index`.
      on_record: called with each record when its portion is done (`portions`), of texts that are
        generated two batches.
      on_done: called with the number of examples answered.
      stop: asked before anything is done, and then batch by batch: whether to leave the rest.

    Raises:
      UserError: there is no such task or metric, no example, or the model cannot do this.
      Stopped: `stop` said so.
    """
    names = metrics_of(task, data.objective)
    told = {_reads_likelihoods(name) for name in names}
    asked = [(i, e) for i, e in enumerate(examples) if e.targets]
    there = {r["index"]: r for r in known}
    waiting = [(i, e) for i, e in asked if i not in there]
    if data.objective in OWN_HEADS:
        parts = [_classes if data.objective == "classify" else _spans]
    else:
        parts = [part for part, of in ((_texts, False), (_told, True)) if of in told]
    asker = _Asker(model, tokenizer, data, task, batch_size)
    done = len(asked) - len(waiting)

    def go_on() -> None:
        if stop and stop():
            raise Stopped

    def count(n: int) -> None:
        if on_done:
            on_done(done + n)
        go_on()

    for some in portions(waiting, batch_size, GENERATED if _texts in parts else READ):
        found = []
        for part in parts:
            go_on()
            found.append(part(asker, [e for _, e in some], (lambda _: go_on()) if found else count))
        for (i, example), *answers in zip(some, *found, strict=True):
            if None not in answers:
                there[i] = {"index": i} | asked_by(example)
                for answer in answers:
                    there[i] |= answer
                if on_record:
                    on_record(there[i])
        done += len(some)
    records = [there[i] for i, _ in asked if i in there]
    if not records:
        raise UserError("there are no examples to evaluate")
    predictions = [r["prediction"] for r in records] if False in told else []
    references = [[_plain(t) for t in r["references"]] for r in records] if predictions else []
    likelihoods = [Likelihood(r["nll"], r["tokens"]) for r in records] if True in told else None
    scores = score(names, predictions, references, likelihoods=likelihoods)
    labels = data.labels if data.objective == "classify" else ()
    # One without targets is a record that was skipped when it was read.
    return Result(scores, records, labels, skipped=len(examples) - len(records))


def asked_by(example: Example) -> Record:
    """What a record of a prediction tells of its example."""
    context = {"context": example.context} if example.context else {}
    return {"prompt": example.prompt} | context | {"references": list(example.targets)}


def _plain(text: str) -> str:
    return text.strip()


# What is told of some examples: for each a part of its record, None where it cannot be asked.


@dataclasses.dataclass(frozen=True)
class _Asker:
    """Who is asked, and how."""

    model: Transformer
    tokenizer: Tokenizer
    data: DataConfig
    task: TaskConfig
    batch_size: int

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.model, self.tokenizer)


def _texts(asker: _Asker, examples: Sequence[Example], on_done: OnDone) -> list[Record | None]:
    task, limit = asker.task, asker.model.config.max_length
    most = most_tokens(task)
    room = max(limit - most, limit // 2)  # an answer has what its prompt leaves
    encoded = _encoded(examples, lambda e: prompt_within(e, asker.tokenizer, room))
    prompts = [ids for ids, _ in encoded.values()]
    common = {"max_tokens": most, "batch_size": asker.batch_size, "on_done": on_done}
    if not prompts:
        completions = []
    elif task.beams > 1:
        completions = asker.generator.beam_search(
            prompts, beams=task.beams, length_penalty=task.length_penalty, **common
        )
    else:
        completions = asker.generator.generate(prompts, sampling=_GREEDY, **common)
    cut = [i for i, (_, cut) in encoded.items() if cut]
    answers = [
        {"prediction": _plain(c.text), "finish_reason": c.finish_reason} for c in completions
    ]
    return _in_place(len(examples), encoded, answers, cut)


def _told(asker: _Asker, examples: Sequence[Example], on_done: OnDone) -> list[Record | None]:
    """How probable the right answers are, each after what is asked, as they are learned."""
    data = dataclasses.replace(asker.data, turns="apart", length=asker.model.config.max_length)
    encoded = _encoded(examples, lambda e: encode_example(e, asker.tokenizer, data))
    rows = []
    for pairs_P3, _ in encoded.values():
        ids = np.append(pairs_P3[:, 0], pairs_P3[-1, 1])
        rows.append((ids, 1 + int(pairs_P3[:, 2].argmax())))
    found = Scorer(asker.model, asker.tokenizer, batch_size=asker.batch_size).of_ids(rows, on_done)
    cut = [i for i, (_, whole) in encoded.items() if not whole]
    answers = [{"nll": -f.log_p, "tokens": f.tokens} for f in found]
    return _in_place(len(examples), encoded, answers, cut)


def _classes(asker: _Asker, examples: Sequence[Example], on_done: OnDone) -> list[Record | None]:
    data = asker.data
    likely = any(map(_reads_likelihoods, metrics_of(asker.task, data.objective)))
    longest = min(data.length, asker.model.config.max_length)
    encoded = _encoded(examples, lambda e: text_to_classify(e, asker.tokenizer, longest))
    rows = [ids for ids, _ in encoded.values()]
    found = classify(
        asker.model, rows, pooling=data.pooling, batch_size=asker.batch_size, on_done=on_done
    )
    cut, answers = [i for i, (_, whole) in encoded.items() if not whole], []
    for i, p_C in zip(encoded, found, strict=True):
        answer = {
            "prediction": data.labels[int(p_C.argmax())],
            "probabilities": [round(float(p), 6) for p in p_C],
        }
        if likely:
            least = np.finfo(np.float32).tiny
            answer |= {"nll": -math.log(max(p_C[examples[i].label], least)), "tokens": 1}
        answers.append(answer)
    return _in_place(len(examples), encoded, answers, cut)


def _spans(asker: _Asker, examples: Sequence[Example], on_done: OnDone) -> list[Record | None]:
    found = extract(
        asker.model,
        asker.tokenizer,
        examples,
        asker.data,
        max_tokens=most_tokens(asker.task),
        batch_size=asker.batch_size,
        on_done=on_done,
    )
    return [a and a.record(asker.data.unanswerable, asker.task.null_threshold) for a in found]


def _in_place(
    count: int, places: Iterable[int], answers: Iterable[Record], cut: Sequence[int]
) -> list[Record | None]:
    """Answers at the places of their examples, those at the places `cut` marked as shortened."""
    out: list[Record | None] = [None] * count
    for i, answer in zip(places, answers, strict=True):
        out[i] = answer | ({"shortened": True} if i in cut else {})
    return out


def _encoded(
    examples: Sequence[Example], encode: Callable[[Example], tuple[np.ndarray, bool]]
) -> dict[int, tuple[np.ndarray, bool]]:
    """Place -> what `encode` gives; without those that it does not take, which are told as records
    that cannot be read are."""
    out = {}
    for i, example in enumerate(examples):
        try:
            out[i] = encode(example)
        except UserError as e:
            example.bad(str(e))
    return out
