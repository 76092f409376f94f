"""Tiny models, and a tokenizer whose ids are readable."""

import pytest
from tiny_generation import GPT2, LLAMA, LetterTokenizer, build

from lm_jax.model.transformer import Transformer


@pytest.fixture(scope="session")
def gpt2() -> Transformer:
    return build(GPT2)


@pytest.fixture(scope="session")
def llama() -> Transformer:
    return build(LLAMA)


@pytest.fixture
def tokenizer() -> LetterTokenizer:
    return LetterTokenizer()
