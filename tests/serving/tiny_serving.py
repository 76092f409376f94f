"""A tiny model to serve."""

import dataclasses
import time
from collections.abc import Callable

import tiny_models

from lm_jax.model.transformer import Transformer


def model_of(max_length: int = 160) -> Transformer:
    """For the vocabulary of a LetterTokenizer, or one of bytes with 300 ids."""
    config = dataclasses.replace(
        tiny_models.LLAMA, vocab_size=300, max_length=max_length, init_std=0.4
    )
    return tiny_models.build(config)


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
