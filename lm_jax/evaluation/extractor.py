"""Answers that a model with a head 'span' finds in texts.

B windows of a batch, T length.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data.examples import Example
from lm_jax.data.spans import Window, windows, with_length
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.batching import batches
from lm_jax.model.pooling import text_states
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard


@dataclasses.dataclass(frozen=True)
class Answer:
    """
    Attributes:
      text: of the context, without the spaces around it.
      start: the character of the context at which it begins.
      score: the sum of the scores of its first and its last token.
      null: that sum for the first token of a window, which stands for no answer: of several windows
        the lowest, as one of them may hold the answer (Devlin et al. 2018, section 4.3).
    """

    text: str
    start: int
    score: float
    null: float

    @property
    def null_margin(self) -> float:
        """How much higher no answer scores than this one."""
        return self.null - self.score

    def record(self, unanswerable: bool, threshold: float) -> dict[str, Any]:
        """What is predicted, and by which scores.

        Args:
          unanswerable: there may be no answer; then that is predicted, as '', where its score is
            higher by more than `threshold`.
        """
        out = {"prediction": self.text, "start": self.start, "score": round(self.score, 4)}
        if unanswerable:
            # Not rounded: it is what a threshold found later is compared with.
            out |= {"candidate": self.text, "null_margin": self.null_margin}
            out["prediction"] = "" if self.null_margin > threshold else self.text
        return out


def extract(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    data: DataConfig,
    *,
    max_tokens: int = 30,
    batch_size: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> list[Answer | None]:
    """The best answer to each example's prompt in its context: over all windows, the span of at
    most `max_tokens` tokens with the highest sum of scores (Devlin et al. 2018). None for one that
    was skipped, as its context has no token.

    Inside `jax.set_mesh` the windows are shared out over it.

    Args:
      data: its length and stride make the windows; no window is longer than the model's longest.
      on_done: called with the number of examples whose windows are all read, at least.

    Raises:
      UserError: the model has no such head; or a context has no token, unless such are skipped.
    """
    if model.config.head != "span":
        raise UserError(f"model.head = '{model.config.head}': this model finds no answers in texts")
    longest = min(data.length, model.config.max_length)
    data = with_length(data, longest)
    found: list[tuple[int, Window]] = []
    for i, example in enumerate(examples):
        found += [(i, window) for window in windows(example, tokenizer, data)]
    best: list[Answer | None] = [None] * len(examples)
    null = np.full(len(examples), np.inf)
    left = np.bincount([i for i, _ in found], minlength=len(examples))
    rows = [window.ids for _, window in found]
    for chosen, tokens_BT, lengths_B in batches(rows, batch_size, longest):
        types_BT = np.zeros_like(tokens_BT)
        for n, types_T in zip(chosen, types_BT, strict=False):
            types_T[: len(rows[n])] = found[n][1].second
        scores_BT2 = np.asarray(_scores(model, tokens_BT, types_BT, lengths_B))
        for n, scores_T2 in zip(chosen, scores_BT2, strict=False):
            i, window = found[n]
            answer = _best(window, scores_T2[: len(window.ids)], examples[i].context, max_tokens)
            if answer:
                null[i] = min(null[i], answer.null)
                best[i] = max(best[i] or answer, answer, key=lambda a: a.score)
            left[i] -= 1
        if on_done:
            on_done(int((left == 0).sum()))
    for example, answer in zip(examples, best, strict=True):
        if answer is None:
            example.bad("its context is empty: it has no token")
    return [x and dataclasses.replace(x, null=float(n)) for x, n in zip(best, null, strict=True)]


def _best(window: Window, scores_T2: np.ndarray, context: str, most: int) -> Answer | None:
    """The best answer in a window; None where it holds nothing of the context."""
    places = np.flatnonzero(window.spans[:, 0] >= 0)
    if not len(places):
        return None
    begin, end = scores_T2[places].T
    n = len(places)
    length_nn = np.arange(n)[None] - np.arange(n)[:, None]
    allowed_nn = (length_nn >= 0) & (length_nn < most)
    sums_nn = np.where(allowed_nn, begin[:, None] + end[None], -np.inf)
    first, last = np.unravel_index(int(sums_nn.argmax()), sums_nn.shape)
    start, stop = int(window.spans[places[first], 0]), int(window.spans[places[last], 1])
    text = context[start:stop]
    start += len(text) - len(text.lstrip())
    return Answer(text.strip(), start, float(sums_nn[first, last]), float(scores_T2[0].sum()))


@jax.jit
def _scores(
    model: Transformer, tokens_BT: jax.Array, types_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    told = types_BT if model.config.token_types >= 2 else None
    x_BTD, _ = text_states(model, tokens_BT, lengths_B, told)
    return reshard(model.logits(x_BTD), activation_spec(None, None, None))
