"""A corpus to token ids on disk, by all cores: blocks of documents go to worker processes, and what
they make of them is written in order, so that a run that was stopped goes on where it was.

Memory is that of a few blocks for each worker, however large the corpus is.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data import worker
from lm_jax.data.blocks import Block, blocks
from lm_jax.data.encoded import Meta, writing
from lm_jax.data.readers import Errors
from lm_jax.data.tokenizer_base import Tokenizer, utf8
from lm_jax.errors import UserError

_BATCH = 1 << 18  # characters that the tokenizer gets at once
_AHEAD = 3  # blocks for each worker that are being encoded, or wait


def pretokenize(
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: str,
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda text_bytes: None,
) -> tuple[Meta, int]:
    """Writes the ids of all documents of `config.sources`, or goes on with that; see
    `lm_jax.data.encoded`.

    Args:
      folder: made if it is not there.
      workers: processes; None: one for each core that this process may use. 1: this process itself.
      on_progress: called with the bytes of text that are done.

    Returns:
      What the folder says of itself, and the bytes of text that this call has added.

    Raises:
      UserError: a document cannot be read or encoded; there is none; or the folder holds something
        else, tokens of other text among it.
    """
    errors = Errors(config.on_error)
    with writing(folder, tokenizer) as writer:
        made_otherwise = UserError(
            f"--output: '{folder}' holds tokens of other text, or of this text as it was, or was"
            " read, before: remove it, or name another folder"
        )
        how = [config.document, config.text_key, config.on_error]
        digest = hashlib.sha256(json.dumps(how).encode())
        begun, known, seen = writer.meta.blocks, writer.meta.digest, 0
        digests, added = deque[str](), 0  # those of blocks that are not written yet

        def left() -> Iterator[Block]:
            nonlocal seen
            for seen, block in enumerate(blocks(config, errors), 1):
                digest.update(json.dumps(block.identity).encode())
                if seen > begun:
                    digests.append(digest.hexdigest())
                    yield block
                elif seen == begun and digest.hexdigest() != known:
                    raise made_otherwise

        work = _Work(tokenizer, config.on_error, writer.meta.dtype)
        on_progress(writer.meta.text_bytes)
        for result in _map(work, left(), _cores() if workers is None else workers):
            for message in result.skipped:
                errors.handle(message)
            size, skipped = result.text_bytes, len(result.skipped)
            writer.add(result.ids, result.lengths, size, skipped, digests.popleft())
            on_progress(writer.meta.text_bytes)
            added += size
        if seen < begun:
            raise made_otherwise
        if not writer.meta.documents:
            raise UserError(f"data source '{', '.join(config.sources)}': no documents")
        writer.meta.complete = True
    return writer.meta, added


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class _Result(NamedTuple):
    ids: np.ndarray  # of all documents
    lengths: np.ndarray  # int64 [documents]
    text_bytes: int
    skipped: list[str]


class _Gathered(Errors):
    """Keeps the messages of a block, for who asked for it to tell."""

    def __init__(self, policy: str):
        super().__init__(policy)
        self.messages: list[str] = []

    def handle(self, message: str) -> None:
        if not self.skip:
            super().handle(message)
        self.messages.append(message)


class _Work:
    """What is done with each block. Picklable."""

    def __init__(self, tokenizer: Tokenizer, policy: str, dtype: str):
        self.tokenizer, self.policy, self.dtype = tokenizer, policy, dtype

    def __call__(self, block: Block) -> _Result:
        errors = _Gathered(self.policy)
        documents = block.open(errors)
        lengths = np.zeros(len(documents), np.int64)
        ids, size, waiting, characters = [np.zeros(0, self.dtype)], 0, [], 0
        for i in range(len(documents)):
            text = documents[i]
            if text:
                waiting.append((i, text))
                characters += len(text)
                size += len(utf8(text))
            if waiting and (characters >= _BATCH or i == len(documents) - 1):
                found = self._encode(documents, waiting)
                lengths[[k for k, _ in waiting]] = [len(one) for one in found]
                ids.append(np.concatenate(found).astype(self.dtype))
                waiting, characters = [], 0
        return _Result(np.concatenate(ids), lengths, size, errors.messages)

    def _encode(
        self, documents: Sequence[str], waiting: Sequence[tuple[int, str]]
    ) -> list[np.ndarray]:
        try:
            return self.tokenizer.encode_batch([text for _, text in waiting])
        except UserError:
            for i, text in waiting:  # which of them?
                try:
                    self.tokenizer.encode(text)
                except UserError as e:
                    raise UserError(f"{documents.place(i)}: {e}") from None
            raise


def _map(work: _Work, found: Iterable[Block], workers: int) -> Iterator[_Result]:
    """What `work` makes of each block, in order. Processes read ahead, so far and no further."""
    if workers == 1:
        yield from map(work, found)
        return
    waiting: deque[concurrent.futures.Future] = deque()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin, (work,)
    )
    try:
        for block in found:
            waiting.append(pool.submit(_do, block))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "a worker process was killed, for want of memory perhaps; what is done is kept, and the"
            " same command goes on, with fewer --workers if you like"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_work: Any = None  # of a worker process


def _begin(work: _Work) -> None:
    global _work
    worker.begin(signal.SIGINT)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    _work = work


def _do(block: Block) -> _Result:
    return _work(block)
