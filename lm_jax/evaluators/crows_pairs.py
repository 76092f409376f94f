"""CrowS-Pairs, of a model that lies somewhere."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lm_jax.errors import UserError
from lm_jax.evaluation.crows_pairs import Pair, PairScore, crows_pairs, read_pairs
from lm_jax.evaluation.output import Output, Record
from lm_jax.evaluators.models import DEFAULT, ModelOptions, identity, prints
from lm_jax.evaluators.scoring import scorer_of
from lm_jax.progress import progress
from lm_jax.training import together


def run_crows_pairs(
    path: str,
    model: ModelOptions = DEFAULT,
    *,
    sources: Sequence[str] = (),
    output: str | None = None,
) -> dict[str, Any]:
    """What `crows_pairs` finds, without the single pairs, which go to `output`.

    Of several processes, all call this; the first one writes.

    Args:
      path: a workdir or a Hugging Face folder.
      sources: one CSV file, the authors' or one like it.
      output: a file for the scores of pairs, see `lm_jax.evaluation.output`.

    Raises:
      UserError: model or file cannot be read, or `output` holds something else.
    """
    if len(sources) != 1:
        raise UserError(
            f"--source: crows_pairs needs one file, the authors' CSV, not {len(sources)}"
        )
    pairs = read_pairs(
        sources[0]
    )  # what is wrong with it is better known before the weights are read
    mesh = model.mesh()
    described = model.describe(path)
    about = identity(described) | {"task": "crows_pairs"}
    together.check_same([about, list(map(dataclasses.asdict, pairs))], "for other pairs")
    with contextlib.ExitStack() as stack:
        file = None
        if output and prints():
            file = stack.enter_context(Output(output, about))
            _check(output, file.records, pairs)
        known = together.said_by_first(file.records if file else [])
        scorer = scorer_of(described, mesh, model)
        stack.enter_context(jax.set_mesh(mesh))
        count = stack.enter_context(
            progress("pairs", len(pairs), start=len(known), active=prints())
        )
        result = crows_pairs(
            scorer,
            pairs,
            known=list(map(PairScore.of_record, known)),
            on_score=file and (lambda score: file.write(score.record())),
            on_done=count,
        )
        report = {"model": described.source.path, "step": described.source.step}
        report |= result.summary()
        if file:
            file.finish(report)
    return report


def _check(path: str, records: list[Record], pairs: list[Pair]) -> None:
    """
    Raises:
      UserError: a record is of another pair.
    """
    there = {pair.line: pair for pair in pairs}
    try:
        same = all(s.pair == there[s.pair.line] for s in map(PairScore.of_record, records))
    except KeyError:
        same = False
    if not same:
        raise UserError(f"--output: '{path}' holds scores of other pairs: name another file")
