"""CrowS-Pairs, of a model that lies somewhere."""

from typing import Any

from lm_jax.evaluation.crows_pairs import crows_pairs, read_pairs
from lm_jax.evaluators.scoring import loaded_scorer, write
from lm_jax.progress import progress


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
        progress("rows") as count,
    ):
        result = crows_pairs(scorer, source, count)
    if output:
        write(output, (score.record() for score in result.scores))
    return {"model": loaded.source.path, "step": loaded.source.step} | result.summary()
