"""Tasks of lm-evaluation-harness, of a model that lies somewhere."""

from collections.abc import Sequence
from typing import Any

from lm_jax.evaluators.scoring import loaded_scorer, write
from lm_jax.progress import progress


def run_lm_eval(
    path: str,
    names: Sequence[str],
    *,
    task_path: str | None = None,
    output: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """What lm-evaluation-harness finds; its record of each example goes to `output`.

    Args:
      names, task_path: see `lm_jax.evaluation.harness.load_tasks`; for the others
        `run_crows_pairs`.

    Raises:
      UserError: it is not installed, or model or task cannot be read or used.
    """
    from lm_jax.evaluation import harness

    tasks = harness.load_tasks(names, task_path)
    with (
        loaded_scorer(path, step, dtype, batch_size) as (loaded, scorer),
        progress("requests") as count,
    ):
        result, samples = harness.run(scorer, tasks, count)
    if output:
        write(output, samples)
    about = {"model": loaded.source.path, "step": loaded.source.step, "task": "lm_eval"}
    return about | result
