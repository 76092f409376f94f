"""How probable a model finds a text: log-likelihoods, in nats.

B rows, T tokens, C of them at a time, D width, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.batching import batches
from lm_jax.generation.parts import OnBatch, numbered, texts_done, windows
from lm_jax.model.head import HEADS_WITHOUT_WORDS
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, dividing, reshard, shards

_LOGITS_A_DEVICE = 2**26  # float32 numbers at a time: 256 MiB


class LogLikelihood(NamedTuple):
    """Of a continuation or a text.

    Attributes:
      log_p: the sum of log p over its tokens.
      tokens: how many were scored.
      greedy: whether each of them is the most probable one, so that a generation at temperature 0
        gives them.
      cut: tokens in front that did not fit into the model beside them.
    """

    log_p: float
    tokens: int
    greedy: bool
    cut: int = 0


class Scorer:
    """Scores texts by one model.

    Inside `jax.set_mesh` it works on that mesh, otherwise on one device. Rows are sorted by length
    and padded to a power of two: a shape for each is all that is compiled. What stands beside a
    text plays no part in its score, up to rounding.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, batch_size: int = 8):
        """
        Args:
          batch_size: rows at a time.

        Raises:
          UserError: the model and the tokenizer do not belong together, or the model has no scores.
        """
        config = model.config
        if config.head in HEADS_WITHOUT_WORDS:
            use = HEADS_WITHOUT_WORDS[config.head]
            raise UserError(f"model.head = '{config.head}': this model {use} and cannot score text")
        if tokenizer.least_vocabulary > config.vocab_size:
            raise UserError(
                f"the tokenizer needs {tokenizer.least_vocabulary} ids, but model.vocab_size ="
                f" {config.vocab_size}: they do not belong together"
            )
        if batch_size < 1:
            raise UserError(f"batch_size: must be at least 1, not {batch_size}")
        if not config.causal and tokenizer.mask_id is None:
            raise UserError(
                "this model fills in masked tokens, and its tokenizer has no mask token"
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    # Causal models.

    def loglikelihood(
        self,
        pairs: Sequence[tuple[str, str]],
        on_batch: OnBatch | None = None,
        names: Sequence[str] | None = None,
    ) -> list[LogLikelihood]:
        """How probable each continuation is after its context.

        The two are encoded together and parted where the context by itself would end, with spaces
        at its end counted to the continuation: as lm-evaluation-harness does (Gao et al. 2021).
        An empty context is the token that begins a text. Of a context that is too long, the end is
        kept. A model with `prefix_attention` reads the context both ways, as it does a prompt.

        Args:
          pairs: context and continuation.
          names: what messages call them; None: by their numbers.

        Raises:
          UserError: the model is not causal; a continuation is empty or longer than the model
            takes; a context is empty where no token begins a text.
        """
        self._check_causal("loglikelihood")
        names = names or [f"pair {i + 1}" for i in range(len(pairs))]
        rows = [self._pair(name, *pair) for name, pair in zip(names, pairs, strict=True)]
        longest = self.model.config.max_length + 1
        kept = [(ids[-longest:], first - max(len(ids) - longest, 0)) for ids, first in rows]
        return [
            found._replace(cut=len(ids) - len(used))
            for found, (ids, _), (used, _) in zip(self.of_ids(kept, on_batch), rows, kept)
        ]

    def of_ids(
        self, rows: Sequence[tuple[np.ndarray, int]], on_batch: OnBatch | None = None
    ) -> list[LogLikelihood]:
        """As `loglikelihood`, of ids.

        Args:
          rows: the ids of a context and its continuation, int32 [n], at most one more than the
            model takes, and where the continuation begins, 0 < first < n.

        Raises:
          UserError: the model is not causal.
        """
        self._check_causal("of_ids")
        return [
            LogLikelihood(float(log_p.sum()), len(log_p), bool(best.all()))
            for log_p, best in self._score(
                rows, texts_done(range(len(rows)), len(rows), on_batch), prefix=True
            )
        ]

    def _pair(self, where: str, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """The ids of both, and where the continuation begins."""
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        try:
            before = self.tokenizer.encode_prompt(text)
            if text:
                ids = self.tokenizer.encode_prompt(text + continuation)
            else:
                ids = np.concatenate([before, self.tokenizer.encode(continuation)])
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        if not len(before):
            raise UserError(
                f"{where}: the context is empty, and this tokenizer has no token that begins a text"
            )
        size = len(ids) - len(before)
        if size <= 0:
            raise UserError(
                f"{where}: the continuation {continuation!r} adds no token to its context"
            )
        if size > self.model.config.max_length:
            raise UserError(
                f"{where}: the continuation has {size} tokens, and the model takes"
                f" {self.model.config.max_length} (model.max_length)"
            )
        return ids, len(before)

    def loglikelihood_rolling(
        self,
        texts: Sequence[str],
        on_batch: OnBatch | None = None,
        names: Sequence[str] | None = None,
    ) -> list[LogLikelihood]:
        """How probable each whole text is, after the token that begins one.

        A text longer than the model is read in windows: each token is scored once, those of a
        window after the last token of the one before it, and the last window is filled up with
        what stands before it, as in lm-evaluation-harness. Where no token begins a text, its first
        one is not scored.

        Args:
          names: what messages call them; None: by their numbers.

        Raises:
          UserError: the model is not causal, or a text has no token to score.
        """
        self._check_causal("loglikelihood_rolling")
        pieces, owners = [], []
        names = names or numbered(len(texts))
        for i, text in enumerate(texts):
            try:
                ids = self.tokenizer.encode_prompt(text)
            except UserError as e:
                raise UserError(f"{names[i]}: {e}") from None
            if self.tokenizer.begin_id is not None and not self.tokenizer.bos_before_text and text:
                ids = np.concatenate([[self.tokenizer.begin_id], ids]).astype(np.int32)
            if len(ids) < 2:
                raise UserError(f"{names[i]} has no token to score: {text!r}")
            for window in windows(ids, self.model.config.max_length):
                pieces.append(window)
                owners.append(i)
        parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in texts]
        of_windows = self._score(pieces, texts_done(owners, len(texts), on_batch), prefix=False)
        for i, found in zip(owners, of_windows):
            parts[i].append(found)
        return [
            LogLikelihood(
                float(sum(log_p.sum() for log_p, _ in of_text)),
                sum(len(log_p) for log_p, _ in of_text),
                all(best.all() for _, best in of_text),
            )
            for of_text in parts
        ]

    def _check_causal(self, what: str) -> None:
        if not self.model.config.causal:
            raise UserError(
                f"model.causal = False: {what} is of models that continue text; this one fills in"
                " masked tokens, and has a pseudo-log-likelihood"
            )

    def _score(
        self,
        rows: Sequence[tuple[np.ndarray, int]],
        on_rows: Callable[[list[int]], None],
        *,
        prefix: bool,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each (ids, first): log p of ids[first:], float64, and whether each is the best.

        Args:
          on_rows: called with the places of those that are done, a batch at a time.
          prefix: what stands before `first` is a prompt.
        """
        out: list[Any] = [None] * len(rows)
        inputs, limit = [ids[:-1] for ids, _ in rows], self.model.config.max_length
        for chosen, inputs_BT, lengths_B in batches(inputs, self.batch_size, limit):
            (B, T), targets_BT = inputs_BT.shape, np.zeros_like(inputs_BT)
            prefixes_B = np.ones(B, np.int32)
            for r, i in enumerate(chosen):
                ids, first = rows[i]
                prefixes_B[r] = first if prefix else 1
                targets_BT[r, : lengths_B[r]] = ids[1:]
            local = B // shards("batch") * self.model.config.vocab_size // shards("vocab")
            chunk = max(
                c
                for c in range(1, T + 1)
                if T % c == 0 and (c == 1 or c * local <= _LOGITS_A_DEVICE)
            )
            found = _log_p(self.model, inputs_BT, targets_BT, lengths_B, prefixes_B, chunk=chunk)
            log_p_BT, best_BT = jax.device_get(found)
            for r, i in enumerate(chosen):
                own = slice(rows[i][1] - 1, lengths_B[r])
                out[i] = log_p_BT[r, own].astype(np.float64), best_BT[r, own]
            on_rows(chosen)
        return out

    # Masked models.

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text with what its tokenizer puts around it, and the places of its own."""
        ids = self.tokenizer.encode(text)
        front = int(np.flatnonzero(self.tokenizer.frame(np.array([-1])) == -1)[0])
        return self.tokenizer.frame(ids), np.arange(front, front + len(ids))

    def pseudo_loglikelihood(
        self,
        rows: Sequence[tuple[np.ndarray, Sequence[int] | np.ndarray]],
        on_batch: OnBatch | None = None,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """log p of single tokens given all others, each masked by itself (Salazar et al. 2020).

        Args:
          rows: the ids of a text and the places to score, as `encode` gives them, or some of those.
          names: what messages call them; None: by their numbers.

        Returns:
          for each row float64 [len(places)]; their sum is the pseudo-log-likelihood.

        Raises:
          UserError: the model is causal, or a row is longer than it takes.
        """
        if self.model.config.causal:
            raise UserError(
                "model.causal = True: a pseudo-log-likelihood is of models that fill in masked"
                " tokens; this one has a log-likelihood"
            )
        limit = self.model.config.max_length
        for name, (ids, _) in zip(names or numbered(len(rows)), rows, strict=True):
            if len(ids) > limit:
                raise UserError(
                    f"{name} has {len(ids)} tokens, and the model takes {limit} (model.max_length)"
                )
        flat = [(i, n, int(place)) for i, (_, places) in enumerate(rows)
                for n, place in enumerate(places)]  # fmt: skip
        out = [np.zeros(len(places)) for _, places in rows]
        texts = [rows[i][0] for i, _, _ in flat]
        on_rows = texts_done([i for i, _, _ in flat], len(rows), on_batch)
        for chosen, tokens_BT, lengths_B in batches(texts, self.batch_size, limit):
            places_B, targets_B = np.zeros((2, len(tokens_BT)), np.int32)
            for r, k in enumerate(chosen):
                places_B[r] = place = flat[k][2]
                targets_B[r], tokens_BT[r, place] = texts[k][place], self.tokenizer.mask_id
            log_p_B = jax.device_get(
                _masked_log_p(self.model, tokens_BT, lengths_B, places_B, targets_B)
            )
            for r, k in enumerate(chosen):
                i, n, _ = flat[k]
                out[i][n] = log_p_B[r]
            on_rows(chosen)
        return out


def _hidden(
    model: Transformer,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    prefixes_B: jax.Array | None = None,
) -> jax.Array:
    tokens_BT = reshard(tokens_BT, activation_spec("batch", None))
    lengths_B1 = reshard(lengths_B, activation_spec("batch"))[:, None]
    place_1T = jnp.arange(tokens_BT.shape[1])[None]
    segments_BT = (place_1T < lengths_B1).astype(jnp.int32)
    prefix_BT = None
    if model.config.prefix_attention:
        prefix_BT = place_1T < reshard(prefixes_B, activation_spec("batch"))[:, None]
    x_BTD, _ = model(tokens_BT, segments_BT=segments_BT, prefix_BT=prefix_BT)
    return reshard(x_BTD, activation_spec("batch"))


@functools.partial(jax.jit, static_argnames=("chunk",))
def _log_p(
    model: Transformer,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    lengths_B: jax.Array,
    prefixes_B: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """float32 [B, T] log p of each target, and bool [B, T] whether it is the most probable id.

    Args:
      prefixes_B: int32, tokens of the prompt.
      chunk: positions of a row whose logits exist at a time; divides T.
    """
    B, T = tokens_BT.shape
    x_BTD = model.head_input(_hidden(model, tokens_BT, lengths_B, prefixes_B))
    x_BTD = reshard(x_BTD, activation_spec("batch"))
    head = model.output_head(dividing("length", chunk))

    def chunks_first(x_BT: jax.Array) -> jax.Array:
        rest = x_BT.shape[2:]
        x = jax.lax.reshape(
            reshard(x_BT, activation_spec("batch")),
            (B, T // chunk, chunk, *rest),
            out_sharding=activation_spec("batch", None, None, *(None,) * len(rest)),
        )
        return jnp.moveaxis(x, 1, 0)

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = part
        logits_BCV = head.logits(x_BCD)
        targets_BC = reshard(targets_BC, activation_spec("batch", dividing("length", chunk)))
        found = _of_targets(logits_BCV, targets_BC), jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return jax.tree.map(lambda x: reshard(x, activation_spec("batch", None)), found)

    found = jax.lax.map(score, (chunks_first(x_BTD), chunks_first(targets_BT)))
    whole = activation_spec(None, None)
    return jax.tree.map(
        lambda x: jnp.moveaxis(
            reshard(x, activation_spec(None, None, None)), 0, 1
        ).reshape(B, T, out_sharding=whole),
        found,
    )  # fmt: skip


def _of_targets(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log p of the targets. A masked sum and no gather: the vocabulary may be split."""
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[:, :, None]
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


@jax.jit
def _masked_log_p(
    model: Transformer,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    places_B: jax.Array,
    targets_B: jax.Array,
) -> jax.Array:
    """float32 [B]: log p of one token of each row, in a place of its own."""
    places_B1, targets_B1 = (
        reshard(x, activation_spec("batch"))[:, None] for x in (places_B, targets_B)
    )
    x_BTD = _hidden(model, tokens_BT, lengths_B)
    is_place_BT = jnp.arange(tokens_BT.shape[1])[None] == places_B1
    # A sum of one term; an index into a sharded batch would gather the batch.
    x_B1D = jnp.sum(jnp.where(is_place_BT[:, :, None], x_BTD, 0), axis=1, keepdims=True)
    return reshard(_of_targets(model.logits(x_B1D), targets_B1)[:, 0], activation_spec(None))
