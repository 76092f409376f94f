"""Labels: accuracy, macro-F1, and which class is taken for which.

N examples, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm_jax.errors import UserError
from lm_jax.evaluation.measure import Label, Measure, mean_of

_WIDEST = 12  # classes of a table that still fits a terminal


class ClassScore(NamedTuple):
    """Of one class; 0 to 100. What has no examples to be a share of is 0."""

    precision: float
    recall: float
    f1: float
    examples: int  # that are of this class


def accuracy(predictions: Sequence[Label], references: Sequence[Sequence[Label]]) -> Measure:
    """The share of predictions that are, letter by letter, one of their references."""
    right = [p in several for p, several in zip(predictions, references)]
    return mean_of(right, "match:exact|refs:any")


def macro_f1(predictions: Sequence[Label], references: Sequence[Sequence[Label]]) -> Measure:
    """The mean F1 of the classes that are predicted or right somewhere in the sample."""
    labels = [several[0] for several in references]
    ids = {label: i for i, label in enumerate(dict.fromkeys([*labels, *predictions]))}
    ours_N, theirs_N = (np.array([ids[x] for x in xs]) for xs in (predictions, labels))
    is_right_N = ours_N == theirs_N

    def value(weights_N: np.ndarray) -> float:
        predicted_C, there_C, right_C = (
            np.bincount(x, w, minlength=len(ids))
            for x, w in (
                (ours_N, weights_N),
                (theirs_N, weights_N),
                (theirs_N, weights_N * is_right_N),
            )
        )
        either_C = predicted_C + there_C
        return float(100 * np.mean(2 * right_C[either_C > 0] / either_C[either_C > 0]))

    return Measure(value, "average:macro|classes:present")


def check_macro_f1(references: Sequence[Sequence[Label]]) -> None:
    """
    Raises:
      UserError: an example has several labels.
    """
    if any(len(several) != 1 for several in references):
        raise UserError("macro_f1: each example needs one label, and some have several")


def confusion_table(
    predictions: Sequence[Label], labels: Sequence[Label], names: Sequence[str]
) -> np.ndarray:
    """How many examples of class i were taken for class j: int64 [C, C].

    Args:
      predictions, labels: names, or indices into them.
      names: of the classes, in order.

    Raises:
      UserError: the lengths differ, or a label is none of these classes.
    """
    if len(predictions) != len(labels):
        raise UserError(f"{len(predictions)} predictions, but {len(labels)} labels")
    ids = {name: i for i, name in enumerate(names)}

    def index(label: Label, what: str, n: int) -> int:
        i = ids.get(label) if isinstance(label, str) else int(label)
        if i is None or not 0 <= i < len(names):
            raise UserError(f"{what} {n + 1}: {label!r} is none of the {len(names)} classes")
        return i

    table_CC = np.zeros((len(names), len(names)), np.int64)
    for n, (prediction, label) in enumerate(zip(predictions, labels)):
        table_CC[index(label, "label", n), index(prediction, "prediction", n)] += 1
    return table_CC


def per_class(
    predictions: Sequence[Label], labels: Sequence[Label], names: Sequence[str]
) -> dict[str, ClassScore]:
    """Precision, recall and F1 of each class by its name; see `confusion_table`."""
    return _scores(confusion_table(predictions, labels, names), names)


def _scores(table_CC: np.ndarray, names: Sequence[str]) -> dict[str, ClassScore]:
    right_C, there_C, predicted_C = np.diag(table_CC), table_CC.sum(axis=1), table_CC.sum(axis=0)

    def share(part_C: np.ndarray, of_C: np.ndarray) -> list[float]:
        return (100 * part_C / np.maximum(of_C, 1)).tolist()

    columns = (
        share(right_C, predicted_C),
        share(right_C, there_C),
        share(2 * right_C, predicted_C + there_C),
        there_C.tolist(),
    )
    return {name: ClassScore(*row) for name, *row in zip(names, *columns)}


def confusion(predictions: Sequence[Label], labels: Sequence[Label], names: Sequence[str]) -> str:
    """Scores of each class and what it was taken for, for a terminal; see `confusion_table`.

    Of more than a dozen classes, the confusions that are most frequent.
    """
    table_CC = confusion_table(predictions, labels, names)
    width = max(map(len, [*names, "class"]))
    lines = [f"{'class':<{width}} {'precision':>9} {'recall':>6} {'f1':>6} {'examples':>8}"]
    lines += [
        f"{name:<{width}} {s.precision:9.2f} {s.recall:6.2f} {s.f1:6.2f} {s.examples:8,}"
        for name, s in _scores(table_CC, names).items()
    ]
    if len(names) <= _WIDEST:
        cells = [max(len(name), len(f"{n:,}")) for name, n in zip(names, table_CC.max(axis=0))]
        lines += ["", "rows: the right class; columns: the predicted one"]
        lines += [" ".join([" " * width, *(f"{n:>{w}}" for n, w in zip(names, cells))])]
        lines += [
            " ".join([f"{name:<{width}}", *(f"{n:>{w},}" for n, w in zip(row_C, cells))])
            for name, row_C in zip(names, table_CC.tolist())
        ]
        return "\n".join(lines)
    wrong_CC = table_CC - np.diag(np.diag(table_CC))
    order = np.argsort(-wrong_CC, axis=None, kind="stable")[:_WIDEST]
    lines += ["", "most frequent confusions"]
    for i, j in zip(*np.unravel_index(order, wrong_CC.shape)):
        if wrong_CC[i, j]:
            lines.append(f"{wrong_CC[i, j]:8,}  {names[i]} taken for {names[j]}")
    return "\n".join(lines)
