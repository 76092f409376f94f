"""Text generation: a prefill of all prompts at once, then a token a step for every row.

B rows, T prompt length, S cache slots, V vocabulary, D width.

Prompts are padded on the right; a row's token at position p stands in slot p of the cache. What
padding leaves in a slot is overwritten by the real token of that position, in the same step in
which that token is first seen, and later tokens look no further than their own slot.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.generation.batching import bucket, by_length, padded, rows_of
from lm_jax.generation.beam import BeamSearch, search
from lm_jax.generation.reading import Model, advance, check_ids, read
from lm_jax.generation.sampling import Knobs, Sampling, next_tokens, row_keys
from lm_jax.generation.text import TextStream
from lm_jax.model.cache import Cache
from lm_jax.model.head import HEADS_WITHOUT_WORDS
from lm_jax.model.layered import for_generation
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard

DEFAULT = Sampling()


Prompt = str | np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
      text: without the prompt, the stop string, and what comes after it.
      tokens: every id that was drawn, the eos or the last one of a stop string included.
      finish_reason: 'eos', 'stop', or 'length': `max_tokens` or the model's longest sequence.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: str


class State(NamedTuple):
    """What one step leaves to the next, and is donated to it."""

    cache: Cache
    seen_BV: jax.Array | None  # bool; only where there is a repetition penalty


class Rows(NamedTuple):
    """The small part of the input of a step; only the first two change."""

    token_B: jax.Array  # int32, the newest token: in the sequence, not yet in the cache
    position_B: jax.Array  # int32, its position
    row_B: jax.Array  # int32, the index of its prompt
    seed: jax.Array  # uint32, one for all rows or one for each
    knobs: Knobs


def check_generates(config: ModelConfig, tokenizer: Any) -> None:
    """
    Raises:
      UserError: the model or its vocabulary cannot be used to continue text.
    """
    if config.head in HEADS_WITHOUT_WORDS:
        use = HEADS_WITHOUT_WORDS[config.head]
        raise UserError(f"model.head = '{config.head}': this model {use} and continues no text")
    if not config.causal:
        raise UserError(
            "model.causal = False: this model fills in masked tokens and cannot continue text"
        )
    if tokenizer.least_vocabulary > config.vocab_size:
        raise UserError(
            f"the tokenizer needs {tokenizer.least_vocabulary} ids, but model.vocab_size ="
            f" {config.vocab_size}: they do not belong together"
        )


class Generator:
    """Continues prompts.

    Inside `jax.set_mesh` it works on that mesh, otherwise on one device. On one CPU, making one
    copies the model's blocks (see `lm_jax.model.layered`); what is compiled is shared by all.
    """

    def __init__(self, model: Transformer, tokenizer: Any, *, donate: bool = False):
        """
        Args:
          model: on the mesh, if there is one.
          tokenizer: see `lm_jax.data.tokenizer_base.Tokenizer`.
          donate: whether the model is used for nothing else, and may be given up for its copy.

        Raises:
          UserError: the model or its vocabulary cannot be used for this.
        """
        check_generates(model.config, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self._form = for_generation(model, donate)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        sampling: Sampling = DEFAULT,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int], None] | None = None,
        batch_size: int = 8,
    ) -> list[Completion]:
        """Continues each prompt until eos, a stop string, or a limit.

        A result depends on the prompt, its index, the seed and the sampling alone, not on the
        prompts beside it or on `batch_size` (up to rounding: a batch of another shape may be
        summed in another order).

        Args:
          prompts: texts, or their ids, int32 [n] each, to which nothing is added.
          max_tokens: the most to generate for each prompt; the model's longest sequence, prompt
            included, is a limit too.
          stop: strings that end the text.
          on_text: called with (index of the prompt, next part of its text) as soon as that part is
            certain; the parts add up to `Completion.text`.
          on_done: called with the number of prompts that are done, each time that one is.
          batch_size: prompts at a time, longest first, so that little is padding.

        Raises:
          UserError: an argument is out of range; a prompt is empty where the tokenizer has no
            token to begin with, or so long that nothing can follow.
        """
        sampling.validate()
        if not 0 <= seed < 2**32:
            raise UserError(f"seed: must be from 0 to 2**32 - 1, not {seed}")
        if any(not s for s in stop):
            raise UserError("stop: an empty stop string would end every text at once")
        rows, batches, B = self._batches(prompts, max_tokens, batch_size, stop)
        on_end = _counting(on_done)
        for active in batches:
            self._run(active, B, sampling.knobs(), seed, on_text, on_end)
        return [row.completion() for row in rows]

    def beam_search(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        beams: int = 4,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        on_done: Callable[[int], None] | None = None,
        batch_size: int = 8,
    ) -> list[Completion]:
        """Continues each prompt by the most probable text that beam search finds; with one beam,
        greedily. See `generate` for what is not said here.

        Args:
          beams, length_penalty, early_stopping: see `BeamSearch`.
          batch_size: prompts at a time, each with all its beams.
        """
        settings = BeamSearch(beams, length_penalty, early_stopping).validate()
        rows, batches, B = self._batches(prompts, max_tokens, batch_size, ())
        on_end = _counting(on_done)
        for active in batches:
            found = search(
                self._form,
                [row.ids for row in active],
                [row.budget for row in active],
                settings,
                rows=B,
                stop_ids=self.tokenizer.stop_ids,
                vocab_size=self.tokenizer.vocab_size,
                on_end=on_end,
            )
            for row, tokens in zip(active, found):
                for token in tokens:
                    row.take(token)
        return [row.completion() for row in rows]

    def _batches(
        self, prompts: Sequence[Prompt], max_tokens: int, batch_size: int, stop: Sequence[str]
    ) -> "tuple[list[Row], list[list[Row]], int]":
        """The prompts in their order, the same in batches, and the rows to compile for."""
        for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name}: must be at least 1, not {value}")
        rows = [
            self._row(i, prompt, len(prompts), max_tokens, stop) for i, prompt in enumerate(prompts)
        ]
        batches = by_length([len(row.ids) for row in rows], batch_size)
        B = rows_of(len(rows), batch_size)  # the same for the last, smaller one
        return rows, [[rows[i] for i in batch] for batch in batches], B

    def _row(
        self, index: int, prompt: Prompt, count: int, max_tokens: int, stop: Sequence[str]
    ) -> "Row":
        """A prompt as ids, with what the tokenizer puts before a text."""
        which = f"prompt {index + 1} of {count}" if count > 1 else "the prompt"
        t, limit = self.tokenizer, self.model.config.max_length
        try:
            ids = t.encode_prompt(prompt) if isinstance(prompt, str) else prompt
            check_ids(ids, self.model.config, t)
        except UserError as e:
            raise UserError(f"{which}: {e}") from None
        if not len(ids):
            raise UserError(
                f"{which} is empty, and this tokenizer has no token that begins a text: give some"
            )
        if len(ids) >= limit:
            raise UserError(
                f"{which} has {len(ids)} tokens, and the model takes {limit} (model.max_length),"
                f" generated ones included: shorten it to {limit - 1} or fewer"
            )
        budget = min(max_tokens, limit - len(ids))
        text = prompt if isinstance(prompt, str) else t.decode(ids)
        return Row(index, text, ids, TextStream(t.stream(), ids, stop), budget, t.stop_ids)

    def _run(
        self,
        active: "list[Row]",
        B: int,
        knobs: Knobs,
        seed: int,
        on_text: Callable[[int, str], None] | None,
        on_end: Callable[[], None] | None,
    ) -> None:
        """Completes some prompts, side by side in the first of `B` rows; the others are idle."""
        limit, vocab_size = self.model.config.max_length, self.tokenizer.vocab_size
        longest = max(len(row.ids) for row in active)
        most = max(row.budget for row in active)
        tokens_BT, lengths_B = padded([row.ids for row in active], B, limit)
        index_B = np.zeros(B, np.int32)
        seen_BV = None
        if knobs.repetition_penalty_B is not None:
            seen_BV = np.zeros((B, self.model.config.vocab_size), bool)
        for r, row in enumerate(active):
            index_B[r] = row.index
            if seen_BV is not None:
                seen_BV[r, row.ids] = True
        newest, state = prefill(
            self._form,
            tokens_BT,
            Rows(np.zeros(B, np.int32), lengths_B, index_B, np.uint32(seed), knobs),
            seen_BV,
            slots=min(bucket(longest + most), limit),
            vocab_size=vocab_size,
        )
        for n in range(most):
            # The next step is on its way before this one's tokens are waited for.
            drawn_B = newest.token_B
            if n + 1 < most:
                newest, state = step(self._form, newest, state, vocab_size=vocab_size)
            for row, token in zip(active, jax.device_get(drawn_B).tolist()):
                if row.finish_reason is not None:
                    continue
                if (text := row.take(token)) and on_text:
                    on_text(row.index, text)
                if row.finish_reason and on_end:
                    on_end()
            if all(row.finish_reason for row in active):
                break


@dataclasses.dataclass
class Row:
    """A prompt in the making."""

    index: int
    prompt: str
    ids: np.ndarray  # int32 [n], n > 0
    stream: TextStream
    budget: int  # tokens to generate at most
    stop_ids: frozenset[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def take(self, token: int) -> str:
        """Adds a token, and returns the text that has become certain."""
        self.tokens.append(token)
        text = ""
        if token in self.stop_ids:
            self.finish_reason = "eos"
        else:
            text = self.stream.push(token)
            if len(self.tokens) >= self.budget:
                self.finish_reason = "length"
        if self.finish_reason:
            text += self.stream.finish()
        if self.stream.stopped:  # by this token, or by the half character that it leaves
            self.finish_reason = "stop"
        return text

    def completion(self) -> Completion:
        return Completion(self.prompt, self.stream.text, tuple(self.tokens), self.finish_reason)


def _counting(on_done: Callable[[int], None] | None) -> Callable[[], None] | None:
    """Called without arguments, it calls `on_done` with how often it has been called."""
    count = itertools.count(1)
    return on_done and (lambda: on_done(next(count)))


def prefill(
    model: Model,
    tokens_BT: jax.Array,
    rows: Rows,
    seen_BV: jax.Array | None,
    *,
    slots: int,
    vocab_size: int,
) -> tuple[Rows, State]:
    """Reads the prompts and draws the first token after each.

    Args:
      tokens_BT: int32, padded on the right with whatever there is.
      rows: `position_B` holds the lengths of the prompts, where their first new tokens go;
        `token_B` is not used.
      seen_BV: bool, the tokens of each prompt, for the penalty.
      slots: of the cache, at least T.
    """
    logits_BV, cache = read(model, tokens_BT, rows.position_B, slots)
    rows, seen_BV = draw_tokens(logits_BV, rows, seen_BV, vocab_size)
    return rows, State(cache, seen_BV)


def step(model: Model, rows: Rows, state: State, *, vocab_size: int) -> tuple[Rows, State]:
    """Puts the newest token of each row in the cache and draws the one after it."""
    logits_BV, cache = advance(model, rows.token_B, rows.position_B, state.cache)
    rows, seen_BV = _draw_next(logits_BV, rows, state.seen_BV, vocab_size, cache.length)
    return rows, State(cache, seen_BV)


@functools.partial(jax.jit, static_argnames=("vocab_size", "slots"), donate_argnames="seen_BV")
def _draw_next(logits_BV, rows: Rows, seen_BV, vocab_size: int, slots: int):
    """The tokens behind the newest ones, at the positions behind theirs."""
    # Rows that are done go on, unheard, in the last slot.
    rows = rows._replace(position_B=jnp.minimum(rows.position_B + 1, slots - 1))
    return draw_tokens(logits_BV, rows, seen_BV, vocab_size)


@functools.partial(jax.jit, static_argnames="vocab_size")
def draw_tokens(
    logits_BV: jax.Array, rows: Rows, seen_BV: jax.Array | None, vocab_size: int
) -> tuple[Rows, jax.Array | None]:
    """Draws the token at each row's position, and notes it as seen."""
    batch = activation_spec("batch")
    seeds = reshard(rows.seed, batch) if jnp.ndim(rows.seed) else rows.seed
    keys_B = row_keys(seeds, reshard(rows.row_B, batch), reshard(rows.position_B, batch))
    if seen_BV is not None:
        seen_BV = reshard(seen_BV, activation_spec("batch", None))
    token_B = next_tokens(logits_BV, rows.knobs, keys_B, seen_BV, vocab_size)
    if seen_BV is not None:
        seen_BV |= token_B[:, None] == jnp.arange(seen_BV.shape[1])[None]
    # On every device, and so on every host: each reads all tokens.
    return rows._replace(token_B=reshard(token_B, activation_spec(None))), seen_BV
