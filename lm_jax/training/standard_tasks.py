"""Tasks that are scored by log-likelihoods, of a model that lies somewhere."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from lm_jax.config import MeshConfig
from lm_jax.evaluation.crows_pairs import crows_pairs, read_pairs
from lm_jax.generation.scoring import Scorer
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training.metrics import progress_bar
from lm_jax.training.weights import Loaded, load_for_inference

_BATCH_SIZE = 32  # rows at a time; most tasks' texts are short


@contextlib.contextmanager
def loaded_scorer(
    path: str, step: int | None, dtype: str | None, batch_size: int | None
) -> Iterator[tuple[Loaded, Scorer]]:
    """A model and what scores texts by it, on all devices, whose mesh is set inside.

    Raises:
      UserError: there is no such model, or it has no scores.
    """
    mesh = make_mesh(MeshConfig())
    loaded = load_for_inference(path, mesh, step, dtype)
    rows = _BATCH_SIZE if batch_size is None else batch_size
    scorer = Scorer(loaded.model, loaded.tokenizer, batch_size=rows)
    with jax.set_mesh(mesh):
        yield loaded, scorer


def run_crows_pairs(
    path: str,
    source: str,
    *,
    output: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """What `crows_pairs` finds, without the single pairs, which go to `output` as JSON lines.

    Args:
      path: a workdir or a Hugging Face folder.
      source: the CSV file.
      output: a new file.
      step, dtype: see `load_for_inference`.
      batch_size: rows at a time.

    Raises:
      UserError: model or file cannot be read.
    """
    read_pairs(source)  # what is wrong with it is better known before the weights are read
    with (
        loaded_scorer(path, step, dtype, batch_size) as (loaded, scorer),
        progress_bar("rows") as count,
    ):
        result = crows_pairs(scorer, source, count)
    if output:
        _write(output, (score.record() for score in result.scores))
    return {"model": loaded.source.path, "step": loaded.source.step} | result.summary()


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
        progress_bar("requests") as count,
    ):
        result, samples = harness.run(scorer, tasks, count)
    if output:
        _write(output, samples)
    about = {"model": loaded.source.path, "step": loaded.source.step, "task": "lm_eval"}
    return about | result


def _write(path: str, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "x", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
