"""From a checked request to jobs, and from what they tell to pieces of an answer."""

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator

import numpy as np

from lm_jax.data.chat import ChatTemplate
from lm_jax.errors import UserError
from lm_jax.generation.decoding import Completion
from lm_jax.generation.sampling import Sampling
from lm_jax.serving.protocol import ApiError, Request
from lm_jax.serving.scheduler import Closed, Event, Full, Job, Scheduler, TimedOut, TooLong

_GLANCE = 0.2  # seconds between two looks whether a client is still there
_GRACE = 2.0  # seconds after a request's deadline in which the scheduler is to say so


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    max_body_bytes: int = 1_000_000
    max_prompt_tokens: int | None = None  # None: what the longest sequence leaves room for
    max_tokens: int | None = None  # to generate; None: as for the prompt
    request_timeout: float = 600.0  # seconds, from a request's arrival to the end of its answer
    read_timeout: float = 20.0  # seconds for a request to arrive, and for one send to be taken
    idle_timeout: float = 60.0  # seconds that a connection may be kept without a request
    connections: int = 256


class Service:
    """What is served: one model under one name."""

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        template: ChatTemplate | None,
        limits: Limits = Limits(),
    ):
        longest = scheduler.max_length - 1
        self.scheduler, self.name, self.template = scheduler, name, template
        self.limits = dataclasses.replace(
            limits,
            max_prompt_tokens=min(limits.max_prompt_tokens or longest, longest),
            max_tokens=min(limits.max_tokens or longest, longest),
        )
        self.created = int(time.time())

    def warm_up(self) -> None:
        """Compiles what the first request needs, before it comes."""
        running, token = Running([], float("inf")), np.zeros(1, np.int32)
        hear = running.listener(0)
        job = self.scheduler.job(token, hear, max_tokens=2, sampling=Sampling(top_k=0), seed=0)
        running.jobs.append(job)
        self.scheduler.submit(running.jobs)
        for _ in running.events(lambda: False):
            pass

    def begin(self, request: Request) -> "Running":
        """Queues a request's jobs.

        Raises:
          ApiError: they cannot be carried out, or not now.
        """
        s, limits = self.scheduler, self.limits
        if request.chat:
            prompts = [self._chat(request)]
        else:
            prompts = [p if isinstance(p, str) else np.array(p, np.int32) for p in request.prompts]
        field = "messages" if request.chat else "prompt"
        most = s.slots + s.waiting
        if len(prompts) > most:
            raise ApiError(400, f"prompt: at most {most} at a time, not {len(prompts)}", field)
        running = Running([], time.monotonic() + limits.request_timeout)
        for i, (prompt, seed) in enumerate(zip(prompts, request.seeds)):
            which = f"{field}[{i}]" if len(prompts) > 1 else field
            try:
                job = s.job(
                    prompt,
                    running.listener(i),
                    max_tokens=request.max_tokens,
                    sampling=request.sampling,
                    seed=seed,
                    stop=request.stop,
                    deadline=running.deadline,
                )
                length, longest = len(job.row.ids), limits.max_prompt_tokens
                if length > longest:
                    raise TooLong(f"it has {length} tokens, and may have {longest}")
            except UserError as e:
                code = "context_length_exceeded" if isinstance(e, TooLong) else None
                raise ApiError(400, f"{which}: {e}", field, code) from None
            running.jobs.append(job)
        try:
            s.submit(running.jobs)
        except Full:
            raise ApiError(
                429, "all slots are busy and the queue is full: try again", code="queue_full"
            ) from None
        except Closed as e:
            raise as_api_error(e) from None
        return running

    def _chat(self, request: Request) -> np.ndarray:
        if self.template is None:
            raise ApiError(
                400,
                "this model has no chat template: send a prompt to /v1/completions",
                "messages",
                "no_chat_template",
            )
        messages = request.messages
        if "developer" not in self.template.text:  # what it has of that kind is called so
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        try:
            return self.template.encode(self.scheduler.tokenizer, messages, True)
        except UserError as e:
            raise ApiError(400, f"messages: {e}", "messages") from None


@dataclasses.dataclass
class Running:
    """A request's jobs, and what they tell."""

    jobs: list[Job]
    deadline: float  # of time.monotonic
    _told: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)

    def listener(self, index: int) -> Callable[[Event], None]:
        return lambda event: self._told.put((index, event))

    def events(self, gone: Callable[[], bool]) -> Iterator[tuple[int, str | Completion]]:
        """The index of a prompt, and the next piece of its text or, at its end, the Completion.

        Args:
          gone: whether the client is; asked now and then.

        Raises:
          ApiError: one of the jobs failed, or the time is up: the scheduler may be busy with what
            cannot be interrupted, and the client slow in taking what there is.
          ConnectionAbortedError: the client is gone.
        """
        left, glance = len(self.jobs), time.monotonic() + _GLANCE
        while left:
            if time.monotonic() > self.deadline + _GRACE:
                raise as_api_error(TimedOut())
            found = None
            try:
                found = self._told.get(timeout=_GLANCE)
            except queue.Empty:
                glance = 0
            if time.monotonic() >= glance:
                glance = time.monotonic() + _GLANCE
                if gone():
                    raise ConnectionAbortedError
            if found is None:
                continue
            if isinstance(found[1], Exception):
                raise as_api_error(found[1])
            left -= isinstance(found[1], Completion)
            yield found

    def cancel(self) -> None:
        """Frees the slots of what still runs."""
        for job in self.jobs:
            job.cancel()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.row.ids) for job in self.jobs)

    @property
    def completion_tokens(self) -> int:
        return sum(len(job.row.tokens) for job in self.jobs)


def as_api_error(error: Exception) -> ApiError:
    """What became of a job, for its client."""
    if isinstance(error, Closed):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    if isinstance(error, TimedOut):
        return ApiError(504, "the answer took too long (--request_timeout)", code="timeout")
    return ApiError(500, f"the answer failed: {error}")
