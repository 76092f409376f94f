"""Answers to questions, scored as SQuAD's are (Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from lm_jax.evaluation.measure import Measure, mean_of

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_SIGNATURE = "norm:squad1.1|refs:max"


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """The share of answers that, normalized, are one of theirs."""
    return _best(lambda a, b: float(a == b), predictions, references)


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """The mean F1 of the words of an answer and of the reference that suits it best.

    Without a common word it is 0. A reference '' says that there is no answer (SQuAD 2.0): 1 for an
    answer that has no words either.
    """
    return _best(word_f1, predictions, references)


def word_f1(prediction: str, reference: str) -> float:
    """Of two normalized texts."""
    ours, theirs = prediction.split(), reference.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _best(
    compare: Callable[[str, str], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> Measure:
    def score(prediction: str, reference: str) -> float:
        ours = normalized(prediction)
        return float(not ours) if reference == "" else compare(ours, normalized(reference))

    values = [
        max(score(prediction, reference) for reference in several)
        for prediction, several in zip(predictions, references)
    ]
    return mean_of(values, _SIGNATURE)
