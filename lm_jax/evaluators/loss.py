"""The loss of a model on a text."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm_jax.config import LEAST_MASKED_LENGTH, MeshConfig
from lm_jax.data.held_out import validation_batches
from lm_jax.errors import UserError
from lm_jax.evaluation.loss import byte_lengths, evaluate_loss
from lm_jax.model import parameters as params_lib
from lm_jax.progress import progress
from lm_jax.sharding.mesh import batch_shards, make_mesh, to_devices
from lm_jax.training.masking import make_masking
from lm_jax.training.step import make_step
from lm_jax.training.weights import load_for_inference


def evaluate_model(
    path: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    max_batches: int | None = None,
    **data: Any,
) -> dict[str, Any]:
    """Loss, perplexity, accuracy and bits per byte, as `evaluate_loss` gives them.

    Args:
      path: a workdir or a Hugging Face folder.
      step: which checkpoint; None: the newest.
      dtype: see `load_for_inference`.
      batch_size: rows at a time; None: the run's. Rounded up to a multiple of the devices.
      max_batches: a sample of the text; None: all of it.
      data: fields of `DataConfig` that differ from the run's.

    Raises:
      UserError: there is no such model, the text cannot be read, or a field does not fit the model.
    """
    for name, value in (("batch_size", batch_size), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise UserError(f"--{name}: must be at least 1, not {value}")
    mesh = make_mesh(MeshConfig())
    loaded = load_for_inference(path, mesh, step, dtype)
    model, config, tokenizer = loaded.model, loaded.config, loaded.tokenizer
    config.data = dataclasses.replace(config.data, **data)
    if not (config.data.validation_sources or config.data.sources):
        raise UserError("--source: name a text: this model has none of its own")
    least = LEAST_MASKED_LENGTH if config.data.objective == "masked" else 1
    if not least <= config.data.length <= config.model.max_length:
        raise UserError(
            f"--length: must be from {least} to the model's {config.model.max_length},"
            f" not {config.data.length}"
        )
    rows, shards = batch_size or config.training.evaluate_batch_size, batch_shards(mesh)
    rows = -(-rows // shards) * shards
    config.data.batch_size, config.training.accumulation = rows, 1
    config.training.loss_chunk = None
    config.optimizer.freeze = ()  # of adapters, it may be, that are merged now
    masking = make_masking(config.data, tokenizer, config.model.vocab_size)
    evaluate = jax.jit(make_step(config, masking).evaluate)
    sources = config.data.validation_sources or config.data.sources
    with jax.set_mesh(mesh), progress("batches") as count:
        lengths = to_devices(byte_lengths(tokenizer, config.model.vocab_size), mesh)
        parameters = params_lib.split(model)
        try:
            batches = validation_batches(
                config.data, tokenizer, batch_size=rows, max_batches=max_batches
            )
        except UserError as e:
            if config.data.validation_sources:
                raise
            raise UserError(
                f"{e}\n(the run's own text, by the paths it was trained with; --source names other)"
            ) from None
        values = evaluate_loss(
            lambda batch, i: evaluate(
                parameters, to_devices(batch, mesh), to_devices(np.int32(i), mesh), lengths
            ),
            batches,
            count,
        )
    source = loaded.source
    return {"model": source.path, "step": source.step, "sources": sources} | values
