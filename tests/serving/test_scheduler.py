"""Each job ends as if it were alone, whatever runs beside it, and gives its row back."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from tiny_generation import LetterTokenizer, build
from tiny_serving import LLAMA

from lm_jax.errors import UserError
from lm_jax.generation.decoding import Completion, Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.serving.scheduler import Closed, Full, Scheduler, TimedOut, wait


@pytest.fixture(scope="module")
def model():
    return build(LLAMA)


@pytest.fixture(scope="module")
def tokenizer():
    return LetterTokenizer()


@pytest.fixture
def make(model, tokenizer):
    made = []

    def start(**arguments) -> Scheduler:
        arguments = {"slots": 5, "waiting": 100} | arguments
        made.append(Scheduler(model, tokenizer, **arguments))
        return made[-1]

    yield start
    for scheduler in made:
        scheduler.close(0)


def requests(count: int) -> list[dict]:
    """Prompts, lengths and sampling of all kinds; no two alike."""
    rng = np.random.default_rng(0)
    kinds = [
        Sampling(0.0),
        Sampling(top_k=0),
        Sampling(),
        Sampling(0.7, top_k=0, top_p=0.8),
        Sampling(0.0, repetition_penalty=1.5),
        Sampling(1.5, top_k=9, min_p=0.05, repetition_penalty=1.2),
    ]
    return [
        {
            "prompt": "".join(rng.choice(["aa", "ba", "cb"], rng.integers(0, 90))),
            "max_tokens": int(rng.integers(1, 60)),
            "sampling": kinds[i % len(kinds)],
            "seed": int(rng.integers(2**32)),
            "stop": ("ab", "zc") if i % 4 == 0 else (),
        }
        for i in range(count)
    ]


def test_many_at_once_end_as_each_would_alone(make, model, tokenizer):
    """And the cache grows, shrinks and changes hands on the way."""
    wanted, asked = [], requests(36)
    for request in asked:
        arguments = {k: v for k, v in request.items() if k != "prompt"}
        wanted += Generator(model, tokenizer).generate([request["prompt"]], **arguments)
    scheduler, got = make(), [None] * len(asked)

    def ask(i: int) -> None:
        job = scheduler.job(**asked[i])
        scheduler.submit([job])
        parts = []
        while isinstance(event := job.events.get(), str):
            parts.append(event)
        got[i] = event
        assert "".join(parts) == event.text

    threads = []
    for i in range(len(asked)):
        threads.append(threading.Thread(target=ask, args=(i,)))
        threads[-1].start()
        if i % 9 == 8:
            time.sleep(0.2)  # they come in waves
    for thread in threads:
        thread.join()
    assert got == wanted
    assert {c.finish_reason for c in got} == {"eos", "stop", "length"}
    assert scheduler.counts() == (0, 0)
