"""Scores of predictions against references, each with how sure it is.

scores = score(["bleu", "chrf"], predictions, references)
print(table(scores))

A score is the field's own, by its own library where there is one, from 0 to 100. Its interval is
what 95% of samples drawn anew from the same examples score (percentile bootstrap: Efron 1979; for
translation, Koehn 2004). N examples, R resamples.
"""

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from lm_jax.errors import UserError
from lm_jax.evaluation import answers, classes, overlap
from lm_jax.evaluation.classes import confusion, confusion_table, per_class
from lm_jax.evaluation.measure import Label, Prepare

__all__ = ["METRICS", "Metric", "Score", "confusion", "confusion_table", "per_class", "score",
           "table"]  # fmt: skip

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Metric:
    """
    Attributes:
      prepare: predictions and, for each, its references -> a function of the examples' weights.
      text: whether it reads texts; others take labels, which may be numbers.
    """

    name: str
    prepare: Prepare
    text: bool = True


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bleu", overlap.bleu),
        Metric("chrf", overlap.chrf),
        Metric("rouge1", overlap.rouge("rouge1")),
        Metric("rouge2", overlap.rouge("rouge2")),
        Metric("rougeL", overlap.rouge("rougeL")),
        Metric("exact_match", answers.exact_match),
        Metric("f1", answers.f1),
        Metric("accuracy", classes.accuracy, text=False),
        Metric("macro_f1", classes.macro_f1, text=False),
    )
}


@dataclasses.dataclass(frozen=True)
class Score:
    """
    Attributes:
      value: of all examples, 0 to 100.
      low, high: the ends of its 95% interval.
      examples: how many.
      signature: how it was computed, to be printed with it.
      notes: what else should be known of it, or ''.
    """

    value: float
    low: float
    high: float
    examples: int
    signature: str
    notes: str = ""


def score(
    names: Sequence[str],
    predictions: Sequence[Label],
    references: Sequence[Label | Sequence[Label]],
    *,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores predictions by each of the metrics.

    Args:
      names: keys of `METRICS`.
      predictions: [N] texts or labels.
      references: [N], for each prediction a list of what would be right, or one such thing.
      seed: draws the resamples; all metrics are computed of the same ones.

    Raises:
      UserError: there is no such metric; the lengths differ; there is nothing to score; a
        prediction or a reference is not what the metric reads.
    """
    predictions = list(predictions)
    several = [[r] if isinstance(r, str | int | np.integer) else list(r) for r in references]
    _check(names, predictions, several)
    n = len(predictions)
    measures = {name: METRICS[name].prepare(predictions, several) for name in names}
    values = {name: measure.of(np.ones(n)) for name, measure in measures.items()}
    draw = np.random.default_rng(seed)
    drawn_R: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(RESAMPLES):
        weights_N = np.bincount(draw.integers(n, size=n), minlength=n).astype(np.float64)
        for name, measure in measures.items():
            drawn_R[name].append(measure.of(weights_N))
    return {
        name: Score(
            values[name],
            *map(float, np.percentile(drawn_R[name], [2.5, 97.5])),
            n,
            measure.signature,
            measure.notes,
        )
        for name, measure in measures.items()
    }


def check_names(names: Sequence[str]) -> None:
    """
    Raises:
      UserError: there is no such metric.
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"no metric '{name}'{hint} (there are {', '.join(METRICS)})")


def _check(
    names: Sequence[str], predictions: Sequence[Label], references: list[list[Label]]
) -> None:
    check_names(names)
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions, but references for {len(references)}: each"
            " prediction needs its own"
        )
    if not predictions:
        raise UserError("there are no predictions to score")
    for i, several in enumerate(references):
        if not several:
            raise UserError(f"example {i + 1} of {len(references)} has no reference to score by")
    # A number is never equal to a text: it would count as wrong without a word.
    kinds = {isinstance(x, str) for x in [*predictions, *(r for rs in references for r in rs)]}
    if len(kinds) > 1:
        raise UserError("some predictions or references are texts and some are numbers")
    wrong = [name for name in names if METRICS[name].text and kinds != {True}]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: predictions and references must be texts")


def table(scores: dict[str, Score]) -> str:
    """The scores for a terminal, and what has to be told with them."""
    width = max(map(len, [*scores, "metric"]))
    lines = [f"{'metric':<{width}}  {'score':>6}  95% interval"]
    lines += [
        f"{name:<{width}}  {s.value:6.2f}  {s.low:.2f} to {s.high:.2f}"
        for name, s in scores.items()
    ]
    lines.append(f"of {max((s.examples for s in scores.values()), default=0):,} examples")
    for name, s in scores.items():
        lines.append(f"{name}: {s.signature}")
        lines += [f"{name}: note: {s.notes}"] if s.notes else []
    return "\n".join(lines)
