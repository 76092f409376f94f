"""The loss of a model on a text."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm_jax.config import OF_EXAMPLES, DataConfig
from lm_jax.data.held_out import validation_batches
from lm_jax.data.sources import digest, documents
from lm_jax.data.spans import with_length
from lm_jax.errors import UserError
from lm_jax.evaluation.loss import byte_lengths, evaluate_loss
from lm_jax.evaluators.models import DEFAULT, ModelOptions, asked_of, checked, identity, prints
from lm_jax.model import parameters as params_lib
from lm_jax.progress import progress
from lm_jax.sharding.mesh import batch_block, batch_shards, to_devices
from lm_jax.training import together
from lm_jax.training.masking import make_masking
from lm_jax.training.step import make_step


def evaluate_model(
    path: str,
    model: ModelOptions = DEFAULT,
    *,
    sources: Sequence[str] = (),
    max_batches: int | None = None,
    **data: Any,
) -> dict[str, Any]:
    """Loss, perplexity, accuracy and bits per byte, as `evaluate_loss` gives them.

    Args:
      path: a workdir or a Hugging Face folder.
      model: its `batch_size` is the run's where it is None, and rounded up to what the devices
        divide.
      sources: the text; (): the run's own validation split.
      max_batches: a sample of the text; None: all of it.
      data: fields of `DataConfig` that differ from the run's.

    Raises:
      UserError: there is no such model, the text cannot be read, or a field does not fit the model.
    """
    if max_batches is not None and max_batches < 1:
        raise UserError(f"--max_batches: must be at least 1, not {max_batches}")
    mesh = model.mesh()
    described = model.describe(path)
    config, tokenizer = described.config, described.tokenizer
    config.data = dataclasses.replace(config.data, **data)
    if config.data.objective in OF_EXAMPLES:
        for name in ("text_key", "document"):
            if name in data:
                raise UserError(
                    f"--{name}: this model learned from records with fields, of which its own"
                    " templates make examples: leave it out"
                )
    if "length" in data:
        config.data = with_length(config.data, data["length"])
    config.data.validation_sources = tuple(sources) or config.data.validation_sources
    asked = asked_of(config.data)
    config = checked(config, {f"data.{name}": name for name in data})
    rows, shards = model.batch_size or config.training.evaluate_batch_size, batch_shards(mesh)
    rows = -(-rows // shards) * shards
    config.data.batch_size = rows
    config.training.loss_chunk = None
    config.optimizer.freeze = ()  # of adapters, it may be, that are merged now
    about = identity(described) | {"data": dataclasses.asdict(config.data), "batches": max_batches}
    together.check_same(about, "for another text or model, or otherwise")
    if jax.process_count() > 1:  # whose disks may hold others of the same names
        with _paths_told(config.data):
            text = digest(documents(config.data, "validation"))
        together.check_same(text, "for another text")
    masking = make_masking(config.data, tokenizer, config.model.vocab_size)
    evaluate = jax.jit(make_step(config, masking).evaluate)
    index, parts = batch_block(mesh)
    parameters = params_lib.split(described.load(mesh).model)
    with (
        jax.set_mesh(mesh),
        progress("batches", max_batches, active=prints()) as count,
    ):
        lengths = to_devices(byte_lengths(tokenizer, config.model.vocab_size), mesh)
        with _paths_told(config.data):
            batches = validation_batches(
                config.data,
                tokenizer,
                batch_size=rows,
                process_index=index,
                process_count=parts,
                max_batches=max_batches,
            )
        values = evaluate_loss(
            lambda batch, i: evaluate(
                parameters, to_devices(batch, mesh), to_devices(np.int32(i), mesh), lengths
            ),
            batches,
            count,
        )
    source = described.source
    return {
        "model": source.path,
        "step": source.step,
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "sources": asked,
    } | values


@contextlib.contextmanager
def _paths_told(data: DataConfig) -> Iterator[None]:
    """Where a text that nobody named is read, which may not be there any more."""
    try:
        yield
    except UserError as e:
        if data.validation_sources:
            raise
        raise UserError(
            f"{e}\n(the run's own text, by the paths it was trained with; --source names other)"
        ) from None
