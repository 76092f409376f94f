"""Published models: a Hugging Face folder as a config and parameters on the mesh.

Weights go from the file to the devices one tensor at a time. The host holds one tensor, and for a
moment one more of its size where it has to be turned.
"""

import dataclasses
import functools
import gc
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop.config_map import family_of, read_config, read_json
from lm_jax.interop.family import Family, Shape, Weight
from lm_jax.interop.labels import read_labels
from lm_jax.interop.safetensors import Weights, open_weights
from lm_jax.model import parameters as params_lib
from lm_jax.model.parameters import Parameters
from lm_jax.model.transformer import skeleton_of
from lm_jax.sharding.mesh import check_parameters

_LISTED = 10  # tensors that one message names
_ROWS = 4096  # of two tables, compared at a time


def is_pretrained(path: str) -> bool:
    """Whether `path` is a folder with a published model's config.json."""
    try:
        values = read_json(os.path.join(path, "config.json"))
    except UserError:
        return False
    return bool(values.keys() & {"model_type", "architectures"})


def read_model_config(path: str) -> ModelConfig:
    """The shape of the model in a folder; what is not of its weights is left at the defaults.

    Raises:
      UserError: it is no such folder, or the model is not supported.
    """
    return _Folder(path).model


@dataclasses.dataclass(frozen=True)
class Classes:
    """What a published classifier's config.json says beside the model's shape.

    Attributes:
      names: of the classes, in order.
      pad_id: the id that Transformers takes for no token of a text; None: it knows none.
    """

    names: tuple[str, ...]
    pad_id: int | None


def read_classes(path: str) -> Classes | None:
    """Of a model without a head 'classify' None.

    Raises:
      UserError: as `read_model_config`.
    """
    return _Folder(path).classes


def fingerprint(path: str) -> str:
    """Tells the weights of a folder from others; a sample, see `Weights.fingerprint`."""
    return open_weights(path).fingerprint()


def load_parameters(
    path: str,
    config: ModelConfig,
    mesh: Mesh,
    each: Callable[[str, jax.Array], Parameters] = params_lib.unchanged,
) -> Parameters:
    """The weights of a folder as float32 parameters, sharded over `mesh`.

    Args:
      config: as `read_model_config` gives it; what is not of the weights may differ.
      each: makes of a parameter, by its name, what is returned in its place, before the next one is
        read.

    Raises:
      UserError: tensors are missing, of another shape or not known, or the mesh does not divide
        them; the message names each.
    """
    with jax.set_mesh(mesh):
        folder, abstract = _checked(path, config)
        shapes = {name: x.shape for name, x in abstract.items()}
        check_parameters(shapes, params_lib.logical_axes(skeleton_of(config)), mesh)
    out = {}
    for weight in folder.family.weights(config):
        x = abstract[weight.ours]
        whole = _load(folder, weight, x.shape, NamedSharding(mesh, x.sharding.spec))
        with jax.set_mesh(mesh):
            out |= each(weight.ours, whole)
    return out


def check(path: str, config: ModelConfig) -> None:
    """What `load_parameters` checks, and raises, without reading a weight."""
    _checked(path, config)


def _checked(path: str, config: ModelConfig) -> tuple["_Folder", Parameters]:
    """The folder, and our parameters as abstract arrays."""
    folder = _Folder(path)
    abstract = params_lib.split(skeleton_of(config))
    folder.check(folder.family.weights(config), {name: x.shape for name, x in abstract.items()})
    return folder, abstract


def tensors_of(weight: Weight, shape: Shape) -> tuple[dict[tuple[int, ...], str], Shape]:
    """Of each place on the stacked axes of a parameter the tensor that holds it, by its name, and
    the shape that each holds."""
    n = weight.stacked
    return {i: weight.theirs.format(*i) for i in np.ndindex(*shape[:n])}, shape[n:]


def _load(folder: "_Folder", weight: Weight, shape: Shape, sharding: NamedSharding) -> jax.Array:
    names, each = tensors_of(weight, shape)
    if each == shape:
        whole = _on_devices(folder.read(weight, names[()], shape), sharding)
        _let_go(whole)
        return whole
    one = NamedSharding(sharding.mesh, P(*sharding.spec[weight.stacked :]))
    stack = jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)()
    for place, name in names.items():
        part = _on_devices(folder.read(weight, name, each), one)
        stack = _put(sharding, one)(stack, part, place)
        _let_go(stack)
    return stack


def _let_go(x: jax.Array) -> None:
    """Waits until `x` is there, or the host would run ahead and hold many tensors.

    Numpy arrays that a device has read, jax gives back by a hook on garbage collection: without
    one, hundreds of megabytes wait for the next that happens to come.
    """
    x.block_until_ready()
    gc.collect(0)


@functools.cache
def _put(sharding: NamedSharding, one: NamedSharding):
    """(stack, part, its place) -> stack with it; what lies on other devices stays as it is."""
    mesh, n = sharding.mesh, len(sharding.spec) - len(one.spec)

    def local(stack: jax.Array, part: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
        here, mine = [], True
        for size, axis, at in zip(stack.shape, sharding.spec, place):
            at = at if axis is None else at - jax.lax.axis_index(axis) * size
            mine &= (at >= 0) & (at < size)
            here.append(jnp.clip(at, 0, size - 1))
        here += [0] * part.ndim
        old = jax.lax.dynamic_slice(stack, here, (1,) * n + part.shape)
        new = jnp.where(mine, part.reshape(old.shape), old)
        return jax.lax.dynamic_update_slice(stack, new, here)

    specs = (sharding.spec, one.spec, (P(),) * n)
    put = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=sharding.spec)
    return jax.jit(put, donate_argnums=0)


def _on_devices(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Each device gets its part, as float32; it is converted there."""
    parts = jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return parts if parts.dtype == jnp.float32 else _to_float32(sharding)(parts)


@functools.cache
def _to_float32(sharding: NamedSharding):
    return jax.jit(lambda x: x.astype(jnp.float32), out_shardings=sharding)


class _Folder:
    """A folder's family, model and tensors, by the names that the family's map has for them."""

    def __init__(self, path: str):
        if not os.path.isdir(path):
            raise UserError(f"{path}: there is no such folder")
        self.path, where = path, os.path.join(path, "config.json")
        hf = read_json(where)
        self.family: Family = family_of(hf, where)
        self.weights: Weights = open_weights(path)
        stored = {_modern(name): name for name in self.weights.names()}
        if not any(name.startswith(self.family.prefix) for name in stored):
            # A base model saved by itself.
            stored = {self.family.prefix + name: old for name, old in stored.items()}
        self._stored = stored
        self.model = read_config(self.family, hf, where, set(stored))
        self.classes: Classes | None = None
        if self.model.head == "classify":
            self.classes = Classes(read_labels(hf, where), hf.get("pad_token_id"))
        self._check_tie(where)

    def _check_tie(self, where: str) -> None:
        """A head beside the embedding that it is tied to must be the same: which one counts?"""
        self._tied: tuple[str, ...] = ()
        if not self.model.tied_head or self.model.head not in ("linear", "masked_lm"):
            return
        apart = self.family.weights(dataclasses.replace(self.model, tied_head=False))
        names = {w.ours: w.theirs for w in apart if w.ours in ("head", "embedding")}
        head, embedding = names["head"], names["embedding"]
        self._tied = (head,)
        if head not in self._stored or embedding not in self._stored:
            return
        a, b = self._stored[head], self._stored[embedding]
        if not self._same(a, b):
            raise UserError(
                f"{where} ties the head to the embedding, but {self.path} holds both, and they"
                f" differ: {a} and {b}; say tie_word_embeddings = false if the head counts"
            )

    def _same(self, a: str, b: str) -> bool:
        """Whether two tables hold the same; a part of each is read at a time."""
        shape = self.weights.shape(a)
        if not shape or shape != self.weights.shape(b):
            return False
        parts = [(i, min(i + _ROWS, shape[0])) for i in range(0, shape[0], _ROWS)]
        read = self.weights.read_rows
        return all(np.array_equal(read(a, *part), read(b, *part)) for part in parts)

    def check(self, weights: list[Weight], shapes: dict[str, Shape]) -> None:
        """
        Args:
          shapes: of our parameters.

        Raises:
          UserError: a tensor is missing, of another shape or dtype, or not known.
        """
        wanted: dict[str, Shape] = {}
        for weight in weights:
            names, each = tensors_of(weight, shapes[weight.ours])
            shape = weight.layout.their_shape(each)
            for name in names.values():
                wanted[name] = (*shape[:-1], shape[-1] * weight.part[1])
        wrong = []
        for name, shape in wanted.items():
            if name not in self._stored:
                wrong.append(f"{name}: expected {list(shape)}, found nothing")
                continue
            found = self.weights.shape(self._stored[name])
            dtype = self.weights.dtype(self._stored[name])
            if found != shape:
                wrong.append(f"{name}: expected {list(shape)}, found {list(found)}")
            elif dtype.name not in ("float16", "bfloat16", "float32", "float64"):
                wrong.append(f"{name}: expected floats of 16 bits or more, found {dtype}")
        known = (*self.family.ignored, *self._tied)
        for name in self._stored.keys() - wanted.keys():
            if not any(part in name for part in known):
                found = list(self.weights.shape(self._stored[name]))
                wrong.append(f"{name}: expected nothing, found {found}")
        if wrong:
            more = f"\n  and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
            raise UserError(
                f"{self.path}: its tensors are not those of the {self.family.model_type} model that"
                " its config.json describes:\n  " + "\n  ".join(sorted(wrong)[:_LISTED]) + more
            )

    def read(self, weight: Weight, name: str, shape: Shape) -> np.ndarray:
        """One of our arrays, of the dtype on disk; a view where the layout allows."""
        x = self.weights.read(self._stored[name])
        index, parts = weight.part
        if parts > 1:
            width = x.shape[-1] // parts
            x = x[..., index * width : (index + 1) * width]
        return weight.layout.read(x, shape)


def _modern(name: str) -> str:
    """A norm's scale and bias were gamma and beta in the first exports from TensorFlow."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
