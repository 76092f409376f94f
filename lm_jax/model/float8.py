"""Products of 8-bit floats: what training a block's products in them does to their operands.

Activations and weights are rounded to e4m3, gradients to e5m2, which has more exponents
(Micikevicius et al. 2022). Each tensor is scaled by a power of two, so that its largest number
fits: by what it holds now, so that no history of earlier steps has to be kept and saved. Sums are
of the dtype that they always are.

A product of two arrays that were converted from 8-bit floats and scaled is what XLA recognizes, and
computes by the 8-bit units of a GPU that has them. Elsewhere the same numbers come out, and slower.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm_jax.config import ModelConfig
from lm_jax.sharding.mesh import reshard

_FROM = (8, 9)  # NVIDIA's Ada, and Hopper after it


def trained(config: ModelConfig) -> ModelConfig:
    """The same model for its use: what it has learned is computed with as it is."""
    return dataclasses.replace(config, float8=False)


def multiplies_float8(device: jax.Device) -> bool:
    """Whether XLA has units for it there. Of TPUs, it makes no use of such as there are."""
    if device.platform != "gpu":
        return False
    # AMD's say what they are in another way.
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return capability is not None and tuple(map(int, capability.groups())) >= _FROM


class Rounded(NamedTuple):
    """An array of 8-bit floats, and the power of two by which they are to be multiplied."""

    narrow: jax.Array
    scale: jax.Array  # of the dtype that was rounded

    @classmethod
    def of(cls, x: jax.Array, dtype: jnp.dtype) -> "Rounded":
        """The nearest to each number that `dtype` has, times one scale.

        Args:
          dtype: of 8 bits.
        """
        largest = jnp.max(jnp.abs(_as_it_is(x))).astype(jnp.float32)
        _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
        scale = jnp.ldexp(jnp.float32(1), exponent).astype(x.dtype)  # 1 where `x` is 0
        return cls((x / scale).astype(dtype), scale)

    def wide(self) -> jax.Array:
        return self.narrow.astype(self.scale.dtype) * self.scale


def _as_it_is(x: jax.Array) -> jax.Array:
    """`x`, whose type says nothing of a gradient that is to be summed over devices: `jnp.max` takes
    no other."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return reshard(x, P(*jax.typeof(x).sharding.spec.partitions))


Product = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiplied(product: Product, x: jax.Array, weight: jax.Array) -> jax.Array:
    """What `product` gives for both, rounded to e4m3. Its gradients are products of the same
    numbers and of the gradient of what it gives, rounded to e5m2.

    The backward pass is handed 8-bit floats, a half of the memory: XLA recognizes a product by the
    conversion of both of its operands, and sees none that was made in another loop.
    """
    return _forward(product, x, weight)[0]


def _forward(product: Product, x: jax.Array, weight: jax.Array):
    operands = Rounded.of(x, jnp.float8_e4m3fn), Rounded.of(weight, jnp.float8_e4m3fn)
    return product(*(operand.wide() for operand in operands)), operands


def _backward(product: Product, operands: tuple[Rounded, Rounded], d_y: jax.Array):
    _, gradients = jax.vjp(product, *(operand.wide() for operand in operands))
    return gradients(Rounded.of(d_y, jnp.float8_e5m2).wide())


multiplied.defvjp(_forward, _backward)
