"""Scores by the field's own libraries and by hand-worked examples, with intervals that are true."""

import math
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lm_jax.errors import UserError
from lm_jax.evaluation.likelihoods import Likelihood
from lm_jax.evaluation.metrics import METRICS, confusion, confusion_table, per_class, score, table

SENTENCE = "the a cat dog sat on mat runs, fast! slowly; jumping Überraschung straße 3.14 don't"
WORDS = SENTENCE.split()


def texts(n: int, references: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Predictions, and up to so many references each that share words with them."""
    rng = random.Random(seed)
    predictions, several = [], []
    for _ in range(n):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
        predictions.append(" ".join(words))
        changed = rng.choice([0, 0.3, 0.6])
        several.append(
            [
                " ".join(rng.choice(WORDS) if rng.random() < changed else w for w in words)
                for _ in range(rng.randint(1, references))
            ]
        )
    return predictions, several


@pytest.mark.parametrize("references", [1, 3])
def test_bleu_and_chrf_are_sacrebleus(references):
    predictions, several = texts(60, references)
    streams = [[r[i] if i < len(r) else None for r in several] for i in range(references)]
    got = score(["bleu", "chrf"], predictions, several)
    for name, theirs in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        assert got[name].value == theirs.corpus_score(predictions, streams).score > 0
        assert got[name].signature == theirs.get_signature().format()
        assert f"nrefs:{'1' if references == 1 else 'var'}" in got[name].signature
    assert got["bleu"].value == sacrebleu.corpus_bleu(predictions, streams).score


def test_rouge_is_rouge_scores_with_stems():
    predictions, several = texts(40, 3)
    kinds = ["rouge1", "rouge2", "rougeL"]
    theirs = RougeScorer(kinds, use_stemmer=True)
    found = [theirs.score_multi(r, p) for p, r in zip(predictions, several)]
    got = score(kinds, predictions, several)
    for kind in kinds:
        want = 100 * np.mean([f[kind].fmeasure for f in found])
        assert got[kind].value == pytest.approx(want, rel=1e-12) and 0 < want < 100
    assert score(["rouge1"], ["jumped cats"], ["jumping cat"])["rouge1"].value == 100


def test_rouge_says_what_it_does_not_see():
    with pytest.raises(UserError, match="chrf"):
        score(["rouge1"], ["猫"], ["猫です"])
    assert "1 reference(s)" in score(["rouge1"], ["猫", "cat"], ["猫です", "cat"])["rouge1"].notes
    assert not score(["rouge1"], ["-", "cat"], ["--", "cat"])["rouge1"].notes


def test_bleu_of_languages_without_spaces_has_tokens_of_its_own():
    signs = "".join(map(chr, range(0x4E00, 0x4E0A)))
    predictions, references = [signs[:-1], "a cat sat"], [signs, "a cat sat"]
    got = score(["bleu", "bleu_zh", "bleu_char"], predictions, references)
    assert "1 reference(s)" in got["bleu"].notes and "bleu_zh" in got["bleu"].notes
    for name, tokens in (("bleu", "13a"), ("bleu_zh", "zh"), ("bleu_char", "char")):
        theirs = sacrebleu.BLEU(tokenize=tokens).corpus_score(predictions, [references])
        assert got[name].value == theirs.score and f"tok:{tokens}" in got[name].signature
    assert got["bleu_zh"].notes == "" and got["bleu_zh"].value > got["bleu"].value
    assert score(["bleu"], ["un \u00e9t\u00e9"], ["un \u00e9t\u00e9"])["bleu"].notes == ""


def test_perplexity_by_hand():
    # 1 nat of one token and 9 of three: 10 of four.
    likelihoods = [Likelihood(1.0, 1), Likelihood(9.0, 3)]
    got = score(["perplexity"], (), (), likelihoods=likelihoods)["perplexity"]
    assert got.value == pytest.approx(math.exp(2.5))
    # Of two examples, either may be drawn twice.
    assert (got.low, got.high) == pytest.approx((math.e, math.exp(3)))
    both = score(["f1", "perplexity"], ["x", "y"], ["x", "z"], likelihoods=likelihoods)
    assert both["f1"].value == 50 and both["perplexity"] == got
    for wrong in (None, likelihoods[:1]):
        with pytest.raises(UserError, match="perplexity: each example needs its likelihood"):
            score(["f1", "perplexity"], ["a", "b"], ["a", "c"], likelihoods=wrong)


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 100, 100),
        ("an apple", ["Apple  the"], 100, 100),
        ("U.S.A.", ["usa"], 100, 100),
        ("theatre", ["atre"], 0, 0),  # an article is a word of its own
        ("the big red dog", ["red dog"], 0, 80),  # of 3 words and 2, 2 are shared
        ("dog dog cat", ["dog"], 0, 50),  # counted as often as in both
        ("red dog", ["blue cat", "dog", "a red dog here"], 0, 80),
        ("nothing", ["something"], 0, 0),
        ("the", ["a"], 100, 0),  # as in SQuAD 1.1's script: no word, none in common
        ("the", [""], 100, 100),  # SQuAD 2.0's: no answer
        ("dog", [""], 0, 0),
    ],
)
def test_answers_are_scored_as_squads(prediction, references, exact, f1):
    got = score(["exact_match", "f1"], [prediction], [references])
    assert got["exact_match"].value == exact
    assert got["f1"].value == pytest.approx(f1)


PREDICTED = ["b", "a", "a", "c", "b", "b"]
LABELS = ["a", "a", "a", "b", "b", "b"]


def test_labels_by_hand():
    # a: 2 of 2 predicted, 2 of 3 found; b: 2 of 3, 2 of 3; c: predicted once, never there.
    got = score(["accuracy", "macro_f1"], PREDICTED, LABELS)
    assert got["accuracy"].value == pytest.approx(100 * 4 / 6)
    assert got["macro_f1"].value == pytest.approx(100 * (0.8 + 2 / 3 + 0) / 3)
    numbers = [["abc".index(x) for x in xs] for xs in (PREDICTED, LABELS)]
    assert score(["accuracy", "macro_f1"], *numbers) == got
    assert score(["accuracy"], ["x"], [["y", "x"]])["accuracy"].value == 100


def test_a_table_of_confusions_by_hand():
    want = [[2, 1, 0], [0, 2, 1], [0, 0, 0]]
    assert confusion_table(PREDICTED, LABELS, ["a", "b", "c"]).tolist() == want
    assert confusion_table([1, 0], [0, 0], ["x", "y"]).tolist() == [[1, 1], [0, 0]]
    classes = per_class(PREDICTED, LABELS, ["a", "b", "c"])
    assert classes["a"] == pytest.approx((100, 200 / 3, 80, 3))
    assert classes["b"] == pytest.approx((200 / 3, 200 / 3, 200 / 3, 3))
    assert classes["c"] == (0, 0, 0, 0)
    shown = [line.split() for line in confusion(PREDICTED, LABELS, ["a", "b", "c"]).splitlines()]
    assert ["a", "100.00", "66.67", "80.00", "3"] in shown
    assert shown[-3:] == [["a", "2", "1", "0"], ["b", "0", "2", "1"], ["c", "0", "0", "0"]]
    many = [f"class {i}" for i in range(20)]
    shown = confusion([3, 3, 5, 5], [4, 4, 5, 6], many).splitlines()
    at = shown.index("most frequent confusions")
    wanted = [["2", "class 4 taken for class 3"], ["1", "class 6 taken for class 5"]]
    assert [line.split(maxsplit=1) for line in shown[at + 1 :]] == wanted


def test_intervals_hold_the_score_and_narrow_with_examples():
    names = [name for name, metric in METRICS.items() if metric.reads != "likelihoods"]
    for name in set(names) - {"accuracy", "macro_f1"}:
        few, many = (score([name], *texts(n, 1))[name] for n in (20, 180))
        assert few.low < few.value < few.high and many.low < many.value < many.high
        assert many.high - many.low < 0.6 * (few.high - few.low), name
    same = score(names, ["x", "x"], ["x", "x"])
    assert all(s.low == s.value == s.high for s in same.values())
    assert same["accuracy"].value == same["macro_f1"].value == same["rouge1"].value == 100


def test_an_interval_is_that_of_a_share():
    """Of a share p of n, plus or minus 1.96 sqrt(p (1 - p) / n), up to the draws."""
    right = [i % 4 > 0 for i in range(400)]
    got = score(["accuracy"], [int(r) for r in right], [1] * 400)["accuracy"]
    half = 196 * (0.75 * 0.25 / 400) ** 0.5
    assert got.low == pytest.approx(75 - half, abs=0.7)
    assert got.high == pytest.approx(75 + half, abs=0.7)
    assert got.examples == 400
    again, other = (
        score(["accuracy"], [int(r) for r in right], [1] * 400, seed=s)["accuracy"] for s in (0, 1)
    )
    assert again == got and (other.low, other.high) != (got.low, got.high)


def test_a_table_of_scores():
    lines = table(score(["bleu", "macro_f1"], ["a cat sat on"], ["a cat sat on"])).splitlines()
    assert lines[0].split() == ["metric", "score", "95%", "interval"]
    assert lines[1].split() == ["bleu", "100.00", "100.00", "to", "100.00"]
    assert lines[3] == "of 1 examples"
    assert any("tok:13a" in line for line in lines)


@pytest.mark.parametrize(
    ("names", "predictions", "references", "said"),
    [
        (["blue"], ["x"], ["x"], "did you mean 'bleu'"),
        (["bleu"], ["x", "y"], ["x"], "2 predictions, but references for 1"),
        (["bleu"], [], [], "no predictions"),
        (["bleu"], ["x", "y"], [["x"], []], "example 2 of 2 has no reference"),
        (["accuracy"], [1], ["1"], "some are numbers"),
        (["accuracy", "bleu"], [1], [1], "bleu: predictions and references must be texts"),
        (["macro_f1"], ["x"], [["x", "y"]], "some have several"),
    ],
)
def test_what_cannot_be_scored_is_told(names, predictions, references, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        score(names, predictions, references)


def test_labels_that_are_no_class_are_told():
    with pytest.raises(UserError, match="prediction 2: 'z' is none of the 2 classes"):
        confusion_table(["x", "z"], ["x", "y"], ["x", "y"])
    with pytest.raises(UserError, match="label 1: -1"):
        confusion_table([0], [-1], ["x", "y"])
    with pytest.raises(UserError, match="2 predictions, but 1 labels"):
        confusion_table([0, 1], [1], ["x", "y"])
