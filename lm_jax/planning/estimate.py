"""How long a step may take: a range, and an estimate, of a program that never ran.

Two models, of a device with a peak P (bf16 FLOP/s) and a memory bandwidth M:

  compiler  = max(C + K / (0.7 P) + S, A_links, A_network, F / P)
  sequence  = max((F - K) / (0.7 P) + K / (0.45 P) + B / M + S + A_links + A_network, F / P)

F: FLOPs of all matrix products, with those computed again for the backward pass; K: those of them
inside of Pallas kernels, and of experts, as if each were chosen as often; C: the compiler's own
cycles (`estimated_cycles`, times how often a loop runs) over the clock, which know no Pallas kernel
and no collective; B: the bytes that instructions take from HBM and put there; S: the time of
collectives that nothing runs beside, A: of those that run beside computation. Where the compiler
estimates no cycles (GPUs), C = max((F - K) / (0.8 P), B / M).

In the first all that can run at the same time does so; in the second nothing does. The range spans
both, and its top never exceeds 100% of the peak, as F / P bounds either. 0.7, 0.45 and 0.8 are
assumptions: shares of the peak that tuned products and attention kernels reach. A collective takes
what its bytes take over the links of the torus dimensions that its group spans, twice that for an
all-reduce; half the links count where a dimension is no ring.

Left out of both: reading the batch, logging, saving, waiting for the slowest host, the latency of
small collectives, contention between those that share links. The compiler's cycles can be wrong
either way: of an addition of long vectors they make 40% of the memory's bandwidth, so a small model
may run faster than both say.
"""

import dataclasses

import numpy as np

from lm_jax.config import Config
from lm_jax.model import parameters as params_lib
from lm_jax.model.attention import layer_kinds
from lm_jax.model.flops import peak_flops, training_flops_per_token
from lm_jax.planning.chips import Chip
from lm_jax.planning.collectives import Collective
from lm_jax.planning.hlo import Computation, Instruction, Module
from lm_jax.planning.program import Program
from lm_jax.planning.topology import Topology, coordinates
from lm_jax.training import trainable

KERNELS_FAST, KERNELS_SLOW = 0.7, 0.45
PRODUCTS_SLOW, PRODUCTS_GPU = 0.7, 0.8


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, a device."""

    fast: float
    slow: float
    compiler: float  # by the first model
    sequence: float  # by the second
    model_flops: float  # of a step, all devices: the convention of lm_jax.model.flops
    executed_flops: float  # with what is computed again
    peak: float  # FLOP/s of all devices
    computing: float  # by the compiler's cycles
    kernels: float
    memory: float  # at the full bandwidth of HBM
    waiting: float  # collectives that nothing runs beside
    beside: float  # collectives that run beside computation

    @property
    def mfu(self) -> tuple[float, float]:
        """(low, high)."""
        return tuple(self.model_flops / (t * self.peak) for t in (self.slow, self.fast))


def estimate(
    config: Config,
    topology: Topology,
    program: Program,
    module: Module,
    found: list[Collective],
) -> Estimate:
    chip, n = topology.chip, topology.devices
    peak = peak_flops(chip.kind)
    work = program.work.used(keys_seen(config), rows_used(config, program))
    executed, kernels = work.total / n, work.kernels / n
    memory = traffic(module) / chip.hbm_bandwidth
    if chip.flops_per_cycle:
        computing = cycles(module) * chip.flops_per_cycle / peak
    else:
        computing = max((executed - kernels) / (PRODUCTS_GPU * peak), memory)
    waiting, links, network = 0.0, 0.0, 0.0
    places = coordinates(program.mesh.devices)
    for c in found:
        seconds = c.times * seconds_of(c, topology, places)
        if not c.asynchronous:
            waiting += seconds
        elif across(c, topology, places):
            network += seconds
        else:
            links += seconds
    fused = computing + kernels / (KERNELS_FAST * peak) + waiting
    compiler = max(fused, links, network, executed / peak)
    sequence = (executed - kernels) / (PRODUCTS_SLOW * peak) + kernels / (KERNELS_SLOW * peak)
    sequence += memory + waiting + links + network
    sequence = max(sequence, executed / peak)
    return Estimate(
        fast=min(compiler, sequence),
        slow=max(compiler, sequence),
        compiler=compiler,
        sequence=sequence,
        model_flops=model_flops(config, program),
        executed_flops=work.total,
        peak=peak * n,
        computing=computing,
        kernels=kernels / (KERNELS_FAST * peak),
        memory=memory,
        waiting=waiting,
        beside=links + network,
    )


def keys_seen(config: Config) -> float:
    """The share of the scores that an attention kernel computes: those seen, by the causal mask and
    the windows, and a sixteenth for blocks seen in part."""
    windows, kinds_L = layer_kinds(config.model)
    length, total = config.data.length, 0.0
    for kind in kinds_L:
        window = min(windows[kind] or length, length)
        total += window - window**2 / (2 * length) if config.model.causal else length
    return min(1.0, total / len(kinds_L) / length + 1 / 16)


def rows_used(config: Config, program: Program) -> float:
    """The share of the rows of the experts' buffer that hold a token, if all are chosen alike."""
    moe = config.model.moe
    if not moe.experts:
        return 1.0
    here = moe.experts / program.mesh.shape["expert"]
    return moe.experts_per_token * here / moe.experts / min(moe.experts_per_token, here)


def model_flops(config: Config, program: Program) -> float:
    """FLOPs of a step as `train` counts them for its MFU."""
    frozen = trainable.frozen_in_products(
        params_lib.split(program.step.skeleton), program.step.rates, config.model
    )
    data = config.data
    a_token = training_flops_per_token(config.model, data.length, data.predictions, frozen)
    return a_token * data.batch_size * data.length


def cycles(module: Module) -> float:
    """The compiler's cycles of a step: of what runs by itself, times the turns of its loops."""
    total = 0.0
    for place in module.places():
        text = place.instruction.rest
        at = text.find('"estimated_cycles":"')
        if at >= 0 and not place.asynchronous:
            start = at + len('"estimated_cycles":"')
            total += place.times * int(text[start : text.index('"', start)])
    return total


_NO_TRAFFIC = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "async-start", "async-update", "async-done", "copy-done",
    "send", "send-done", "recv", "recv-done", "slice-done", "opt-barrier", "iota",
}  # fmt: skip


def traffic(module: Module) -> float:
    """Bytes that a step moves from and to HBM. Of an array of which only a slice is taken or put,
    the slice counts."""
    total = 0.0
    for place in module.places():
        instruction = place.instruction
        if instruction.opcode not in _NO_TRAFFIC:
            total += place.times * _moved(module, place.computation, instruction)
    return total


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    inner = None
    if instruction.opcode == "fusion":
        inner = module.computations.get((instruction.called or [""])[0])
    if instruction.opcode in ("copy-start", "slice-start"):  # from HBM to VMEM, or back
        return min((a.bytes for a in instruction.arrays[:2]), default=0)
    total = 0
    for i, name in enumerate(instruction.operands):
        operand = computation.instructions.get(name)
        if operand is None:
            continue
        size = sum(a.bytes for a in operand.arrays if not a.fast)
        if inner is not None and i < len(inner.parameters):
            size = min(size, _taken(inner, inner.parameters[i].name, size))
        elif instruction.opcode in ("dynamic-slice", "gather") and i == 0:
            size = min(size, instruction.bytes)
        elif instruction.opcode == "dynamic-update-slice" and i == 0:
            size = 0
        total += size
    return total + _put(computation, instruction, inner)


def _taken(inner: Computation, parameter: str, size: int) -> int:
    """Bytes of a fusion's operand that it reads."""
    total = 0
    for user in inner.users.get(parameter, []):
        if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter:
            continue
        elif user.opcode == "bitcast":
            total += _taken(inner, user.name, size)
        else:
            return size
    return total


def _put(computation: Computation, instruction: Instruction, inner: Computation | None) -> int:
    size = sum(a.bytes for a in instruction.arrays if not a.fast)
    if instruction.opcode == "dynamic-update-slice":
        updated = computation.instructions.get(instruction.operands[1])
        return updated.bytes if updated else size
    if inner is None:
        return size
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[n] for n in inner.root.operands if n in inner.instructions]
    for root in roots:
        while root.opcode == "bitcast" and root.operands[0] in inner.instructions:
            root = inner.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice" and root.operands[1] in inner.instructions:
            updated = inner.instructions[root.operands[1]]
            size -= max(0, root.bytes - updated.bytes)
    return max(0, size)


def across(c: Collective, topology: Topology, places: np.ndarray) -> bool:
    """Whether a group's members lie in several slices, or nodes."""
    return c.groups is None or bool(_spans(c.groups, places)[: _outer(topology)].any())


def _outer(topology: Topology) -> int:
    return 1 if topology.chip.flops_per_cycle else 2  # of GPUs the node as well


def _spans(groups: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Along which coordinates the members of some group differ: bool [dims]."""
    of_members = places[groups]  # [groups, members, dims]
    return (of_members != of_members[:, :1]).any(axis=(0, 1))


def seconds_of(c: Collective, topology: Topology, places: np.ndarray) -> float:
    """Of one collective, by its bytes and the links between the members of its groups."""
    chip, members = topology.chip, topology.slices if c.groups is None else c.groups.shape[1]
    if members < 2:
        return 0.0
    if across(c, topology, places):
        bandwidth = chip.network
    else:
        bandwidth = _bandwidth(chip, topology, _spans(c.groups, places)[_outer(topology) :])
    share = (members - 1) / members
    match c.kind:
        case "all-reduce":
            return 2 * share * c.bytes / bandwidth
        case "all-gather" | "reduce-scatter":
            return share * c.bytes / bandwidth
        case "all-to-all" | "ragged-all-to-all":
            return share * c.bytes / bandwidth
    return c.bytes / bandwidth


def _bandwidth(chip: Chip, topology: Topology, spans: np.ndarray) -> float:
    """Bytes/s that a device sends over the dimensions of the torus that a group spans."""
    if not chip.flops_per_cycle:
        return chip.links
    rings = (*topology.wraps, *(False,) * 3)
    used = [1.0 if rings[i] else 0.5 for i, spanned in enumerate(spans[:3]) if spanned]
    # Two cores of one chip that no dimension of the torus separates.
    return chip.links * (sum(used) or 1.0)
