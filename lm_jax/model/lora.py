"""Low-rank adapters by name, and their sum with the weights they belong to.

'blocks.attention.query_lora.a' and '.b' are the adapter of 'blocks.attention.query'.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lm_jax.config import LoraConfig, ModelConfig
from lm_jax.model.parameters import Parameters

_A, _B = "_lora.a", "_lora.b"


def is_adapter(name: str) -> bool:
    return name.endswith((_A, _B))


def base_config(config: ModelConfig) -> ModelConfig:
    """The same model without adapters."""
    return dataclasses.replace(config, lora=LoraConfig())


def merge(config: ModelConfig, parameters: Parameters) -> tuple[ModelConfig, Parameters]:
    """The model without adapters that computes the same: each weight W becomes W + scale x A B.

    Returns:
      Its config, and its parameters, sharded as they were.
    """
    merged = {name: x for name, x in parameters.items() if not is_adapter(name)}
    scale = config.lora.alpha / max(1, config.lora.rank)

    @jax.jit
    def add(weight, a, b):
        """weight [L, *inputs, *outputs], a [L, *inputs, rank], b [L, rank, *outputs]"""
        low, out = "LDE"[: a.ndim - 1], "NH"[: b.ndim - 2]
        return weight + scale * jnp.einsum(f"{low}r,Lr{out}->{low}{out}", a, b)

    for name in [n.removesuffix(_A) for n in parameters if n.endswith(_A)]:
        merged[name] = add(merged[name], parameters[name + _A], parameters[name + _B])
    return base_config(config), merged
