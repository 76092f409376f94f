"""Questions without an answer: their scores by kind, and the threshold that gives the best."""

import random

import pytest

from lm_jax.evaluation.answers import exact_matches, word_f1s
from lm_jax.evaluation.metrics import score
from lm_jax.evaluation.unanswerable import best_thresholds, by_kind

METRICS = {"exact_match": exact_matches, "f1": word_f1s}


def test_each_kind_is_scored_by_itself():
    references = [["red dog"], [""], ["cat", "a cat"], [""]]
    got = by_kind(["dog", "", "The cat", "cow"], references)
    assert got == {
        "answerable": {"examples": 2, "exact_match": 50.0, "f1": pytest.approx(100 * 5 / 6)},
        "unanswerable": {"examples": 2, "exact_match": 50.0, "f1": 50.0},
    }
    assert by_kind(["dog"], [["dog"]]).keys() == {"answerable"}


def test_a_reference_without_a_word_counts_only_where_all_have_an_answer():
    assert score(["exact_match"], ["the"], [["a", "cat"]])["exact_match"].value == 100
    both = score(["exact_match"], ["the", ""], [["a", "cat"], [""]])["exact_match"]
    assert both.value == 50 and both.signature == "norm:squad2.0|refs:max"


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_gives_more_than_the_best(seed):
    rng = random.Random(seed)
    words = ("red", "dog", "cat", "cow")
    n = rng.randint(2, 12)

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 3)))

    found = [text() for _ in range(n)]
    references = [[""], [found[0]]]
    references += [[""] if rng.random() < 0.5 else [text(), text()] for _ in range(n - 2)]
    margins = [rng.uniform(-5, 5) for _ in range(n)]

    def scores_at(threshold: float) -> dict[str, float]:
        said = ["" if margin > threshold else x for x, margin in zip(found, margins)]
        return {name: 100 * sum(of(said, references)) / n for name, of in METRICS.items()}

    of_all = [scores_at(t) for t in (-9.0, *margins)]
    for name, best in best_thresholds(found, margins, references).items():
        assert best["score"] == pytest.approx(max(one[name] for one in of_all))
        assert scores_at(best["threshold"])[name] == pytest.approx(best["score"])
