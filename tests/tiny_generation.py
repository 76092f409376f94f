"""Tiny models, and a tokenizer whose ids are readable."""

import dataclasses

import jax
import numpy as np

from lm_jax.config import Config, ModelConfig, RopeScaling
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.model.parameters import bind, logical_axes, split
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import parameter_spec
from lm_jax.validation import validate


class LetterTokenizer(Tokenizer):
    """Ids 0 to 99 are the pieces 'aa', 'ba', ... or what `pieces` says; ids above: no text."""

    kind = "letters"

    def __init__(self, vocab_size=100, bos_id=98, eos_id=99, pieces=(), bos_before_text=None):
        table = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}".encode() for i in range(vocab_size)]
        table[: len(pieces)] = pieces
        ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": 0}
        super().__init__(table, specials={}, bos_before_text=bos_before_text, **ids)

    def encode(self, text: str) -> np.ndarray:
        pairs = [text[i : i + 2].encode() for i in range(0, len(text), 2)]
        return np.array([self._pieces.index(pair) for pair in pairs], np.int32)

    def _definition(self) -> dict[str, bytes]:
        return {}


GPT2 = ModelConfig(
    vocab_size=128, layers=2, width=32, heads=4, max_length=64, dtype="float32", init_std=0.4
)
LLAMA = dataclasses.replace(
    GPT2,
    kv_heads=2,
    mlp_width=48,
    norm="rmsnorm",
    position="rope",
    rope_scaling=RopeScaling("llama3", factor=4.0, original_length=16),
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied_head=False,
)


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    whole = Config(model=dataclasses.replace(config))
    whole.data.sources, whole.data.length = ("python:",), config.max_length
    return jax.jit(lambda key: Transformer(validate(whole).model, key))(jax.random.key(seed))


def on_mesh(model: Transformer, mesh: jax.sharding.Mesh) -> Transformer:
    with jax.set_mesh(mesh):
        shardings = {
            name: jax.sharding.NamedSharding(mesh, parameter_spec(*axes))
            for name, axes in logical_axes(model).items()
        }
        return bind(model, jax.device_put(split(model), shardings))
