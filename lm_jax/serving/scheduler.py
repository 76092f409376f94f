"""Requests wait in a queue, take turns at the rows of a batch, and hear of each piece of text.

One thread owns the device. Between two steps it hands out what was drawn, drops what nobody waits
for any more, and reads prompts into rows that are free. A step is on its way before the tokens of
the one before it are read.
"""

import collections
import contextlib
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.decoding import Completion, Row, check_generates
from lm_jax.generation.reading import check_ids
from lm_jax.generation.sampling import Sampling
from lm_jax.generation.text import TextStream
from lm_jax.model.transformer import Transformer
from lm_jax.serving.batch import Batch, Entry

_PROMPT_TOKENS = 256  # to read between two steps, so that long prompts do not hold up the rest


class TooLong(UserError):
    """A prompt leaves no room for an answer."""


class Full(Exception):
    """The queue has no room."""


class Closed(Exception):
    """The server is shutting down."""


class TimedOut(Exception):
    """A job's time was up."""


class Failed(Exception):
    """A job was ended by a defect."""


Event = str | Completion | Exception


@dataclasses.dataclass(eq=False)
class Job:
    """One continuation, made by `Scheduler.job`.

    Attributes:
      tell: called by the scheduler's thread with pieces of text as they become certain, then with
        the Completion, or else with an exception. It must not wait.
    """

    row: Row
    entry: Entry
    tell: Callable[[Event], None]
    deadline: float  # of time.monotonic
    together: object = None  # the same for all that were submitted at once
    cancelled: bool = False
    asked: int = 0  # tokens that were drawn or are on their way

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled = True

    @property
    def over(self) -> bool:
        """Whether nothing more is to be drawn."""
        done = self.row.finish_reason is not None or self.asked >= self.row.budget
        return done or self.cancelled or time.monotonic() > self.deadline


class Scheduler:
    """Continues many prompts at once.

    What becomes of a job depends on its prompt, seed and sampling alone: it is what
    `Generator.generate([prompt], ...)` makes of them, up to rounding.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int,
        waiting: int,
        max_length: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        donate: bool = False,
    ):
        """
        Args:
          model: on the mesh, if there is one; its batch axes must be of size 1.
          slots: the most jobs at a time.
          waiting: the most jobs that wait for a slot.
          max_length: the longest sequence, prompt included; None: the model's, or 2048 if that is
            less.
          donate: whether the model is used for nothing else, and may be given up for a copy.

        Raises:
          UserError: the model cannot continue text, or `max_length` is out of range.
        """
        check_generates(model.config, tokenizer)
        longest = model.config.max_length
        self.max_length = min(longest, 2048) if max_length is None else max_length
        if not 2 <= self.max_length <= longest:
            raise UserError(
                f"--max_length: must be from 2 to the model's {longest}, not {self.max_length}"
            )
        self.slots, self.waiting, self.tokenizer = slots, waiting, tokenizer
        self._mesh = mesh
        self._config = model.config
        self._batch = Batch(model, tokenizer.vocab_size, slots, self.max_length, donate=donate)
        self._running: list[Job] = []
        self._queue: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._flying: collections.deque[tuple[jax.Array, list[Job | None]]] = collections.deque()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def job(
        self,
        prompt: str | np.ndarray,
        tell: Callable[[Event], None],
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        stop: Sequence[str] = (),
        deadline: float = float("inf"),
    ) -> Job:
        """A job to submit.

        Args:
          prompt: text, or the ids int32 [n] that are to be read.
          tell: see `Job`.
          max_tokens: the most to generate; `max_length` is a limit too.

        Raises:
          TooLong: the prompt is.
          UserError: it is empty, cannot be encoded, or has ids that are no tokens.
        """
        t = self.tokenizer
        ids = t.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        check_ids(ids, self._config, t)
        if not len(ids):
            raise UserError("it is empty, and this tokenizer has no token that begins a text")
        if len(ids) >= self.max_length:
            raise TooLong(
                f"it has {len(ids)} tokens, and prompt and answer together may have"
                f" {self.max_length}"
            )
        text = prompt if isinstance(prompt, str) else ""
        budget = min(max_tokens, self.max_length - len(ids))
        row = Row(0, text, ids, TextStream(t.stream(), ids, stop), budget, t.stop_ids)
        return Job(row, Entry(ids, sampling, seed), tell, deadline)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs, or none. Those that are queued at once wait for one another
        before others wait for them.

        Raises:
          Full: they do not all find room.
          Closed: `close` was called.
        """
        with self._changed:
            if self._closing:
                raise Closed
            free = self.slots - len(self._running)
            if len(self._queue) + len(jobs) > self.waiting + free:
                raise Full
            together = object()
            for job in jobs:
                job.together = together
            self._queue.extend(jobs)
            self._changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """How many jobs run, and how many wait."""
        with self._changed:
            return len(self._running), len(self._queue)

    def close(self, seconds: float) -> None:
        """Takes no more jobs, drops those that wait, and gives those that run so long to end."""
        with self._changed:
            self._closing = True
            while self._queue:
                self._queue.popleft().tell(Closed())
            for job in self._running:
                job.deadline = min(job.deadline, time.monotonic() + seconds)
            self._changed.notify_all()
        self._thread.join(seconds + 60)

    def _run(self) -> None:
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._running or self._closing)
                    if self._closing and not self._running:
                        return
                try:
                    self._turn()
                except Exception as error:  # out of memory, say: the next ones may fare better
                    traceback.print_exc()
                    self._fail(error)

    def _turn(self) -> None:
        """Reads prompts, starts a step, and hands out what the step before it has drawn."""
        self._drop()
        tokens = 0
        while tokens < _PROMPT_TOKENS and (job := self._next()):
            self._flying.append((self._batch.add(job.entry), [job]))
            self._asked(job)
            tokens += len(job.row.ids)
        stepped = self._batch.count > 0
        if stepped:
            token_R, entries = self._batch.step()
            by_entry = {id(job.entry): job for job in self._running}
            jobs = [by_entry.get(id(entry)) for entry in entries]
            self._flying.append((token_R, jobs))
            for job in filter(None, jobs):
                self._asked(job)
        while len(self._flying) > stepped:
            token_R, jobs = self._flying.popleft()
            for job, token in zip(jobs, jax.device_get(token_R).tolist()):
                if job and job.row.finish_reason is None:
                    self._take(job, token)
        self._drop()

    def _next(self) -> Job | None:
        """The next job that waits, now running, if there is a free row for it: of the request that
        has the fewest rows already, so that one of many prompts does not keep others waiting."""
        with self._changed:
            while self._queue and self._batch.count < self.slots:
                rows = collections.Counter(job.together for job in self._running)
                job = min(self._queue, key=lambda job: rows[job.together])  # the first of several
                self._queue.remove(job)
                if job.over:
                    self._end(job)
                    continue
                self._running.append(job)
                return job
        return None

    def _asked(self, job: Job) -> None:
        job.asked += 1
        if job.asked >= job.row.budget:  # its last token is on its way
            self._batch.remove(job.entry)

    def _take(self, job: Job, token: int) -> None:
        text = job.row.take(token)
        if text:
            job.tell(text)
        if job.row.finish_reason:
            job.tell(job.row.completion())

    def _drop(self) -> None:
        """Frees the rows of jobs that are over, and tells those that wait in vain."""
        with self._changed:
            for job in [job for job in self._queue if job.over]:
                self._queue.remove(job)
                self._end(job)
            for job in [job for job in self._running if job.over]:
                in_batch = job.asked < job.row.budget
                on_its_way = not in_batch and job.row.finish_reason is None
                if on_its_way and not job.cancelled and time.monotonic() <= job.deadline:
                    continue
                if in_batch:
                    self._batch.remove(job.entry)
                self._running.remove(job)
                self._end(job)

    def _end(self, job: Job) -> None:
        if job.row.finish_reason is None:
            job.row.finish_reason = "cancelled"
            job.tell(Closed() if self._closing else TimedOut())

    def _fail(self, error: Exception) -> None:
        with self._changed:
            for job in self._running:
                if job.row.finish_reason is None:
                    job.row.finish_reason = "cancelled"
                    job.tell(Failed(f"{type(error).__name__} in the model"))
            self._running.clear()
        self._flying.clear()
        self._batch.clear()
