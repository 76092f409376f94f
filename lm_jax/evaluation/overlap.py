"""Texts compared by the pieces that they share: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

N examples, S sufficient statistics.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from lm_jax.errors import UserError
from lm_jax.evaluation.measure import Measure, Prepare, mean_of

# Scripts whose words no spaces part, and Korean, whose words are long: Thai, Lao, Burmese, Khmer,
# kana, Chinese characters, hangul.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)


def bleu(tokens: str) -> Prepare:
    """BLEU (Papineni et al. 2002) as sacrebleu has it (Post 2018): on texts as they are, which it
    tokenizes itself.

    Args:
      tokens: '13a', of European languages and the like; 'zh', of Chinese; 'char': each character is
        one, for languages without spaces between words.
    """

    def prepare(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
        import sacrebleu

        found = _from_statistics(sacrebleu.BLEU(tokenize=tokens), predictions, references)
        whole = sum(bool(_WITHOUT_SPACES.search(t)) for several in references for t in several)
        if tokens != "13a" or not whole:
            return found
        return dataclasses.replace(
            found,
            notes=f"{whole} reference(s) are in a script whose words tok:13a does not part: use"
            " bleu_zh for Chinese, and for others bleu_char or chrf",
        )

    return prepare


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
        unseen, _ = _unseen(references)
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


def check_rouge(kind: str, references: Sequence[Sequence[str]]) -> None:
    """
    Raises:
      UserError: it sees nothing of any reference.
    """
    unseen, all_of_them = _unseen(references)
    if unseen and unseen == all_of_them:
        raise UserError(
            f"{kind} sees the letters a to z and digits alone, and no reference has any: use"
            " chrf for this language"
        )


def _unseen(references: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Of how many references ROUGE sees nothing, and how many there are that have a word."""
    split = _rouge_tokenizer()
    words = [t for several in references for t in several if any(c.isalnum() for c in t)]
    return sum(not split.tokenize(text) for text in words), len(words)


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
