"""Model FLOPs of a training token, and the peak of the device it runs on.

Convention: 6 FLOPs for each parameter of a matrix product (2 forward, 4 backward; the head counts,
embedding look-ups, norms, biases and adapters do not), plus attention's two products, as far as a
causal mask or a window does not let them be skipped (Kaplan et al. 2020; PaLM, appendix B).
Of experts, those that a token goes to count. Rematerialization and padding do not: MFU is useful
work over peak.
"""

import math

from lm_jax.config import ModelConfig
from lm_jax.model.attention import layer_kinds

# Dense bf16 FLOP/s of one device, by a part of jax's device_kind. From the vendors' data sheets.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,  # a device is one of a chip's two cores
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,  # after the two above, whose names it is a part of
}


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters of the matrix products that a token takes part in, the head among them."""
    c = config
    attention = 2 * c.width * (c.heads + c.kv_heads) * c.head_width
    mlp = _mlp_parameters(c)
    if c.moe.experts:
        mlp = c.moe.experts_per_token * mlp + c.width * c.moe.experts  # and the router
    return c.layers * (attention + mlp) + _head_parameters(c)


def idle_parameters(config: ModelConfig) -> int:
    """Parameters of the experts that a token does not go to."""
    c = config
    unused = max(0, c.moe.experts - c.moe.experts_per_token)
    return c.layers * unused * _mlp_parameters(c)


def _mlp_parameters(c: ModelConfig) -> int:
    """Of one feed-forward, or one expert."""
    return (3 if c.gated_mlp else 2) * c.width * c.mlp_width


def _head_parameters(c: ModelConfig) -> int:
    dense = c.width**2 * (c.head == "masked_lm")
    outputs = {"none": 0, "classify": c.labels, "span": 2}.get(c.head, c.vocab_size)
    return c.width * outputs + dense


def training_flops_per_token(
    config: ModelConfig, length: int, predictions: int | None = None, frozen: float = 0
) -> float:
    """FLOPs, forward and backward, of a token in a row of `length` tokens.

    Args:
      predictions: positions of a row that the head works for; None: all.
      frozen: parameters of matrix products that need no gradient: 2 of their 6 FLOPs less.
    """
    c = config
    windows, kinds_L = layer_kinds(c)
    seen = 0.0  # keys, on average over the queries of a row, in all layers
    for kind in kinds_L:
        window = min(windows[kind] or length, length)
        seen += window - window**2 / (2 * length) if c.causal else length
    idle = _head_parameters(c) * (1 - (predictions or length) / length)
    products = 6 * (matrix_parameters(c) - idle) - 2 * frozen
    return products + 12 * c.heads * c.head_width * seen


def peak_flops(device_kind: str) -> float:
    """Dense bf16 FLOP/s of one device; nan where it is not known (a CPU, say)."""
    return next((peak for part, peak in _PEAKS.items() if part in device_kind), math.nan)
