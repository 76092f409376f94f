"""Applications: what is asked of a model, how its answers are obtained, and how they are scored."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from lm_jax import paths
from lm_jax.applications import find
from lm_jax.config import DataConfig, TaskConfig
from lm_jax.data.encoding import prompt_within
from lm_jax.data.examples import Example
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.classes import confusion
from lm_jax.evaluation.classifier import classify
from lm_jax.evaluation.extractor import extract
from lm_jax.evaluation.metrics import Score, check_names, score
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.model.transformer import Transformer

_GREEDY = Sampling(temperature=0.0)


def metrics_of(task: TaskConfig) -> tuple[str, ...]:
    """The metrics of a task, the most telling one first.

    Raises:
      UserError: there is no such task or metric.
    """
    names = task.metrics or find(task.name).metrics
    check_names(names)
    return names


@dataclasses.dataclass(frozen=True)
class Result:
    """
    Attributes:
      records: for each example what was asked, what would be right, and the prediction.
      confusion: of classes, a table for a person.
    """

    scores: dict[str, Score]
    records: list[dict[str, Any]]
    confusion: str = ""

    def values(self) -> dict[str, float]:
        return {name: s.value for name, s in self.scores.items()}


def run_task(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    data: DataConfig,
    task: TaskConfig,
    *,
    batch_size: int = 8,
    known: Sequence[dict[str, Any]] = (),
    on_record: Callable[[dict[str, Any]], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Result:
    """Asks a model what the examples ask, and scores its answers.

    Inside `jax.set_mesh` it works on that mesh.

    Args:
      known: records of examples that were answered before, by their `index`.
      on_record: called with each record as soon as it is there.
      on_done: called with the number of examples answered.

    Raises:
      UserError: there is no such task or metric, no example, or the model cannot do this.
    """
    names = metrics_of(task)
    asked = [(i, e) for i, e in enumerate(examples) if e.targets]
    if not asked:
        raise UserError("there are no examples to evaluate")
    there = {r["index"]: r for r in known}
    waiting = [(i, e) for i, e in asked if i not in there]
    answer = {"classify": _classes, "extract": _spans}.get(data.objective, _texts)
    for first in range(0, len(waiting), 16 * batch_size):
        some = waiting[first : first + 16 * batch_size]
        before = len(asked) - len(waiting) + first
        count = (lambda n, before=before: on_done(before + n)) if on_done else None
        found = answer(model, tokenizer, [e for _, e in some], data, task, batch_size, count)
        for (i, example), prediction in zip(some, found):
            if prediction is not None:
                there[i] = {"index": i} | _asked(example) | prediction
                if on_record:
                    on_record(there[i])
    records = [there[i] for i, _ in asked if i in there]
    predictions = [r["prediction"] for r in records]
    references = [[_plain(t) for t in r["references"]] for r in records]
    scores = score(names, predictions, references)
    table = ""
    if data.objective == "classify":
        table = confusion(predictions, [r[0] for r in references], data.labels)
    return Result(scores, records, table)


def _asked(example: Example) -> dict[str, Any]:
    """What a record of a prediction tells of its example."""
    context = {"context": example.context} if example.context else {}
    return {"prompt": example.prompt} | context | {"references": list(example.targets)}


def _plain(text: str) -> str:
    return text.strip()


def _texts(model, tokenizer, examples, data, task, batch_size, on_done) -> list[dict[str, Any]]:
    kind, limit = find(task.name), model.config.max_length
    most = task.max_tokens or kind.max_tokens
    room = max(limit - most, limit // 2)  # an answer has what its prompt leaves
    prompts = [prompt_within(example, tokenizer, room)[0] for example in examples]
    generator = Generator(model, tokenizer)
    if task.beams > 1:
        completions = generator.beam_search(
            prompts,
            max_tokens=most,
            beams=task.beams,
            length_penalty=task.length_penalty,
            batch_size=batch_size,
            on_done=on_done,
        )
    else:
        completions = generator.generate(
            prompts, max_tokens=most, sampling=_GREEDY, batch_size=batch_size, on_done=on_done
        )
    return [{"prediction": _plain(c.text), "finish_reason": c.finish_reason} for c in completions]


def _classes(model, tokenizer, examples, data, task, batch_size, on_done) -> list[dict[str, Any]]:
    del task
    found = classify(
        model,
        tokenizer,
        examples,
        length=data.length,
        batch_size=batch_size,
        on_done=on_done,
    )
    return [
        {
            "prediction": data.labels[int(p_C.argmax())],
            "probabilities": [round(float(p), 6) for p in p_C],
        }
        for p_C in found
    ]


def _spans(
    model, tokenizer, examples, data, task, batch_size, on_done
) -> list[dict[str, Any] | None]:
    most = task.max_tokens or find(task.name).max_tokens
    found = extract(
        model,
        tokenizer,
        examples,
        data,
        max_tokens=most,
        batch_size=batch_size,
        on_done=on_done,
    )
    return [a and a.record(data.unanswerable, task.null_threshold) for a in found]


def read_records(path: str, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What an evaluation that was stopped wrote to `path`; a line cut off in the middle is dropped.

    Raises:
      UserError: it is of other examples.
    """
    found: list[dict[str, Any]] = []
    if not os.path.exists(path):
        return found
    for line in paths.read_text(path).splitlines():
        try:
            record = json.loads(line)
            asked = _asked(examples[record["index"]])
            same = "prediction" in record and all(record[k] == v for k, v in asked.items())
        except (ValueError, KeyError, TypeError, IndexError):
            continue
        if not same:
            raise UserError(
                f"--output: '{path}' holds predictions for other examples: name another file"
            )
        found.append(record)
    return found
