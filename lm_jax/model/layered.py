"""A model that runs its blocks one after the other, each by the same compiled program and from
arrays of its own: what generates on a CPU.

In a scan, XLA's CPU backend copies a layer's weights, keys and values out of their stacks before
its products read them, so that a step that reads every weight once moves it three times. Unrolled,
a program for all layers takes as many times longer to compile. On other platforms small models
would wait for a program for each layer, and the scan is what runs.
"""

import copy
import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lm_jax.config import ModelConfig
from lm_jax.model.attention import layer_kinds
from lm_jax.model.block import Attention, Block, Context, FeedForward
from lm_jax.model.cache import Cache, together
from lm_jax.model.kept import KeptWeight, merged
from lm_jax.model.quantized import parts
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec

# Products of the same activations, which are made one.
_TOGETHER = ("query", "key", "value"), ("up", "gate")


class Layered:
    """The blocks of a causal model, apart. What is before and behind them is in `outer`."""

    def __init__(self, model: Transformer, donate: bool = False):
        """
        Args:
          model: on one CPU. What is in its blocks is copied.
          donate: whether what was copied is given up: the model cannot be used any more.
        """
        self.config: ModelConfig = model.config
        self.outer = copy.copy(model)
        self.outer.blocks = None
        stacked, structure = jax.tree.flatten(model.blocks)
        place = stacked[0].sharding
        on_mesh = isinstance(place, NamedSharding)
        _, kinds = layer_kinds(model.config)
        self._layers = []
        with jax.set_mesh(place.mesh) if on_mesh else jax.default_device(*place.device_set):
            self.outer.head = nnx.data(_kept_head(model))
            for layer, kind in enumerate(kinds):
                block = jax.tree.unflatten(structure, [np.asarray(x)[layer] for x in stacked])
                leaves, kept = jax.tree.flatten(_on_device(_with_kept(block)))
                each = {id(x): x for x in leaves}
                places = tuple(map([*each].index, map(id, leaves)))
                self._layers.append(([*each.values()], np.int32(kind)))
        self._run = _program(kept, places)
        # A tied head's table is the embedding's too.
        for x in [*stacked, *jax.tree.leaves(model.head)] if donate else ():
            x.delete()

    def run_blocks(
        self, x_BTD: jax.Array, context: Context, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """See `Transformer.run_blocks`.

        Args:
          x_BTD: is donated.
          cache: its layers are apart, and are donated.
        """
        caches = []
        for (weights, kind), own in zip(self._layers, cache.apart(), strict=True):
            x_BTD, own = self._run(weights, x_BTD, context, own, kind)
            caches.append(own)
        return x_BTD, together(caches)


def for_generation(model: Transformer | Layered, donate: bool = False) -> Transformer | Layered:
    """The model in the form in which it generates fastest where it is.

    Args:
      donate: see `Layered`.
    """
    if isinstance(model, Layered):
        return model
    devices = {device for x in jax.tree.leaves(model) for device in x.devices()}
    alone = len(devices) == 1 and all(device.platform == "cpu" for device in devices)
    return Layered(model, donate) if alone else model


def _kept_head(model: Transformer) -> KeptWeight:
    c = model.config
    if model.head is not None:
        return _on_device(KeptWeight.of(model.head, 1, c.dtype))
    table, scale = parts(model.embedding)
    table_VD, scale_V = table.get_value(), None if scale is None else scale.get_value()
    if scale_V is None:
        table_VD = table_VD.astype(c.dtype)
    return _on_device(KeptWeight(table_VD, table_VD.shape[:1], ("embed", "vocab"), scale_V))


def _with_kept(block: Block) -> Block:
    """The same block with the weights of its products as generation keeps them."""

    def kept(module: Attention | FeedForward) -> Attention | FeedForward:
        module, dtype = copy.copy(module), module.config.dtype
        weights = {
            name: KeptWeight.of(p, len(contracted), dtype)
            for name, contracted in module.products.items()
            if (p := getattr(module, name)) is not None
        }
        for names in _TOGETHER:
            if set(names) <= set(weights):
                weights |= zip(names, merged([weights[name] for name in names]))
        for name, weight in weights.items():
            setattr(module, name, weight)
        return module

    block = copy.copy(block)
    block.attention = kept(block.attention)
    if isinstance(block.mlp, FeedForward):
        block.mlp = kept(block.mlp)
    return block


def _on_device(module: nnx.Module) -> nnx.Module:
    """What is shared stays shared, and what is there already is not copied."""
    done: dict[int, nnx.Param] = {}

    def place(p: nnx.Param) -> nnx.Param:
        if id(p) not in done:
            value, spec = p.get_value(), activation_spec(*p.axes)
            may_alias = None if isinstance(value, jax.Array) else False
            done[id(p)] = p.replace(jax.device_put(value, spec, may_alias=may_alias))
        return done[id(p)]

    return jax.tree.map(place, module, is_leaf=lambda x: isinstance(x, nnx.Param))


@functools.lru_cache
def _program(structure, places: tuple[int, ...]) -> Callable[..., tuple[jax.Array, Cache]]:
    """What runs any block of a model.

    Args:
      places: of each of its arrays, among those that there are.
    """

    @functools.partial(jax.jit, donate_argnames=("x_BTD", "cache"))
    def run(weights, x_BTD, context, cache, kind):
        block = jax.tree.unflatten(structure, [weights[i] for i in places])
        x_BTD, cache, _, _ = block(x_BTD, context, 0, kind, cache, None)
        return x_BTD, cache

    return run
