"""A model that runs its blocks one after the other, each by the same compiled program and from
arrays of its own: what generates on a CPU.

In a scan, XLA's CPU backend copies a layer's weights out of the stack before its products read
them, so that a step that reads every weight once moves it three times. Unrolled, a program for all
layers takes as many times longer to compile. On other platforms a program for each layer would be
waited for by small models, and the scan is what runs.
"""

import copy
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax.config import ModelConfig
from lm_jax.model.attention import layer_kinds
from lm_jax.model.block import Context
from lm_jax.model.cache import Cache
from lm_jax.model.transformer import Transformer


class Layered:
    """The blocks of a causal model, apart. What is before and behind them is in `outer`."""

    def __init__(self, model: Transformer):
        """
        Args:
          model: on one CPU. Float32 weights are shared with it and not copied.
        """
        self.config: ModelConfig = model.config
        self.outer = copy.copy(model)
        self.outer.blocks = None
        stacked, structure = jax.tree.flatten(model.blocks)
        _, kinds = layer_kinds(model.config)
        self._layers = [
            (weights, np.int32(layer), np.int32(kind))
            for layer, (kind, *weights) in enumerate(zip(kinds, *map(_apart, stacked)))
        ]
        self._run = _program(structure)

    def run_blocks(
        self, x_BTD: jax.Array, context: Context, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """See `Transformer.run_blocks`. `x_BTD` and `cache` are donated."""
        for weights, layer, kind in self._layers:
            x_BTD, cache = self._run(weights, x_BTD, context, cache, layer, kind)
        return x_BTD, cache


def for_generation(model: Transformer | Layered) -> Transformer | Layered:
    """The model in the form in which it generates fastest where it is."""
    if isinstance(model, Layered):
        return model
    devices = {device for x in jax.tree.leaves(model) for device in x.devices()}
    alone = len(devices) == 1 and all(device.platform == "cpu" for device in devices)
    return Layered(model) if alone else model


def _apart(x: jax.Array) -> list[jax.Array]:
    """The parts of an array of one CPU along its first axis, in its memory where they can be."""
    place = x.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, P(*place.spec[1:]))
    if x.dtype != np.float32:  # which NumPy may not know
        return [jax.device_put(part, place) for part in x]
    whole = np.from_dlpack(x.addressable_data(0))
    return [jax.device_put(part, place, may_alias=True) for part in whole]


@functools.lru_cache
def _program(structure) -> Callable[..., tuple[jax.Array, Cache]]:
    """What runs any block of a model."""

    @functools.partial(jax.jit, donate_argnames=("x_BTD", "cache"))
    def run(weights, x_BTD, context, cache, layer, kind):
        block = jax.tree.unflatten(structure, weights)
        x_BTD, cache, _, _ = block(x_BTD, context, layer, kind, cache, None)
        return x_BTD, cache

    return run
