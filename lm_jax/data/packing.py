"""From documents to packed rows.

A document becomes its tokens, [bos] + ids + [eos]; its tokens become pairs (input, target), each
token with the one after it; pairs are packed into rows of `length`. As each pair brings its own
target, a document may be cut anywhere and each token after its first is a target exactly once.

With objective 'masked' each token is paired with itself, and which of them are masked, and count,
is drawn later, in the train step. 'first_fit' then gives each piece of a document ends of its own,
so that every segment of a row is a whole [CLS] ... [SEP]; the other packings cut one stream of
[bos] + ids + [eos] anywhere.

Of an example not every pair counts: then pairs are (input, target, whether it counts), see
`lm_jax.data.encoding`. It is never cut in two, but shortened where it is longer than a row.

Shapes: P pairs of a document or piece, T pairs of a row (`DataConfig.length`), B rows of a block.
"""

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data.chat import chat_template_for
from lm_jax.data.encoded import Encoded, ids_of
from lm_jax.data.encoding import by_turn, encode_example, with_ends
from lm_jax.data.examples import Example
from lm_jax.data.spans import windows
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError

Row = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

PAIRS, SEGMENTS, POSITIONS = "pairs", "pairs_segment_ids", "pairs_positions"  # as Grain names them


def targets_ahead(config: DataConfig) -> int:
    """How many tokens after an input its target stands: 1, or 0 where the target is the input
    itself before it was masked."""
    return 0 if config.objective == "masked" else 1


def as_pairs(tokens: np.ndarray, ahead: int) -> np.ndarray:
    """Each token with the one `ahead` (0 or 1) after it: a view [len(tokens) - ahead, 2]."""
    if len(tokens) <= ahead:
        return np.zeros((0, 2), np.int32)
    if ahead == 0:
        return np.broadcast_to(tokens[:, None], (len(tokens), 2))
    return np.lib.stride_tricks.sliding_window_view(tokens, 2)


class Encode(grain.experimental.FlatMapTransform):
    """A document to its pieces {'pairs': int32 [P, 2]}, P at most `longest` where that is given.

    An example is one piece {'pairs': int32 [P, 3]}, or one for each window of its context, or for
    each answer in its conversation.

    Raises:
      UserError: as many documents in a row as the corpus holds have not a single target.
    """

    max_fan_out = 1 << 62  # Grain only asks where pieces are indexed, and here they are streamed

    def __init__(
        self, tokenizer: Tokenizer, config: DataConfig, documents: int, *, longest: int | None
    ):
        self.tokenizer, self.longest, self.documents = tokenizer, longest, documents
        self.ahead = targets_ahead(config)
        self.own_ends = config.objective == "masked" and config.packing == "first_fit"
        self.config = config
        if config.objective == "chat":
            if config.turns is None:
                raise ValueError("data.turns is None: lm_jax.validation.validate fills it in")
            chat_template_for(tokenizer, "chat")  # that there is none is better said now
        self.barren = 0  # documents without a target since the last one that had some

    def flat_map(self, element: str | Encoded | Example) -> list[Row]:
        if isinstance(element, Example):
            pieces = self._example(element)
        else:
            ids = ids_of(element, self.tokenizer)
            pieces = self._pieces(ids) if len(ids) else []
        self.barren = 0 if pieces else self.barren + 1
        if self.barren > self.documents:
            raise UserError(
                f"no document of the training split has {least_tokens(self.ahead)}, so there is"
                " nothing to predict: look at data.sources, and at what data.on_error='skip' left"
                " out"
            )
        return [{PAIRS: pairs_P2} for pairs_P2 in pieces]

    def _example(self, example: Example) -> list[np.ndarray]:
        if not example.targets:
            return []
        try:
            if self.config.objective == "extract":
                found = windows(example, self.tokenizer, self.config)
                return [window.pairs(example) for window in found]
            apart = by_turn(example) if self.config.turns == "apart" else [example]
            found = [encode_example(one, self.tokenizer, self.config) for one in apart]
        except UserError as e:
            example.bad(str(e))
            return []
        if not all(whole for _, whole in found):
            _say_once(
                f"note: an example is longer than data.length = {self.config.length}: it is"
                " shortened, as are others like it (said once)"
            )
        return [pairs_P3 for pairs_P3, _ in found]

    def _pieces(self, ids: np.ndarray) -> list[np.ndarray]:
        if self.own_ends:
            step = self.longest - len(with_ends(self.tokenizer, ids[:0]))
            parts = [ids[i : i + step] for i in range(0, len(ids), step)]
            return [as_pairs(with_ends(self.tokenizer, part), self.ahead) for part in parts]
        pairs_P2 = as_pairs(with_ends(self.tokenizer, ids), self.ahead)
        step = self.longest or max(len(pairs_P2), 1)
        return [pairs_P2[i : i + step] for i in range(0, len(pairs_P2), step)]


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def least_tokens(ahead: int) -> str:
    """What a document needs to have a target, for messages."""
    return "two tokens or more" if ahead else "a token"


def pack(pieces: grain.IterDataset, config: DataConfig, *, seed: int | None) -> grain.IterDataset:
    """Packs {'pairs': [P, 2]} into rows: pairs [T, 2], their segment ids and positions [T].

    'first_fit' never cuts a piece (P <= T), and pads; 'concatenate' fills every row but the last.
    `seed` shuffles the rows of 'first_fit' that were open together; None leaves them in order.
    """
    length = {PAIRS: config.length}
    if config.packing == "concatenate":
        return grain.experimental.ConcatThenSplitIterDataset(pieces, length_struct=length)
    return grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct=length,
        num_packing_bins=config.packing_bins,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )


def longest_piece(config: DataConfig) -> int | None:
    """The most pairs that a piece may have: a row's where pieces are not cut."""
    return config.length if config.packing == "first_fit" else None


class Block:
    """Rows gathered into arrays [B, T], padding included."""

    def __init__(self, rows: int, length: int, pad_id: int):
        shape = (rows, length)
        self.batch: Batch = {
            "inputs": np.full(shape, pad_id, np.int32),
            "targets": np.full(shape, pad_id, np.int32),
            "segments": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
        }
        self.rows = 0  # that hold tokens

    def put(self, index: int, row: Row) -> None:
        real_T, pairs = row[SEGMENTS] > 0, row[PAIRS]
        for key, values_T in (
            ("inputs", pairs[:, 0]),
            ("targets", pairs[:, 1]),
            ("segments", row[SEGMENTS]),
            ("positions", row[POSITIONS]),
            ("weights", np.float32(1) if pairs.shape[1] == 2 else pairs[:, 2].astype(np.float32)),
        ):
            np.copyto(self.batch[key][index], values_T, where=real_T)
        self.rows += 1


def finish(batch: Batch, attend_across: bool) -> Batch:
    """Joins the segments of a row if so asked."""
    if attend_across:
        real_BT = batch["segments"] > 0
        batch["segments"] = real_BT.astype(np.int32)
        batch["positions"] = np.arange(real_BT.shape[1], dtype=np.int32) * real_BT
    return batch


class FlatText:
    """All documents as one array of tokens, from which 'crop' takes windows (as nanoGPT does).

    Each begins with bos, if the tokenizer has one. Several are separated by eos, which belongs to
    the document that it opens. Where the tokenizer has no eos, the last token of a document has no
    target, unless rows attend across. With objective 'masked' each is [bos] + ids + [eos].
    """

    def __init__(
        self, documents: Sequence[str | Encoded], tokenizer: Tokenizer, config: DataConfig
    ):
        small = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        several = len(documents) > 1
        eos = [] if tokenizer.eos_id is None or not several else [tokenizer.eos_id]
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # what a prompt begins with
        self.length, self.ahead = config.length, targets_ahead(config)
        # Whether a pair may reach over the end of a document into the next.
        self.crosses = bool(eos) or not several or config.attend_across_documents or not self.ahead
        parts, starts, total = [], [], 0
        for document in documents:
            ids = ids_of(document, tokenizer).astype(small)
            if not len(ids):
                continue
            if self.ahead:
                ids = np.concatenate([np.array([*(eos if parts else []), *bos], small), ids])
            else:
                ids = with_ends(tokenizer, ids).astype(small)
            starts.append(total)
            parts.append(ids)
            total += len(ids)
        self.tokens = np.concatenate(parts) if parts else np.zeros(0, small)
        self.starts = np.array(starts, np.int64)  # [documents]
        self.targets = max(len(self.tokens) - self.ahead, 0)

    def window(self, start: int) -> Row:
        """The row whose first input is token `start`; padded where the text ends."""
        count = min(self.length, self.targets - start)
        pairs_T2 = np.zeros((self.length, 2), np.int32)
        pairs_T2[:count] = as_pairs(self.tokens[start : start + count + self.ahead], self.ahead)
        segments_T = np.zeros(self.length, np.int32)
        positions_T = np.zeros(self.length, np.int32)
        here = np.searchsorted(self.starts, [start, start + count], side="right")
        inside = self.starts[here[0] : here[1]] - start
        edges = [0, *(int(s) for s in inside if s < count), count]
        ends = set() if self.crosses else set(inside.tolist())  # their last pair is no target
        segment = 0
        for a, b in itertools.pairwise(edges):
            stop = b - 1 if b in ends else b
            if stop > a:
                segment += 1
                segments_T[a:stop] = segment
                positions_T[a:stop] = np.arange(stop - a)
        return {PAIRS: pairs_T2, SEGMENTS: segments_T, POSITIONS: positions_T}


class CropLane(Iterator):
    """The rows of one lane of 'crop': windows at positions drawn from (seed, row of the stream)."""

    def __init__(self, text: FlatText, *, lane: int, rows: int, batch_size: int, seed: int):
        self.text, self.lane, self.rows, self.batch_size = text, lane, rows, batch_size
        self.seed, self.next = seed, 0

    def __next__(self) -> Row:
        batch, row = divmod(self.next, self.rows)
        index = batch * self.batch_size + self.lane * self.rows + row
        draw = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        self.next += 1
        return self.text.window(int(draw.integers(self.text.targets - self.text.length + 1)))

    def get_state(self) -> dict[str, Any]:
        return {"next": self.next}

    def set_state(self, state: dict[str, Any]) -> None:
        self.next = state["next"]
