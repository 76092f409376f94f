"""Tries meshes, rematerialization and parts of the batch: the most promising of each mesh first."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm_jax.config import Config
from lm_jax.config_keys import walk
from lm_jax.errors import UserError
from lm_jax.model.flops import (
    idle_parameters,
    matrix_parameters,
    peak_flops,
    training_flops_per_token,
)
from lm_jax.planning.chips import GIB
from lm_jax.planning.program import compile_step
from lm_jax.planning.report import make_report
from lm_jax.planning.suggest import Changes, changed, flags_of
from lm_jax.planning.topology import Topology
from lm_jax.sharding.mesh import AXES, make_mesh
from lm_jax.training.masking import Masking

# A rough model, for the order alone: what is computed again, as a share of the FLOPs, and the
# activations that a layer keeps, in widths of bfloat16 numbers a token.
_REMAT = {
    "none": (0.0, 34),
    "dots": (0.1, 16),
    "heads": (0.25, 5),
    "attention": (0.28, 3),
    "full": (0.33, 2),
}
AS_IT_IS = "(the config as it is)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One that fits."""

    flags: tuple[str, ...]  # none: the config as it is
    total: int  # bytes a device
    fast: float  # seconds
    slow: float
    mfu: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to, of `candidates` that it knew of."""

    rows: tuple[Row, ...]  # that fit, the best first, by the middle of the estimated range
    tried: int
    candidates: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def search(
    config: Config,
    topology: Topology,
    devices: list[jax.Device],
    masking: Masking | None,
    *,
    minutes: float,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """What fits of what could be compiled in so many minutes. The batch of a step stays as it is:
    its parts change."""
    begun, rows, tried = time.monotonic(), [], 0
    now = _as_it_is(config, devices)
    order = _ordered(now, list(_candidates(config, topology)), lambda c: _cost(config, c, topology))
    for changes in order:
        if time.monotonic() - begun > minutes * 60:
            break
        tried += 1
        different = {key: value for key, value in changes.items() if now[key] != value}
        flags, candidate = flags_of(different), changed(config, different)
        try:
            program = compile_step(candidate, make_mesh(candidate.mesh, devices), masking)
        except UserError as e:  # the mesh does not divide this model, say
            said = f"cannot be: {str(e).splitlines()[0]}"
        else:
            report, said = make_report(candidate, topology, program), "does not fit"
            if report.fits:
                e, total = report.estimate, program.memory.total
                rows.append(Row(flags, total, e.fast, e.slow, e.mfu))
                said = f"{e.mfu[0]:.0%} to {e.mfu[1]:.0%} MFU, {total / GIB:.2f} GiB"
        left = max(0.0, minutes - (time.monotonic() - begun) / 60)
        say(f"[{tried}/{len(order)}, {left:.1f} min left] {' '.join(flags) or AS_IT_IS}: {said}")
    rows.sort(key=lambda r: -math.sqrt(r.mfu[0] * r.mfu[1]))
    return Found(tuple(rows), tried, len(order))


def _as_it_is(config: Config, devices: list[jax.Device]) -> Changes:
    """What a candidate sets, of the config itself; -1 is told where the mesh fits the devices."""
    keys = {f"mesh.{axis}" for axis in AXES} | {"model.remat", "training.accumulation"}
    now = {key: value for key, value, _ in walk(config) if key in keys}
    try:
        mesh = make_mesh(config.mesh, devices)
    except UserError:  # it is tried all the same, and what is wrong with it said
        return now
    return now | {f"mesh.{axis}": mesh.shape[axis] for axis in AXES}


def _ordered(
    now: Changes, candidates: list[Changes], cost: Callable[[Changes], float]
) -> list[Changes]:
    """The config as it is, then the most promising of each mesh, then the others."""
    first, others, meshes = [now], [], set()
    for changes in sorted((c for c in candidates if c != now), key=cost):
        mesh = tuple(changes[f"mesh.{axis}"] for axis in AXES)
        (others if mesh in meshes else first).append(changes)
        meshes.add(mesh)
    return first + others


def _candidates(config: Config, topology: Topology) -> Iterator[Changes]:
    n, slices, model = topology.devices, topology.slices, config.model
    powers = [2**i for i in range(12)]
    tensors = [
        t
        for t in powers
        if t <= 8 and model.kv_heads % t == model.mlp_width % t == model.vocab_size % t == 0
    ]
    sequences = [s for s in powers if s <= 4 and config.data.length % (128 * s) == 0] or [1]
    experts = [e for e in powers if model.moe.experts and model.moe.experts % e == 0] or [1]
    all_parts = sorted({*powers, config.training.accumulation})
    for tensor, sequence, expert in itertools.product(tensors, sequences, experts):
        if n % (tensor * sequence * expert * slices):
            continue
        shards = n // (tensor * sequence)  # of the batch
        copies = shards // expert
        for fsdp in (f for f in powers if (copies // slices) % f == 0):
            for parts in (p for p in all_parts if config.data.batch_size % (p * shards) == 0):
                for remat in _REMAT:
                    yield {
                        "mesh.data": copies // fsdp,
                        "mesh.fsdp": fsdp,
                        "mesh.tensor": tensor,
                        "mesh.sequence": sequence,
                        "mesh.expert": expert,
                        "model.remat": remat,
                        "training.accumulation": parts,
                    }


def _cost(config: Config, changes: Changes, topology: Topology) -> float:
    """Seconds of a step by a rough model; what will hardly fit comes last."""
    model, data, chip = config.model, config.data, topology.chip
    n = topology.devices
    fsdp, tensor = changes["mesh.fsdp"] * changes["mesh.sequence"], changes["mesh.tensor"]
    expert, parts = changes["mesh.expert"], changes["training.accumulation"]
    again, widths = _REMAT[changes["model.remat"]]
    # All experts are stored, gathered and updated, not only those that a token goes to.
    an_expert = (3 if model.gated_mlp else 2) * model.width * model.mlp_width
    of_experts = model.layers * model.moe.experts * an_expert
    size = matrix_parameters(model) + idle_parameters(model) + model.vocab_size * model.width
    used = (size - of_experts + of_experts / expert) / tensor  # by a device, once gathered
    tokens = data.batch_size * data.length
    a_device = tokens / (parts * n / tensor)  # tokens at a time that share a device's layers

    held = 16 * size / (fsdp * expert * tensor)  # parameters, moments, a gradient, of 4 bytes each
    kept = 2 * a_device * model.layers * model.width * (2 + (widths - 2) / tensor)
    memory = held + kept + 8 * used / model.layers

    peak = peak_flops(chip.kind)
    flops = training_flops_per_token(model, data.length, data.predictions) * tokens / n
    seconds = flops * (1 + again) / (0.6 * peak)
    links = chip.links * chip.dimensions
    moved = 0.0
    # Gathered twice or three times in bfloat16, gradients scattered, for each part. Along their own
    # axis the experts stay where they are.
    if fsdp * expert > 1:
        gathered = used if fsdp > 1 else (size - of_experts) / tensor
        moved += parts * (2 * (2 + (again > 0.2)) + 2) * gathered
    if changes["mesh.data"] > 1:
        moved += 2 * 4 * size / (fsdp * expert * tensor)
    if tensor > 1:
        moved += parts * 8 * 2 * 2 * model.layers * a_device * model.width / tensor
    if expert > 1:  # tokens are gathered along the axis, and results scattered
        moved += parts * 4 * 2 * model.layers * a_device * model.width * (expert - 1) / tensor
    seconds += 0.5 * moved / links
    return seconds + (1e6 + memory / GIB if memory > 1.2 * chip.hbm_gib * GIB else 0.0)
