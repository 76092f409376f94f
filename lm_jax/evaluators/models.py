"""The model that is evaluated: which, on which devices, and how to know it again."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lm_jax.config import Config, DataConfig, MeshConfig
from lm_jax.config_keys import walk
from lm_jax.data.chat import chat_template_of
from lm_jax.data.sources import held_out_sources
from lm_jax.errors import UserError
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training.inference import Described, describe
from lm_jax.training.weights import fingerprint
from lm_jax.validation import mistakes_in

# Fields of the model that no prediction depends on.
_NO_MATTER = ("dropout", "float8", "remat", "scan_layers", "attention", "family")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Of a model, which checkpoint, and how it is computed."""

    step: int | None = None  # None: the newest
    dtype: str | None = None  # see `lm_jax.training.inference.describe`
    quantize: str | None = None  # the same
    batch_size: int | None = None  # rows at a time; None: as the evaluation has it
    fsdp: int = 1  # devices that share the parameters out
    tensor: int = 1  # devices that each layer is split over; the batch goes over what is left

    def __post_init__(self):
        """
        Raises:
          UserError: a number is below 1.
        """
        for name in ("batch_size", "fsdp", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: must be at least 1, not {value}")

    def mesh(self) -> Mesh:
        """All devices of the job.

        Raises:
          UserError: they cannot be shared out so.
        """
        parts, devices = self.fsdp * self.tensor, jax.device_count()
        if devices % parts:
            raise UserError(
                f"--fsdp={self.fsdp} x --tensor={self.tensor} does not divide the {devices}"
                " device(s) that there are"
            )
        return make_mesh(MeshConfig(fsdp=self.fsdp, tensor=self.tensor))

    def describe(self, path: str) -> Described:
        return describe(path, self.step, self.dtype, self.quantize)


DEFAULT = ModelOptions()


def prints() -> bool:
    """Whether this process is the one of the job that prints and writes."""
    return jax.process_index() == 0


def checked(config: Config, flags: Mapping[str, str]) -> Config:
    """A model's config that was changed for an evaluation, validated. Nothing is learned: checks
    about that alone do not apply.

    Args:
      flags: key -> the flag that sets it, by which it is called in messages.

    Raises:
      UserError: a line for each field that is wrong.
    """
    config.training.steps, config.training.accumulation = 0, 1
    wrong = mistakes_in(config)
    for key, flag in flags.items():
        wrong = [re.sub(rf"\b{re.escape(key)}\b", f"--{flag}", line) for line in wrong]
    if wrong:
        raise UserError("\n".join(wrong))
    return config


def asked_of(data: DataConfig) -> list[str]:
    """What is evaluated on, fit for a report.

    Raises:
      UserError: there is nothing; or it would be what a data set has to train on, and nobody asked
        for that.
    """
    if not (data.validation_sources or data.sources):
        raise UserError("--source: name what to evaluate on: this model has nothing of its own")
    found = held_out_sources(data)
    for given, source in zip(data.validation_sources, found, strict=False):
        if source == f"{given}[train]":
            raise UserError(
                f"--source: '{given}' has neither a split validation nor test: if the one that"
                f" models are trained on is meant, say '{source}'"
            )
    return found


def identity(model: Described) -> dict[str, Any]:
    """What a prediction depends on of the model, to be compared; fit for JSON."""
    template = chat_template_of(model.tokenizer)
    shape = {
        key: value
        for key, value, field in walk(model.config.model, "model.")
        if field.name not in _NO_MATTER
        # Not there at all in reports of older versions.
        and (field.name, value) != ("quantize", "none")
    }
    return {
        "model": model.source.path,
        "step": model.source.step,
        "weights": fingerprint(model.source),
        "tokenizer": model.tokenizer.fingerprint,
        "stop_ids": sorted(model.tokenizer.stop_ids),
        "chat_template": template and hashlib.sha256(template.text.encode()).hexdigest(),
    } | shape
