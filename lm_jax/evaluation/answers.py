"""Answers to questions, scored as SQuAD's are (Rajpurkar et al. 2016), and as those of SQuAD 2.0
where there may be none (Rajpurkar et al. 2018).

A reference '' says that there is no answer. Where a sample has such, references without a word, as
'The' has none, are left out, as in the script of SQuAD 2.0.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from lm_jax.evaluation.measure import Measure, mean_of

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """The share of answers that, normalized, are one of theirs."""
    return mean_of(exact_matches(predictions, references), _signature(references))


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """The mean F1 of the words of an answer and of the reference that suits it best.

    Without a common word it is 0; of no answer, 1 for one that has no words either.
    """
    return mean_of(word_f1s(predictions, references), _signature(references))


def exact_matches(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Of each answer, 1 or 0."""
    return _best(lambda a, b: float(a == b), predictions, references)


def word_f1s(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Of each answer, 0 to 1."""
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
) -> list[float]:
    may_be_none, out = _may_be_none(references), []
    for prediction, several in zip(predictions, references):
        ours, theirs = normalized(prediction), [normalized(reference) for reference in several]
        if may_be_none and not any(theirs):
            out.append(float(not ours))
            continue
        out.append(max(compare(ours, x) for x in theirs if x or not may_be_none))
    return out


def _may_be_none(references: Sequence[Sequence[str]]) -> bool:
    return any("" in several for several in references)


def _signature(references: Sequence[Sequence[str]]) -> str:
    return f"norm:squad{2.0 if _may_be_none(references) else 1.1}|refs:max"
