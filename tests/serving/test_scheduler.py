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
        arguments = {"slots": 4, "waiting": 100} | arguments
        made.append(Scheduler(model, tokenizer, **arguments))
        return made[-1]

    yield start
    for scheduler in made:
        scheduler.close(0)


def requests(count: int) -> list[dict]:
    """Prompts, lengths and sampling of many kinds; no two alike."""
    rng = np.random.default_rng(0)
    kinds = [Sampling(0.0), Sampling(top_k=0), Sampling(), Sampling(0.7, top_k=0, top_p=0.8)]
    return [
        {
            "prompt": "".join(rng.choice(["aa", "ba", "cb"], rng.integers(0, 31))),
            "max_tokens": 99 + i if i % 9 else 1 + i,
            "sampling": kinds[i % 4],
            "seed": int(rng.integers(2**32)),
            "stop": ("ab", "zc") if i % 3 == 0 else (),
        }
        for i in range(count)
    ]


def test_many_at_once_end_as_each_would_alone(make, model, tokenizer):
    """And the cache grows, shrinks and changes hands on the way."""
    wanted, asked = [], requests(24)
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
        if i % 7 == 6:
            time.sleep(0.2)  # they come in waves
    for thread in threads:
        thread.join()
    assert got == wanted
    assert {c.finish_reason for c in got} == {"eos", "stop", "length"}
    assert scheduler.counts() == (0, 0)
