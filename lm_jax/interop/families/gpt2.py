"""GPT-2 and DistilGPT-2 (Radford et al. 2019)."""

from lm_jax.config import ModelConfig
from lm_jax.interop.family import (
    FLAT,
    SAME,
    Family,
    Json,
    Weight,
    conv1d,
    decoder_head,
    read_activation,
    write_activation,
)


def _read(hf: Json) -> Json:
    return {
        "mlp_width": hf["n_inner"] or 4 * hf["n_embd"],
        "activation": read_activation(hf["activation_function"]),
    }


def _write(model: ModelConfig) -> Json:
    return {
        "n_inner": model.mlp_width,
        "activation_function": write_activation(model.activation),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }


def _weights(model: ModelConfig) -> list[Weight]:
    block = "transformer.h.{}."
    qkv = [
        Weight(f"blocks.attention.{name}{end}", f"{block}attn.c_attn.{kind}", layout, (i, 3))
        for end, kind, layout in (("", "weight", conv1d()), ("_bias", "bias", FLAT))
        for i, name in enumerate(("query", "key", "value"))
    ]
    return [
        Weight("embedding", "transformer.wte.weight", SAME),
        Weight("position_embedding", "transformer.wpe.weight", SAME),
        Weight("blocks.attention_norm.scale", block + "ln_1.weight", SAME),
        Weight("blocks.attention_norm.bias", block + "ln_1.bias", SAME),
        *qkv,
        Weight("blocks.attention.out", block + "attn.c_proj.weight", conv1d(2)),
        Weight("blocks.attention.out_bias", block + "attn.c_proj.bias", SAME),
        Weight("blocks.mlp_norm.scale", block + "ln_2.weight", SAME),
        Weight("blocks.mlp_norm.bias", block + "ln_2.bias", SAME),
        Weight("blocks.mlp.up", block + "mlp.c_fc.weight", conv1d()),
        Weight("blocks.mlp.up_bias", block + "mlp.c_fc.bias", SAME),
        Weight("blocks.mlp.down", block + "mlp.c_proj.weight", conv1d()),
        Weight("blocks.mlp.down_bias", block + "mlp.c_proj.bias", SAME),
        Weight("norm.scale", "transformer.ln_f.weight", SAME),
        Weight("norm.bias", "transformer.ln_f.bias", SAME),
        *decoder_head(model),
    ]


GPT2 = Family(
    model_type="gpt2",
    architectures={
        "GPT2LMHeadModel": "linear",
        "GPT2ForSequenceClassification": "classify",
        "GPT2Model": "none",
    },
    prefix="transformer.",
    keys={
        "vocab_size": "vocab_size",
        "n_layer": "layers",
        "n_embd": "width",
        "n_head": "heads",
        "n_positions": "max_length",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tied_head",
    },
    fixed={},  # the defaults are GPT-2's
    defaults={
        "vocab_size": 50257,
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    aliases={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    read=_read,
    write=_write,
    weights=_weights,
    ignored=(".attn.bias", ".attn.masked_bias"),
)
