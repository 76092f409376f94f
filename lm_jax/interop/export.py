"""A model as a Hugging Face folder, written one tensor at a time."""

import contextlib
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop.config_map import choose_family, write_config
from lm_jax.interop.family import Family, Json, Shape, Weight
from lm_jax.interop.pretrained import tensors_of
from lm_jax.interop.safetensors_writer import WeightsWriter
from lm_jax.model import lora
from lm_jax.model.parameters import Parameters
from lm_jax.sharding.mesh import reshard

DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5_000_000_000  # as Transformers


def save_pretrained(
    folder: str,
    model: ModelConfig,
    parameters: Parameters,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = SHARD_BYTES,
    token_ids: dict[str, int | None] | None = None,
    labels: tuple[str, ...] = (),
) -> Family:
    """Writes config.json, generation_config.json and the weights.

    Every process takes part; the first one writes. It holds one tensor at a time.

    Args:
      parameters: on the mesh that is set.
      dtype: of the weights.
      token_ids: 'bos_token_id', 'eos_token_id' and 'pad_token_id'.
      labels: the names of the classes, of a model that has them.

    Returns:
      The family.

    Raises:
      UserError: no family expresses the model, or the folder cannot be written.
      ValueError: there are adapters left; see `lm_jax.model.lora.merge`.
    """
    if any(map(lora.is_adapter, parameters)):
        raise ValueError("adapters have no place in a published model: merge them first")
    chosen = choose_family(model)
    # Said even where there is none: Transformers' own defaults are of another tokenizer.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | (token_ids or {})
    for key in ids.keys() & chosen.only.keys():
        if ids.pop(key) not in (None, chosen.only[key]):
            raise UserError(
                f"a {chosen.model_type} model has {key} = {chosen.only[key]}, and this tokenizer"
                f" has {(token_ids or {})[key]}: choose another family"
            )
    config = write_config(chosen, model, labels) | ids | {"dtype": dtype}
    tensors = _tensors(chosen, model, {name: x.shape for name, x in parameters.items()})
    if first := jax.process_index() == 0:
        planned = [(name, shape, jnp.dtype(dtype)) for name, shape, _ in tensors]
        files = WeightsWriter(folder, planned, max_shard_bytes=max_shard_bytes)
    with files if first else contextlib.nullcontext() as writer:
        for name, _, parts in tensors:
            x = [on_host(parameters[w.ours], place, _fetched(w, dtype)) for w, place in parts]
            if writer is not None:
                theirs = [w.layout.write(part) for (w, _), part in zip(parts, x)]
                theirs = [part.astype(jnp.dtype(dtype), copy=False) for part in theirs]
                writer.write(name, theirs[0] if len(x) == 1 else np.concatenate(theirs, -1))
    if first:
        write_json(folder, "config.json", config)
        if model.causal and model.head == "linear":
            write_json(folder, "generation_config.json", ids)
    return chosen


Part = tuple[Weight, tuple[int, ...]]  # a parameter, and the place on its stacked axes


def _tensors(
    family: Family, model: ModelConfig, shapes: dict[str, Shape]
) -> list[tuple[str, Shape, list[Part]]]:
    """Name, shape and the parts of each tensor, layer by layer."""
    found: dict[str, tuple[Shape, list[Part]]] = {}
    prefix = family.prefix if model.head == "none" else ""
    for weight in family.weights(model):
        if not weight.written:
            continue
        names, each = tensors_of(weight, shapes[weight.ours])
        shape = weight.layout.their_shape(each)
        whole = (*shape[:-1], shape[-1] * weight.part[1])
        for place, name in names.items():
            name = name.removeprefix(prefix)
            found.setdefault(name, (whole, []))[1].append((weight, place))
    return [(name, shape, parts) for name, (shape, parts) in found.items()]


def _fetched(weight: Weight, dtype: str) -> str:
    """A scale less one is rounded after the subtraction, or its last digits would be lost."""
    return "float32" if weight.layout.name == "plus_one" else dtype


def on_host(x: jax.Array, place: tuple[int, ...], dtype: str) -> np.ndarray:
    """What lies at a place on the first axes of a parameter, (): all of it; rounded on the device,
    so that less is moved."""
    if jax.process_count() > 1:
        return np.asarray(_part(x, place, dtype, True).addressable_data(0))
    if not place and x.dtype == dtype:
        # An array keeps the copy that numpy makes of it: this one goes, and the parameter stays.
        parts = [shard.data for shard in x.addressable_shards]
        x = jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
    else:
        x = _part(x, place, dtype, False)
    return np.asarray(x)  # put together from the devices' parts


@functools.partial(jax.jit, static_argnames=("dtype", "everywhere"))
def _part(x: jax.Array, place: tuple[jax.Array, ...], dtype: str, everywhere: bool) -> jax.Array:
    """
    Args:
      everywhere: whole on every device, and so on every host.
    """
    for i in place:
        spec = jax.typeof(x).sharding.spec
        if spec and spec[0] is not None:  # experts of one layer: whole, to take one of them out
            x = reshard(x, P(None, *spec[1:]))
        x = jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
    x = x.astype(dtype)
    return reshard(x, P(*[None] * x.ndim)) if everywhere else x


def write_json(folder: str, name: str, values: Json) -> None:
    """
    Raises:
      UserError: it cannot be written.
    """
    path = os.path.join(folder, name)
    try:
        with open(path, "w", encoding="utf-8") as f:
            f.write(json.dumps(values, indent=2, sort_keys=True) + "\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
