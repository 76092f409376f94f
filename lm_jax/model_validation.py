"""Checks on a model's shape, wherever it comes from: a recipe, a run, a published config.json."""

import math
from collections.abc import Iterator
from typing import Any

from lm_jax.config import ModelConfig
from lm_jax.config_keys import fits, walk
from lm_jax.errors import UserError

Check = tuple[bool, str, str]  # (holds, key, what to do)
_SHOWN = 200  # characters of a value in a message

# What projections are called in Llama's family, as users of peft know them.
_PEFT = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "up_proj": "up",
    "gate_proj": "gate",
    "down_proj": "down",
}


def validate_model(model: ModelConfig, where: str) -> ModelConfig:
    """Checks `model`, fills in its derived fields, and returns it.

    Raises:
      UserError: a line for each field that is wrong, after `where`.
    """
    wrong = mistakes(model, "model.")
    if not wrong:
        derive_model(model)
        wrong = [f"{key}: {why}" for holds, key, why in model_checks(model) if not holds]
    if wrong:
        raise UserError(f"{where}: the model is not usable:\n  " + "\n  ".join(wrong))
    return model


def mistakes(config: Any, prefix: str = "") -> list[str]:
    """A line for each field that is not of its type, or else none of its choices."""
    wrong = []
    for key, value, field in walk(config, prefix):
        if not fits(value, field.type):
            kind = field.type.__name__ if isinstance(field.type, type) else field.type
            wrong.append(f"{key}: must be {kind}, not {repr(value)[:_SHOWN]}")
        elif isinstance(value, int) and abs(value) >= 2**63:
            wrong.append(f"{key}: {repr(value)[:_SHOWN]} is too large a number")
    if wrong:
        return wrong
    for key, value, field in walk(config, prefix):
        allowed = field.metadata.get("choices")
        if allowed and value not in allowed:
            wrong.append(
                f"{key}: '{str(value)[:_SHOWN]}' is none of {', '.join(map(str, allowed))}"
            )
    return wrong


def derive_model(model: ModelConfig) -> None:
    if model.kv_heads is None:
        model.kv_heads = model.heads
    if model.head_width is None and model.heads > 0 and model.width % model.heads == 0:
        model.head_width = model.width // model.heads
    if model.mlp_width is None:
        model.mlp_width = 4 * model.width


def model_checks(model: ModelConfig) -> Iterator[Check]:
    """In an order in which earlier ones make later ones safe."""
    yield (
        model.head_width is not None or model.heads < 1,
        "model.heads",
        f"{model.heads} do not divide model.width = {model.width}: or give model.head_width",
    )
    sizes = ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "max_length")
    given = {
        name: value
        for name in (*sizes, "vocab_size")
        if (value := getattr(model, name)) is not None
    }
    for name, value in given.items():
        yield value > 0, f"model.{name}", f"must be at least 1, not {value}"
    if model.head_width is None or min(given.values()) < 1:
        return
    for key, value, _ in walk(model, "model."):
        if isinstance(value, float):
            yield math.isfinite(value), key, f"must be a finite number, not {value}"
    yield (
        model.heads % model.kv_heads == 0,
        "model.kv_heads",
        f"{model.kv_heads} does not divide model.heads = {model.heads}",
    )
    yield (
        model.position != "rope" or model.head_width % 2 == 0,
        "model.head_width",
        f"rotary positions need an even width, not {model.head_width}",
    )
    yield all(w >= 0 for w in model.windows), "model.windows", "each must be at least 0 (0: all)"
    yield (
        model.causal or not any(model.windows),
        "model.windows",
        "a window is of earlier tokens: it needs model.causal = True",
    )
    yield from _prefix_checks(model)
    yield (
        model.head not in ("none", "classify", "span") or model.tied_head,
        "model.tied_head",
        "a model without a head for its vocabulary has none of its own: leave it True",
    )
    yield (
        (model.labels >= 2) if model.head == "classify" else model.labels == 0,
        "model.labels",
        f"a head 'classify' has two classes or more, any other none, not {model.labels}",
    )
    yield (
        model.head != "span" or not model.causal,
        "model.causal",
        "must be False for a head 'span': an answer is found by what stands on both sides of it",
    )
    yield 0 <= model.dropout < 1, "model.dropout", f"must be in [0, 1), not {model.dropout}"
    above_0 = "norm_epsilon init_std rope_theta rope_scaling.factor rope_scaling.original_length"
    above_0 += " window_rope_theta attention_scale"
    from_0 = "token_types attention_softcap logits_softcap"
    for key, value, _ in walk(model):
        if value is not None and key in above_0.split():
            yield value > 0, f"model.{key}", f"must be above 0, not {value}"
        elif key in from_0.split():
            yield value >= 0, f"model.{key}", f"must be at least 0, not {value}"
    scaling = model.rope_scaling
    yield (
        scaling.high_frequency_factor > scaling.low_frequency_factor,
        "model.rope_scaling.high_frequency_factor",
        f"must be above low_frequency_factor = {scaling.low_frequency_factor}",
    )
    yield from _expert_checks(model)
    yield from _adapter_checks(model)


def _prefix_checks(model: ModelConfig) -> Iterator[Check]:
    if not model.prefix_attention:
        return
    yield (
        model.causal,
        "model.prefix_attention",
        "the tokens after a prefix see earlier ones only: it needs model.causal = True (and"
        " data.objective 'next_token')",
    )
    yield not any(model.windows), "model.windows", "prefix attention has none: leave it ()"
    yield (
        model.attention in ("auto", "xla", "tiled"),
        "model.attention",
        f"'{model.attention}' cannot do model.prefix_attention: use auto",
    )


def _expert_checks(model: ModelConfig) -> Iterator[Check]:
    experts, chosen = model.moe.experts, model.moe.experts_per_token
    yield experts >= 0, "model.moe.experts", f"must be at least 0 (0: none), not {experts}"
    if experts <= 0:
        return
    yield (
        1 <= chosen <= experts,
        "model.moe.experts_per_token",
        f"must be from 1 to model.moe.experts = {experts}, not {chosen}",
    )
    yield not model.mlp_bias, "model.mlp_bias", "experts have no biases: set it to False"
    yield not model.float8, "model.float8", "experts have no products of 8-bit floats: leave it out"


def _adapter_checks(model: ModelConfig) -> Iterator[Check]:
    lora = model.lora
    yield lora.rank >= 0, "model.lora.rank", f"must be at least 0 (0: none), not {lora.rank}"
    if lora.rank <= 0:
        return
    yield lora.alpha > 0, "model.lora.alpha", f"must be above 0, not {lora.alpha}"
    gate = ("gate",) if model.gated_mlp else ()
    places = ("query", "key", "value", "out", "up", *gate, "down")
    if model.moe.experts:  # a routed product has no adapters
        yield (
            not {"up", "gate", "down", "all"} & set(lora.targets),
            "model.lora.targets",
            "experts have no adapters: name some of query, key, value, out",
        )
        places, gate = places[:4], ()
    if lora.targets == ("all",):
        return
    wrong = [name for name in lora.targets if name not in places]
    meant = [_PEFT[name] for name in wrong if name in _PEFT]
    yield (
        bool(lora.targets) and not wrong and len(set(lora.targets)) == len(lora.targets),
        "model.lora.targets",
        (f"'{wrong[0]}' is no projection of this model" if wrong else f"{lora.targets}")
        + (f" (it is called '{meant[0]}' here)" if meant else "")
        + f": name each once, of {', '.join(places)}; or all of them by 'all'",
    )
