"""What a run says when it begins: what it trains, where, and on how much at a time."""

from collections.abc import Iterator

from jax.sharding import Mesh

from lm_jax.config import Config
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.model.attention import resolve_backend
from lm_jax.model.float8 import multiplies_float8
from lm_jax.model.flops import idle_parameters
from lm_jax.training import trainable
from lm_jax.training.step import TrainState


def greeting(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, state: TrainState, rates: trainable.Rates
) -> Iterator[str]:
    """Lines for a person."""
    count = sum(x.size for x in state.all_parameters.values())
    learning = trainable.count(state.parameters, rates)
    idle = idle_parameters(config.model)
    active = f" ({count - idle:,} of them for a token)" if idle else ""
    yield (
        f"model: {count:,} parameters{active}, {config.model.dtype}, vocabulary"
        f" {config.model.vocab_size:,} ({tokenizer.kind})"
    )
    if config.model.float8 and not multiplies_float8(mesh.devices.flat[0]):
        yield (
            "note: model.float8: these devices have no products of 8-bit floats; rounding to them"
            " takes longer than it gains"
        )
    if learning < count:
        yield f"training: {learning:,} of {count:,} parameters ({count - learning:,} frozen)"
    axes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1) or "no mesh"
    yield (
        f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}),"
        f" attention: {resolve_backend(config.model, config.data.length)}"
    )
    yield (
        f"batch: {config.data.batch_size} x {config.data.length} tokens"
        f" in {config.training.accumulation} part(s), {config.data.packing} packing"
    )
