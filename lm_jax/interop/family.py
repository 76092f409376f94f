"""What a family of published models is: a map of its config and a map of its weights' names.

Both maps are data, read in both directions. A family's own file holds nothing else; reading and
writing are `lm_jax.interop.pretrained` and `lm_jax.interop.export`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError

Shape = tuple[int, ...]
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of our arrays is laid out in a published file, and back. Views where possible."""

    name: str
    their_shape: Callable[[Shape], Shape]
    read: Callable[[np.ndarray, Shape], np.ndarray]  # theirs, our shape -> ours
    write: Callable[[np.ndarray], np.ndarray]


def linear(inputs: int = 1) -> Layout:
    """PyTorch's Linear, [outputs, inputs]; the first `inputs` axes of ours are contracted."""

    def shape(ours: Shape) -> Shape:
        return math.prod(ours[inputs:]), math.prod(ours[:inputs])

    return Layout(
        name="linear",
        their_shape=shape,
        read=lambda x, ours: x.T.reshape(ours),
        write=lambda x: x.reshape(shape(x.shape)[::-1]).T,
    )


def conv1d(inputs: int = 1) -> Layout:
    """GPT-2's Conv1D, [inputs, outputs]."""

    def shape(ours: Shape) -> Shape:
        return math.prod(ours[:inputs]), math.prod(ours[inputs:])

    return Layout(
        "conv1d", shape, lambda x, ours: x.reshape(ours), lambda x: x.reshape(shape(x.shape))
    )


def plus_one(layout: Layout) -> Layout:
    """Gemma's norms keep the scale less one."""
    return Layout(
        "plus_one",
        layout.their_shape,
        lambda x, ours: layout.read(x, ours).astype(np.float32) + 1,
        lambda x: layout.write(x - np.ones((), x.dtype)),
    )


def after_rows(count: int) -> Layout:
    """A table whose first rows nobody looks up; they are written as zeros."""
    return Layout(
        "after_rows",
        lambda ours: (ours[0] + count, *ours[1:]),
        lambda x, ours: x[count:],
        lambda x: np.pad(x, [(count, 0), *[(0, 0)] * (x.ndim - 1)]),
    )


# Vectors, whatever the axes of ours.
FLAT = Layout(
    "flat",
    lambda ours: (math.prod(ours),),
    lambda x, ours: x.reshape(ours),
    lambda x: x.reshape(-1),
)
SAME = Layout("same", lambda ours: ours, lambda x, ours: x, lambda x: x)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of our parameters and the tensor that holds it; of several, the last is read.

    Attributes:
      ours: its dotted name; 'blocks.…' are stacked over the layers.
      theirs: the tensor's name, with {} for the number of the layer, and of experts a second one
        for theirs: each has a tensor of its own.
      part: (i, n): the tensor holds n of ours, one behind the other on its last axis, and this is
        the i-th.
      written: False: it is read where it is there, and the class that is exported has none.
    """

    ours: str
    theirs: str
    layout: Layout
    part: tuple[int, int] = (0, 1)
    written: bool = True

    @property
    def stacked(self) -> int:
        """Leading axes of ours of which each place is a tensor: of layers, and of experts."""
        return self.theirs.count("{}")


@dataclasses.dataclass(frozen=True)
class Family:
    """
    Attributes:
      model_type: as config.json has it.
      architectures: Transformers' class -> our `model.head` of it. The first of each head is the
        one that is written.
      prefix: what stands before the base model's names in a class with a head.
      keys: key of config.json -> field of ModelConfig, where the value is the same.
      fixed: fields that are the same in the whole family.
      defaults: what Transformers takes for a key that config.json leaves out.
      only: keys that stand for another computation unless they have this value.
      read, write: what the maps above cannot say: config.json -> fields, and back.
      aliases: other names that Transformers takes for a key.
      weights: the tensors of a model of this config.
      has: fields that its tensors decide: field -> name of a tensor that is there if it is True.
      ignored: parts of names of tensors that a model can do without: buffers, other heads.
      by_head: our `model.head` -> fields that all its models with this head have.
      refused: Transformers' classes that are known and not supported -> why.
    """

    model_type: str
    architectures: Mapping[str, str]
    prefix: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    weights: Callable[[ModelConfig], list[Weight]]
    read: Callable[[Json], Json] = lambda hf: {}
    write: Callable[[ModelConfig], Json] = lambda model: {}
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    by_head: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


def decoder_head(model: ModelConfig) -> list[Weight]:
    """What a causal model has behind its last norm, if anything of its own."""
    if model.head == "classify":
        return [Weight("head", "score.weight", linear())]
    if model.head == "none" or model.tied_head:
        return []
    return [Weight("head", "lm_head.weight", linear())]


# Transformers' names of activations -> ours. Of several, the last is the one that is written.
ACTIVATIONS = {
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "swish": "silu",
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
}


def read_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"activation '{name}' is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def write_activation(ours: str) -> str:
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}[ours]


def read_rope(rope: Json) -> Json:
    """Fields of ModelConfig from 'rope_parameters' of one kind of layer."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {"rope_theta": float(rope["rope_theta"])}
    scaling: Json = {"kind": "none" if kind == "default" else kind}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("rotary positions on a part of each head (partial_rotary_factor) are not"
                        " supported")  # fmt: skip
    if kind == "linear":
        scaling["factor"] = float(rope["factor"])
    elif kind == "llama3":
        scaling |= {
            "factor": float(rope["factor"]),
            "low_frequency_factor": float(rope["low_freq_factor"]),
            "high_frequency_factor": float(rope["high_freq_factor"]),
            "original_length": int(rope["original_max_position_embeddings"]),
        }
    elif kind != "default":
        raise UserError(f"rope type '{kind}' is not supported; known: default, linear, llama3")
    return fields | {"rope_scaling": scaling}


def write_rope(model: ModelConfig) -> Json:
    s = model.rope_scaling
    rope = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if s.kind == "linear":
        rope |= {"rope_type": "linear", "factor": s.factor}
    elif s.kind == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_frequency_factor,
            "high_freq_factor": s.high_frequency_factor,
            "original_max_position_embeddings": s.original_length,
        }
    return rope


def rope_of(hf: Json) -> Json:
    """'rope_parameters', or 'rope_scaling', which Transformers wrote before version 5, and which it
    prefers where there are both."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return {"rope_theta": hf.get("rope_theta", 10_000.0)} | given


def shortest_pattern(windows: list[int]) -> tuple[int, ...]:
    """The shortest tuple that repeats to `windows`; () if all are 0."""
    if not any(windows):
        return ()
    # Of each beginning the longest that it also ends with (Knuth, Morris and Pratt 1977): of all of
    # it, what is left in front of that is the pattern.
    both, ends = 0, [0]
    for window in windows[1:]:
        while both and window != windows[both]:
            both = ends[both - 1]
        both += window == windows[both]
        ends.append(both)
    return tuple(windows[: len(windows) - ends[-1]])


def read_windows(hf: Json, types: list[str]) -> tuple[int, ...]:
    """`model.windows` from 'sliding_window' and 'layer_types'."""
    known = {"sliding_attention": hf.get("sliding_window") or 0, "full_attention": 0}
    if unknown := set(types) - known.keys():
        raise UserError(f"layer type '{min(unknown)}' is not supported")
    return shortest_pattern([known[t] for t in types])


def write_windows(model: ModelConfig) -> Json:
    sizes = [model.windows[i % len(model.windows)] if model.windows else 0
             for i in range(model.layers)]  # fmt: skip
    types = ["sliding_attention" if w else "full_attention" for w in sizes]
    return {"sliding_window": max(sizes) or None, "layer_types": types}
