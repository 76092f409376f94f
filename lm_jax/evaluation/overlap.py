"""Texts compared by the pieces that they share: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

N examples, S sufficient statistics.
"""

import functools
import itertools
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from lm_jax.errors import UserError
from lm_jax.evaluation.measure import Measure, Prepare, mean_of


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """BLEU (Papineni et al. 2002) as sacrebleu has it (Post 2018): on texts as they are, which it
    tokenizes itself. Of Chinese, Japanese and Korean its '13a' makes too few tokens: see chrF."""
    import sacrebleu

    return _from_statistics(sacrebleu.BLEU(), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """chrF2 (Popović 2015): n-grams of characters, up to six."""
    import sacrebleu

    return _from_statistics(sacrebleu.CHRF(), predictions, references)


def _from_statistics(
    metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Measure:
    """Counts add up over sentences, so that a sample is scored without reading it again."""
    streams = list(itertools.zip_longest(*references))  # None: an example with fewer references
    counts = metric._extract_corpus_statistics(predictions, streams)
    counts_NS = np.array(counts, np.float64)
    return Measure(
        lambda weights_N: metric._compute_score_from_stats((weights_N @ counts_NS).tolist()).score,
        metric.get_signature().format(),
    )


def rouge(kind: str) -> Prepare:
    """ROUGE (Lin 2004), the mean F1 of the examples, each against the reference that suits it best.

    Words are stemmed by Porter's algorithm, as most papers and Transformers' examples have it.

    Args:
      kind: 'rouge1', 'rouge2', or 'rougeL': of the whole text as one sequence, line ends or not.
    """

    def prepare(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
        from rouge_score.rouge_scorer import RougeScorer

        split = _rouge_tokenizer()
        scorer = RougeScorer([kind], tokenizer=split)
        unseen = sum(
            any(c.isalnum() for c in text) and not split.tokenize(text)
            for several in references
            for text in several
        )
        if unseen and unseen == sum(any(c.isalnum() for c in t) for s in references for t in s):
            raise UserError(
                f"{kind} sees the letters a to z and digits alone, and no reference has any: use"
                " chrf for this language"
            )
        values = [
            scorer.score_multi(several, prediction)[kind].fmeasure
            for prediction, several in zip(predictions, references)
        ]
        return mean_of(
            values,
            f"f1|stemmer:porter|aggregate:mean|refs:best|rouge-score:{version('rouge-score')}",
            f"{unseen} reference(s) have no letter a to z and no digit: it does not see them"
            if unseen
            else "",
        )

    return prepare


@functools.cache
def _rouge_tokenizer() -> Any:
    """rouge-score's own, which stems each word once: that is most of the time it takes."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score.tokenize import tokenize

    class Stemmer:
        stem = staticmethod(functools.cache(PorterStemmer().stem))

    class Split:
        @staticmethod
        @functools.lru_cache(100_000)
        def tokenize(text: str) -> list[str]:
            return tokenize(text, Stemmer)

    return Split
