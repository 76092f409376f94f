"""Beam search: the continuation of the highest score that a few candidates at a time lead to.

B prompts, W beams of each, R = B x W rows, C candidates, T prompt length, S cache slots,
V vocabulary, D width.

Sutskever et al. 2014; lengths as in Wu et al. 2016, but by the simpler formula of Transformers,
whose results these are: a text of n tokens, eos included, scores sum(log p) / n ** length_penalty.

The device extends the beams and never waits: which candidates go on does not depend on the texts
that have ended. Those are kept on the host, which reads the candidates one step later.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.errors import UserError
from lm_jax.generation.batching import SMALLEST_BUCKET, bucket, padded
from lm_jax.generation.reading import Model, advance, read
from lm_jax.generation.sampling import without_padding
from lm_jax.model.cache import AXES, Cache
from lm_jax.sharding.mesh import activation_spec, reshard

_DEAD = -1e9  # the score of a beam that is none yet
_BLOCK = SMALLEST_BUCKET  # cache slots that are moved at a time
_STEEPEST = 10.0  # length penalty; n ** penalty must stay a number


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """What is searched for, and for how long. The names are those of Transformers."""

    beams: int = 4  # candidates that are kept at a time
    length_penalty: float = 1.0  # above 0 favors long texts, below 0 short ones
    # A prompt is done once it has as many ended texts as beams; False: and none that goes on, at
    # its score so far, would be among them.
    early_stopping: bool = False

    def validate(self) -> "BeamSearch":
        """Returns itself.

        Raises:
          UserError: a value is out of its range; the message names it.
        """
        if self.beams < 1:
            raise UserError(f"beams: must be at least 1, not {self.beams}")
        if not abs(self.length_penalty) <= _STEEPEST:
            raise UserError(
                f"length_penalty: must be from -{_STEEPEST:g} to {_STEEPEST:g},"
                f" not {self.length_penalty}"
            )
        return self


def search(
    model: Model,
    prompts: Sequence[np.ndarray],
    budgets: Sequence[int],
    settings: BeamSearch,
    *,
    rows: int,
    stop_ids: frozenset[int],
    vocab_size: int,
    on_end: Callable[[], None] | None = None,
) -> list[list[int]]:
    """The best continuation of each prompt, as ids; eos is the last one if it has ended by that.

    Args:
      prompts: int32 [n] each, n > 0.
      budgets: the most tokens to generate for each; with its prompt it fits the model.
      rows: prompts to compile for, a multiple of the parts that the mesh splits a batch in.
      stop_ids: each ends a text.
      vocab_size: ids from here on are padding of the vocabulary.
      on_end: called each time that a prompt is done.
    """
    limit, most = model.config.max_length, max(budgets)
    tokens_BT, lengths_B = padded(prompts, rows, limit)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    slots = min(bucket(longest + most), limit)
    span = np.array([shortest, longest], np.int32)
    stops = np.array(sorted(stop_ids), np.int32)
    logits_BV, cache = read(model, tokens_BT, lengths_B, -(-slots // _BLOCK) * _BLOCK)
    found, state = _start(
        logits_BV, cache, lengths_B, span, stops, W=settings.beams, vocab_size=vocab_size
    )
    hopes = [_Hypotheses(settings, budget, stop_ids) for budget in budgets]
    for n in range(most):
        ready = found
        # The next step is on its way before this one's candidates are waited for.
        if n + 1 < most:
            found, state = _advance(model, state, stops, vocab_size=vocab_size)
        columns = [x.tolist() for x in jax.device_get(ready)]
        for hope, *candidates in zip(hopes, *columns):
            if not hope.done:
                hope.take(*candidates)
                if hope.done and on_end:
                    on_end()
        if all(hope.done for hope in hopes):
            break
    return [hope.best() for hope in hopes]


Text = tuple[int, "Text"] | None  # the last token, and the text before it


class _Hypotheses:
    """The texts of one prompt: those that go on, and those that have ended."""

    def __init__(self, settings: BeamSearch, budget: int, stop_ids: frozenset[int]):
        self._settings, self._budget, self._stop_ids = settings, budget, stop_ids
        self._running: list[Text] = [None] * settings.beams
        self._ended: list[tuple[float, Text]] = []  # at most W, highest score first
        self._tokens = 0
        self.done = False

    def take(self, score_C: list[float], token_C: list[int], beam_C: list[int]) -> None:
        """Adds a token to each text.

        Args:
          score_C: sums of log p, highest first.
          beam_C: which of the running texts `token_C` goes on.
        """
        W, running = self._settings.beams, []
        self._tokens += 1
        over = self._tokens == self._budget
        weight = self._tokens**-self._settings.length_penalty
        for place, (score, token, beam) in enumerate(zip(score_C, token_C, beam_C)):
            text = token, self._running[beam]
            if over or token in self._stop_ids:
                if place < W:  # others are there only so that enough go on
                    self._ended.append((score * weight, text))
            else:
                running.append((score, text))
        self._ended = sorted(self._ended, key=lambda scored: -scored[0])[:W]
        self._running = [text for _, text in running[:W]]
        self.done = over or (
            len(self._ended) == W
            and (self._settings.early_stopping or running[0][0] * weight <= self._ended[-1][0])
        )

    def best(self) -> list[int]:
        tokens, text = [], self._ended[0][1]
        while text is not None:
            token, text = text
            tokens.append(token)
        return tokens[::-1]


class Candidates(NamedTuple):
    """The best ways to go on, highest score first; whole on every device."""

    score_BC: jax.Array  # float32, sums of log p
    token_BC: jax.Array  # int32
    beam_BC: jax.Array  # int32, which beam it extends


class State(NamedTuple):
    """What one step leaves to the next, and is donated to it."""

    cache: Cache  # R rows, a prompt's beams together; in the order of the step before
    parent_BW: jax.Array  # int32, whose slots each beam goes on with
    token_BW: jax.Array  # int32, the newest token: not yet in the cache
    score_BW: jax.Array  # float32
    position_B: jax.Array  # int32, of the newest tokens
    # int32 [2]: slots from the first on, and before the second, differ between beams.
    span: jax.Array


@functools.partial(jax.jit, static_argnames=("W", "vocab_size"))
def _start(
    logits_BV: jax.Array,
    cache: Cache,
    lengths_B: jax.Array,
    span: jax.Array,
    stop_ids: jax.Array,
    *,
    W: int,
    vocab_size: int,
) -> tuple[Candidates, State]:
    """Begins the beams of prompts that have been read."""
    B, V = logits_BV.shape

    def repeated(x_LBKSH: jax.Array) -> jax.Array:
        L, _, K, S, H = x_LBKSH.shape
        x = jnp.broadcast_to(
            x_LBKSH[:, :, None],
            (L, B, W, K, S, H),
            out_sharding=activation_spec(*AXES[:2], None, *AXES[2:]),
        )
        return jax.lax.reshape(x, (L, B * W, K, S, H), out_sharding=activation_spec(*AXES))

    # One beam for now: the same prompt W times would give each candidate W times.
    score_BW = jnp.where(jnp.arange(W)[None] == 0, jnp.zeros((B, 1)), _DEAD)
    score_BW = reshard(score_BW, activation_spec("batch", None))
    position_B = reshard(lengths_B, activation_spec("batch"))
    logits_BWV = jnp.broadcast_to(
        logits_BV[:, None], (B, W, V), out_sharding=activation_spec("batch", None, "vocab")
    )
    logits_RV = jax.lax.reshape(
        logits_BWV, (B * W, V), out_sharding=activation_spec("batch", "vocab")
    )
    cache = jax.tree.map(repeated, cache)
    return _choose(logits_RV, score_BW, stop_ids, vocab_size, cache, position_B, span)


def _advance(
    model: Model, state: State, stop_ids: jax.Array, *, vocab_size: int
) -> tuple[Candidates, State]:
    """Puts each beam's newest token in the cache and looks for the next."""
    cache, token_R, position_R = _of_beams(
        state.cache, state.parent_BW, state.token_BW, state.position_B, state.span
    )
    logits_RV, cache = advance(model, token_R, position_R, cache)
    rest = state.score_BW, state.position_B, state.span
    return _choose_next(logits_RV, cache, *rest, stop_ids, vocab_size, model.config.max_length)


@functools.partial(jax.jit, donate_argnames="cache")
def _of_beams(cache: Cache, parent_BW, token_BW, position_B, span):
    """The cache with each beam's slots those of its parent; its newest token, and its position."""
    B, W = token_BW.shape
    token_R = jax.lax.reshape(token_BW, (B * W,), out_sharding=activation_spec("batch"))
    position_BW = jnp.broadcast_to(
        position_B[:, None], (B, W), out_sharding=activation_spec("batch", None)
    )
    position_R = jax.lax.reshape(position_BW, (B * W,), out_sharding=activation_spec("batch"))
    return _of_parents(cache, parent_BW, span), token_R, position_R


@functools.partial(
    jax.jit,
    static_argnames=("vocab_size", "max_length"),
    donate_argnames="cache",
)
def _choose_next(logits_RV, cache, score_BW, position_B, span, stop_ids, vocab_size, max_length):
    # Prompts that are done go on, unheard, in their last slot.
    position_B = jnp.minimum(position_B + 1, max_length - 1)
    span = jnp.minimum(span + jnp.array([0, 1], jnp.int32), cache.length)
    return _choose(logits_RV, score_BW, stop_ids, vocab_size, cache, position_B, span)


def _of_parents(cache: Cache, parent_BW: jax.Array, span: jax.Array) -> Cache:
    """The cache with each beam's slots those of its parent, as far as they differ."""

    def local(cache, parent_BW, span):
        B, W = parent_BW.shape
        from_R = (jnp.arange(B)[:, None] * W + parent_BW).reshape(-1)

        def move(block: jax.Array, x_LRKSH: jax.Array) -> jax.Array:
            slots = functools.partial(jax.lax.dynamic_slice_in_dim, axis=3, slice_size=_BLOCK)
            moved = slots(x_LRKSH, block * _BLOCK)[:, from_R]
            return jax.lax.dynamic_update_slice_in_dim(x_LRKSH, moved, block * _BLOCK, axis=3)

        return jax.lax.fori_loop(
            span[0] // _BLOCK,
            -(-span[1] // _BLOCK),
            lambda block, cache: jax.tree.map(functools.partial(move, block), cache),
            cache,
        )

    spec = activation_spec(*AXES)
    if spec is not None:  # a prompt's beams are on one device: no row has to leave it
        in_specs = spec, activation_spec("batch", None), activation_spec(None)
        local = jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)
        span = reshard(span, activation_spec(None))
    return local(cache, parent_BW, span)


def _choose(
    logits_RV: jax.Array,
    score_BW: jax.Array,
    stop_ids: jax.Array,
    vocab_size: int,
    cache: Cache,
    position_B: jax.Array,
    span: jax.Array,
) -> tuple[Candidates, State]:
    """The candidates, and the beams that go on: the best ones that do not end.

    Each beam ends in as many ways as there are stop ids, so that of (1 + stop ids) x W candidates
    enough go on.
    """
    B, W = score_BW.shape
    rows = activation_spec("batch", None)
    # Sorting needs the whole vocabulary on each device.
    log_p_RV = jax.nn.log_softmax(reshard(logits_RV, rows), axis=-1)
    C, V = W * max(2, 1 + len(stop_ids)), log_p_RV.shape[1]
    log_p_Rc, token_Rc = jax.lax.top_k(without_padding(log_p_RV, vocab_size), c := min(C, V))

    def of_prompt(x_Rc: jax.Array) -> jax.Array:
        return jax.lax.reshape(x_Rc, (B, W * c), out_sharding=rows)

    before_BWc = jnp.broadcast_to(
        score_BW[:, :, None], (B, W, c), out_sharding=activation_spec("batch", None, None)
    )
    score_BC, place_BC = jax.lax.top_k(of_prompt(log_p_Rc) + of_prompt(before_BWc), C)
    token_BC = jnp.take_along_axis(of_prompt(token_Rc), place_BC, axis=1)
    found = Candidates(score_BC, token_BC, place_BC // c)
    ends_BC = jnp.any(token_BC[:, :, None] == stop_ids[None, None], axis=-1)
    _, on_BW = jax.lax.top_k((~ends_BC).astype(jnp.int32), W)  # the first of equals come first
    score_BW, token_BW, parent_BW = (jnp.take_along_axis(x, on_BW, axis=1) for x in found)
    found = Candidates(*(reshard(x, activation_spec(None, None)) for x in found))
    return found, State(cache, parent_BW, token_BW, score_BW, position_B, span)
