"""Streams of training batches that do not depend on hosts, workers or restarts.

There are `DataConfig.lanes` lanes. Lane l reads every lanes-th document of the shuffled, repeated
corpus, from the l-th on, and packs them into rows of its own. With R = batch_size / lanes, rows l R
to (l + 1) R of each global batch are the next R rows of lane l. Process p of P owns lanes p lanes /
P to (p + 1) lanes / P, so its rows are one block of the global batch, and that batch is the same
whatever P is. (P counts the processes that have rows of their own. On a mesh whose devices are
arranged so that a process has several blocks, the same rows stand in another order.) Within a
process a thread or worker processes read the lanes, which changes nothing either.
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from lm_jax.config import DataConfig
from lm_jax.data import packing, worker
from lm_jax.data.packing import Batch, Block, CropLane, Encode, FlatText, Row
from lm_jax.data.sources import by_source, documents
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import Interrupted, UserError

_KILLED = "terminated unexpectedly"  # what Grain says of a worker process that is gone
_AHEAD = 2  # batches that each worker (or the thread) prepares beyond the one in use
State = dict[str, Any]


def train_stream(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Stream":
    """The training batches of this process.

    Args:
      process_index, process_count: as `lm_jax.sharding.mesh.batch_block` gives them: processes that
        share rows count as one.

    Raises:
      UserError: the sources cannot be read, hold no text, or too little for 'crop'; or
        `process_count` does not divide the lanes.
    """
    if config.lanes is None:
        raise ValueError("data.lanes is None: lm_jax.validation.validate fills it in")
    if config.lanes % process_count:
        raise UserError(
            f"data.lanes: {process_count} processes cannot share {config.lanes} lanes alike; set "
            f"data.lanes to a multiple of {process_count} that divides data.batch_size = "
            f"{config.batch_size}"
        )
    here = config.lanes // process_count
    lanes = range(process_index * here, (process_index + 1) * here)
    crop = config.packing == "crop"
    maker = CropLanes(config, tokenizer, seed) if crop else PackedLanes(config, tokenizer, seed)
    # A crop is a slice of an array that is in memory: workers would only copy it about.
    workers = 0 if crop else min(config.workers, here)
    return Stream(maker, config, tokenizer.pad_id, lanes, workers, alone=process_count == 1)


class PackedLanes:
    """Opens the lanes of 'first_fit' and 'concatenate'. Picklable."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, seed: int):
        self.config, self.tokenizer = config, tokenizer
        self.sources = by_source(config, "train")
        # Grain shuffles epoch e with seed + e: seeds far apart keep two runs, or two sources, from
        # meeting in the same order.
        self.seeds = np.random.SeedSequence(seed).generate_state(len(self.sources) + 1).tolist()

    def __call__(self, lane: int) -> grain.DatasetIterator:
        config = self.config
        parts = []
        for source, seed in zip(self.sources, self.seeds, strict=False):
            part = grain.MapDataset.source(source)
            if config.shuffle:
                part = part.shuffle(seed=seed)
            parts.append(part.repeat(config.epochs)[lane :: config.lanes])
        # Mixed within the lane: mixed before it is sliced, two sources of equal weight would
        # alternate, and each of two lanes would read one of them only.
        mixed = grain.MapDataset.mix(parts, config.weights) if config.weights else parts[0]
        texts = mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        total = sum(len(s) for s in self.sources)
        encode = Encode(self.tokenizer, config, total, longest=packing.longest_piece(config))
        pieces = grain.experimental.FlatMapIterDataset(texts, encode)
        seed = self.seeds[-1] if config.shuffle else None
        return iter(packing.pack(pieces, config, seed=seed))


class CropLanes:
    """Opens the lanes of 'crop'."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, seed: int):
        self.config, self.seed = config, seed
        self.sources = [documents(config, "train")]
        self.text = FlatText(self.sources[0], tokenizer, config)
        if self.text.targets < config.length:
            raise UserError(
                f"data.length: the training text has {len(self.text.tokens)} tokens, and packing"
                f" 'crop' needs at least {config.length + self.text.ahead} for data.length ="
                f" {config.length}"
            )

    def __call__(self, lane: int) -> CropLane:
        config = self.config
        rows = config.batch_size // config.lanes
        return CropLane(
            self.text, lane=lane, rows=rows, batch_size=config.batch_size, seed=self.seed
        )


class Stream(Iterator[Batch]):
    """An iterator of local batches: dicts of arrays [batch_size / processes, length].

      inputs, targets: int32, pad_id where there is nothing
      segments: int32, 1.. for each piece of a document in the row, 0 for padding
      positions: int32, from 0 within each segment
      weights: float32, 1 at each real target, 0 at padding

    With objective 'masked' a target is the input itself, until the train step masks some.

    With finite epochs the lanes end at different times; an ended lane gives rows of padding. When
    every lane of a lone process has ended, iteration stops. One of several processes cannot see the
    others' lanes, so it yields padding for ever; `exhausted` says that the batch just returned, and
    all to come, are nothing but padding here: stop once it is so on every process.
    """

    exhausted: bool = False

    def __init__(
        self,
        maker: Any,
        config: DataConfig,
        pad_id: int,
        lanes: Sequence[int],
        workers: int,
        *,
        alone: bool,
    ):
        """
        Args:
          maker: opens a lane, by its number: an iterator of rows with get_state and set_state. Its
            `sources` are sequences of documents.
        """
        self.sources = maker.sources
        self._maker, self._config, self._pad_id = maker, config, pad_id
        self._lanes, self._workers, self._alone = lanes, workers, alone
        self._state: State = {str(lane): None for lane in lanes}  # None: from the start
        self._blocks: grain.DatasetIterator | None = None

    def get_state(self) -> State:
        """Where each lane of this process stands after the batch last returned; fit for JSON."""
        return json.loads(json.dumps(self._state))

    def set_state(self, state: State) -> None:
        """Goes on after the batch whose state this is.

        `state` holds the states of all lanes of the job, or at least those of this process.

        Raises:
          UserError: a lane is missing, or there were more.
        """
        known = {str(lane) for lane in range(self._config.lanes)}
        if not self._state.keys() <= state.keys() <= known:
            raise UserError(
                f"data.lanes = {self._config.lanes}, but the saved position in the data is that of"
                f" {len(state)} lanes, and each has read other documents: set data.lanes ="
                f" {len(state)}, or start anew in another workdir"
            )
        self.close()
        self._state = {lane: state[lane] for lane in self._state}
        self.exhausted = False

    def __next__(self) -> Batch:
        if self._blocks is None:
            self._blocks = self._open()
        try:
            blocks = [next(self._blocks) for _ in range(max(self._workers, 1))]
        except BaseException as e:
            self.close()
            if isinstance(e, RuntimeError) and _KILLED in str(e):
                raise Interrupted(
                    "data.workers: a worker process was killed, for want of memory perhaps; the"
                    " same command goes on, with fewer workers if you like"
                ) from None
            raise
        live = sum(int(block.pop("rows")) for block in blocks)
        for block in blocks:
            self._state |= json.loads(block.pop("state"))
        self.exhausted = live == 0
        if self.exhausted and self._alone:
            self.close()
            raise StopIteration
        if len(blocks) == 1:
            batch = blocks[0]
        else:
            batch = {key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]}
        return packing.finish(batch, self._config.attend_across_documents)

    def close(self) -> None:
        """Ends the thread or the worker processes; the next batch starts them again."""
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> grain.DatasetIterator:
        blocks = _Blocks(self._maker, self._config, self._pad_id, self._lanes, dict(self._state))
        if not self._workers:
            ahead = grain.experimental.ThreadPrefetchIterDataset(
                blocks, prefetch_buffer_size=_AHEAD
            )
            return iter(ahead)
        # Through a pipe rather than shared memory: containers often allow 64 MB of that, and
        # exceeding it kills the process without a message.
        options = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags, also outside absl programs
            flags.FLAGS.mark_as_parsed()
        shared = grain.experimental.WithOptionsIterDataset(blocks, options)
        return iter(
            shared.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=_AHEAD
                ),
                worker_init_fn=_init_worker,
            )
        )


class _Blocks(grain.IterDataset):
    """Blocks of rows of a set of lanes, each with the lanes' state after it.

    The state travels with the rows: it is that of what was consumed, however much is read ahead.
    """

    def __init__(
        self, maker: Any, config: DataConfig, pad_id: int, lanes: Sequence[int], state: State
    ):
        super().__init__()
        self.maker, self.config, self.pad_id = maker, config, pad_id
        self.lanes, self.state = lanes, state

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain calls this in worker `sl.start` of `sl.step`: keeps that worker's lanes."""
        del sequential_slice
        n = len(self.lanes)
        self.lanes = self.lanes[n * sl.start // sl.step : n * (sl.start + 1) // sl.step]

    def __iter__(self) -> "_BlockIterator":
        return _BlockIterator(self)


class _BlockIterator(grain.DatasetIterator):
    def __init__(self, blocks: _Blocks):
        super().__init__()
        self._of = blocks
        self._rows: dict[int, Iterator[Row]] | None = None  # opened where they are read
        self._ended: set[int] = set()

    def _open(self) -> dict[int, Iterator[Row]]:
        opened = {}
        for lane in self._of.lanes:
            opened[lane] = self._of.maker(lane)
            if (state := self._of.state[str(lane)]) is not None:
                opened[lane].set_state(_tuples(state))
        return opened

    def __next__(self) -> dict[str, Any]:
        if self._rows is None:
            self._rows = self._open()
        config = self._of.config
        each = config.batch_size // config.lanes
        block = Block(each * len(self._of.lanes), config.length, self._of.pad_id)
        for i, lane in enumerate(self._of.lanes):
            for j in range(each):
                if lane in self._ended:
                    break
                try:
                    block.put(i * each + j, next(self._rows[lane]))
                except StopIteration:
                    self._ended.add(lane)
        state = {str(lane): rows.get_state() for lane, rows in self._rows.items()}
        return block.batch | {"rows": np.int64(block.rows), "state": json.dumps(state)}

    def get_state(self) -> dict[str, Any]:
        return {}  # the state is in the elements

    def set_state(self, state: dict[str, Any]) -> None:
        raise RuntimeError("a stream is restored through its dataset")


def _tuples(state: Any) -> Any:
    """JSON has no tuples, and ConcatThenSplit compares its slices with one."""
    if isinstance(state, dict):
        return {k: _tuples(v) for k, v in state.items()}
    return tuple(_tuples(v) for v in state) if isinstance(state, list) else state


def _init_worker(index: int, count: int) -> None:
    """Makes a worker process that ends with its parent and never touches the accelerator."""
    del index, count
    worker.begin(signal.SIGINT, signal.SIGTERM)  # the parent ends its workers itself
    if "jax" in sys.modules:  # Grain imports it for its trees; this keeps backends from starting
        sys.modules["jax"].config.update("jax_platforms", "cpu")
