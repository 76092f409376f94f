"""Portions: all items once, in order, in as few batches as they fill."""

import pytest

from lm_jax.generation.batching import portions


@pytest.mark.parametrize("count", range(0, 41, 1))
@pytest.mark.parametrize("most", [2, 16])
def test_portions_are_of_whole_batches(count, most):
    found = list(portions(range(count), 4, most))
    assert [i for some in found for i in some] == [*range(count)]
    assert all(len(some) <= 4 * most for some in found)
    assert all(len(some) % 4 == 0 for some in found[:-1])
    assert count <= 4 or all(len(some) >= 4 for some in found)
    assert len(found) == -(-count // (4 * most))
