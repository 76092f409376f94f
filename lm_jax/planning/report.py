"""One report of a plan: as text for a person, as JSON for a program."""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from lm_jax.config import Config
from lm_jax.errors import UserError
from lm_jax.model import parameters as params_lib
from lm_jax.model.attention import resolve_backend
from lm_jax.planning.chips import GIB
from lm_jax.planning.collectives import Collective, axes_of, collectives
from lm_jax.planning.estimate import Estimate, across, estimate
from lm_jax.planning.hlo import parse
from lm_jax.planning.program import Program
from lm_jax.planning.topology import Topology, coordinates
from lm_jax.sharding.mesh import batch_block


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, over the same axes."""

    kind: str
    axes: tuple[str, ...]  # of the mesh
    network: str  # 'links' of a slice or node, or 'network' between them
    in_program: int
    a_step: int  # with the turns of loops
    bytes: int  # a step
    asynchronous: int  # of `a_step`


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Changes of the config with which it was seen to fit."""

    flags: tuple[str, ...]
    total: int  # bytes a device
    mfu: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Report:
    config: Config
    topology: Topology
    program: Program
    attention: str
    traffic: tuple[Traffic, ...]
    estimate: Estimate | None  # None: it does not fit
    unknown_loops: int
    notes: tuple[str, ...]
    suggestion: Suggestion | None = None
    tried: int = 0  # other configs, in search of a suggestion

    @property
    def hbm(self) -> int:
        return int(self.topology.chip.hbm_gib * GIB)

    @property
    def fits(self) -> bool:
        return self.program.memory is not None and self.program.memory.total <= self.hbm


def make_report(config: Config, topology: Topology, program: Program) -> Report:
    """What a compiled program says of itself, and what follows from it."""
    mesh = program.mesh
    with jax.set_mesh(mesh):
        attention = resolve_backend(config.model, config.data.length)
    traffic, estimated, unknown = (), None, 0
    if program.text:
        module = parse(program.text)
        found = collectives(module, mesh.size // topology.slices)
        traffic, unknown = _traffic(found, topology, program), module.unknown_loops()
        if program.memory is not None:
            estimated = estimate(config, topology, program, module, found)
    notes = _notes(config, program)
    return Report(config, topology, program, attention, traffic, estimated, unknown, notes)


def _notes(config: Config, program: Program) -> tuple[str, ...]:
    """What `train` would refuse on so many hosts."""
    mesh, lanes = program.mesh, config.data.lanes
    try:
        _, parts = batch_block(mesh, mesh.devices.flat[0].process_index)
    except UserError as e:
        return (f"train refuses this mesh: {e}",)
    if lanes % parts:
        return (
            f"the hosts read {parts} different parts of a batch: data.lanes = {lanes} must be a"
            f" multiple of {parts} that divides data.batch_size: add --config.data.lanes={parts}",
        )
    return ()


def _traffic(found: list[Collective], topology: Topology, program: Program) -> tuple[Traffic, ...]:
    sizes, places = dict(program.mesh.shape), coordinates(program.mesh.devices)
    kinds = collections.defaultdict(list)
    for c in found:
        axes = ("data",) if c.groups is None else _axes(c.groups, sizes, topology.slices)
        network = "network" if across(c, topology, places) else "links"
        kinds[c.kind, axes, network].append(c)
    rows = [
        Traffic(
            *key,
            in_program=len(group),
            a_step=sum(c.times for c in group),
            bytes=sum(c.times * c.bytes for c in group),
            asynchronous=sum(c.times for c in group if c.asynchronous),
        )
        for key, group in kinds.items()
    ]
    return tuple(sorted(rows, key=lambda r: -r.bytes))


def _axes(groups: np.ndarray, sizes: dict[str, int], slices: int) -> tuple[str, ...]:
    """A program of several slices speaks of the devices of one."""
    if slices > 1:
        sizes = sizes | {"data": sizes["data"] // slices}
    return axes_of(groups, sizes)


def to_json(report: Report) -> dict[str, Any]:
    """Everything that the text says, as plain values."""
    config, program, e = report.config, report.program, report.estimate
    memory = program.memory
    out = {
        "topology": str(report.topology),
        "device_kind": report.topology.chip.kind,
        "devices": report.topology.devices,
        "mesh": dict(program.mesh.shape),
        "parameters": _count(program),
        "batch_size": config.data.batch_size,
        "length": config.data.length,
        "accumulation": config.training.accumulation,
        "remat": config.model.remat,
        "attention": report.attention,
        "vocab_size": config.model.vocab_size,
        "compile_seconds": round(program.seconds, 2),
        "fits": report.fits,
        "hbm_bytes": report.hbm,
        "memory_bytes": dataclasses.asdict(memory) | {"total": memory.total} if memory else None,
        "needed_bytes": program.needed,
        "buffers": [dataclasses.asdict(b) for b in program.buffers],
        "collectives": [dataclasses.asdict(t) for t in report.traffic],
        "loops_of_unknown_length": report.unknown_loops,
        "notes": list(report.notes),
        "estimate": None,
        "suggestion": dataclasses.asdict(report.suggestion) if report.suggestion else None,
    }
    if e is not None:
        out["estimate"] = dataclasses.asdict(e) | {"mfu": list(e.mfu)}
    return out


def _count(program: Program) -> int:
    return sum(x.size for x in params_lib.split(program.step.skeleton).values())


def to_text(report: Report) -> str:
    """The report for a person."""
    sections = [_head(report), _memory(report)]
    if report.traffic:
        sections.append(_collectives(report))
    if report.estimate is not None:
        sections.append(_estimate(report))
    sections.append("\n".join(f"note: {note}" for note in report.notes))
    if not report.fits:
        sections.append(_advice(report))
    return "\n\n".join(s for s in sections if s)


def _head(report: Report) -> str:
    config, program = report.config, report.program
    axes = " x ".join(f"{name} {n}" for name, n in program.mesh.shape.items() if n > 1) or "one"
    data, training = config.data, config.training
    return "\n".join(
        [
            f"plan for {report.topology}: {report.topology.devices} devices ({axes}),"
            f" {report.topology.chip.kind}; compiled in {program.seconds:.0f} s, nothing was run",
            f"model: {_count(program):,} parameters, {config.model.dtype}, vocabulary"
            f" {config.model.vocab_size:,}, attention {report.attention}, remat"
            f" {config.model.remat}",
            f"batch: {data.batch_size} x {data.length} tokens in {training.accumulation} part(s)",
        ]
    )


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}" if n == 0 or n >= GIB / 200 else "<0.01"


def _memory(report: Report) -> str:
    memory, program = report.program.memory, report.program
    lines = ["memory, GiB a device"]
    if memory is not None:
        for name, label in (
            ("parameters", "parameters"),
            ("optimizer", "optimizer state"),
            ("inputs", "batch, padding"),
            ("temporaries", "activations and other temporaries"),
            ("outputs", "outputs"),
        ):
            lines.append(f"  {_gib(getattr(memory, name)):>8}  {label}")
        if memory.host:
            lines.append(f"  {_gib(memory.host):>8}  and this in the memory of the host")
        verdict = "fits" if report.fits else "DOES NOT FIT"
        lines.append(f"  {_gib(memory.total):>8}  of {report.topology.chip.hbm_gib}: {verdict}")
    else:
        needed = f"needs {_gib(program.needed)}" if program.needed else "needs more than there is"
        lines.append(f"  DOES NOT FIT: {needed} of {report.topology.chip.hbm_gib}")
    if program.buffers:
        lines.append("  the largest temporaries (not all of them are there at the same time):")
        for b in program.buffers[: 8 if not report.fits else 4]:
            many = f"{b.count} x " if b.count > 1 else ""
            lines.append(f"  {_gib(b.bytes):>8}  {many}{b.shape}  {b.origin}")
    return "\n".join(lines)


def _advice(report: Report) -> str:
    s = report.suggestion
    if s is None:
        tried = f" ({report.tried} changes were tried)" if report.tried else ""
        return f"no change was found that fits{tried}: take more devices or a smaller model"
    low, high = s.mfu
    return (
        f"this fits, with {_gib(s.total)} GiB a device and an estimated {low:.0%} to {high:.0%}"
        f" MFU; add:\n  {' '.join(s.flags)}"
    )


def _collectives(report: Report) -> str:
    rows = [("collectives", "program", "a step", "GiB a step", "over", "beside computation")]
    for t in report.traffic:
        over = " x ".join(t.axes) or "-"
        if t.network == "network":
            over += " (between slices)" if report.topology.slices > 1 else " (between nodes)"
        beside = {0: "no", t.a_step: "yes"}.get(t.asynchronous, f"{t.asynchronous} of {t.a_step}")
        size = _gib(t.bytes)
        rows.append((t.kind, str(t.in_program), str(t.a_step), size, over, beside))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0] + 2)]
        cells += [cell.rjust(w) for cell, w in zip(row[1:4], widths[1:4], strict=True)]
        cells += [cell.ljust(w) for cell, w in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    if report.unknown_loops:
        lines.append(f"{report.unknown_loops} loop(s) do not say how often they run: counted once")
    return "\n".join(lines)


def _estimate(report: Report) -> str:
    e, data = report.estimate, report.config.data
    low, high = e.mfu
    tokens = data.batch_size * data.length
    again = e.executed_flops / e.model_flops - 1
    cycles = report.topology.chip.flops_per_cycle is not None
    source = "the compiler's cycles" if cycles else "products at 80% of the peak, or HBM"
    return "\n".join(
        [
            "estimate, not a measurement",
            f"  a step: {e.fast:.3g} to {e.slow:.3g} s, {tokens / e.slow:,.0f} to"
            f" {tokens / e.fast:,.0f} tokens/s, {low:.0%} to {high:.0%} MFU",
            f"  model FLOPs a step: {e.model_flops:.4g} (6 a parameter and token, attention halved"
            f" where causal); executed: {again:+.0%}",
            f"  a device, in s: computing {e.computing:.3g} ({source}), kernels"
            f" {e.kernels:.3g}, HBM {e.memory:.3g}, collectives {e.waiting:.3g} alone and"
            f" {e.beside:.3g} beside computation",
            "  the range is that of two models, which time products each in their own way; either"
            " may say less:",
            f"    {e.compiler:.3g} s: products by {source}; what can run at the same time does",
            f"    {e.sequence:.3g} s: products at 70% of the peak; one thing runs after the other",
            "  left out: reading data, logging, saving, waiting for other hosts, latencies",
        ]
    )
