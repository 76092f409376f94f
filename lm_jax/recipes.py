"""What the recipes in `configs/` share: choosing a variant by its name, and a small model."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError

T = TypeVar("T")


def choose(variant: str, variants: Mapping[str, T]) -> T:
    """The entry of `variants` for the ARG of `--config=FILE.py:ARG`.

    Raises:
      UserError: there is none; the message names the nearest and lists them all.
    """
    if variant in variants:
        return variants[variant]
    near = difflib.get_close_matches(variant.lower(), variants, n=1, cutoff=0.4)
    raise UserError(
        f"the recipe has no variant '{variant}'"
        + (f"; did you mean '{near[0]}'?" if near else "")
        + f" (it has {', '.join(variants)})"
    )


def prefix_lm(layers: int, width: int, heads: int, max_length: int, **fields: Any) -> ModelConfig:
    """A small model that reads what is given both ways, with Llama's norms, positions and
    feed-forward, which learn faster than GPT-2's."""
    shape = ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=8 * width // 3 // 32 * 32,
        max_length=max_length,
        prefix_attention=True,
        norm="rmsnorm",
        position="rope",
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=True,
        init_std=width**-0.5,
        dtype="float32",
        scan_layers=False,  # a few layers compile fast, and run faster in a row on CPUs
    )
    return dataclasses.replace(shape, **fields)


def encoder(layers: int, width: int, heads: int, **fields: Any) -> ModelConfig:
    """A small model that sees both sides of each token, with rotary positions and norms before each
    part, which learn faster than BERT's."""
    shape = ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        max_length=512,
        causal=False,
        norm="layernorm",
        norm_placement="pre",
        position="rope",
        activation="gelu",
        dtype="float32",
    )
    return dataclasses.replace(shape, **fields)
