"""No input ends in anything but what is right or an error for the user: a few mutations of each
target, always the same ones. `fuzz.py` tries many, guided by what they reach."""

import pathlib
import random
import sys

import pytest

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / name) for name in ("interop", "serving")]

from fuzzing import attempt, mutated  # noqa: E402
from targets import TARGETS  # noqa: E402

INPUTS = 40


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_the_input_it_is_read_right_or_refused(name):
    target, rng = TARGETS[name], random.Random(name)
    read = [attempt(target, seed) for seed in target.seeds]
    assert any(read), "no input that is right is read"
    for _ in range(INPUTS):
        data = mutated(rng, target, rng.choice(target.seeds), rng.choice(target.seeds))
        try:
            read.append(attempt(target, data))
        except BaseException as e:
            raise AssertionError(f"on {data!r}") from e
    assert not all(read), "no mutation makes anything wrong"
