"""Questions without an answer: their scores by kind, and the threshold that gives the best."""

import json
import random

import pytest

from lm_jax.evaluation.answers import exact_matches, word_f1s
from lm_jax.evaluation.extractor import Answer
from lm_jax.evaluation.metrics import score
from lm_jax.evaluation.unanswerable import by_kind, report

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
    # Some are the same, and some almost.
    margins = [rng.choice([rng.uniform(-5, 5), 0.0, 1 / 3, 1 / 3 + 1e-9]) for _ in range(n)]
    answers = [Answer(x, 0, 0.0, null=margin) for x, margin in zip(found, margins)]

    def records_at(threshold: float) -> list[dict[str, object]]:
        made = [a.record(True, threshold) for a in answers]
        return [r | {"references": several} for r, several in zip(made, references)]

    def scores_at(threshold: float) -> dict[str, float]:
        said = [r["prediction"] for r in records_at(threshold)]
        return {name: 100 * sum(of(said, references)) / n for name, of in METRICS.items()}

    of_all = [scores_at(t) for t in (-9.0, *margins)]
    records = json.loads(json.dumps(records_at(0.0)))  # as they are read from a file
    for name, best in report(records)["unanswerable"]["best"].items():
        assert best["score"] == pytest.approx(max(one[name] for one in of_all))
        assert scores_at(best["threshold"])[name] == pytest.approx(best["score"])
