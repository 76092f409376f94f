"""What a run makes of its losses."""

import json
import math

import pytest

from lm_jax.config import FaultsConfig
from lm_jax.training.health import Health, Verdict

NAN = math.nan
FINE, SKIPPED, TOO_MANY, SPIKE = (
    Verdict.FINE,
    Verdict.SKIPPED,
    Verdict.TOO_MANY_SKIPPED,
    Verdict.SPIKE,
)


def judged(config, *losses):
    health = Health(config)
    return [health.judge(loss, 1.0) for loss in losses], health


def test_so_many_that_are_no_numbers_in_a_row_are_too_many():
    found, health = judged(FaultsConfig(skips=3), NAN, NAN, 2.0, NAN, math.inf, NAN)
    assert found == [SKIPPED, SKIPPED, FINE, SKIPPED, SKIPPED, TOO_MANY]
    assert (health.skipped, health.in_a_row) == (5, 3)
    assert Health(FaultsConfig()).judge(1.0, math.inf) is SKIPPED  # the gradient counts as well


def test_a_spike_is_far_above_the_losses_before_and_is_none_of_them():
    usual = [3 + 0.1 * (i % 2) for i in range(20)]
    found, health = judged(FaultsConfig(spike=6), *usual, 3.2, 4.0, 4.0, 2.0)
    assert found == [FINE] * 21 + [SPIKE, SPIKE, FINE]
    assert 4.0 not in health.losses
    assert judged(FaultsConfig(spike=0), *usual, 99.0)[0][-1] is FINE
    assert judged(FaultsConfig(spike=6), *[3.0] * 20, 3.0 + 1e-4)[0][-1] is FINE  # rounding


def test_the_first_losses_tell_nothing_and_old_ones_are_forgotten():
    assert judged(FaultsConfig(spike=6), *[3.0] * 15, 99.0)[0] == [FINE] * 16
    _, health = judged(FaultsConfig(spike=6, spike_window=4), *range(9, 0, -1))
    assert health.losses == [4, 3, 2, 1]


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_what_is_noted_is_all_that_it_depends_on(cut):
    losses = [3 + 0.1 * math.sin(i) for i in range(40)]
    losses[25], losses[31], losses[32] = 9.0, NAN, NAN
    config = FaultsConfig(spike=5, spike_window=20, skips=2)
    whole, end = judged(config, *losses)
    first, health = judged(config, *losses[:cut])
    health = Health(config).recalled(json.loads(json.dumps(health.noted())))
    assert [*first, *(health.judge(x, 1.0) for x in losses[cut:])] == whole
    assert health.noted() == end.noted()
    assert {SPIKE, TOO_MANY} < set(whole)
