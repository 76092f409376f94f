"""Questions of which some have no answer, scored as the official script of SQuAD 2.0 does
(Rajpurkar et al. 2018): those with an answer, those without, and what the best threshold gives.

N questions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm_jax.evaluation.answers import exact_matches, word_f1s

METRICS = {"exact_match": exact_matches, "f1": word_f1s}


def report(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What there is to say of predictions beside their scores, fit for JSON: nothing where each
    question has an answer.

    Args:
      records: with `prediction` and `references`; of answers that were found in a text, also with
        `candidate` and `null_margin`.
    """
    references = [r["references"] for r in records]
    if all(any(several) for several in references):
        return {}
    out: dict[str, Any] = {"by_kind": by_kind([r["prediction"] for r in records], references)}
    if all("null_margin" in r for r in records):
        candidates = [r["candidate"] for r in records]
        out["best"] = best_thresholds(candidates, [r["null_margin"] for r in records], references)
    return {"unanswerable": out}


def by_kind(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Scores of the questions that have an answer and of those that have none, 0 to 100, and how
    many they are. Of a kind that is not there, nothing.

    Args:
      predictions: '' where there is said to be no answer.
      references: all of them '' where there is none.
    """
    each = {name: np.array(of(predictions, references)) for name, of in METRICS.items()}
    has_answer_N = np.array([any(several) for several in references])
    return {
        kind: {"examples": int(of_N.sum())}
        | {name: float(100 * each_N[of_N].mean()) for name, each_N in each.items()}
        for kind, of_N in (("answerable", has_answer_N), ("unanswerable", ~has_answer_N))
        if of_N.any()
    }


def best_thresholds(
    candidates: Sequence[str], margins: Sequence[float], references: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """The highest score that a threshold gives, and that threshold, of exact match and of F1: no
    answer is said where the margin is above it.

    Args:
      candidates: the best answer to each question, if it has one.
      margins: [N], how much higher no answer scores than that.
    """
    has_answer_N = np.array([any(several) for several in references])
    order_N = np.argsort(margins, kind="stable")
    sorted_N = np.array(margins, float)[order_N]
    # No threshold parts questions of the same margin: what counts is behind the last of them.
    parted = np.concatenate([[True], sorted_N[1:] > sorted_N[:-1], [True]])
    out = {}
    for name, of in METRICS.items():
        each_N = np.array(of(candidates, references))
        # Beginning with no answer to any, each question is answered in turn: those that have none
        # were right until then.
        gained_N = np.where(has_answer_N, each_N, -np.array([bool(x) for x in candidates], float))
        totals = np.concatenate([[0.0], np.cumsum(gained_N[order_N])]) + (~has_answer_N).sum()
        best = int(np.where(parted, totals, -np.inf).argmax())
        # All that have no larger margin are answered; below the smallest one, none.
        threshold = float(sorted_N[best - 1] if best else sorted_N[0] - 1)
        out[name] = {"score": float(100 * totals[best] / len(margins)), "threshold": threshold}
    return out
