"""Parameters: declared on one line with shape, initializer and axes; a module or a flat dict.

Modules hold `nnx.Param`s. Everything outside of the model (gradients, optimizer, checkpoints) sees
a flat dict, dotted name -> array, such as 'blocks.attention.query'. `split` and `bind` go from one
to the other and back.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.sharding.mesh import activation_spec, parameter_spec, reshard

Parameters = dict[str, jax.Array]


def normal(key: jax.Array, shape: tuple[int, ...], std: float, *axes: str) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), with the logical axes that shard it."""
    value = jax.random.normal(key, shape, jnp.float32, out_sharding=parameter_spec(*axes))
    return nnx.Param(std * value, axes=axes)


def constant(value: float, shape: tuple[int, ...], *axes: str) -> nnx.Param:
    """A float32 parameter that starts as one number."""
    full = jnp.full(shape, value, jnp.float32, out_sharding=parameter_spec(*axes))
    return nnx.Param(full, axes=axes)


def use(p: nnx.Param, dtype: str) -> jax.Array:
    """A parameter as a layer computes with it: cast first, so that half the bytes are gathered."""
    return reshard(p.get_value().astype(dtype), activation_spec(*p.axes))


def _leaves(model: nnx.Module) -> dict[str, nnx.Param]:
    """Dotted name -> parameter, in the order in which `jax.tree.leaves` gives their arrays."""
    leaves, _ = jax.tree.flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Param))
    return {".".join(str(k.name) for k in path): p for path, p in leaves}


def unchanged(name: str, parameter: jax.Array) -> Parameters:
    """What loading makes of a parameter, if nothing else is asked for."""
    return {name: parameter}


def split(model: nnx.Module) -> Parameters:
    """The parameters of `model` by name."""
    return {name: p.get_value() for name, p in _leaves(model).items()}


def bind(skeleton: nnx.Module, parameters: Parameters) -> nnx.Module:
    """The module shaped like `skeleton` (its arrays may be abstract) that holds `parameters`."""
    return jax.tree.unflatten(
        jax.tree.structure(skeleton), [parameters[name] for name in _leaves(skeleton)]
    )


def logical_axes(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Name -> one logical axis for each array axis; stacked parameters begin with 'layers'."""
    return {
        name: p.axes if p.get_value().ndim == len(p.axes) else ("layers", *p.axes)
        for name, p in _leaves(model).items()
    }
