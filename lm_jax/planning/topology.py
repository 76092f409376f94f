"""Slices of TPUs and nodes of GPUs that are not there, as devices to compile for."""

import dataclasses
import difflib
import importlib.util
import math
import re
from typing import Any

import jax
import numpy as np

from lm_jax.errors import UserError
from lm_jax.planning.chips import CHIPS, Chip

_EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8"
# As large as a slice can be rented.
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "tpu7x": 9216, "h100": 8192}


@dataclasses.dataclass(frozen=True)
class Topology:
    """What `--topology` names."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of a slice; of GPUs (a node, nodes)
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.cores * self.slices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions are closed to a ring: all of a v4's, v5p's or tpu7x' that are made of
        whole cubes of 4, and those of a v5e or v6e that reach across the whole pod."""
        if not self.chip.full:
            return (False,) * len(self.shape)
        if self.chip.dimensions == 2:
            return tuple(n >= self.chip.full for n in self.shape)
        return (all(n % self.chip.full == 0 for n in self.shape),) * len(self.shape)

    def __str__(self) -> str:
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """'v5p:4x4x4' -> a topology.

    Raises:
      UserError: it is none; the message names the nearest.
    """
    if match := re.fullmatch(r"(v4|v5litepod|v5e|v5p|v6e|tpu7x)-(\d+)", text.strip().lower()):
        raise UserError(_of_a_type(text, match[1], int(match[2])))
    name, _, dims = text.strip().lower().partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}:{dims}'? " if near else ""
        raise UserError(
            f"--topology: no chip is called '{name}': {hint}there are {', '.join(CHIPS)}, as in"
            f" {_EXAMPLES}"
        )
    if slices < 1:
        raise UserError(f"--slices: must be at least 1, not {slices}")
    chip, shape = CHIPS[name], tuple(int(n) for n in re.findall(r"\d+", dims))
    if not re.fullmatch(r"\d+(x\d+)*", dims) or 0 in shape:
        raise UserError(f"--topology: '{text}' is not of the form {_EXAMPLES}")
    if name == "h100":
        return _gpus(chip, shape, slices, text)
    if len(shape) != chip.dimensions:
        raise UserError(
            f"--topology: a slice of {name} has {chip.dimensions} dimensions, and '{text}' has"
            f" {len(shape)}: did you mean '{name}:{_nearest_shape(chip, math.prod(shape))}'?"
        )
    count = math.prod(shape)
    whole = shape[0] % 2 == 0 and shape[1] % 2 == 0
    if (not whole and count > 1) or count > _LARGEST[name]:
        near = _nearest_shape(chip, min(count, _LARGEST[name]))
        raise UserError(
            f"--topology: there is no slice '{text}' (a host has 2x2 chips, and a slice at most"
            f" {_LARGEST[name]}): did you mean '{name}:{near}'?"
        )
    return Topology(chip, shape, slices)


def _gpus(chip: Chip, shape: tuple[int, ...], slices: int, text: str) -> Topology:
    if slices > 1:
        raise UserError("--slices: is of TPUs; several nodes of GPUs are h100:8x4, say")
    if len(shape) > 2 or shape[0] > 8:
        raise UserError(
            f"--topology: '{text}' is no node of GPUs: h100:8 has 8, h100:8x4 is four such nodes"
        )
    return Topology(chip, (*shape, 1)[:2])


def _of_a_type(text: str, generation: str, number: int) -> str:
    """What to give instead of a type as Cloud names it, such as v5litepod-16."""
    name = {"v5litepod": "v5e"}.get(generation, generation)
    chip, cores = CHIPS[name], 1 if name in ("v5e", "v6e") else 2
    count = number // cores
    shape = "1x1" if (chip.dimensions, count) == (2, 1) else _nearest_shape(chip, count)
    counted = "cores, two a chip" if cores == 2 else "chips"
    return (
        f"--topology: '{text}' is a type of Google Cloud's, whose number counts {counted}; here the"
        f" shape of the slice is said: did you mean '{name}:{shape}'?"
    )


def _nearest_shape(chip: Chip, count: int) -> str:
    """The most compact slice of about as many chips."""
    powers = [1, *(2**i for i in range(1, 14))]
    best, shape = math.inf, (2,) * chip.dimensions
    options = [(a, b) for a in powers for b in powers if 1 < a <= b]
    if chip.dimensions == 3:
        options = [(a, b, c) for a, b in options for c in powers if c >= b or c == 1]
    for option in options:
        n = math.prod(option)
        off = abs(math.log2(n / max(1, count))) * 100 + sum(option) / 1000
        if n <= _LARGEST[chip.name] and off < best:
            best, shape = off, option
    return "x".join(map(str, shape))


def devices_of(topology: Topology) -> list[jax.Device]:
    """Devices that can be compiled for, and not run on.

    Raises:
      UserError: what compiles for them is not installed, or knows no such topology.
    """
    return _gpu_devices(topology) if topology.chip.name == "h100" else _tpu_devices(topology)


def _tpu_devices(topology: Topology) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, which compiles for TPUs, is not installed (no TPU is needed): pip install"
            " 'lm_jax[plan]'"
        )
    from jax.experimental import topologies

    shape, wraps = topology.shape, topology.wraps
    more: dict[str, Any] = {"wrap": [*wraps, *(False,) * (3 - len(wraps))]}
    if topology.slices > 1:
        more["num_slices"] = topology.slices
    if topology.chip.name == "v4":  # a chip's two cores as one device, as Cloud TPU VMs have it
        more["chip_config_name"] = "megacore"
    name = f"{topology.chip.name}:{'x'.join(map(str, shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"--topology: libtpu knows no '{name}': {str(e).splitlines()[0]}") from None
    return list(found.devices)


# What XLA reads of an H100 (SXM, 80 GB) where there is none.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _gpu_devices(topology: Topology) -> list[jax.Device]:
    plugins = [f"jax_cuda{n}_plugin" for n in (12, 13)]
    if not any(importlib.util.find_spec(name) for name in plugins):
        raise UserError(
            "jax's CUDA plugin, which compiles for NVIDIA's GPUs, is not installed (no GPU is"
            " needed, but gigabytes of disk): pip install 'lm_jax[cuda]'"
        )
    from jax.experimental import topologies

    node, nodes = topology.shape
    try:
        found = topologies.get_topology_desc(
            "h100", "cuda", target_config=_H100, topology=f"1x{nodes}x{node}"
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as e:
        said = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"--topology: jax's CUDA plugin cannot compile for it: {said}") from None
    return list(found.devices)


def coordinates(devices: np.ndarray) -> np.ndarray:
    """int [number of devices, dims]: slice, then the place in the torus or (node, place in it)."""

    def place(d: jax.Device) -> tuple[int, ...]:
        if hasattr(d, "coords"):
            return (getattr(d, "slice_index", None) or 0, *d.coords, d.core_on_chip)
        return (getattr(d, "slice_index", None) or 0, d.process_index, d.id)

    return np.array([place(d) for d in devices.flat])
