"""Tries meshes, rematerialization and parts of the batch, the most promising first."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm_jax.config import Config, walk
from lm_jax.errors import UserError
from lm_jax.model.flops import matrix_parameters, peak_flops, training_flops_per_token
from lm_jax.planning.chips import GIB
from lm_jax.planning.program import compile_step
from lm_jax.planning.report import make_report
from lm_jax.planning.suggest import Changes, changed, flags_of
from lm_jax.planning.topology import Topology
from lm_jax.sharding.mesh import make_mesh
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


@dataclasses.dataclass(frozen=True)
class Row:
    """One that fits."""

    flags: tuple[str, ...]
    total: int  # bytes a device
    fast: float  # seconds
    slow: float
    mfu: tuple[float, float]

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
) -> list[Row]:
    """What fits of what could be compiled in so many minutes, the best first (by the middle of the
    estimated range). The batch of a step stays as it is: its parts change."""
    begun, rows = time.monotonic(), []
    order = sorted(_candidates(config, topology), key=lambda c: _cost(config, c, topology))
    for i, changes in enumerate(order):
        if time.monotonic() - begun > minutes * 60:
            break
        flags = flags_of(_differing(config, changes))
        candidate = changed(config, changes)
        try:
            program = compile_step(candidate, make_mesh(candidate.mesh, devices), masking)
        except UserError:
            continue  # the mesh does not divide this model
        report = make_report(candidate, topology, program)
        said = "does not fit"
        if report.fits:
            e, total = report.estimate, program.memory.total
            rows.append(Row(flags, total, e.fast, e.slow, e.mfu))
            said = f"{e.mfu[0]:.0%} to {e.mfu[1]:.0%} MFU, {total / GIB:.2f} GiB"
        left = max(0.0, minutes - (time.monotonic() - begun) / 60)
        say(f"[{i + 1}/{len(order)}, {left:.1f} min left] {' '.join(flags)}: {said}")
    return sorted(rows, key=lambda r: -math.sqrt(r.mfu[0] * r.mfu[1]))


def _differing(config: Config, changes: Changes) -> Changes:
    now = {key: value for key, value, _ in walk(config)}
    return {key: value for key, value in changes.items() if now[key] != value}


def _candidates(config: Config, topology: Topology) -> Iterator[Changes]:
    n, slices, model = topology.devices, topology.slices, config.model
    powers = [2**i for i in range(12)]
    tensors = [
        t
        for t in powers
        if t <= 8 and model.kv_heads % t == model.mlp_width % t == model.vocab_size % t == 0
    ]
    sequences = [s for s in powers if s <= 4 and config.data.length % (128 * s) == 0] or [1]
    for tensor, sequence in itertools.product(tensors, sequences):
        if n % (tensor * sequence * slices):
            continue
        shards = n // (tensor * sequence)
        for fsdp in (f for f in powers if (shards // slices) % f == 0):
            for parts in (p for p in powers if config.data.batch_size % (p * shards) == 0):
                for remat in _REMAT:
                    yield {
                        "mesh.data": shards // fsdp,
                        "mesh.fsdp": fsdp,
                        "mesh.tensor": tensor,
                        "mesh.sequence": sequence,
                        "model.remat": remat,
                        "training.accumulation": parts,
                    }


def _cost(config: Config, changes: Changes, topology: Topology) -> float:
    """Seconds of a step by a rough model; what will hardly fit comes last."""
    model, data, chip = config.model, config.data, topology.chip
    n = topology.devices
    fsdp, tensor = changes["mesh.fsdp"] * changes["mesh.sequence"], changes["mesh.tensor"]
    again, widths = _REMAT[changes["model.remat"]]
    parts = changes["training.accumulation"]
    size = matrix_parameters(model) + model.vocab_size * model.width
    tokens = data.batch_size * data.length
    a_device = tokens / (parts * n / tensor)  # tokens at a time that share a device's layers

    held = 16 * size / (fsdp * tensor)  # parameters, two moments and a gradient, of 4 bytes
    kept = 2 * a_device * model.layers * model.width * (2 + (widths - 2) / tensor)
    memory = held + kept + 8 * size / (model.layers * tensor)

    peak = peak_flops(chip.kind)
    flops = training_flops_per_token(model, data.length, data.predictions) * tokens / n
    seconds = flops * (1 + again) / (0.6 * peak)
    links = chip.links * chip.dimensions
    moved = 0.0
    if fsdp > 1:  # gathered twice or three times in bfloat16, gradients scattered, for each part
        moved += parts * (2 * (2 + (again > 0.2)) + 2) * size / tensor
    if changes["mesh.data"] > 1:
        moved += 2 * 4 * size / (fsdp * tensor)
    if tensor > 1:
        moved += parts * 8 * 2 * 2 * model.layers * a_device * model.width / tensor
    seconds += 0.5 * moved / links
    return seconds + (1e6 + memory / GIB if memory > 1.2 * chip.hbm_gib * GIB else 0.0)
