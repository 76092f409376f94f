"""Questions with a text that holds the answer, as windows of tokens.

A window is [begin] question [end] part of the context [end], as in BERT (Devlin et al. 2018). A
context that is too long is split into windows that share `data.stride` tokens.

P tokens of a window.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data.examples import Example
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError

# What the target of a token tells, added up. FIRST and LAST are those of the answer, or both of the
# window's first token where the answer is not in it, or there is none.
FIRST, LAST, CONTEXT = 1, 2, 4


@dataclasses.dataclass(frozen=True)
class Window:
    """
    Attributes:
      ids: int32 [P].
      spans: int32 [P, 2], the characters of the context from and to which each token stands for;
        (-1, -1) where it is no part of it.
    """

    ids: np.ndarray
    spans: np.ndarray

    @property
    def second(self) -> np.ndarray:
        """Which tokens are of the context, or the end behind it: bool [P]."""
        return np.cumsum(self.spans[:, 0] >= 0) > 0

    def pairs(self, example: Example) -> np.ndarray:
        """(input, target, whether it counts), int32 [P, 3]; what counts is the target FIRST, so
        that a window counts once.

        Raises:
          UserError: where the answer begins cannot be told.
        """
        if example.misplaced:
            raise UserError(example.misplaced)
        start, stop = example.start, example.start + len(example.targets[0])
        within_P = (self.spans[:, 0] < stop) & (self.spans[:, 1] > start)
        places = np.flatnonzero(within_P)
        whole = (
            len(places)
            and stop > start
            and (self.spans[places[0], 0] <= start and self.spans[places[-1], 1] >= stop)
        )
        first, last = (places[0], places[-1]) if whole else (0, 0)
        pairs_P3 = np.zeros((len(self.ids), 3), np.int32)
        pairs_P3[:, 0] = self.ids
        pairs_P3[:, 1] = CONTEXT * self.second
        pairs_P3[first, 1] += FIRST
        pairs_P3[last, 1] += LAST
        pairs_P3[first, 2] = 1
        return pairs_P3


def with_length(config: DataConfig, length: int) -> DataConfig:
    """`config` with windows of so many tokens, which share at most half of them."""
    return dataclasses.replace(config, length=length, stride=min(config.stride, length // 2))


def windows(example: Example, tokenizer: Tokenizer, config: DataConfig) -> Iterator[Window]:
    """The windows of an example, each of at most `config.length` tokens.

    A question is cut off where it would fill more than a quarter of a window.

    Raises:
      UserError: what windows share would leave a part of the context in none.
    """
    question = tokenizer.encode(example.prompt)[: config.length // 4]
    context, spans = tokenizer.locate(example.context)
    nothing = np.zeros(0, np.int32)
    room = config.length - len(tokenizer.frame_pair(question, nothing)[0])
    step = room - config.stride
    if step < 1:
        raise UserError(
            f"data.stride: windows of data.length = {config.length} tokens have room for {room} of"
            f" a context, and cannot share {config.stride}"
        )
    for begin in range(0, max(1, len(context) - config.stride), step):
        part = context[begin : begin + room]
        ids, place = tokenizer.frame_pair(question, part)
        where = np.full((len(ids), 2), -1, np.int32)
        where[place : place + len(part)] = spans[begin : begin + room]
        yield Window(ids, where)
