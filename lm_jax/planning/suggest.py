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
from lm_jax.model import parameters as params_lib
from lm_jax.planning.program import compile_step
from lm_jax.planning.report import Report, Suggestion, make_report
from lm_jax.sharding.mesh import batch_shards, make_mesh
from lm_jax.training.masking import Masking

Changes = dict[str, Any]
_TRIES = 16
SECONDS = 100.0  # after which, with the first compilation, a search for what fits gives up


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
    seconds: float = SECONDS,
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
    """Each with what came before it and was not enough."""
    config, n, slices = report.config, len(devices), report.topology.slices
    mesh, shards = dict(report.program.mesh.shape), batch_shards(report.program.mesh)
    changes: Changes = {}
    if config.model.remat not in ("full", "offload"):
        changes["model.remat"] = "full"
        yield dict(changes)
    if mesh["data"] > slices and _state(report) * (1 - slices / mesh["data"]) > report.hbm / 20:
        changes |= {"mesh.data": slices, "mesh.fsdp": -1}
        yield dict(changes)

    most = config.data.batch_size // shards  # parts of one row a device
    parts = _divisors(config.data.batch_size, config.training.accumulation, most)
    # The compiler says how much it needed: what is far from enough is not tried.
    least = config.training.accumulation * (report.program.needed or 0) / report.hbm / 8
    for n_parts in [p for p in parts if p >= least] or parts[-1:]:
        changes["training.accumulation"] = n_parts
        yield dict(changes)
    for axis, limit in (
        ("sequence", config.data.length // 128),
        ("tensor", math.gcd(config.model.kv_heads, config.model.mlp_width)),
    ):
        for size in (2, 4, 8, 16):
            if mesh[axis] < size <= limit and n % (size * slices) == 0:
                # The rows are spread over fewer devices, so there can be fewer at a time.
                split = {f"mesh.{axis}": size, "mesh.data": slices, "mesh.fsdp": -1}
                split["training.accumulation"] = min(most * size, config.data.batch_size)
                yield changes | split
    if config.model.remat != "offload" and report.topology.chip.flops_per_cycle:
        yield changes | {"model.remat": "offload"}
    rows = most // 2 * shards
    while rows >= shards:
        yield changes | {"data.batch_size": rows, "training.accumulation": rows // shards}
        rows //= 2


def _state(report: Report) -> float:
    """Bytes a device of the parameters, their moments and gradients."""
    mesh = report.program.mesh.shape
    size = sum(x.size for x in params_lib.split(report.program.step.skeleton).values())
    return 16 * size / math.prod(mesh[a] for a in ("fsdp", "expert", "sequence", "tensor"))


def _divisors(n: int, above: int, most: int) -> list[int]:
    """Divisors of `n` above `above` and up to `most`, each at least about twice the one before."""
    out: list[int] = []
    for d in range(above + 1, most + 1):
        if n % d == 0 and (d >= 2 * (out[-1] if out else above) or d == most):
            out.append(d)
    return out
