"""How probable a model finds the right answers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm_jax.evaluation.measure import Measure

_MOST = 700.0  # nats a token, of which the exponential is still a number


class Likelihood(NamedTuple):
    """Of one right answer, given what was asked."""

    nll: float  # -log p, in nats
    tokens: int  # that this is the sum over


def perplexity(likelihoods: Sequence[Likelihood]) -> Measure:
    """e to the mean of -log p over the tokens of all answers: longer ones weigh more."""
    nll_N, tokens_N = np.array(likelihoods, np.float64).T

    def value(weights_N: np.ndarray) -> float:
        return math.exp(min(float(weights_N @ nll_N / (weights_N @ tokens_N)), _MOST))

    return Measure(value, "of:right answer|refs:first|base:e|aggregate:tokens, ends included")
