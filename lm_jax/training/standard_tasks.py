"""Tasks that are scored by log-likelihoods, of a model that lies somewhere."""

import contextlib
import json
from collections.abc import Iterator
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
        with open(output, "x", encoding="utf-8") as f:
            for score in result.scores:
                f.write(json.dumps(score.record(), ensure_ascii=False) + "\n")
    return {"model": loaded.source.path, "step": loaded.source.step} | result.summary()
