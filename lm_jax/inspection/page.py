"""A page that shows a `Look`: one HTML file with its data, that asks for nothing else.

Whatever comes from a prompt or a model stands in the data alone, which the script puts on the page
as text.
"""

import base64
import math
import unicodedata
from typing import Any

import numpy as np

from lm_jax.data.tokenizer import Tokenizer
from lm_jax.inspection.look import Look, Scores
from lm_jax.page import assemble

_SYMBOLS = {"\n": "⏎", "\t": "⇥"}


def render(look: Look, tokenizer: Tokenizer, facts: dict[str, str]) -> str:
    """The page.

    Args:
      facts: what its head says of the model, in this order; the first is the title.
    """
    layers, heads, *_ = look.weights_LNTS.shape
    used = set(look.ids_T.tolist())
    both_ways = not look.causal or look.prefix > 1
    data: dict[str, Any] = {
        "facts": list(facts.items()),
        "ids": look.ids_T.tolist(),
        "layers": layers,
        "heads": heads,
        "causal": look.causal,
        "prefix": look.prefix,
        "bothWays": both_ways,
        "weights": pack(look.weights_LNTS, causal=not both_ways),
        "scores": None,
    }
    if look.scores is not None:
        data["scores"] = _scores(look.scores)
        used |= {*look.scores.candidates_MK.flat, *look.scores.lens_LT.flat} - {-1}
    data["names"] = {int(id): name(tokenizer, int(id)) for id in sorted(used)}
    data["specials"] = [int(id) for id in sorted(used & set(tokenizer.specials))]
    return assemble(__package__, data)


def pack(weights_LNTS: np.ndarray, *, causal: bool) -> str:
    """Attention weights as bytes in base64, each the root of a weight, to 1/255.

    Most weights are small, and the root spends more of the 256 steps on them: none is off by more
    than 0.4 points of a hundred. Of causal attention, only keys up to the query are kept.
    """
    bytes_LNTS = np.rint(255 * np.sqrt(np.clip(weights_LNTS, 0, 1))).astype(np.uint8)
    if causal:
        bytes_LNTS = bytes_LNTS[:, :, *np.tril_indices(weights_LNTS.shape[2])]
    return base64.b64encode(bytes_LNTS.tobytes()).decode()


def _scores(scores: Scores) -> dict[str, Any]:
    def number(x: float) -> float | None:
        return None if math.isnan(x) else float(f"{x:.4g}")

    def pairs(ids: np.ndarray, chances: np.ndarray) -> list[tuple[int, float | None]]:
        return [(int(i), number(p)) for i, p in zip(ids, chances) if i >= 0]

    return {
        "vocabulary": scores.vocab_size,
        "loss": [number(x) for x in scores.loss_T],
        "rank": scores.rank_T.tolist(),
        "candidates": [*map(pairs, scores.candidates_MK, scores.probabilities_MK)],
        "lens": [*map(pairs, scores.lens_LT, scores.lens_probabilities_LT)],
    }


def name(tokenizer: Tokenizer, id: int) -> str:
    """How an id is shown: a special's name, its text, or its bytes where they are not text."""
    if id in tokenizer.specials:
        return tokenizer.specials[id]
    if not 0 <= id < tokenizer.vocab_size or not (data := tokenizer.spelling(id)):
        return f"⟨id:{id}⟩"  # an embedding may have more rows than there are tokens
    try:
        return "".join(map(_visible, data.decode("utf-8")))
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02X}" for byte in data)


def _visible(character: str) -> str:
    """What would not be seen, or would change how its neighbours are, by its name."""
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    kind = unicodedata.category(character)
    if kind[0] == "C" or (kind[0] == "Z" and character != " "):
        return f"⟨U+{ord(character):04X}⟩"
    return "\u25cc" + character if kind[0] == "M" else character  # marks on a dotted circle
