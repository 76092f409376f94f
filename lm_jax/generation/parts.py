"""Texts that are scored in parts: windows of long ones, and when all of a text is done."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

OnBatch = Callable[[int], None]  # called with how many texts or pairs all tokens are scored of


def numbered(count: int) -> list[str]:
    """What messages call texts that have no other name."""
    return [f"text {i + 1} of {count}" for i in range(count)]


def texts_done(
    owners: Sequence[int], count: int, on_batch: OnBatch | None
) -> Callable[[list[int]], None]:
    """Called with the places of rows that are done, it tells how many of `count` texts are.

    Args:
      owners: of each row, the text that it is a part of.
    """
    left = np.bincount(np.array(owners, np.int64), minlength=count)

    def on_rows(chosen: list[int]) -> None:
        for place in chosen:
            left[owners[place]] -= 1
        if on_batch:
            on_batch(int((left == 0).sum()))

    return on_rows


def windows(ids: np.ndarray, limit: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of at most `limit` inputs, and where in each the tokens begin that it is to score."""
    for first in range(1, len(ids), limit):
        end = min(first + limit, len(ids))
        start = max(end - limit - 1, 0)
        yield ids[start:end], first - start
