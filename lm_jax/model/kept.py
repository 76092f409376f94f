"""Weights as generation on a CPU keeps them: a row for each output of the product.

B batch, T length, M their product, K inputs, O outputs.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax.sharding.mesh import activation_spec

_FEW = 32  # rows of activations


class KeptWeight(nnx.Module):
    """A weight [inputs ..., outputs ...], as a matrix [O, K].

    For a few rows of activations, XLA's CPU backend takes up to twice as long for a product that
    has the weight on its right, which it then packs anew each time.
    """

    def __init__(
        self, matrix_OK: jax.Array | np.ndarray, outputs: tuple[int, ...], axes: tuple[str, ...]
    ):
        """
        Args:
          outputs: what O becomes.
          axes: logical names of the weight's.
        """
        rows = axes[len(axes) - len(outputs)], axes[0]
        self.matrix_OK, self.outputs = nnx.Param(matrix_OK, axes=rows), outputs
        self.axes = axes

    @classmethod
    def of(cls, p: nnx.Param, inputs: int, dtype: str) -> "KeptWeight":
        """
        Args:
          p: [inputs ..., outputs ...].
          inputs: how many of its first axes are contracted.
          dtype: of the activations; cast now, and not for each product.
        """
        weight = np.asarray(p.get_value()).astype(dtype, copy=False)
        outputs = weight.shape[inputs:]
        matrix_OK = np.ascontiguousarray(weight.reshape(-1, math.prod(outputs)).T)
        return cls(matrix_OK, outputs, p.axes)

    def product(self, x: jax.Array, *axes: str | None, dtype: jnp.dtype | None = None) -> jax.Array:
        """The product of the last axes of `x`, [B, T, ...], with the weight.

        Args:
          axes: logical axes of the result; None: whole.
          dtype: of the result; None: of `x`.
        """
        B, T = x.shape[:2]
        weight_OK = self.matrix_OK.get_value()
        outer, inner = self.matrix_OK.axes
        x_MK = jax.lax.reshape(
            x, (B * T, weight_OK.shape[1]), out_sharding=activation_spec("batch", inner)
        )
        einsum = functools.partial(jnp.einsum, preferred_element_type=dtype)
        if B * T > _FEW:
            spec = activation_spec("batch", outer)
            y_MO = einsum("MK,OK->MO", x_MK, weight_OK, out_sharding=spec)
        else:
            spec = activation_spec(outer, "batch")
            y_OM = einsum("OK,MK->OM", weight_OK, x_MK, out_sharding=spec)
            # Otherwise XLA makes the product one with the weight on its right.
            y_MO = jax.lax.optimization_barrier(y_OM).T
        spec = activation_spec(*axes)
        return jax.lax.reshape(y_MO, (B, T, *self.outputs), out_sharding=spec)
