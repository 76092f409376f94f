"""The device's side of continuous batching: rows that come and go while the others are decoded.

L layers, R rows, K key/value heads, S cache slots, H head width, V vocabulary, T prompt length.

One program is compiled for each number of rows and of cache slots that there is, and both are of a
few sizes only. The cache has as many slots as the longest row needs, rounded up, since attention
reads them all.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.generation.batching import bucket, padded
from lm_jax.generation.decoding import Rows, draw_tokens
from lm_jax.generation.reading import advance, read
from lm_jax.generation.sampling import Sampling, knobs_of
from lm_jax.model.cache import AXES, Cache, init_cache
from lm_jax.model.layered import Layered, for_generation
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard

_SHORTEST = 128  # slots; fewer would save little
_PATIENCE = 32  # steps in which a smaller cache would have done, before it is made smaller
_IDLE = Sampling(temperature=0.0)


class State(NamedTuple):
    """What one step leaves to the next."""

    cache: Cache  # donated to it
    token_R: jax.Array  # int32, the newest token: in the sequence, not yet in the cache
    seen_RV: jax.Array  # bool; kept up to date of rows with a repetition penalty alone


@dataclasses.dataclass(eq=False)
class Entry:
    """A sequence in the making.

    Attributes:
      position: of its newest token.
    """

    ids: np.ndarray
    sampling: Sampling
    seed: int
    position: int = 0


class Batch:
    """At most `rows` sequences, decoded together.

    Inside of `jax.set_mesh` it works on that mesh, of which the batch must not be split.
    """

    def __init__(
        self,
        model: Transformer,
        vocab_size: int,
        rows: int,
        max_length: int,
        *,
        donate: bool = False,
    ):
        """
        Args:
          rows: the most sequences at a time.
          max_length: the longest sequence, prompt included; at most the model's.
          donate: whether the model is used for nothing else, and may be given up for a copy.
        """
        self._model, self._vocab_size = for_generation(model, donate), vocab_size
        self._max_length = max_length
        self._sizes = [4**n for n in range(16) if 4**n < rows] + [rows]
        self._places: list[Entry | None] = []  # by row
        self._state: State | None = None
        self._knobs = None
        self._too_large_for = 0  # steps

    @property
    def count(self) -> int:
        return sum(place is not None for place in self._places)

    def add(self, entry: Entry) -> jax.Array:
        """Reads a prompt, and gives it a row.

        Returns:
          int32 [1], the token after it; not waited for.
        """
        length = len(entry.ids)
        tokens_1T, length_1 = padded([entry.ids], 1, self._max_length)
        seen_1V = np.zeros((1, self._model.config.vocab_size), bool)
        seen_1V[0, entry.ids] = True
        entry.position = length
        rows = _rows([entry], np.zeros(1, np.int32))
        logits_1V, cache = read(self._model, tokens_1T, length_1, tokens_1T.shape[1])
        (token_1, *_), seen_1V = draw_tokens(logits_1V, rows, seen_1V, self._vocab_size)
        if None not in self._places or self._slots < tokens_1T.shape[1]:
            self._resize(self.count + 1, max(length + 1, tokens_1T.shape[1]))
        row = self._places.index(None)
        self._places[row] = entry
        self._state = _insert(
            self._state.cache, self._state[1:], State(cache, token_1, seen_1V), row
        )
        self._knobs = None
        return token_1

    def remove(self, entry: Entry) -> None:
        """Frees its row."""
        row = next(i for i, place in enumerate(self._places) if place is entry)
        self._places[row] = None
        self._knobs = None
        if not self.count:  # nothing is held by an idle server but the model
            self.clear()

    def clear(self) -> None:
        """Forgets all rows."""
        self._places, self._state, self._knobs, self._too_large_for = [], None, None, 0

    def step(self) -> tuple[jax.Array, list[Entry | None]]:
        """Decodes a token for each row.

        Returns:
          int32 [R], not waited for, and whose they are.
        """
        self._fit()
        if self._knobs is None:
            self._knobs = _rows(self._places, np.zeros(len(self._places), np.int32))
        position_R = np.array([s.position if s else 0 for s in self._places], np.int32)
        logits_RV, cache = advance(self._model, self._state.token_R, position_R, self._state.cache)
        rows = self._knobs._replace(position_B=position_R + 1)
        seen_RV = self._state.seen_RV
        penalty = rows.knobs.repetition_penalty_B is not None
        (token_R, *_), new_RV = draw_tokens(
            logits_RV, rows, seen_RV if penalty else None, self._vocab_size
        )
        self._state = State(cache, token_R, new_RV if penalty else seen_RV)
        for entry in filter(None, self._places):
            entry.position += 1
        return token_R, list(self._places)

    @property
    def _slots(self) -> int:
        return self._state.cache.length if self._state else 0

    def _needed(self) -> int:
        """Slots for the token that each row is about to put in the cache."""
        return max(s.position for s in self._places if s) + 1

    def _fit(self) -> None:
        """Grows the cache where a row needs it, and shrinks it after a while without need."""
        if self._needed() > self._slots:
            self._resize(self.count, self._needed())
        wanted = self._size_for(self.count, self._needed())
        if wanted == (len(self._places), self._slots):
            self._too_large_for = 0
        else:
            self._too_large_for += 1
            if self._too_large_for > _PATIENCE:
                self._resize(self.count, self._needed())

    def _size_for(self, rows: int, slots: int) -> tuple[int, int]:
        rows = next(size for size in self._sizes if size >= rows)
        return rows, min(max(bucket(slots), _SHORTEST), self._max_length)

    def _resize(self, rows: int, slots: int) -> None:
        """Makes room for `rows` sequences of `slots` tokens, and keeps those that there are."""
        there = [i for i, place in enumerate(self._places) if place]
        if there:
            slots = max(slots, self._needed())
        R, S = self._size_for(rows, slots)
        order = there + [0] * (R - len(there))
        self._places = [self._places[i] for i in there] + [None] * (R - len(there))
        if self._state is None:
            apart = isinstance(self._model, Layered)
            self._state = _empty(self._model.config, R, S, apart)
        else:
            self._state = _moved(self._state, np.array(order, np.int32), S)
        self._knobs, self._too_large_for = None, 0


def _rows(entries: Sequence[Entry | None], zeros: np.ndarray) -> Rows:
    """Their keys are those of a first prompt, as each has a seed of its own."""
    return Rows(
        token_B=zeros,
        position_B=np.array([s.position if s else 0 for s in entries], np.int32),
        row_B=zeros,
        seed=np.array([s.seed if s else 0 for s in entries], np.uint32),
        knobs=knobs_of([s.sampling if s else _IDLE for s in entries]),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(c: ModelConfig, R: int, S: int, apart: bool) -> State:
    seen_RV = jnp.zeros((R, c.vocab_size), bool, out_sharding=activation_spec(None, None))
    token_R = jnp.zeros(R, jnp.int32, out_sharding=activation_spec(None))
    return State(init_cache(c, R, S, apart), token_R, seen_RV)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _insert(cache: Cache, others: tuple[jax.Array, jax.Array], one: State, row: jax.Array) -> State:
    """Puts a state of one row, with as many slots or fewer, at `row`; the tokens that are there may
    still be read."""

    def put(whole: jax.Array, part: jax.Array, axis: int = 0) -> jax.Array:
        start = [row if i == axis else 0 for i in range(whole.ndim)]
        return jax.lax.dynamic_update_slice(whole, part, start)

    cache = jax.tree.map(functools.partial(put, axis=AXES.index("batch")), cache, one.cache)
    return State(cache, *map(put, others, one[1:]))


@functools.partial(jax.jit, static_argnums=2)
def _moved(state: State, order_R: jax.Array, S: int) -> State:
    """The rows of that order, with the first `S` slots or empty ones behind."""

    def move(x_LRKSH: jax.Array) -> jax.Array:
        x_LRKSH = x_LRKSH[:, :, :, :S]
        x_LRKSH = x_LRKSH.at[:, order_R].get(out_sharding=activation_spec(*AXES))
        more = [(0, S - x_LRKSH.shape[3] if axis == "length" else 0) for axis in AXES]
        return jnp.pad(x_LRKSH, more)

    whole = activation_spec(None), activation_spec(None, None)
    token_R = state.token_R.at[order_R].get(out_sharding=whole[0])
    seen_RV = reshard(state.seen_RV, whole[1]).at[order_R].get(out_sharding=whole[1])
    return State(jax.tree.map(move, state.cache), token_R, seen_RV)
