"""Gemma 2 and the text models of Gemma 3 (Gemma Team 2024, 2025)."""

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop.family import (
    SAME,
    Family,
    Json,
    Weight,
    decoder_head,
    linear,
    plus_one,
    read_activation,
    read_rope,
    read_windows,
    rope_of,
    write_rope,
    write_windows,
)

_KEYS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied_head",
}
_FIXED = {
    "norm": "rmsnorm",
    "norm_placement": "both",
    "position": "rope",
    "gated_mlp": True,
    "mlp_bias": False,
    "qkv_bias": False,
    "out_bias": False,
    "embedding_scale": True,
}
# What Transformers takes where config.json says nothing: Gemma 2 2B's, and Gemma 3's.
_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
}
_ONLY = {"attention_bias": False, "use_bidirectional_attention": (False, None)}


def _read(hf: Json) -> Json:
    return {
        "activation": read_activation(hf["hidden_activation"]),
        "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": hf.get("attn_logit_softcapping") or 0.0,
        "logits_softcap": hf.get("final_logit_softcapping") or 0.0,
    }


def _write(model: ModelConfig) -> Json:
    scale = model.head_width**-0.5 if model.attention_scale is None else model.attention_scale
    scalar = scale**-2
    return {
        # Transformers reads a whole number as well as a fraction.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": model.attention_softcap or None,
        "final_logit_softcapping": model.logits_softcap or None,
        "hidden_activation": {"gelu_tanh": "gelu_pytorch_tanh"}.get(
            model.activation, model.activation
        ),
        "attention_dropout": model.dropout,
        **write_windows(model),
    }


def _weights(model: ModelConfig) -> list[Weight]:
    block, norm = "model.layers.{}.", plus_one(SAME)
    out = [
        Weight("embedding", "model.embed_tokens.weight", SAME),
        Weight("blocks.attention_norm.scale", block + "input_layernorm.weight", norm),
        Weight("blocks.attention.query", block + "self_attn.q_proj.weight", linear()),
        Weight("blocks.attention.key", block + "self_attn.k_proj.weight", linear()),
        Weight("blocks.attention.value", block + "self_attn.v_proj.weight", linear()),
        Weight("blocks.attention.out", block + "self_attn.o_proj.weight", linear(2)),
        Weight("blocks.attention_out_norm.scale", block + "post_attention_layernorm.weight", norm),
        Weight("blocks.mlp_norm.scale", block + "pre_feedforward_layernorm.weight", norm),
        Weight("blocks.mlp.gate", block + "mlp.gate_proj.weight", linear()),
        Weight("blocks.mlp.up", block + "mlp.up_proj.weight", linear()),
        Weight("blocks.mlp.down", block + "mlp.down_proj.weight", linear()),
        Weight("blocks.mlp_out_norm.scale", block + "post_feedforward_layernorm.weight", norm),
        Weight("norm.scale", "model.norm.weight", norm),
        *decoder_head(model),
    ]
    if model.qk_norm:
        out += [
            Weight("blocks.attention.query_norm.scale", block + "self_attn.q_norm.weight", norm),
            Weight("blocks.attention.key_norm.scale", block + "self_attn.k_norm.weight", norm),
        ]
    return out


def _every(hf: Json, period: int) -> list[str]:
    """Where config.json lists no types: each `period`-th layer sees all."""
    return hf.get("layer_types") or [
        "sliding_attention" if (i + 1) % period else "full_attention"
        for i in range(hf["num_hidden_layers"])
    ]


GEMMA2 = Family(
    model_type="gemma2",
    architectures={
        "Gemma2ForCausalLM": "linear",
        "Gemma2ForSequenceClassification": "classify",
        "Gemma2Model": "none",
    },
    prefix="model.",
    keys=_KEYS,
    fixed=_FIXED,
    defaults=_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    only=_ONLY,
    read=lambda hf: (
        _read(hf) | read_rope(rope_of(hf)) | {"windows": read_windows(hf, _every(hf, 2))}
    ),
    write=lambda model: _write(model) | {"rope_parameters": write_rope(model)},
    weights=_weights,
)


def _read3(hf: Json) -> Json:
    if "full_attention" in (rope := hf.get("rope_parameters") or {}):
        full = rope["full_attention"] | (hf.get("rope_scaling") or {})
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise UserError(f"rope type '{local['rope_type']}' of layers with a window")
    else:
        full = rope_of({"rope_theta": 1_000_000.0} | hf)
        local = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)}
    period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    fields = {
        **_read(hf),
        **read_rope(full),
        "windows": read_windows(hf, _every(hf, period)),
        "window_rope_theta": read_rope(local)["rope_theta"],
    }
    return fields


def _write3(model: ModelConfig) -> Json:
    local = model.rope_theta if model.window_rope_theta is None else model.window_rope_theta
    return _write(model) | {
        "rope_parameters": {
            "full_attention": write_rope(model),
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        }
    }


GEMMA3 = Family(
    model_type="gemma3_text",
    architectures={
        "Gemma3ForCausalLM": "linear",
        "Gemma3TextForSequenceClassification": "classify",
        "Gemma3TextModel": "none",
    },
    prefix="model.",
    keys=_KEYS,
    fixed=_FIXED | {"qk_norm": True},
    defaults=_DEFAULTS,
    only=_ONLY | {"attn_logit_softcapping": None},  # Transformers' layers do not look at it
    read=_read3,
    write=_write3,
    weights=_weights,
)
