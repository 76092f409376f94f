"""Products of 8-bit floats: what training a block's products in them does to their operands.

Activations and weights are rounded to e4m3, gradients to e5m2, which has more exponents
(Micikevicius et al. 2022). Each tensor is scaled by a power of two, so that its largest number
fits: by what it holds now, so that no history of earlier steps has to be kept and saved. Sums are
of the dtype that they always are.

A product of two arrays that were converted from 8-bit floats and scaled is what XLA recognizes, and
computes by the 8-bit units of a GPU that has them. Elsewhere the same numbers come out, and slower.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm_jax.sharding.mesh import reshard

_FROM = (8, 9)  # NVIDIA's Ada, and Hopper after it


def multiplies_float8(device: jax.Device) -> bool:
    """Whether XLA has units for it there. Of TPUs, it makes no use of such as there are."""
    if device.platform != "gpu":
        return False
    capability = str(getattr(device, "compute_capability", "0.0"))
    return tuple(map(int, capability.split("."))) >= _FROM


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x`, in its own dtype, each number as the nearest that `dtype` has, times one scale.

    Args:
      dtype: of 8 bits.
    """
    largest = jnp.max(jnp.abs(_as_it_is(x))).astype(jnp.float32)
    _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    scale = jnp.ldexp(jnp.float32(1), exponent).astype(x.dtype)  # 1 where `x` is 0
    return (x / scale).astype(dtype).astype(x.dtype) * scale


def _as_it_is(x: jax.Array) -> jax.Array:
    """`x`, whose type says nothing of a gradient that is to be summed over devices: `jnp.max` takes
    no other."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return reshard(x, P(*jax.typeof(x).sharding.spec.partitions))


@jax.custom_vjp
def operand(x: jax.Array) -> jax.Array:
    """An operand of a product in the forward pass; its gradient is left as it is."""
    return rounded(x, jnp.float8_e4m3fn)


operand.defvjp(lambda x: (operand(x), None), lambda _, d_x: (d_x,))


@jax.custom_vjp
def result(y: jax.Array) -> jax.Array:
    """A product, whose gradient is an operand of two others in the backward pass."""
    return y


result.defvjp(lambda y: (y, None), lambda _, d_y: (rounded(d_y, jnp.float8_e5m2),))
