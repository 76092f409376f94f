"""Gathers whose gradients are scattered, and scatters.

The type of an array says along which mesh axes its gradient is still to be summed: such an axis is
`reduced` in the array's sharding, and `unreduced` in its gradient's.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm_jax.sharding.mesh import names_in, reshard


def gather(x: jax.Array, wanted: P | None, summed: tuple[str, ...]) -> jax.Array:
    """`x` with fewer of its axes split, to be multiplied with what is split over `summed`.

    As `reshard`, but for the gradient, to which each device along the mesh axes `summed` adds a
    part: the sums are scattered as they are added. Left to the compiler, every device gets all of
    every sum (twice the traffic, and a whole gradient in memory), and throws most of it away.

    Sums over devices are of the dtype of `x`: bfloat16 for weights that are used in it, as is what
    each device adds.
    """
    if wanted is None:
        return x
    held = jax.typeof(x).sharding.spec
    # Along other mesh axes gradients are alike: nothing to add.
    alike = P(*(
        tuple(name for name in names_in(h) if name in (*names_in(w), *summed)) or None
        for h, w in zip(held.partitions, wanted.partitions)
    ))  # fmt: skip
    x = reshard(x, alike)
    return _gather(alike, wanted, summed, x) if summed else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(held: P, wanted: P, summed: tuple[str, ...], x: jax.Array) -> jax.Array:
    return jax.sharding.reshard(x, wanted.update(reduced=set(summed)))


def _gather_forward(held, wanted, summed, x):
    return _gather(held, wanted, summed, x), None


def _gather_backward(held, wanted, summed, _, parts):
    return (scatter(parts, wanted.update(unreduced=set(summed)), held),)


_gather.defvjp(_gather_forward, _gather_backward)


def gradient_spec(x: jax.Array) -> P | None:
    """The sharding of the gradient of `x`; None outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(x).sharding.spec
    return spec.update(reduced=spec.unreduced, unreduced=spec.reduced)


def scatter(parts: jax.Array, spec: P, wanted: P) -> jax.Array:
    """The sums of what devices hold parts of, each sum where it belongs.

    Args:
      spec: the sharding of `parts`, with `unreduced` the mesh axes to sum over.
      wanted: the same with some of these splitting array axes.
    """
    here = [
        tuple(name for name in names_in(w) if name not in names_in(s))
        for s, w in zip(spec.partitions, wanted.partitions)
    ]
    rest = tuple(n for n in spec.unreduced if all(n not in names for names in here))

    def local(x):
        for axis, names in enumerate(here):
            if names:
                x = _scatter(x, names, axis)
        return jax.lax.psum(x, rest) if rest else x

    return jax.shard_map(local, in_specs=spec, out_specs=wanted)(parts)


def _scatter(x: jax.Array, names: tuple[str, ...], axis: int) -> jax.Array:
    """A reduce-scatter. The compiler for TPUs makes an all-reduce of one of large float32 arrays,
    unless it is along an axis of its own; which would cost others a copy."""
    if x.dtype != jnp.float32:
        return jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)
    parts = math.prod(jax.lax.axis_size(name) for name in names)
    x = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jax.lax.psum_scatter(x, names, scatter_dimension=axis)
