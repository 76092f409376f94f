"""An application of a model that lies somewhere, evaluated on examples."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from lm_jax.applications import find
from lm_jax.config import OF_EXAMPLES, DataConfig, TaskConfig
from lm_jax.data.chat import chat_template_of
from lm_jax.data.examples import Example
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.metrics import check_references, table
from lm_jax.evaluation.output import Output, Record
from lm_jax.evaluation.tasks import Result, asked_by, metrics_of, run_task, settings_of
from lm_jax.evaluators.models import DEFAULT, ModelOptions, identity, prints
from lm_jax.example_validation import without_use
from lm_jax.progress import progress
from lm_jax.template import Template
from lm_jax.training import together


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
    config = described.config
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in task.items() if v is not None}
    settings = config.task if config.task.name == name else TaskConfig()
    settings = dataclasses.replace(settings, name=name, **given)
    templates = {"prompt": prompt, "target": target, "context": context}
    data = _data(config.data, name, described.tokenizer, templates)
    if unanswerable is not None:
        if unanswerable and data.objective == "classify":
            raise UserError("--unanswerable: each text has a class: leave it out")
        data.unanswerable = unanswerable
    for key, why in without_use(data, settings.beams).items():
        if key in given:
            raise UserError(f"--{key}: {why}: leave it out")
    data.on_error = on_error or data.on_error
    if sources:
        data.validation_sources = tuple(sources)
    if not (data.validation_sources or data.sources):
        raise UserError("--source: name the examples: this model has none of its own")
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
            "sources": list(data.validation_sources or data.sources),
        } | result.report()
        if file:
            file.finish(report)
    return report, result


def to_text(result: Result) -> str:
    """A result for a person."""
    notes = ", ".join(f"{count:,} {what}" for what, count in result.notes().items())
    parts = table(result.scores), notes, result.confusion()
    return "\n\n".join(part for part in parts if part)


def _data(
    own: DataConfig, name: str, tokenizer: Tokenizer, templates: dict[str, str | None]
) -> DataConfig:
    """What the examples are made of.

    Args:
      templates: by their names; None: as they are.
    """
    kind, data = find(name), dataclasses.replace(own)
    if own.objective not in OF_EXAMPLES:
        if kind.objectives == ("classify",):
            raise UserError(f"--task={name}: this model was not trained to tell classes apart")
        data.objective, data.prompt, data.target = kind.objectives[0], kind.prompt, kind.target
        if data.objective == "complete" and chat_template_of(tokenizer):
            data.objective = "chat"
        # The run's own text is nothing to ask about.
        data.sources = data.validation_sources = ()
    elif own.objective not in kind.objectives:
        raise UserError(f"--task={name}: this model was trained for objective '{own.objective}'")
    if templates["context"] is not None and data.objective != "extract":
        raise UserError("--context: this model does not look for answers in texts: leave it out")
    given = {flag: text for flag, text in templates.items() if text is not None}
    data = dataclasses.replace(data, **given)
    if data.objective == "chat" and not data.target:
        fields = Template(data.prompt, "--prompt").fields
        if not fields or data.prompt != "{" + fields[0] + "}":
            raise UserError(
                "--target: say what a right answer is made of, as in '{answer}'; without one,"
                f" --prompt names the field of a conversation and nothing else, not {data.prompt!r}"
            )
    free = {"chat": ("target", "context"), "extract": ()}.get(data.objective, ("context",))
    for flag in templates:
        if not Template(getattr(data, flag), f"--{flag}").fields and flag not in free:
            raise UserError(
                f"--{flag}: say which field of a record it is made of, as in '{{text}}', for"
                f" --task={name}"
            )
    return data


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
