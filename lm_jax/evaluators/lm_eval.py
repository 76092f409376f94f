"""Tasks of lm-evaluation-harness, of a model that lies somewhere."""

import contextlib
import os
from typing import Any

import jax

from lm_jax import cli
from lm_jax.errors import UserError
from lm_jax.evaluation.output import Output, report_of, write_whole
from lm_jax.evaluators.models import DEFAULT, ModelOptions, identity, prints
from lm_jax.evaluators.scoring import scorer_of
from lm_jax.training import together


def run_lm_eval(
    path: str,
    tasks: str,
    model: ModelOptions = DEFAULT,
    *,
    task_path: str | None = None,
    output: str | None = None,
    max_examples: int | None = None,
    shots: int | None = None,
) -> dict[str, Any]:
    """What lm-evaluation-harness finds.

    Of several processes, all call this; the first one writes.

    Args:
      path: a workdir or a Hugging Face folder.
      tasks: their names, with commas.
      task_path: see `lm_jax.evaluation.harness.load_tasks`.
      output: a new file for the harness's record of each example. Until that and its report are
        there, answers are kept in FILE.requests.jsonl, from which the same call goes on.
      max_examples: the first so many of each task; None: all.
      shots: see `lm_jax.evaluation.harness.set_shots`.

    Raises:
      UserError: it is not installed, or model or task cannot be read or used.
    """
    names = [name for name in tasks.split(",") if name]
    if not names:
        raise UserError("--task: name the harness's tasks, as in --task=lm_eval:piqa,sciq")
    if output:
        _check_output(output)

    from lm_jax.evaluation import harness

    loaded = harness.load_tasks(names, task_path)
    harness.set_shots(loaded, shots)
    mesh = model.mesh()
    described = model.describe(path)
    about = identity(described) | {"task": "lm_eval"}
    settings = [about, names, max_examples, shots]
    together.check_same(settings, "for other tasks, or otherwise")
    first = prints()
    with contextlib.ExitStack() as stack:
        file = None
        if output and first:
            file = stack.enter_context(Output(_requests_of(output), about))
        known = together.said_by_first(file.records if file else [])
        scorer = scorer_of(described, mesh, model)
        stack.enter_context(jax.set_mesh(mesh))
        asked = harness.HarnessModel(scorer, known=known, on_answer=file and file.write, show=first)
        result, samples = harness.run(asked, loaded, max_examples)
        if file:
            write_whole(output, samples, about, result)
            for done in (_requests_of(output), report_of(_requests_of(output))):
                os.unlink(done)
    about = {"model": described.source.path, "step": described.source.step, "task": "lm_eval"}
    return about | result


def _check_output(path: str) -> None:
    """
    Raises:
      UserError: records or report are there, and are not those that a kill left half written.
    """
    cli.check_new_file("output", report_of(path))  # is written last
    if not os.path.exists(report_of(_requests_of(path))):
        cli.check_new_file("output", path)


def _requests_of(path: str) -> str:
    return path.removesuffix(".jsonl") + ".requests.jsonl"
