"""Rows of unequal length in batches of few shapes.

B rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from lm_jax.sharding.mesh import shards

# Tokens; shorter rows would save next to nothing. Those of a cache, and of a text by itself.
SMALLEST_BUCKET, SMALLEST_TEXT = 32, 16

# Batches of a portion: what a portion came to is written down when all of it is done, and its rows
# are sorted by length among themselves. A text that is generated takes far longer than one that is
# read.
GENERATED, READ = 2, 16

Item = TypeVar("Item")


def bucket(n: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The power of two to compile for."""
    return max(smallest, 1 << (n - 1).bit_length())


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Places in `lengths`, longest first and `batch_size` at a time, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def padded(
    rows: Sequence[np.ndarray], B: int, limit: int, smallest: int = SMALLEST_BUCKET
) -> tuple[np.ndarray, np.ndarray]:
    """Rows side by side in the first of `B`; the others are one token long.

    Args:
      limit: the longest row.

    Returns:
      int32 ids [B, T], padded on the right with zeros, and the lengths, int32 [B].
    """
    T = min(bucket(max(map(len, rows)), smallest), limit)
    tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.ones(B, np.int32)
    for r, ids in enumerate(rows):
        lengths_B[r], tokens_BT[r, : len(ids)] = len(ids), ids
    return tokens_BT, lengths_B


def rows_of(count: int, batch_size: int) -> int:
    """The rows to compile for where there are `count`, at most about `batch_size` at a time: the
    mesh divides them."""
    parts = shards("batch")
    return -(-min(batch_size, max(count, 1)) // parts) * parts


def batches(
    rows: Sequence[np.ndarray], batch_size: int, limit: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Texts by themselves: the places of those that stand side by side, and these as `padded` gives
    them."""
    B = rows_of(len(rows), batch_size)
    for chosen in by_length(list(map(len, rows)), B):
        yield chosen, *padded([rows[i] for i in chosen], B, limit, SMALLEST_TEXT)


def portions(items: Sequence[Item], batch_size: int, most: int) -> Iterator[Sequence[Item]]:
    """As few parts as have at most so many batches each, all of them about as long and the last one
    no shorter than others: a batch that is not full would be compiled for if it were alone."""
    whole = -(-len(items) // batch_size)
    count = -(-whole // most)
    for n in range(count):
        first, end = n * whole // count, (n + 1) * whole // count
        yield items[first * batch_size : end * batch_size]
