"""Rotary position embeddings (Su et al. 2021), half-split as in Llama's published weights."""

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import ModelConfig


def rope_frequencies(config: ModelConfig, windowed: bool = False) -> np.ndarray:
    """Radians a position for each pair of features: float32 [head_width / 2].

    Args:
      windowed: those of the layers with a window.
    """
    exponents = np.arange(0, config.head_width, 2, dtype=np.float64) / config.head_width
    if windowed and config.window_rope_theta is not None:
        return (config.window_rope_theta**-exponents).astype(np.float32)
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling.kind == "linear":  # Chen et al. 2023, position interpolation
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":  # Llama 3.1's reference code: stretch the slow turns only
        turns = scaling.original_length * frequencies / (2 * np.pi)
        span = scaling.high_frequency_factor - scaling.low_frequency_factor
        kept = np.clip((turns - scaling.low_frequency_factor) / span, 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rope_tables(
    config: ModelConfig, positions_BT: jax.Array, windowed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for each position: two float32 [B, T, 1, head_width / 2]."""
    angles = (
        positions_BT[:, :, None, None].astype(jnp.float32)
        * rope_frequencies(config, windowed)[None, None, None, :]
    )
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x[i], x[i + H/2]) by its position's angle, in float32."""
    cos, sin = tables
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
