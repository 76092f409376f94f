"""What evaluations by log-likelihoods share: the model, and a file for what they find."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from lm_jax.config import MeshConfig
from lm_jax.generation.scoring import Scorer
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training.weights import Loaded, load_for_inference

_BATCH_SIZE = 32  # rows at a time; most tasks' texts are short


@contextlib.contextmanager
def loaded_scorer(
    path: str, step: int | None, dtype: str | None, batch_size: int | None
) -> Iterator[tuple[Loaded, Scorer]]:
    """A model and what scores texts by it, on all devices, whose mesh is set inside.

    Raises:
      UserError: there is no such model, or it has no scores.
    """
    mesh = make_mesh(MeshConfig())
    loaded = load_for_inference(path, mesh, step, dtype)
    rows = _BATCH_SIZE if batch_size is None else batch_size
    scorer = Scorer(loaded.model, loaded.tokenizer, batch_size=rows)
    with jax.set_mesh(mesh):
        yield loaded, scorer


def write(path: str, records: Iterable[dict[str, Any]]) -> None:
    """A JSON line each, in a new file."""
    with open(path, "x", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
