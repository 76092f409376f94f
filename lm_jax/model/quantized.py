"""Weights of eight bits, with a scale for each output: what a model that learns nothing can have.

They are rounded to the nearest of 255 multiples of a scale, by which the largest of an output's
weights is 127 (absmax quantization, Dettmers et al. 2022, section 2.1). Activations stay as they
are; a product is of them and of the integers, and is scaled afterwards. What generates on one CPU
takes them as 15 bits where they are few (`lm_jax.model.kept`), which changes a hundredth of what
rounding the weights does.
"""

from collections.abc import Callable

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


def parts(p: nnx.Param | QuantizedWeight) -> tuple[nnx.Param, nnx.Param | None]:
    """A weight's numbers, and the scale that they are to be multiplied by, if there is one."""
    return (p.values, p.scale) if isinstance(p, QuantizedWeight) else (p, None)


def rounded(weight: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Integers and their scales: see `QuantizedWeight`."""
    scale = scale_of(weight, contracted)
    values = jnp.round(weight / scale).astype(jnp.int8)
    return values, jnp.squeeze(scale, contracted)


def scale_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """By which the largest number along `axes`, which stay as 1, becomes 127; nan where one of them
    is no number, which no integer could tell."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)  # of zeros any will do
    # Not left to the maximum: XLA's CPU backend passes over nan.
    return jnp.where(jnp.all(jnp.isfinite(x), axis=axes, keepdims=True), scale, jnp.nan)


def take_place(module: nnx.Module, contracted: dict[str, tuple[int, ...]]) -> None:
    """Has weights of eight bits in place of a new module's.

    Args:
      contracted: the weights' names, and which axes of each are: see `QuantizedWeight`.
    """
    for name, axes in contracted.items():
        if (p := getattr(module, name)) is not None:
            setattr(module, name, QuantizedWeight(p, axes))


def rounder(skeleton: nnx.Module) -> Callable[[str, jax.Array], Parameters]:
    """What makes of each float32 parameter what a model has in its place, some of eight bits.

    Args:
      skeleton: the model, its arrays abstract.

    Returns:
      A function of a parameter's name and the parameter, which it deletes if it is replaced.
    """
    leaves, _ = jax.tree.flatten_with_path(skeleton, is_leaf=_is_quantized)
    contracted = {
        ".".join(str(key.name) for key in path): leaf.contracted
        for path, leaf in leaves
        if _is_quantized(leaf)
    }

    def each(name: str, whole: jax.Array) -> Parameters:
        if name not in contracted:
            return {name: whole}
        values, scale = jax.block_until_ready(_rounded(whole, contracted[name]))
        whole.delete()
        return {f"{name}.values": values, f"{name}.scale": scale}

    return each


def _is_quantized(x: object) -> bool:
    return isinstance(x, QuantizedWeight)


_rounded = jax.jit(rounded, static_argnames="contracted")
