"""Runs to published folders and back."""

import dataclasses
import math
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.interop import verify
from lm_jax.interop.config_map import choose_family, write_config
from lm_jax.interop.export import SHARD_BYTES, save_pretrained
from lm_jax.interop.peft import save_adapters
from lm_jax.interop.tokenizer_export import write_huggingface_tokenizer
from lm_jax.interop.verify import Comparison
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training import weights
from lm_jax.training import workdir as workdir_lib
from lm_jax.training.checkpoint import Checkpoints
from lm_jax.training.inference import Loaded, load_for_inference
from lm_jax.training.published import padding_of
from lm_jax.training.weights import Source


def load(path: str, step: int | None = None) -> Loaded:
    """The model at `path` in float32, its parameters shared out over all devices."""
    mesh = _mesh_for(weights.model_of(path))
    return load_for_inference(path, mesh, step, "float32")


def _mesh_for(model: ModelConfig) -> jax.sharding.Mesh:
    """All devices, over as many of which as possible the parameters are shared out."""
    return make_mesh(MeshConfig(data=-1, fsdp=math.gcd(model.width, jax.device_count())))


def to_huggingface(
    loaded: Loaded,
    output: str,
    *,
    family: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = SHARD_BYTES,
) -> tuple[str, str | None]:
    """Writes a folder that Transformers loads.

    Args:
      family: its model_type; None: that it was read from, or the first that has this shape.

    Returns:
      The family, and why there is no tokenizer in the folder, where there is none.

    Raises:
      UserError: no family has such a model, or the folder is not free.
    """
    _check_free(output)
    config, tokenizer = loaded.model.config, loaded.tokenizer
    if family is not None:
        config = dataclasses.replace(config, family=family)
    ids = _token_ids(tokenizer)
    if classify := config.head == "classify":
        _check_classifier(config, loaded.config.data)
        if config.causal:
            ids["pad_token_id"] = padding_of(tokenizer)
    with jax.set_mesh(_mesh_of(loaded.model)):
        chosen = save_pretrained(
            output,
            config,
            params_lib.split(loaded.model),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            token_ids=ids,
            labels=loaded.config.data.labels,
        )
    missing = None
    if jax.process_index() == 0:
        try:
            write_huggingface_tokenizer(
                tokenizer,
                output,
                config.max_length,
                whole_texts=config.head in ("classify", "span"),
                pad_id=ids["pad_token_id"] if classify and config.causal else None,
                objective=loaded.config.data.objective,
            )
        except UserError as e:
            missing = str(e)
    return chosen.model_type, missing


def _check_classifier(model: ModelConfig, data: DataConfig) -> None:
    """
    Raises:
      UserError: it computes what no published classifier does.
    """
    if data.pooling != (wanted := "last" if model.causal else "first"):
        raise UserError(
            f"published classifiers of this kind tell the class by the {wanted} token, and this one"
            f" by data.pooling = '{data.pooling}': train it with '{wanted}'"
        )
    if model.causal:
        return
    pooled = dataclasses.replace(model, pooler=True)
    write_config(choose_family(pooled), pooled)  # what keeps it from a family whatever it pools
    if not model.pooler:
        raise UserError(
            "published classifiers of both directions have a dense layer and tanh before the"
            " classes, and this model has none: train it with model.pooler = True"
        )


def to_workdir(loaded: Loaded, workdir: str) -> None:
    """Writes a published model as the workdir of a run of no steps.

    Raises:
      UserError: the folder is not free.
    """
    _check_free(workdir)
    config = Config(model=loaded.config.model, data=loaded.config.data)
    config.tokenizer, config.training.steps = loaded.config.tokenizer, 0
    config.init_from = loaded.source.path
    workdir_lib.check(workdir, config)
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        checkpoints.save_parameters(0, params_lib.split(loaded.model))
    if jax.process_index() == 0:
        workdir_lib.settle(workdir, config, loaded.tokenizer)


def to_peft(workdir: str, output: str, step: int | None = None) -> str:
    """Writes a run's adapters as peft has them; returns the path of the model they belong to.

    Raises:
      UserError: the run has none, or they belong to no published model, or the folder is not free.
    """
    _check_free(output)
    model = workdir_lib.read_config(workdir).model
    if not model.lora.rank:
        raise UserError(f"'{workdir}' holds no adapters: it was trained with model.lora.rank = 0")
    base: Source = weights.pinned(workdir)
    if base.step is not None:
        raise UserError(
            f"the adapters in '{workdir}' belong to the weights of the run {base}, and peft loads"
            " adapters of published models: export them merged, with --to=huggingface"
        )
    mesh = _mesh_for(model)
    adapters = weights.load_saved(weights.find(workdir, step), model, mesh)
    with jax.set_mesh(mesh):
        save_adapters(output, model, adapters, base.path)
    return base.path


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _mesh_of(model: Transformer) -> jax.sharding.Mesh:
    return model.embedding.get_value().sharding.mesh


def _check_free(folder: str) -> None:
    """Raises in every process or in none, before any of them makes it."""
    taken = os.path.exists(folder) and (not os.path.isdir(folder) or bool(os.listdir(folder)))
    if jax.process_count() > 1:
        taken = bool(multihost_utils.broadcast_one_to_all(np.array(taken)))
    if taken:
        raise UserError(f"--output: '{folder}' is there already: name a new folder")


def compare(loaded: Loaded, folder: str) -> Comparison:
    """The loaded model against the published folder in Transformers; see `interop.verify`.

    Raises:
      UserError: there are several processes, or Transformers cannot be had.
    """
    if jax.process_count() > 1:
        raise UserError("--verify runs in one process: verify what was written afterwards")
    with jax.set_mesh(_mesh_of(loaded.model)):
        return verify.compare(loaded.model, folder)
