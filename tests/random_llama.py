"""A published Llama of random weights, of any size, made without PyTorch and tensor by tensor."""

import json
import pathlib

import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.interop.config_map import choose_family, write_config
from lm_jax.interop.pretrained import tensors_of
from lm_jax.interop.safetensors_writer import WeightsWriter
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import skeleton_of


def llama(*, width: int, layers: int, mlp_width: int, vocab_size: int) -> ModelConfig:
    """With heads of 64 and a head of its own."""
    return ModelConfig(
        vocab_size=vocab_size,
        layers=layers,
        width=width,
        heads=width // 64,
        kv_heads=width // 64,
        head_width=64,
        mlp_width=mlp_width,
        max_length=128,
        norm="rmsnorm",
        position="rope",
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_head=False,
        family="llama",
    )


def write(folder: pathlib.Path, model: ModelConfig, dtype: str, shard_bytes: int) -> list[int]:
    """Writes it; returns the number of numbers in each tensor."""
    family, shapes = choose_family(model), {}
    for weight in family.weights(model):
        ours = params_lib.split(skeleton_of(model))[weight.ours].shape
        names, each = tensors_of(weight, ours)
        shapes |= dict.fromkeys(names.values(), weight.layout.their_shape(each))
    planned = [(name, shape, np.dtype(dtype)) for name, shape in shapes.items()]
    rng = np.random.default_rng(0)
    with WeightsWriter(folder, planned, max_shard_bytes=shard_bytes) as writer:
        for name, shape, kind in planned:
            x = rng.standard_normal(shape, np.float32)
            x *= 0.02
            writer.write(name, x.astype(kind))
    (folder / "config.json").write_text(json.dumps(write_config(family, model)))
    return [int(np.prod(shape)) for shape in shapes.values()]
