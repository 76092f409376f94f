"""Scores of predictions against references, each with how sure it is.

scores = score(["bleu", "chrf"], predictions, references)
print(table(scores))

A score is the field's own, by its own library where there is one, from 0 to 100; of perplexity, the
less, the better. Its interval is what 95% of samples drawn anew from the same examples score
(percentile bootstrap: Efron 1979; for translation, Koehn 2004). N examples, R resamples.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lm_jax.errors import UserError
from lm_jax.evaluation import answers, classes, overlap
from lm_jax.evaluation.classes import confusion, confusion_table, per_class
from lm_jax.evaluation.likelihoods import Likelihood, perplexity
from lm_jax.evaluation.measure import Label, Measure, Prepare

__all__ = ["METRICS", "Metric", "Score", "confusion", "confusion_table", "per_class", "score",
           "table"]  # fmt: skip

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Metric:
    """
    Attributes:
      prepare: predictions and, for each, its references -> a function of the examples' weights; of
        one that reads likelihoods, these alone.
      reads: 'texts'; 'labels', which may be numbers; or 'likelihoods': of the right answers.
      less: whether less is better.
      check: raises a UserError where these references leave it nothing to score by.
    """

    name: str
    prepare: Prepare | Callable[[Sequence[Likelihood]], Measure]
    reads: Literal["texts", "labels", "likelihoods"] = "texts"
    less: bool = False
    check: Callable[[Sequence[Sequence[Label]]], None] | None = None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bleu", overlap.bleu("13a")),
        Metric("bleu_zh", overlap.bleu("zh")),
        Metric("bleu_char", overlap.bleu("char")),
        Metric("chrf", overlap.chrf),
        *(
            Metric(kind, overlap.rouge(kind), check=functools.partial(overlap.check_rouge, kind))
            for kind in ("rouge1", "rouge2", "rougeL")
        ),
        Metric("exact_match", answers.exact_match),
        Metric("f1", answers.f1),
        Metric("accuracy", classes.accuracy, "labels"),
        Metric("macro_f1", classes.macro_f1, "labels", check=classes.check_macro_f1),
        Metric("perplexity", perplexity, "likelihoods", less=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Score:
    """
    Attributes:
      value: of all examples.
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
    likelihoods: Sequence[Likelihood] | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores predictions by each of the metrics.

    Args:
      names: keys of `METRICS`.
      predictions: [N] texts or labels; () where all metrics read likelihoods.
      references: [N], for each prediction a list of what would be right, or one such thing; as
        `predictions`.
      likelihoods: [N], of each example, for metrics that read them.
      seed: draws the resamples; all metrics are computed of the same ones.

    Raises:
      UserError: there is no such metric; the lengths differ; there is nothing to score; a
        prediction or a reference is not what the metric reads.
    """
    predictions = list(predictions)
    several = [[r] if isinstance(r, str | int | np.integer) else list(r) for r in references]
    check_names(names)
    of_likelihoods = [name for name in names if METRICS[name].reads == "likelihoods"]
    sizes = {len(likelihoods or ())} if of_likelihoods else set()
    if len(of_likelihoods) < len(names):
        _check(names, predictions, several)
        sizes |= {len(predictions)}
    if sizes == {0} or len(sizes) > 1:
        raise UserError(f"{', '.join(of_likelihoods)}: each example needs its likelihood")
    (n,) = sizes
    measures = {
        name: METRICS[name].prepare(likelihoods)
        if name in of_likelihoods
        else METRICS[name].prepare(predictions, several)
        for name in names
    }
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


def check_references(names: Sequence[str], references: Sequence[Sequence[Label]]) -> None:
    """Checks, before anything is predicted, that the metrics can score by these references.

    Raises:
      UserError: one of them cannot, or there are none.
    """
    check_names(names)
    _check(names, [several[0] for several in references], [list(r) for r in references])


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
    if len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} predictions, but references for {len(references)}: each"
            " prediction needs its own"
        )
    if not predictions:
        raise UserError("there are no predictions to score: no example can be used")
    for i, several in enumerate(references):
        if not several:
            raise UserError(f"example {i + 1} of {len(references)} has no reference to score by")
    # A number is never equal to a text: it would count as wrong without a word.
    kinds = {isinstance(x, str) for x in [*predictions, *(r for rs in references for r in rs)]}
    if len(kinds) > 1:
        raise UserError("some predictions or references are texts and some are numbers")
    wrong = [name for name in names if METRICS[name].reads == "texts" and kinds != {True}]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: predictions and references must be texts")
    for name in names:
        if check := METRICS[name].check:
            check(references)


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
