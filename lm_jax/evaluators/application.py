"""An application of a model that lies somewhere, evaluated on examples."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from lm_jax.applications import find
from lm_jax.config import OF_EXAMPLES, Config, DataConfig, TaskConfig
from lm_jax.data.chat import chat_template_of
from lm_jax.data.examples import Example
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.metrics import check_references, table
from lm_jax.evaluation.output import Output, Record
from lm_jax.evaluation.tasks import Result, asked_by, metrics_of, run_task, settings_of
from lm_jax.evaluators.models import DEFAULT, ModelOptions, asked_of, checked, identity, prints
from lm_jax.example_validation import without_use
from lm_jax.progress import progress
from lm_jax.training import together

_TEMPLATES = ("prompt", "target", "context")


def evaluate_task(
    path: str,
    name: str,
    model: ModelOptions = DEFAULT,
    *,
    sources: Sequence[str] = (),
    prompt: str | None = None,
    target: str | None = None,
    context: str | None = None,
    unanswerable: bool | None = None,
    output: str | None = None,
    max_examples: int | None = None,
    on_error: str | None = None,
    **task: Any,
) -> tuple[dict[str, Any], Result]:
    """Scores of a model's answers.

    Of several processes, all call this; the first one writes.

    Args:
      path: a workdir or a Hugging Face folder.
      name: a key of `lm_jax.applications.APPLICATIONS`.
      model: its `batch_size` is the run's where it is None.
      sources: files of examples; (): the run's own validation split.
      prompt, target, context: templates; None: the run's, if it learned from examples, or the
        task's.
      unanswerable: as `DataConfig.unanswerable`; None: the run's.
      output: a file for the predictions, see `lm_jax.evaluation.output`.
      max_examples: the first so many; None: all.
      on_error: as `DataConfig.on_error`; None: the run's.
      task: fields of `TaskConfig` that differ from the run's, if that had this task, or the usual
        ones; None: they do not.

    Returns:
      What there is to report, fit for JSON, and the result.

    Raises:
      UserError: there is no such model or task, the examples cannot be read or scored, the model
        cannot do this, or `output` holds something else.
    """
    find(name)
    mesh = model.mesh()
    described = model.describe(path)
    of_data = dict(zip(_TEMPLATES, (prompt, target, context)))
    of_data |= {"unanswerable": unanswerable, "on_error": on_error}
    config = _changed(described.config, name, described.tokenizer, _given(of_data), _given(task))
    data, settings = config.data, config.task
    if sources:
        data.validation_sources = tuple(sources)
    asked = asked_of(data)
    examples = documents(data, "validation")
    count = len(examples) if max_examples is None else min(max_examples, len(examples))
    examples = [examples[i] for i in range(count)]
    check_references(
        metrics_of(settings, data.objective), [e.targets for e in examples if e.targets]
    )
    about = identity(described) | settings_of(data, settings)
    together.check_same([about, list(map(asked_by, examples))], "for other examples, or otherwise")
    with _records(output, about, examples) as (file, known):
        loaded = described.load(mesh)
        with (
            jax.set_mesh(mesh),
            progress("examples", count, start=len(known), active=prints()) as on_done,
        ):
            result = run_task(
                loaded.model,
                described.tokenizer,
                examples,
                data,
                settings,
                batch_size=model.batch_size or settings.rows,
                known=known,
                on_record=file and file.write,
                on_done=on_done,
            )
        report = {
            "model": described.source.path,
            "step": described.source.step,
            "task": name,
            "sources": asked,
        } | result.report()
        if file:
            file.finish(report)
    return report, result


def to_text(result: Result) -> str:
    """A result for a person."""
    notes = ", ".join(f"{count:,} {what}" for what, count in result.notes().items())
    parts = table(result.scores), notes, result.confusion()
    return "\n\n".join(part for part in parts if part)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None; lists, which flags have, as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if v is not None}


def _changed(
    own: Config,
    name: str,
    tokenizer: Tokenizer,
    data: dict[str, Any],
    task: dict[str, Any],
) -> Config:
    """A model's config as the examples are made and asked.

    Args:
      own: the model's.
      data, task: fields that are given.

    Raises:
      UserError: they do not fit the task or the model, or would change nothing.
    """
    config = copy.deepcopy(own)
    config.data = dataclasses.replace(_base(own.data, name, tokenizer), **data)
    config.task = config.task if own.task.name == name else TaskConfig()
    config.task = dataclasses.replace(config.task, name=name, **task)
    # The run's own are none that anybody asked for.
    for key in without_use(config.data, config.task.beams).keys() - task.keys():
        setattr(config.task, key, getattr(TaskConfig, key))
    flags = {f"data.{key}": key for key in (*_TEMPLATES, *data)}
    flags |= {f"task.{key}": key for key in task} | {"task.name": "task"}
    return checked(config, flags)


def _base(own: DataConfig, name: str, tokenizer: Tokenizer) -> DataConfig:
    """What examples are made of where nothing else is said: as the model learned them or, if it
    did not, in the words of the task. Its own text is nothing to ask about then."""
    if own.objective in OF_EXAMPLES:
        return own
    kind = find(name)
    objective = kind.objectives[0]
    if objective == "classify":
        raise UserError(f"--task={name}: this model was not trained to tell classes apart")
    if objective == "complete" and chat_template_of(tokenizer):
        objective = "chat"
    words = {"prompt": kind.prompt, "target": kind.target}
    return DataConfig(objective=objective, length=own.length, on_error=own.on_error, **words)


@contextlib.contextmanager
def _records(
    path: str | None, settings: dict[str, Any], examples: list[Example]
) -> Iterator[tuple[Output | None, list[Record]]]:
    """What the first process writes records to, and those that are there, on all processes."""
    with contextlib.ExitStack() as stack:
        file = None
        if path is not None and prints():
            file = stack.enter_context(Output(path, settings))
            for record in file.records:
                _check_example(path, record, examples)
        yield file, together.said_by_first(file.records if file else [])


def _check_example(path: str, record: Record, examples: list[Example]) -> None:
    """
    Raises:
      UserError: the record is of another example.
    """
    i = record.get("index")
    there = isinstance(i, int) and 0 <= i < len(examples)
    if not there or any(record.get(k) != v for k, v in asked_by(examples[i]).items()):
        raise UserError(
            f"--output: '{path}' holds predictions for other examples: name another file"
        )
