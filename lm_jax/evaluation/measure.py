"""What a metric is, once it has seen predictions and references: a function of their weights.

N examples.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Label = str | int


@dataclasses.dataclass(frozen=True)
class Measure:
    """The score of a sample, for any number of times that each example is in it.

    Attributes:
      of: float64 [N], how often each example counts (all 1: the sample itself) -> 0 to 100.
      signature: what has to be known to compute the same again.
      notes: what a reader of this score should know; '' if nothing.
    """

    of: Callable[[np.ndarray], float]
    signature: str
    notes: str = ""


Prepare = Callable[[Sequence[Label], Sequence[Sequence[Label]]], Measure]


def mean_of(values_N: Sequence[float] | np.ndarray, signature: str, notes: str = "") -> Measure:
    """The mean of a score that each example has by itself, 0 to 1."""
    values_N = np.asarray(values_N, np.float64)
    return Measure(
        lambda weights_N: float(100 * (weights_N @ values_N) / weights_N.sum()), signature, notes
    )
