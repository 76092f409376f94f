"""What a step was given, written down for a person: WORKDIR/faults/NAME.json."""

import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lm_jax import paths
from lm_jax.data.packing import Batch
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError

FOLDER = "faults"
_SHOWN = 200  # characters of a row


class Exhibit(NamedTuple):
    """A step and the rows of it that this process read."""

    step: int
    loss: float
    gradient_norm: float
    batch: Batch


def write_down(workdir: str, name: str, exhibits: Sequence[Exhibit], tokenizer: Tokenizer) -> str:
    """Writes the token ids of each row, and the text that they begin with; of several processes,
    each in a file of its own. Returns the path."""
    if jax.process_count() > 1:
        name += f"-process{jax.process_index()}"
    folder = os.path.join(workdir, FOLDER)
    path = os.path.join(folder, f"{name}.json")
    told = [
        {
            "step": e.step,
            "loss": str(e.loss),  # nan is no JSON
            "gradient_norm": str(e.gradient_norm),
            "rows": [_row(*row, tokenizer) for row in zip(e.batch["inputs"], e.batch["segments"])],
        }
        for e in exhibits
    ]
    paths.makedirs(folder)
    paths.write_whole(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return path


def _row(inputs_T: np.ndarray, segments_T: np.ndarray, tokenizer: Tokenizer) -> dict:
    ids = inputs_T[segments_T > 0].tolist()
    try:
        text = tokenizer.decode(ids)[:_SHOWN]
    except UserError:  # ids of a vocabulary that has no text for them
        text = ""
    return {"text": text, "pieces": int(segments_T.max(initial=0)), "ids": ids}
