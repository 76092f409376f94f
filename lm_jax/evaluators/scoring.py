"""What evaluations by log-likelihoods share."""

from jax.sharding import Mesh

from lm_jax.evaluators.models import ModelOptions
from lm_jax.generation.scoring import Scorer
from lm_jax.training.inference import Described

_BATCH_SIZE = 32  # rows at a time; most tasks' texts are short


def scorer_of(described: Described, mesh: Mesh, options: ModelOptions) -> Scorer:
    """A model with its weights on `mesh`, and what scores texts by it.

    Raises:
      UserError: it has no scores, or its weights cannot be read.
    """
    loaded = described.load(mesh)
    rows = options.batch_size or _BATCH_SIZE
    return Scorer(loaded.model, loaded.tokenizer, batch_size=rows)
