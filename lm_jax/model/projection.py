"""Products with weights, with a bias and a low-rank adapter where there are such."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lm_jax.config import LoraConfig
from lm_jax.model.float8 import multiplied
from lm_jax.model.kept import KeptWeight
from lm_jax.model.parameters import constant, normal, use
from lm_jax.model.quantized import QuantizedWeight
from lm_jax.sharding.gather import gather, scatter
from lm_jax.sharding.mesh import activation_spec, names_in, parameter_spec, platform, shards

_SUMS = "product"  # of what devices have parts of, by its name for rematerialization


def saves_products(policy: Callable[..., bool]) -> Callable[..., bool]:
    """A policy of `jax.checkpoint` that keeps the products that `policy` does: of those of which
    each device has a part, the sum, which is smaller and, unlike the parts, can be stacked."""
    save_sums = jax.checkpoint_policies.save_only_these_names(_SUMS)

    def save(primitive, *inputs, **params) -> bool:
        if (sharding := params.get("out_sharding")) is not None and sharding.spec.unreduced:
            return False
        return policy(primitive, *inputs, **params) or save_sums(primitive, *inputs, **params)

    return save


class Lora(nnx.Module):
    """A low-rank adapter of a weight (Hu et al. 2021): adds `scale` times x A B to its product.

    A is [input axes, rank], drawn with the variance that peft's default has; B is [rank, output
    axes] and starts at zero, and with it what the adapter adds.
    """

    def __init__(self, config: LoraConfig, key: jax.Array, p: nnx.Param, inputs: int):
        """Args:
        p: the weight; its first `inputs` axes are contracted.
        """
        self.scale = config.alpha / config.rank
        shape, std = p.get_value().shape, (3 * math.prod(p.get_value().shape[:inputs])) ** -0.5
        self.a = normal(key, (*shape[:inputs], config.rank), std, *p.axes[:inputs], "rank")
        self.b = constant(0.0, (config.rank, *shape[inputs:]), "rank", *p.axes[inputs:])


def project(
    x: jax.Array,
    p: nnx.Param | KeptWeight | QuantizedWeight,
    bias: nnx.Param | None,
    *axes: str | None,
    lora: Lora | None = None,
    float8: bool = False,
) -> jax.Array:
    """The product of the last axes of `x` with the first of a weight, plus a bias and what an
    adapter adds, where there are such.

    Args:
      x: activations; as many leading axes remain as `axes` names before the weight's own.
      axes: logical axes of the result; None: whole.
      float8: as `model.float8`, but for what the adapter adds.
    """
    if isinstance(p, KeptWeight):
        y = p.product(x, *axes)
    elif isinstance(p, QuantizedWeight):
        y = _product(x, p.values, *axes, dtype=jnp.float32)
        y = (y * _spread(p.scale, y)).astype(x.dtype)
    else:
        y = _product(x, p, *axes, float8=float8)
    y = plus(y, bias)
    if lora is not None:
        contracted = lora.a.get_value().ndim - 1
        low = project(x, lora.a, None, *axes[: x.ndim - contracted], "rank")
        y = y + lora.scale * project(low, lora.b, None, *axes)
    return y


def _product(
    x: jax.Array,
    p: nnx.Param,
    *axes: str | None,
    dtype: jnp.dtype | None = None,
    float8: bool = False,
) -> jax.Array:
    shape = p.get_value().shape
    contracted = (x.ndim + len(shape) - len(axes)) // 2
    merged = p.axes[-len(shape)], p.axes[contracted]  # how the merged axes are sharded
    weight_KO = jax.lax.reshape(
        p.get_value().astype(x.dtype),
        (math.prod(shape[:contracted]), math.prod(shape[contracted:])),
        out_sharding=parameter_spec(*merged),
    )
    weight_KO = gather(weight_KO, activation_spec(*merged), names_in(rows_of(x)))

    def multiply(x: jax.Array, weight_KO: jax.Array) -> jax.Array:
        return product(x, weight_KO, merged, shape[contracted:], *axes, dtype=dtype)

    return multiplied(multiply, x, weight_KO) if float8 else multiply(x, weight_KO)


def product(
    x: jax.Array,
    weight_KO: jax.Array,
    merged: tuple[str, str],
    last: tuple[int, ...],
    *axes: str | None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """The product of the last axes of `x`, merged into one of K, with a matrix; O becomes `last`.

    On CPUs, batch and length are merged too: XLA takes a third longer there for the gradient of an
    einsum over unmerged axes (6.3 against 7.9 ms for 2048 x 256 x 256 and back). On TPUs it would
    cost copies between layouts; and rows that are split over devices cannot be merged.

    Args:
      merged: logical axes of K and of O.
      axes: logical axes of the result.
      dtype: of the result; None: of the inputs.
    """
    (B, T), K = x.shape[:2], weight_KO.shape[0]
    (inner, outer), rows, spec = merged, rows_of(x), activation_spec(*axes)
    if platform() == "cpu" and shards(axes[1]) == 1:
        y = jnp.einsum(
            "MK,KO->MO",
            _merged(x, (B * T, K), activation_spec("batch", inner)),
            weight_KO,
            preferred_element_type=dtype,
            out_sharding=activation_spec("batch", outer),
        )
        return jax.lax.reshape(y, (B, T, *last), out_sharding=spec)
    product = functools.partial(
        jnp.einsum,
        "BTK,KO->BTO",
        _merged(x, (B, T, K), rows and P(*rows, *activation_spec(inner))),
        weight_KO,
        preferred_element_type=dtype,
    )
    wanted = activation_spec(*axes[:2], outer)
    # Where the result is split further, it is by devices that each have a part of the sum.
    summed = {*names_in(wanted)} & {*names_in(activation_spec(inner))} - {*names_in(rows)}
    if summed:
        here = P(*rows, wanted[2], unreduced=summed)
        # What a block keeps of this product are the sums: see `saves_products`.
        y = checkpoint_name(scatter(product(out_sharding=here), here, wanted), _SUMS)
    else:
        y = product(out_sharding=wanted)
    return jax.lax.reshape(y, (B, T, *last), out_sharding=spec)


def _merged(x: jax.Array, shape: tuple[int, ...], spec: P | None) -> jax.Array:
    if spec is not None:
        spec = spec.update(reduced=jax.typeof(x).sharding.spec.reduced)
    return jax.lax.reshape(x, shape, out_sharding=spec)


def rows_of(x: jax.Array) -> P | None:
    """How batch and length of activations are split; None outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else P(*jax.typeof(x).sharding.spec.partitions[:2])


def plus(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`x` with a bias, if there is one, over its last axes."""
    if bias is None:
        return x
    return x + _spread(bias, x)


def _spread(p: nnx.Param, x: jax.Array) -> jax.Array:
    """A parameter of the last axes of `x`, to be added to it or multiplied by."""
    return use(p, x.dtype)[(None,) * (x.ndim - len(p.axes))]
