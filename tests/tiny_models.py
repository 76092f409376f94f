"""Tiny models of each family, and batches of packed rows for them."""

import contextlib
import copy
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm_jax.config import Config, LoraConfig, MeshConfig, ModelConfig, MoeConfig, RopeScaling
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, make_mesh
from lm_jax.training.step import skeleton_of
from lm_jax.validation import validate

V, T = 64, 16

# LLVM's optimizations are half of the time that compiling a tiny model takes, and gain nothing.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

GPT2 = ModelConfig(
    vocab_size=V,
    layers=2,
    width=32,
    heads=4,
    kv_heads=4,
    head_width=8,
    mlp_width=128,
    max_length=T,
    dtype="float32",
    init_std=0.2,
)
LLAMA = dataclasses.replace(
    GPT2,
    kv_heads=2,
    mlp_width=48,
    norm="rmsnorm",
    norm_epsilon=1e-6,
    position="rope",
    rope_theta=100.0,
    rope_scaling=RopeScaling("llama3", factor=4.0, original_length=64),
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tied_head=False,
)
BERT = dataclasses.replace(
    GPT2,
    causal=False,
    norm_placement="post",
    activation="gelu",
    token_types=2,
    pooler=True,
    head="masked_lm",
)
GEMMA = dataclasses.replace(
    LLAMA,
    layers=3,
    windows=(3, 0),
    window_rope_theta=30.0,
    norm_placement="both",
    embedding_scale=True,
    activation="gelu_tanh",
    attention_scale=0.5,
    attention_softcap=2.0,
    logits_softcap=3.0,
    tied_head=True,
)
MOE = dataclasses.replace(LLAMA, mlp_width=24, moe=MoeConfig(experts=4, experts_per_token=2))
LORA = dataclasses.replace(
    LLAMA,
    lora=LoraConfig(2, 4.0, ("query", "key", "value", "out", "up", "gate", "down")),
)


@functools.cache
def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with random parameters, none of them at a trivial value such as a bias of 0.

    Drawn by numpy: compiling the real initialization takes seconds a shape.
    """
    skeleton, rng = skeleton_of(config), np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        x = config.init_std * rng.standard_normal(shape)
        return jnp.asarray(1 + x if name.endswith("scale") else x, jnp.float32)

    parameters = {name: draw(name, x.shape) for name, x in params_lib.split(skeleton).items()}
    return params_lib.bind(skeleton, parameters)


@quick_jit
def logits(model: Transformer, ids: np.ndarray, **inputs: np.ndarray) -> jax.Array:
    """[B, T, V]; each operation by itself would take a compilation."""
    return model.logits(model(ids, **inputs)[0])


def run_config(model: ModelConfig = GPT2, rows: int = 8, **sections: dict) -> Config:
    """A validated config of a run; `sections` sets fields, as in `training={'seed': 1}`."""
    config = Config(model=copy.deepcopy(model))
    config.data.sources = ("python:",)
    config.data.length, config.data.batch_size = T, rows
    for section, fields in sections.items():
        for name, value in fields.items():
            assert hasattr(getattr(config, section), name), name
            setattr(getattr(config, section), name, value)
    return validate(config)


def on_devices(axes: tuple[int, ...]) -> Mesh:
    """A mesh of data x fsdp x tensor [x sequence [x expert]] devices, the first ones there are."""
    return make_mesh(MeshConfig(*axes), jax.devices()[: math.prod(axes)])


@contextlib.contextmanager
def placed(model, axes):
    """The model on a mesh, which is set; or as it is."""
    if axes is None:
        yield model
        return
    with jax.set_mesh(on_devices(axes)):
        shapes = params_lib.split(model)
        axes_of = params_lib.logical_axes(model)
        yield params_lib.bind(model, {
            name: jax.device_put(np.asarray(x), params_lib.parameter_spec(*axes_of[name]))
            for name, x in shapes.items()
        })  # fmt: skip


def shard(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the mesh that is set."""
    return jax.device_put(batch, activation_spec("batch"))


def packed_batch(rows: int = 8, seed: int = 0, length: int = T) -> dict[str, np.ndarray]:
    """Rows of one to three documents each, padded by unequal amounts (some rows by most of it)."""
    rng = np.random.default_rng(seed)
    batch = {k: np.zeros((rows, length), np.int32) for k in ("inputs", "targets", "segments")}
    batch |= {
        "positions": np.zeros((rows, length), np.int32),
        "weights": np.zeros((rows, length), np.float32),
    }
    for row in range(rows):
        start = 0
        for segment in range(1, 1 + rng.integers(1, 4)):
            size = min(int(rng.integers(2, length // 2)), length - start)
            here = slice(start, start + size)
            # Learnable: the next token is a function of this one, but for some noise.
            ids = np.cumsum(rng.choice([3, 3, 3, 5], size + 1)) + rng.integers(V)
            batch["inputs"][row, here], batch["targets"][row, here] = ids[:-1] % V, ids[1:] % V
            batch["segments"][row, here], batch["weights"][row, here] = segment, 1
            batch["positions"][row, here] = np.arange(size)
            start += size
    return batch
