"""An application of a model that lies somewhere, evaluated on examples."""

import contextlib
import dataclasses
import json
from typing import Any

import jax

from lm_jax.applications import find
from lm_jax.config import OF_EXAMPLES, DataConfig, MeshConfig, TaskConfig
from lm_jax.data.chat import chat_template_of
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation import unanswerable
from lm_jax.evaluation.metrics import table
from lm_jax.evaluation.tasks import Result, metrics_of, read_records, run_task
from lm_jax.progress import progress
from lm_jax.sharding.mesh import make_mesh
from lm_jax.template import Template
from lm_jax.training.weights import load_for_inference


def evaluate_task(
    path: str,
    name: str,
    *,
    sources: tuple[str, ...] = (),
    prompt: str | None = None,
    target: str | None = None,
    output: str | None = None,
    max_examples: int | None = None,
    step: int | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    on_error: str | None = None,
    **task: Any,
) -> tuple[dict[str, Any], Result]:
    """Scores of a model's answers.

    Args:
      path: a workdir or a Hugging Face folder.
      name: a key of `lm_jax.applications.APPLICATIONS`.
      sources: files of examples; (): the run's own validation split.
      prompt, target: templates; None: the run's, if it learned from examples, or the task's.
      output: a file for the predictions, JSON lines. What is in it from before is not done again.
      max_examples: the first so many; None: all.
      on_error: as `DataConfig.on_error`; None: the run's.
      task: fields of `TaskConfig` that differ from the run's; None: the run's.

    Returns:
      What there is to report, fit for JSON, and the result.

    Raises:
      UserError: there is no such model or task, the examples cannot be read, or the model cannot
        do this.
    """
    metrics_of(TaskConfig(name=name))
    mesh = make_mesh(MeshConfig())
    loaded = load_for_inference(path, mesh, step, dtype)
    config, tokenizer = loaded.config, loaded.tokenizer
    given = {key: value for key, value in task.items() if value is not None}
    settings = dataclasses.replace(config.task, name=name, **given)
    data = _data(config.data, name, tokenizer, prompt, target)
    data.on_error = on_error or data.on_error
    if sources:
        data.validation_sources = sources
    if not (data.validation_sources or data.sources):
        raise UserError("--source: name the examples: this model has none of its own")
    examples = documents(data, "validation")
    count = len(examples) if max_examples is None else min(max_examples, len(examples))
    examples = [examples[i] for i in range(count)]
    known = read_records(output, examples) if output else []
    with (
        jax.set_mesh(mesh),
        progress("examples", count, start=len(known)) as on_done,
        _recorder(output) as on_record,
    ):
        result = run_task(
            loaded.model,
            tokenizer,
            examples,
            data,
            settings,
            batch_size=batch_size or settings.rows,
            known=known,
            on_record=on_record,
            on_done=on_done,
        )
    report = {
        "model": loaded.source.path,
        "step": loaded.source.step,
        "task": name,
        "sources": list(data.validation_sources or data.sources),
        "examples": len(result.records),
        "scores": {key: dataclasses.asdict(s) for key, s in result.scores.items()},
    } | unanswerable.report(result.records)
    return report, result


def to_text(result: Result) -> str:
    """A result for a person."""
    return "\n\n".join(part for part in (table(result.scores), result.confusion) if part)


def _data(
    own: DataConfig, name: str, tokenizer: Tokenizer, prompt: str | None, target: str | None
) -> DataConfig:
    """What the examples are made of."""
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
    data.prompt = data.prompt if prompt is None else prompt
    data.target = data.target if target is None else target
    for flag in ("prompt", "target"):
        template = getattr(data, flag)
        fields = Template(template, f"--{flag}").fields
        if not fields and not (flag == "target" and data.objective == "chat"):
            raise UserError(
                f"--{flag}: say which field of a record it is made of, as in '{{text}}', for"
                f" --task={name}"
            )
    return data


@contextlib.contextmanager
def _recorder(output: str | None):
    """Writes each record as soon as it is there."""
    if output is None:
        yield None
        return
    try:
        f = open(output, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"--output: '{output}' cannot be written: {e.strerror}") from None
    with f:
        yield lambda record: print(json.dumps(record, ensure_ascii=False), file=f, flush=True)
