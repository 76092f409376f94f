"""What to change so that a config fits: found by compiling it, not by a formula."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm_jax.config import Config
from lm_jax.errors import UserError
from lm_jax.planning.program import compile_step
from lm_jax.planning.report import Report, Suggestion, make_report
from lm_jax.sharding.mesh import batch_shards, make_mesh
from lm_jax.training.masking import Masking

Changes = dict[str, Any]
_TRIES = 16


def flags_of(changes: Changes) -> tuple[str, ...]:
    return tuple(f"--config.{key}={value}" for key, value in changes.items())


def changed(config: Config, changes: Changes) -> Config:
    """A copy of `config` with some keys set, and what follows from them."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    if {"training.accumulation", "data.batch_size"} & changes.keys():
        rows = config.data.batch_size // config.training.accumulation
        config.training.evaluate_batch_size = rows
    return config


def suggest(
    report: Report,
    masking: Masking | None,
    devices: list[jax.Device],
    seconds: float = 100.0,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """`report`, of a config that does not fit, with changes with which it does.

    What costs least comes first: computing activations again, sharing the state out, smaller parts
    of the batch, splitting rows and layers; a smaller batch, which changes what is learned, comes
    last. Gives up after `seconds`.
    """
    begun, tried = time.monotonic(), 0
    for changes in _candidates(report, devices):
        if time.monotonic() - begun > seconds or tried >= _TRIES:
            break
        config = changed(report.config, changes)
        say(f"trying {' '.join(flags_of(changes))}")
        try:
            program = compile_step(config, make_mesh(config.mesh, devices), masking)
        except UserError:
            continue  # the mesh does not divide this model
        tried += 1
        found = make_report(config, report.topology, program)
        if found.fits:
            total, mfu = program.memory.total, found.estimate.mfu
            suggestion = Suggestion(flags_of(changes), total, mfu)
            return dataclasses.replace(report, suggestion=suggestion, tried=tried)
    return dataclasses.replace(report, tried=tried)


def _candidates(report: Report, devices: list[jax.Device]) -> Iterator[Changes]:
    """Each with what came before it: it was not enough."""
    config, n = report.config, len(devices)
    changes: Changes = {}
    if config.model.remat != "full":
        changes["model.remat"] = "full"
        yield dict(changes)
    mesh = dict(report.program.mesh.shape)
    shards = batch_shards(report.program.mesh)
    across = report.topology.slices
    if mesh["data"] > across:
        changes |= {"mesh.data": across, "mesh.fsdp": -1}
        yield dict(changes)
    rows = config.data.batch_size // config.training.accumulation
    most = rows // shards * config.training.accumulation  # one row a device at a time
    parts = config.training.accumulation
    while parts < most:
        parts = next(p for p in range(2 * parts, 2 * most + 1) if config.data.batch_size % p == 0)
        parts = min(parts, most)
        changes["training.accumulation"] = parts
        yield dict(changes)
    shape = config.model
    for axis, limit in (
        ("sequence", config.data.length // 128),
        ("tensor", math.gcd(shape.kv_heads, shape.mlp_width, shape.vocab_size)),
    ):
        for size in (2, 4, 8, 16):
            if mesh[axis] < size <= limit and n % (size * across) == 0:
                # The rows at a time are spread over fewer devices, so there can be fewer.
                smaller = dict.fromkeys(("mesh.sequence", "mesh.tensor"), 1)
                smaller |= {f"mesh.{axis}": size, "mesh.data": across, "mesh.fsdp": -1}
                smaller["training.accumulation"] = min(config.data.batch_size, most * size)
                yield changes | smaller
    for rows in (shards * 2**i for i in range(int(math.log2(max(1, most))), -1, -1)):
        if rows < config.data.batch_size:
            yield changes | {"data.batch_size": rows, "training.accumulation": 1}
