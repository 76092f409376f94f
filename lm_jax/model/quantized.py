"""Weights of eight bits, with a scale for each output: what a model that learns nothing can have.

They are rounded to the nearest of 255 multiples of a scale, by which the largest of an output's
weights is 127 (absmax quantization, Dettmers et al. 2022, section 2.1). Activations stay as they
are; a product is of them and of the integers, and is scaled afterwards, so that what is rounded is
nothing but the weights, on every platform and over any devices.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.model.parameters import Parameters

_LARGEST = 127


class QuantizedWeight(nnx.Module):
    """int8 `values` [inputs ..., outputs ...] or in another order, and float32 `scale` [outputs
    ...]; both with a leading axis L where layers are stacked."""

    def __init__(self, p: nnx.Param, contracted: tuple[int, ...]):
        """
        Args:
          p: the weight, float32.
          contracted: its axes that are no outputs, counted from the last, -1.
        """
        self.axes, self.contracted = p.axes, contracted
        outputs = (a for i, a in enumerate(p.axes) if i - len(p.axes) not in contracted)
        values, scale = rounded(p.get_value(), contracted)
        self.values, self.scale = nnx.Param(values, axes=p.axes), nnx.Param(scale, axes=(*outputs,))

    def dequantized(self, dtype: jnp.dtype) -> jax.Array:
        """The weight that this stands for."""
        scale = jnp.expand_dims(self.scale.get_value(), self.contracted)
        return (self.values.get_value() * scale).astype(dtype)


def rounded(weight: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Integers and their scales: see `QuantizedWeight`."""
    largest = jnp.max(jnp.abs(weight), axis=contracted, keepdims=True)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)  # of zeros any will do
    values = jnp.round(weight / scale).astype(jnp.int8)
    return values, jnp.squeeze(scale, contracted)


def take_place(module: nnx.Module, contracted: dict[str, tuple[int, ...]]) -> None:
    """Has weights of eight bits in place of a new module's.

    Args:
      contracted: the weights' names, and which axes of each are: see `QuantizedWeight`.
    """
    for name, axes in contracted.items():
        if (p := getattr(module, name)) is not None:
            setattr(module, name, QuantizedWeight(p, axes))


def quantized(skeleton: nnx.Module, parameters: Parameters) -> Parameters:
    """The parameters of a model of which some weights may have eight bits.

    Args:
      skeleton: that model, its arrays abstract.
      parameters: of the same model with float32 weights. Those that are replaced are deleted, one
        after the other, so that both are never there as a whole.
    """
    done = dict(parameters)
    leaves, _ = jax.tree.flatten_with_path(skeleton, is_leaf=_is_quantized)
    for path, weight in leaves:
        if not _is_quantized(weight):
            continue
        name = ".".join(str(key.name) for key in path)
        whole = done.pop(name)
        done[f"{name}.values"], done[f"{name}.scale"] = jax.block_until_ready(
            _rounded(whole, weight.contracted)
        )
        whole.delete()
    return done


def _is_quantized(x: object) -> bool:
    return isinstance(x, QuantizedWeight)


_rounded = jax.jit(rounded, static_argnames="contracted")
