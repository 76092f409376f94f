"""From hidden states to scores over the vocabulary, or of classes.

B batch, T length, M positions of all rows, D width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.model.kept import KeptWeight
from lm_jax.model.projection import project
from lm_jax.sharding.gather import gather, gradient_spec
from lm_jax.sharding.mesh import activation_spec, dividing, names_in, platform, reshard, shards

# What a model does whose head knows no vocabulary.
HEADS_WITHOUT_WORDS = {
    "none": "gives vectors (lm_jax.embed)",
    "classify": "tells classes apart (lm_jax.evaluate --task)",
    "span": "finds answers in a text (lm_jax.evaluate --task)",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns `Transformer.head_input` into scores, so that a loss can do it in chunks.

    The weight is in the dtype of the products; its gradient is summed over the chunks in float32.
    """

    weight_DV: jax.Array  # has no gradient
    # float32, of no effect but that they have the weight's gradient. None: nothing learns.
    zeros_DV: jax.Array | None
    bias_V: jax.Array | None
    scale_V: jax.Array | None  # of a quantized weight
    softcap: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        weight_DV: jax.Array,
        bias_V: jax.Array | None,
        scale_V: jax.Array | None = None,
        *,
        dtype: str,
        softcap: float,
        length: str | None,
    ) -> "Head":
        """
        Args:
          weight_DV: float32, or int8 with a scale, sharded as a parameter.
          dtype: of the products.
          length: logical axis of the positions that it is for.
        """
        spec, rows = activation_spec("embed", "vocab"), names_in(activation_spec("batch", length))
        used = reshard(jax.lax.stop_gradient(weight_DV).astype(dtype), spec)
        if scale_V is not None:
            return cls(used, None, bias_V, scale_V, softcap)
        zeros = weight_DV - jax.lax.stop_gradient(weight_DV)
        return cls(used, gather(zeros, spec, rows), bias_V, None, softcap)

    @property
    def learned(self) -> dict[str, jax.Array | None]:
        """What has a gradient."""
        return {"zeros_DV": self.zeros_DV, "bias_V": self.bias_V}

    def with_learned(self, learned: dict[str, jax.Array | None]) -> "Head":
        return dataclasses.replace(self, **learned)

    @property
    def vocab(self) -> int:
        """Ids whose logits one device has."""
        return self.weight_DV.shape[1] // shards("vocab")

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]."""
        (B, T, D), V = x_BTD.shape, self.weight_DV.shape[1]
        axes = "batch", dividing("length", T), "vocab"
        x_BTD = reshard(x_BTD, activation_spec(*axes[:2], "embed"))
        if shards(axes[1]) > 1 or platform() != "cpu":
            logits_BTV = _product(x_BTD, self.weight_DV, self.zeros_DV)
        else:  # as one product of two matrices: see `projection.product`
            x_MD = jax.lax.reshape(
                x_BTD, (1, B * T, D), out_sharding=activation_spec(None, "batch", "embed")
            )
            logits_BTV = _product(x_MD, self.weight_DV, self.zeros_DV)
        spec = activation_spec(*axes)
        logits_BTV = jax.lax.reshape(logits_BTV, (B, T, V), out_sharding=spec)
        if self.scale_V is not None:
            logits_BTV = logits_BTV * self.scale_V[None, None]
        return _finished(logits_BTV, self.bias_V, self.softcap)


def _finished(logits_BTV: jax.Array, bias_V: jax.Array | None, softcap: float) -> jax.Array:
    if bias_V is not None:
        logits_BTV = logits_BTV + bias_V[None, None]
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    return logits_BTV


@dataclasses.dataclass(frozen=True)
class KeptHead:
    """A head as generation on a CPU has it: it learns nothing."""

    weight: KeptWeight
    bias_V: jax.Array | None
    softcap: float

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]."""
        logits_BTV = self.weight.product(x_BTD, "batch", None, "vocab", dtype=jnp.float32)
        return _finished(logits_BTV, self.bias_V, self.softcap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassHead:
    """Scores of a few classes, or of a token as an answer's first and last; never split."""

    weight: nnx.Param  # [D, V]
    bias: nnx.Param | None  # [V]

    @property
    def learned(self) -> dict[str, nnx.Param | None]:
        """What has a gradient."""
        return {"weight": self.weight, "bias": self.bias}

    def with_learned(self, learned: dict[str, nnx.Param | None]) -> "ClassHead":
        return ClassHead(**learned)

    @property
    def vocab(self) -> int:
        """Classes."""
        return self.weight.get_value().shape[1]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, V]."""
        axes = "batch", dividing("length", x_BTD.shape[1])
        x_BTD = reshard(x_BTD, activation_spec(*axes, "embed"))
        return project(x_BTD, self.weight, self.bias, *axes, "features").astype(jnp.float32)


@jax.custom_vjp
def _product(x_BTD: jax.Array, weight_DV: jax.Array, zeros_DV: jax.Array | None) -> jax.Array:
    """float32 [B, T, V]."""
    return jnp.einsum("BTD,DV->BTV", x_BTD, weight_DV, preferred_element_type=jnp.float32)


def _product_forward(x_BTD, weight_DV, zeros_DV):
    return _product(x_BTD, weight_DV, zeros_DV), (x_BTD, weight_DV, zeros_DV)


def _product_backward(saved, d_logits_BTV):
    x_BTD, weight_DV, zeros_DV = saved
    d_logits_BTV = d_logits_BTV.astype(x_BTD.dtype)
    d_x_BTD = jnp.einsum("BTV,DV->BTD", d_logits_BTV, weight_DV, out_sharding=gradient_spec(x_BTD))
    if zeros_DV is None:
        return d_x_BTD, jnp.zeros_like(weight_DV), None
    d_weight_DV = jnp.einsum(
        "BTD,BTV->DV",
        x_BTD,
        d_logits_BTV,
        preferred_element_type=jnp.float32,
        out_sharding=gradient_spec(zeros_DV),
    )
    return d_x_BTD, jnp.zeros_like(weight_DV), d_weight_DV


_product.defvjp(_product_forward, _product_backward)
