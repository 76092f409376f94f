"""Llama 2 and 3, SmolLM2 (Touvron et al. 2023), Mistral, Qwen2, Qwen2.5 and Qwen3.

One architecture: they differ in biases, in norms of queries and keys, and in windows.
"""

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop.family import (
    FLAT,
    SAME,
    Family,
    Json,
    Weight,
    decoder_head,
    linear,
    read_activation,
    read_rope,
    read_windows,
    rope_of,
    write_activation,
    write_rope,
    write_windows,
)

_KEYS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied_head",
}
_FIXED = {"norm": "rmsnorm", "position": "rope", "gated_mlp": True, "mlp_bias": False}
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}


def _read(hf: Json) -> Json:
    heads = hf["num_attention_heads"]
    return {
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_width": hf.get("head_dim") or hf["hidden_size"] // heads,
        "activation": read_activation(hf["hidden_act"]),
        **read_rope(rope_of(hf)),
    }


def _write(model: ModelConfig) -> Json:
    return {
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": write_activation(model.activation),
        "rope_parameters": write_rope(model),
        "attention_dropout": model.dropout,
    }


def _weights(model: ModelConfig) -> list[Weight]:
    block = "model.layers.{}."
    projections = {"query": "q", "key": "k", "value": "v"}
    out = [
        Weight("embedding", "model.embed_tokens.weight", SAME),
        Weight("blocks.attention_norm.scale", block + "input_layernorm.weight", SAME),
    ]
    for ours, letter in projections.items():
        theirs = f"{block}self_attn.{letter}_proj"
        out.append(Weight(f"blocks.attention.{ours}", theirs + ".weight", linear()))
        if model.qkv_bias:
            out.append(Weight(f"blocks.attention.{ours}_bias", theirs + ".bias", FLAT))
    out.append(Weight("blocks.attention.out", block + "self_attn.o_proj.weight", linear(2)))
    if model.out_bias:
        out.append(Weight("blocks.attention.out_bias", block + "self_attn.o_proj.bias", SAME))
    if model.qk_norm:
        for ours, letter in (("query", "q"), ("key", "k")):
            theirs = f"{block}self_attn.{letter}_norm.weight"
            out.append(Weight(f"blocks.attention.{ours}_norm.scale", theirs, SAME))
    out.append(Weight("blocks.mlp_norm.scale", block + "post_attention_layernorm.weight", SAME))
    for ours in ("gate", "up", "down"):
        out.append(Weight(f"blocks.mlp.{ours}", f"{block}mlp.{ours}_proj.weight", linear()))
        if model.mlp_bias:
            theirs = f"{block}mlp.{ours}_proj.bias"
            out.append(Weight(f"blocks.mlp.{ours}_bias", theirs, SAME))
    out.append(Weight("norm.scale", "model.norm.weight", SAME))
    return out + decoder_head(model)


def _read_llama(hf: Json) -> Json:
    bias = hf["attention_bias"]
    return _read(hf) | {"qkv_bias": bias, "out_bias": bias}


def _write_llama(model: ModelConfig) -> Json:
    return _write(model) | {"attention_bias": model.qkv_bias}


def architectures(name: str) -> dict[str, str]:
    return {
        f"{name}ForCausalLM": "linear",
        f"{name}ForSequenceClassification": "classify",
        f"{name}Model": "none",
    }


LLAMA = Family(
    model_type="llama",
    architectures=architectures("Llama"),
    prefix="model.",
    keys=_KEYS | {"mlp_bias": "mlp_bias"},
    fixed={k: v for k, v in _FIXED.items() if k != "mlp_bias"},
    defaults=_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    read=_read_llama,
    write=_write_llama,
    weights=_weights,
    ignored=("rotary_emb.inv_freq",),
)

MISTRAL = Family(
    model_type="mistral",
    architectures=architectures("Mistral"),
    prefix="model.",
    keys=_KEYS,
    fixed=_FIXED | {"qkv_bias": False, "out_bias": False},
    defaults=_DEFAULTS | {"sliding_window": 4096},
    read=lambda hf: (
        _read(hf) | {"windows": (hf["sliding_window"],) if hf["sliding_window"] else ()}
    ),
    write=lambda model: _write(model) | {"sliding_window": max(model.windows, default=0) or None},
    weights=_weights,
    ignored=("rotary_emb.inv_freq",),
)


def _qwen_windows(hf: Json) -> tuple[int, ...]:
    if not hf["use_sliding_window"]:
        return ()
    types = hf.get("layer_types")
    if types is None:  # the first layers see all
        first, layers = hf["max_window_layers"], hf["num_hidden_layers"]
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not hf.get("sliding_window"):
        raise UserError("use_sliding_window is on, and sliding_window gives no size")
    return read_windows(hf, types)


def _write_qwen(model: ModelConfig) -> Json:
    windows = write_windows(model)
    first = windows["layer_types"] + ["sliding_attention"]
    return _write(model) | {
        **windows,
        "use_sliding_window": bool(model.windows),
        "max_window_layers": first.index("sliding_attention"),
    }


QWEN2 = Family(
    model_type="qwen2",
    architectures=architectures("Qwen2"),
    prefix="model.",
    keys=_KEYS,
    fixed=_FIXED | {"qkv_bias": True, "out_bias": False},
    defaults=_DEFAULTS | {"use_sliding_window": False, "max_window_layers": 28},
    read=lambda hf: _read(hf) | {"windows": _qwen_windows(hf)},
    write=_write_qwen,
    weights=_weights,
    ignored=("rotary_emb.inv_freq",),
)

QWEN3 = Family(
    model_type="qwen3",
    architectures=architectures("Qwen3"),
    prefix="model.",
    keys=_KEYS,
    fixed=_FIXED | {"qk_norm": True},
    defaults=_DEFAULTS
    | {"use_sliding_window": False, "max_window_layers": 28, "head_dim": 128}
    | {"attention_bias": False},
    read=lambda hf: _read_llama(hf) | {"windows": _qwen_windows(hf)},
    write=lambda model: _write_qwen(model) | {"attention_bias": model.qkv_bias},
    weights=_weights,
)
