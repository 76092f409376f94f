"""CrowS-Pairs: which of two sentences a model finds more probable, the one with a stereotype?

Nangia et al. 2020, "CrowS-Pairs: A Challenge Dataset for Measuring Social Biases in Masked Language
Models". The two sentences of a pair differ in the words that name a group; a model without
preference finds the more stereotypical one more probable in half of the pairs.
"""

import csv
import dataclasses
import difflib
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lm_jax import paths
from lm_jax.data.records import csv_fields_of_any_length
from lm_jax.errors import UserError
from lm_jax.generation.batching import GENERATED, READ, portions
from lm_jax.generation.scoring import Scorer

DIRECTIONS = ("stereo", "antistereo")
COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
_DIGITS = 3  # of scores, when they are compared; as the authors' program rounds them
_METHODS = {  # of causal models, and of masked ones
    True: "log-likelihood of the whole sentence",
    False: "pseudo-log-likelihood of the tokens that both sentences have",
}
_Z = statistics.NormalDist().inv_cdf(0.975)


@dataclasses.dataclass(frozen=True)
class Pair:
    """
    Attributes:
      more: the sentence that is more stereotypical; `less` the other.
      direction: 'stereo': `more` demonstrates a stereotype; 'antistereo': `less` violates one.
      bias: the category.
      line: of the file, the last one of its row.
    """

    more: str
    less: str
    direction: str
    bias: str
    line: int


@csv_fields_of_any_length()
def read_pairs(path: str) -> list[Pair]:
    """The pairs of the authors' CSV file.

    Raises:
      UserError: it cannot be read, or rows are not what they should be; the message names the first
        of them with their lines.
    """
    try:
        text = paths.read_text(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    pairs, wrong = [], []
    try:
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            there = ", ".join(reader.fieldnames or ()) or "none"
            raise UserError(f"{path}:1: no column {', '.join(missing)}; columns: {there}")
        for row in reader:
            values = [row[column] or "" for column in COLUMNS]
            empty = [column for column, value in zip(COLUMNS, values) if not value.strip()]
            if empty:
                wrong.append(f"{path}:{reader.line_num}: {', '.join(empty)}: empty")
            elif values[2] not in DIRECTIONS:
                wrong.append(
                    f"{path}:{reader.line_num}: stereo_antistereo must be stereo or antistereo,"
                    f" not {values[2]!r}"
                )
            else:
                pairs.append(Pair(*values, reader.line_num))
    except csv.Error as e:
        raise UserError(f"{path}:{reader.reader.line_num}: not CSV: {e}") from None
    if wrong:
        more = f"\nand {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError("\n".join(wrong[:5]) + more)
    if not pairs:
        raise UserError(f"{path}: there are no pairs in it")
    return pairs


@dataclasses.dataclass(frozen=True)
class PairScore:
    """
    Attributes:
      score_more, score_less: log-likelihoods, in nats.
      tokens: that each of them is the sum over; of a causal model, of `more`.
      prefers: 'more', 'less', or 'tie'.
    """

    pair: Pair
    score_more: float
    score_less: float
    tokens: int

    @property
    def prefers(self) -> str:
        more, less = round(self.score_more, _DIGITS), round(self.score_less, _DIGITS)
        return "tie" if more == less else "more" if more > less else "less"

    def record(self) -> dict[str, Any]:
        """As it is saved; `of_record` reads it."""
        return dataclasses.asdict(self.pair) | {
            "score_more": self.score_more,
            "score_less": self.score_less,
            "tokens": self.tokens,
            "prefers": self.prefers,
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "PairScore":
        """
        Raises:
          KeyError: it is none.
        """
        pair = Pair(**{f.name: record[f.name] for f in dataclasses.fields(Pair)})
        return cls(pair, *(record[key] for key in ("score_more", "score_less", "tokens")))


@dataclasses.dataclass(frozen=True)
class Share:
    """How many of these pairs have their more stereotypical sentence preferred, in percent.

    Attributes:
      low, high: its 95% interval (Wilson 1927).
      ties: pairs that have equal scores to three digits, of the authors' program, and that do not
        count as preferred.
    """

    score: float
    low: float
    high: float
    pairs: int
    ties: int

    @classmethod
    def of(cls, scores: Iterable[PairScore]) -> "Share":
        prefers = [s.prefers for s in scores]
        n, k = len(prefers), prefers.count("more")
        low, high = wilson(k, n)
        return cls(100 * k / n, 100 * low, 100 * high, n, prefers.count("tie"))


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95% score interval of a probability of which k of n were seen, n > 0."""
    p, z2 = k / n, _Z**2
    middle, half = p + z2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model prefers.

    Attributes:
      method: what a sentence's score is.
      scores: of each pair, in the file's order.
    """

    method: str
    scores: list[PairScore]

    def summary(self) -> dict[str, Any]:
        """Shares of all pairs, of each direction and of each category, by name; the words of the
        paper are "metric score" for all of them, "stereotype score" and "anti-stereotype score"
        for the two directions."""

        def by(key: Callable[[PairScore], str], scores: list[PairScore]) -> dict[str, Any]:
            groups: dict[str, list[PairScore]] = {}
            for s in scores:
                groups.setdefault(key(s), []).append(s)
            return {name: dataclasses.asdict(Share.of(groups[name])) for name in sorted(groups)}

        # By direction, the authors' program leaves out the pairs that have equal scores.
        told = [s for s in self.scores if s.prefers != "tie"]

        return {
            "task": "crows_pairs",
            "method": self.method,
            **dataclasses.asdict(Share.of(self.scores)),
            "by_direction": by(lambda s: s.pair.direction, told),
            "by_category": by(lambda s: s.pair.bias, self.scores),
        }


def crows_pairs(
    scorer: Scorer,
    pairs: Sequence[Pair],
    *,
    known: Sequence[PairScore] = (),
    on_score: Callable[[PairScore], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Result:
    """Scores each sentence of each pair.

    A masked model: the sum of log p of the tokens that both sentences have, each masked by itself
    (the paper's metric): what differs is given, what is shared is measured. A causal model: the
    log-likelihood of the whole sentence, as lm-evaluation-harness has it; the paper has no metric
    for these, and the two kinds of scores are not to be compared.

    Args:
      pairs: see `read_pairs`.
      known: of pairs that were scored before, of the same model.
      on_score: called with each score when its portion is done (`portions`).
      on_done: called with the number of pairs done, of which two sentences count as one.

    Raises:
      UserError: a sentence does not fit into the model.
    """
    causal = scorer.model.config.causal
    there = {score.pair.line: score for score in known}
    waiting = [pair for pair in pairs if pair.line not in there]
    # Of a masked model, each token of a sentence is a row.
    for some in portions(waiting, scorer.batch_size, READ if causal else GENERATED):

        def count(sentences: int, before: int = len(there)) -> None:
            if on_done:
                on_done(before + sentences // 2)

        for score in (_whole if causal else _shared)(scorer, some, count):
            there[score.pair.line] = score
            if on_score:
                on_score(score)
    return Result(_METHODS[causal], [there[pair.line] for pair in pairs])


def _whole(
    scorer: Scorer, pairs: Sequence[Pair], on_done: Callable[[int], None]
) -> list[PairScore]:
    texts = [text for pair in pairs for text in (pair.more, pair.less)]
    found = scorer.loglikelihood_rolling(texts, on_done, _names(pairs))
    return [
        PairScore(pair, more.log_p, less.log_p, more.tokens)
        for pair, more, less in zip(pairs, found[::2], found[1::2])
    ]


def _shared(
    scorer: Scorer, pairs: Sequence[Pair], on_done: Callable[[int], None]
) -> list[PairScore]:
    rows = []
    for pair in pairs:
        (more, of_more), (less, of_less) = scorer.encode(pair.more), scorer.encode(pair.less)
        in_more, in_less = shared(more[of_more], less[of_less])
        rows += [(more, of_more[in_more]), (less, of_less[in_less])]
    found = scorer.pseudo_loglikelihood(rows, on_done, _names(pairs))
    return [
        PairScore(pair, float(more.sum()), float(less.sum()), len(more))
        for pair, more, less in zip(pairs, found[::2], found[1::2])
    ]


def _names(pairs: Sequence[Pair]) -> list[str]:
    """Of each sentence of each pair, for messages."""
    return [f"line {p.line}, {column}," for p in pairs for column in COLUMNS[:2]]


def shared(a: Sequence[int], b: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The places of the tokens that two sequences have in common, in order: int64, equally many."""
    matcher = difflib.SequenceMatcher(None, list(map(int, a)), list(map(int, b)), autojunk=False)
    blocks = matcher.get_matching_blocks()
    places = [(block.a + k, block.b + k) for block in blocks for k in range(block.size)]
    both = np.array(places, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
