"""Weights as generation on a CPU keeps them: a row for each output of the product.

B batch, T length, M their product, K inputs, O outputs.
"""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax.model.quantized import QuantizedWeight, parts, scale_of
from lm_jax.sharding.mesh import activation_spec

_FEW = 32  # rows of activations


class KeptWeight(nnx.Module):
    """A weight [inputs ..., outputs ...], as a matrix [O, K].

    For a few rows of activations, XLA's CPU backend takes up to twice as long for a product that
    has the weight on its right, which it then packs anew each time.
    """

    def __init__(
        self,
        matrix_OK: jax.Array | np.ndarray,
        outputs: tuple[int, ...],
        axes: tuple[str, ...],
        scale_O: jax.Array | np.ndarray | None = None,
    ):
        """
        Args:
          matrix_OK: of the dtype of the activations, or int8 with a scale.
          outputs: what O becomes.
          axes: logical names of the weight's.
          scale_O: float32.
        """
        rows = axes[len(axes) - len(outputs)], axes[0]
        self.matrix_OK, self.outputs = nnx.Param(matrix_OK, axes=rows), outputs
        self.scale_O = None if scale_O is None else nnx.Param(scale_O, axes=rows[:1])
        self.axes = axes
        # Of a matrix that several share, the rows of this one, from and to: see `merged`.
        self.part: tuple[int, int] | None = None

    @classmethod
    def of(cls, p: nnx.Param | QuantizedWeight, inputs: int, dtype: str) -> "KeptWeight":
        """
        Args:
          p: [inputs ..., outputs ...].
          inputs: how many of its first axes are contracted.
          dtype: of the activations; cast now, and not for each product.
        """
        values, scale = parts(p)
        weight = np.asarray(values.get_value())
        if scale is None:
            weight = weight.astype(dtype, copy=False)
        scale_O = None if scale is None else np.asarray(scale.get_value()).reshape(-1)
        outputs = weight.shape[inputs:]
        matrix_OK = np.ascontiguousarray(weight.reshape(-1, math.prod(outputs)).T)
        return cls(matrix_OK, outputs, p.axes, scale_O)

    def product(self, x: jax.Array, *axes: str | None, dtype: jnp.dtype | None = None) -> jax.Array:
        """The product of the last axes of `x`, [B, T, ...], with the weight.

        Args:
          axes: logical axes of the result; None: whole.
          dtype: of the result; None: of `x`.
        """
        B, T = x.shape[:2]
        weight_OK, dtype = self.matrix_OK.get_value(), dtype or x.dtype
        outer, inner = self.matrix_OK.axes
        x_MK = jax.lax.reshape(
            x, (B * T, weight_OK.shape[1]), out_sharding=activation_spec("batch", inner)
        )
        if self.scale_O is not None:
            y_MO = _integer_product(x_MK, weight_OK, outer) * self.scale_O.get_value()[None]
            y_MO = y_MO.astype(dtype)
        else:
            y_MO = _product(x_MK, weight_OK, outer, dtype)
        if self.part is not None:
            y_MO = y_MO[:, slice(*self.part)]
        spec = activation_spec(*axes)
        return jax.lax.reshape(y_MO, (B, T, *self.outputs), out_sharding=spec)


def _product(x_MK: jax.Array, weight_OK: jax.Array, outer: str, dtype: jnp.dtype) -> jax.Array:
    """[M, O] of `dtype`."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=dtype)
    if len(x_MK) > _FEW:
        spec = activation_spec("batch", outer)
        return einsum("MK,OK->MO", x_MK, weight_OK, out_sharding=spec)
    y_OM = einsum("OK,MK->OM", weight_OK, x_MK, out_sharding=activation_spec(outer, "batch"))
    # Otherwise XLA makes the product one with the weight on its right.
    return jax.lax.optimization_barrier(y_OM).T


def _integer_product(x_MK: jax.Array, weight_OK: jax.Array, outer: str) -> jax.Array:
    """float32 [M, O], of int8 weights.

    For a few rows, weights that are converted first would take ten times as long as floats do. Here
    a row of activations becomes two of integers: the nearest, and what that leaves, in 254ths. Of
    the row's largest number, 1/64,000 at most is lost.
    """
    if len(x_MK) > _FEW:
        return _product(x_MK, weight_OK.astype(x_MK.dtype), outer, jnp.float32)
    x_MK = x_MK.astype(jnp.float32)
    scale_M1 = scale_of(x_MK, (1,))
    nearest_MK = jnp.round(x_MK / scale_M1)
    rest_MK = jnp.round((x_MK / scale_M1 - nearest_MK) * 254)
    parts_AMK = jnp.stack([nearest_MK, rest_MK]).astype(jnp.int8)
    y_AMO = jnp.einsum(
        "AMK,OK->AMO",
        parts_AMK,
        weight_OK,
        preferred_element_type=jnp.int32,
        out_sharding=activation_spec(None, "batch", outer),
    ).astype(jnp.float32)
    return (y_AMO[0] + y_AMO[1] / 254) * scale_M1


def merged(weights: list[KeptWeight]) -> list[KeptWeight]:
    """The same weights, of the same activations, whose products are parts of one."""

    def joined(params: list[nnx.Param | None]) -> np.ndarray | None:
        return None if params[0] is None else np.concatenate([p.get_value() for p in params])

    matrix_OK, scale_O = (
        joined([getattr(w, name) for w in weights]) for name in ("matrix_OK", "scale_O")
    )
    outer, inner = weights[0].matrix_OK.axes
    whole = KeptWeight(matrix_OK, matrix_OK.shape[:1], (inner, outer), scale_O)
    parts, first = [], 0
    for weight in weights:
        part = copy.copy(weight)
        last = first + len(weight.matrix_OK.get_value())
        part.matrix_OK, part.scale_O, part.part = whole.matrix_OK, whole.scale_O, (first, last)
        parts.append(part)
        first = last
    return parts
