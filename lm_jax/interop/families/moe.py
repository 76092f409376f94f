"""Mixtral (Jiang et al. 2024) and Qwen3-MoE (Yang et al. 2025): Mistral and Qwen3 with experts."""

import dataclasses
from collections.abc import Callable

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop.families.llama import MISTRAL, QWEN3, architectures
from lm_jax.interop.family import Family, Json, Weight, linear

_MOST_TENSORS = 100_000  # layers x experts: several times those of any model there is


def _read(hf: Json, experts: str, normalize: bool) -> Json:
    """
    Args:
      experts: the key that says how many there are.
    """
    number, layers = hf[experts], hf["num_hidden_layers"]
    if not isinstance(number, int) or not 1 <= number * layers <= _MOST_TENSORS:
        raise UserError(f"{experts} = {number!r} is no number of experts that a model has")
    return {
        "moe": {
            "experts": number,
            "experts_per_token": hf["num_experts_per_tok"],
            "normalize_weights": normalize,
        }
    }


def _write(model: ModelConfig, experts: str) -> Json:
    return {experts: model.moe.experts, "num_experts_per_tok": model.moe.experts_per_token}


def _with_experts(dense: Family, place: str, names: dict[str, str]) -> Callable:
    """The tensors of `dense` with a router, and with experts under `names` of theirs."""

    def weights(model: ModelConfig) -> list[Weight]:
        block = f"model.layers.{{}}.{place}."
        kept = [w for w in dense.weights(model) if not w.ours.startswith("blocks.mlp.")]
        router = Weight("blocks.mlp.router", block + "gate.weight", linear())
        return [*kept, router] + [
            Weight(f"blocks.mlp.{ours}", f"{block}experts.{{}}.{theirs}.weight", linear())
            for ours, theirs in names.items()
        ]

    return weights


MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    architectures=architectures("Mixtral"),
    defaults=MISTRAL.defaults
    | {"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    aliases={"num_experts": "num_local_experts"},
    read=lambda hf: MISTRAL.read(hf) | _read(hf, "num_local_experts", normalize=True),
    write=lambda model: MISTRAL.write(model) | _write(model, "num_local_experts"),
    weights=_with_experts(
        MISTRAL, "block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"}
    ),
)  # fmt: skip


def _read_qwen3(hf: Json) -> Json:
    windows: tuple[int, ...] = ()
    if hf["use_sliding_window"]:  # here of all layers
        windows = (hf["sliding_window"],) if hf["sliding_window"] else ()
    return (
        QWEN3.read(hf | {"use_sliding_window": False})
        | _read(hf, "num_experts", hf["norm_topk_prob"])
        | {"mlp_width": hf["moe_intermediate_size"], "windows": windows}
    )


def _write_qwen3(model: ModelConfig) -> Json:
    out = QWEN3.write(model)
    del out["layer_types"], out["max_window_layers"]
    return out | _write(model, "num_experts") | {
        "moe_intermediate_size": model.mlp_width,
        "intermediate_size": model.mlp_width,  # of layers without experts: there are none
        "norm_topk_prob": model.moe.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }  # fmt: skip


QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    architectures=architectures("Qwen3Moe"),
    keys={theirs: ours for theirs, ours in QWEN3.keys.items() if ours != "mlp_width"},
    defaults={k: v for k, v in QWEN3.defaults.items() if k != "head_dim"}
    | {"num_key_value_heads": 4, "sliding_window": 4096, "norm_topk_prob": False}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    aliases={"num_local_experts": "num_experts"},
    only={"decoder_sparse_step": 1, "mlp_only_layers": ([], None)},
    read=_read_qwen3,
    write=_write_qwen3,
    weights=_with_experts(
        QWEN3, "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    ),
)  # fmt: skip
