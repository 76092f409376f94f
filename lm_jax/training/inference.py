"""A run's model or a published one that is to be used, and learns nothing."""

import dataclasses

import jax
from jax.sharding import Mesh

from lm_jax.config import Config
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.model import parameters as params_lib
from lm_jax.model.float8 import trained
from lm_jax.model.quantized import rounder
from lm_jax.model.transformer import Transformer, skeleton_of
from lm_jax.training import weights
from lm_jax.training.weights import Source


@dataclasses.dataclass(frozen=True)
class Described:
    """All of a model that can be used but its weights; see `describe`."""

    config: Config
    tokenizer: Tokenizer
    source: Source

    def load(self, mesh: Mesh) -> "Loaded":
        """
        Raises:
          UserError: the weights are damaged, or do not fit the mesh.
        """
        whole = dataclasses.replace(self.config.model, quantize="none")
        with jax.set_mesh(mesh):
            skeleton = skeleton_of(self.config.model)
        parameters = weights.load_weights(self.source, whole, mesh, rounder(skeleton))
        model = params_lib.bind(skeleton, parameters)
        return Loaded(model, self.config, self.tokenizer, self.source)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that can be used, with what belongs to it."""

    model: Transformer
    config: Config
    tokenizer: Tokenizer
    source: Source


def load_for_inference(
    path: str,
    mesh: Mesh,
    step: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> Loaded:
    """As `describe`, with the weights on `mesh`."""
    return describe(path, step, dtype, quantize).load(mesh)


def describe(
    path: str, step: int | None = None, dtype: str | None = None, quantize: str | None = None
) -> Described:
    """The model of a run, adapters merged, or a published one.

    Args:
      path: a workdir or a Hugging Face folder.
      step: of a run, which checkpoint; None: the newest.
      dtype: to compute in; None: the run's; of a published model, bfloat16 but on CPUs, which are
        slower at that, float32.
      quantize: as `model.quantize`; None: not.

    Raises:
      UserError: there is no such model or checkpoint.
    """
    source = weights.find(path, step)
    config, tokenizer = weights.settings_of(source)
    if source.step is None:
        config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config.model.dtype = dtype or config.model.dtype
    config.model = trained(config.model)
    config.model.quantize = quantize or "none"
    config.model.attention = "auto"  # whatever the platform that trained it had
    return Described(config, tokenizer, source)
