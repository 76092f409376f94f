"""Adapters in the format of the peft library: adapter_config.json, adapter_model.safetensors."""

import re

import jax
import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop.config_map import choose_family
from lm_jax.interop.export import on_host, write_json
from lm_jax.interop.family import Json, Weight
from lm_jax.interop.safetensors_writer import WeightsWriter
from lm_jax.model.parameters import Parameters


def save_adapters(folder: str, model: ModelConfig, adapters: Parameters, base: str) -> None:
    """Writes low-rank adapters so that `peft.PeftModel.from_pretrained` loads them.

    Where a published model keeps several of our projections in one (GPT-2's query, key and value),
    their adapters become one of the sum of their ranks, whose B is zero off the diagonal blocks.

    Every process takes part; the first one writes.

    Args:
      model: with `model.lora` as trained.
      adapters: '….query_lora.a' [L, *inputs, rank] and '….query_lora.b' [L, rank, *outputs], on
        the mesh that is set.
      base: the published model that they belong to, for adapter_config.json.

    Raises:
      UserError: no family expresses the model, or the folder cannot be written.
    """
    if not model.lora.rank:
        raise UserError("there are no adapters: model.lora.rank = 0")
    family = choose_family(model)
    prefix = family.prefix if model.head == "none" else ""
    modules: dict[str, list[Weight]] = {}  # of the tensors, all our parameters in each
    for weight in family.weights(model):
        if weight.theirs.endswith(".weight") and weight.stacked == 1:
            name = weight.theirs.removesuffix(".weight").removeprefix(prefix)
            modules.setdefault(name, []).append(weight)
    adapted = {
        name: [w for w in weights if f"{w.ours}_lora.a" in adapters]
        for name, weights in modules.items()
    }
    adapted = {name: weights for name, weights in adapted.items() if weights}
    config = _config(model, modules, adapted, base)
    layers = range(model.layers)
    planned = {}
    for name, weights in adapted.items():
        rank = model.lora.rank * len(weights)
        inputs, outputs = _sizes(adapters, weights[0])
        for i in layers:
            theirs = "base_model.model." + name.format(i)
            planned[f"{theirs}.lora_A.weight"] = (rank, inputs)
            planned[f"{theirs}.lora_B.weight"] = (outputs * weights[0].part[1], rank)
    arrays = {name: on_host(x, (), "float32") for name, x in adapters.items()}
    if jax.process_index():
        return
    tensors = [(name, shape, np.float32) for name, shape in planned.items()]
    with WeightsWriter(folder, tensors, stem="adapter_model", max_shard_bytes=None) as writer:
        for name, weights in adapted.items():
            for i in layers:
                a, b = _joined(arrays, weights, i)
                theirs = "base_model.model." + name.format(i)
                writer.write(f"{theirs}.lora_A.weight", a)
                writer.write(f"{theirs}.lora_B.weight", b)
    write_json(folder, "adapter_config.json", config)


def _sizes(adapters: Parameters | dict[str, np.ndarray], weight: Weight) -> tuple[int, int]:
    """Inputs and outputs of one of our projections."""
    a, b = adapters[f"{weight.ours}_lora.a"], adapters[f"{weight.ours}_lora.b"]
    return int(np.prod(a.shape[1:-1])), int(np.prod(b.shape[2:]))


def _joined(
    adapters: dict[str, np.ndarray], weights: list[Weight], layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """A [ranks, inputs] and B [outputs, ranks] of one layer's projections together."""
    inputs, outputs = _sizes(adapters, weights[0])
    rows, blocks = [], []
    for k, weight in enumerate(weights):
        a = adapters[f"{weight.ours}_lora.a"][layer].reshape(inputs, -1).T
        b = adapters[f"{weight.ours}_lora.b"][layer].reshape(-1, outputs).T
        index, parts = weight.part
        rank = a.shape[0]
        block = np.zeros((outputs * parts, rank * len(weights)), np.float32)
        block[index * outputs : (index + 1) * outputs, k * rank : (k + 1) * rank] = b
        rows.append(a)
        blocks.append(block)
    return np.ascontiguousarray(np.concatenate(rows)), np.sum(blocks, axis=0)


def _config(
    model: ModelConfig,
    modules: dict[str, list[Weight]],
    adapted: dict[str, list[Weight]],
    base: str,
) -> Json:
    lora = model.lora
    last = {name: name.rpartition(".")[2] for name in modules}
    unique = all(list(last.values()).count(last[name]) == 1 for name in adapted)
    exact = "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in adapted)
    several = {last[name]: len(weights) for name, weights in adapted.items() if len(weights) > 1}
    conv1d = {weight.layout.name == "conv1d" for weights in adapted.values() for weight in weights}
    return {
        "peft_type": "LORA",
        "task_type": {"linear": "CAUSAL_LM", "none": "FEATURE_EXTRACTION"}.get(model.head),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # Last parts of names where they tell the modules apart, else an expression for all of it.
        "target_modules": sorted(last[name] for name in adapted) if unique else f"({exact})",
        "fan_in_fan_out": True in conv1d,
        "rank_pattern": {name: lora.rank * n for name, n in several.items()},
        "alpha_pattern": {name: lora.alpha * n for name, n in several.items()},
    }
