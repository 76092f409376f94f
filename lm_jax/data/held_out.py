"""The validation split as batches: all of it once, or a fixed sample from all over it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data import packing
from lm_jax.data.packing import (
    Batch,
    Block,
    Encode,
    FlatText,
    Row,
    least_tokens,
    targets_ahead,
)
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer import golden_order
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Batches as `Stream` yields them, [batch_size / process_count, length], unshuffled.

    Each target of the split occurs once; rows of padding fill the last batch. The split is packed
    as the training data is; 'crop' reads consecutive windows of it. Every process packs the whole
    split and keeps its block of rows, so all of them yield the same number of batches.

    Args:
      batch_size: rows of a batch over all processes.
      max_batches: stop after so many, which then hold a sample: first one piece of each document,
        from another place in each, then a second one, and so on ('crop': windows at equal
        distances). The same sample each time.

    Raises:
      UserError: the split cannot be read or has no target, or the processes do not divide
        `batch_size`.
    """
    if batch_size % process_count:
        raise UserError(
            f"training.evaluate_batch_size: {process_count} processes cannot share {batch_size} "
            "rows alike"
        )
    found = documents(config, "validation")
    limit = None if max_batches is None else max_batches * batch_size
    if config.packing == "crop":
        rows = _windows(FlatText(found, tokenizer, config), limit)
    else:
        rows = _packed(found, tokenizer, config, limit)
    local = range(
        process_index * batch_size // process_count,
        (process_index + 1) * batch_size // process_count,
    )
    return _batches(rows, config, tokenizer.pad_id, batch_size, local, max_batches)


def _batches(
    rows: Iterator[Row],
    config: DataConfig,
    pad_id: int,
    batch_size: int,
    local: range,
    max_batches: int | None,
) -> Iterator[Batch]:
    count = 0
    while max_batches is None or count < max_batches:
        block, seen = Block(len(local), config.length, pad_id), 0
        for row in rows:
            if seen in local:
                block.put(seen - local.start, row)
            seen += 1
            if seen == batch_size:
                break
        if not seen:
            break
        yield packing.finish(block.batch, config.attend_across_documents)
        count += 1
    if count == 0 and max_batches != 0:
        raise UserError(
            f"the validation split has no document of {least_tokens(targets_ahead(config))}: look"
            " at data.sources and data.validation_sources, or raise data.validation_fraction"
        )


def _windows(text: FlatText, limit: int | None) -> Iterator[Row]:
    """Windows of the whole text one after the other, or `limit` of them at equal distances."""
    total = -(-text.targets // text.length)
    count = total if limit is None else min(limit, total)
    return (text.window(i * total // count * text.length) for i in range(count))


def _packed(
    found: Sequence[str], tokenizer: Tokenizer, config: DataConfig, limit: int | None
) -> Iterator[Row]:
    if limit is None:
        encode = Encode(tokenizer, config, len(found), longest=packing.longest_piece(config))
        return iter(packing.pack(_Pieces(lambda: _in_order(found, encode)), config, seed=None))
    encode = Encode(tokenizer, config, len(found), longest=config.length)
    return iter(packing.pack(_Pieces(lambda: _spread(found, encode)), config, seed=None))


def _in_order(found: Sequence[str], encode: Encode) -> Iterator[Row]:
    for i in range(len(found)):
        yield from encode.flat_map(found[i])


def _spread(found: Sequence[str], encode: Encode) -> Iterator[Row]:
    """All pieces: one of each document, then another of each, until none is left.

    Both documents and the pieces of a document are visited in steps of the golden ratio, so that
    wherever the caller stops, what it has seen lies evenly over the split.
    """
    waiting: list[Iterator[Row]] = []
    for rank, i in enumerate(golden_order(len(found))):
        if pieces := encode.flat_map(found[i]):
            first = int(len(pieces) * (rank * 0.618034 % 1))
            order = [(first + k) % len(pieces) for k in golden_order(len(pieces))]
            yield pieces[order[0]]
            waiting.append(iter([pieces[k] for k in order[1:]]))
    while waiting:
        left = []
        for pieces_left in waiting:
            if (piece := next(pieces_left, None)) is not None:
                yield piece
                left.append(pieces_left)
        waiting = left


class _Pieces(grain.IterDataset):
    """A generator as the input of a Grain transformation; it has no state to save."""

    def __init__(self, make: Callable[[], Iterator[Row]]):
        super().__init__()
        self.make = make

    def __iter__(self) -> "_PiecesIterator":
        return _PiecesIterator(self.make())


class _PiecesIterator(grain.DatasetIterator):
    def __init__(self, pieces: Iterator[Row]):
        super().__init__()
        self.pieces = pieces

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self.pieces)

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise RuntimeError("validation is read from the start")
