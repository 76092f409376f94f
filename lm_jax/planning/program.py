"""Compiles a run's train step for devices that are not there, and keeps what the compiler says."""

import dataclasses
import glob
import os
import re
import tempfile
import time

import jax
from jax.sharding import Mesh

from lm_jax.config import Config
from lm_jax.planning.environment import compiled_anew, quiet
from lm_jax.planning.hlo import arrays_of
from lm_jax.planning.work import Work, traced_work
from lm_jax.training.checkpoint import abstract_parameters
from lm_jax.training.masking import Masking
from lm_jax.training.optimizer import check_rules
from lm_jax.training.program import abstract_batch, abstract_state, check_batch, jit_train_step
from lm_jax.training.step import Step, make_step, skeleton_of


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Something that is stored during a step and not before or after it."""

    bytes: int
    shape: str
    count: int  # of the same size and origin; they need not be there at the same time
    origin: str  # the operation that made it


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device."""

    parameters: int
    optimizer: int
    inputs: int  # the batch, and what layouts add to all of the arguments
    temporaries: int
    outputs: int  # that take no argument's place
    host: int = 0  # in the memory of the host: none of the total

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or one that did not fit."""

    mesh: Mesh
    step: Step
    work: Work
    seconds: float  # that tracing and compiling took
    memory: Memory | None  # None: it did not fit
    needed: int | None  # bytes a device that it would have needed, where the compiler says so
    text: str  # after the compiler's optimizations
    buffers: tuple[Buffer, ...]  # the largest first


def compile_step(config: Config, mesh: Mesh, masking: Masking | None = None) -> Program:
    """Compiles what `train` would run.

    Args:
      config: as `recipe.resolve` gives it, with its masking.

    Raises:
      UserError: the model or the batch does not fit the mesh.
    """
    begun = time.monotonic()
    check_batch(config, mesh)
    check_rules(list(abstract_parameters(skeleton_of(config.model), mesh)))
    step = make_step(config, masking)
    state, batch = abstract_state(step, mesh), abstract_batch(config.data, mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        traced = jit_train_step(step, mesh).trace(state, batch)
        work, memory, needed = traced_work(traced), None, None
        # The text of a step whose collectives run on SparseCores cannot be had in another way.
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with quiet(), compiled_anew():
                compiled = traced.lower().compile(compiler_options=dump)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            needed = _needed(str(e))
        else:
            memory = _memory(state, batch, compiled.memory_analysis())
        # The compiler's cycles stand in the last of its texts alone; GPUs and CPUs have no such.
        text = _newest(folder, "after_codegen.txt") or _newest(folder, "after_optimizations.txt")
        buffers = _buffers(_newest(folder, "after_optimizations-buffer-assignment.txt"), text)
    seconds = time.monotonic() - begun
    return Program(mesh, step, work, seconds, memory, needed, text, buffers)


def _memory(state, batch, analysis) -> Memory:
    def local(tree) -> int:
        return sum(
            x.dtype.itemsize * _size(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
        )

    parameters, optimizer = local((state.parameters, state.frozen)), local(state.optimizer)
    return Memory(
        parameters,
        optimizer,
        max(0, analysis.argument_size_in_bytes - parameters - optimizer),
        analysis.temp_size_in_bytes,
        max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        analysis.host_temp_size_in_bytes,
    )


def _size(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _needed(message: str) -> int | None:
    """'... HLO temporaries (1.64T) exceeds ...' -> bytes."""
    found = re.search(r"\(([\d.]+)([BKMGT]?)\) exceeds", message) or re.search(
        r"Used ([\d.]+)([BKMGT]?) of", message
    )
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _newest(folder: str, name: str) -> str:
    """The text of the last file that XLA dumped whose name ends so (CPUs and GPUs put theirs
    before it); '' if there is none."""
    paths = [p for p in glob.glob(os.path.join(folder, "*")) if p.endswith(name)]
    paths = [p for p in paths if ".jit_train." in p] or paths
    if not paths:
        return ""
    with open(max(paths, key=os.path.getmtime), encoding="utf-8", errors="replace") as f:
        return f.read()


def _buffers(assignment: str, text: str, most: int = 8) -> tuple[Buffer, ...]:
    """The largest temporaries of a buffer assignment, with the operations of the module's text."""
    origins = dict(re.findall(r'^\s+(?:ROOT )?%?(\S+) = .*?op_name="([^"]*)"', text, re.MULTILINE))
    found: dict[tuple[int, str, str], int] = {}
    inside = False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            fast = re.search(r"color ([1-9]\d*)", line)  # not HBM
            inside = "preallocated-temp" in line and not fast
        elif inside and (match := _VALUE.match(line)):
            name, size, shape = match[1], int(match[2]), match[3]
            arrays = arrays_of(shape)
            if len(arrays) == 1:
                key = size, str(arrays[0]), _short(origins.get(name, name))
                found[key] = found.get(key, 0) + 1
    largest = sorted(found.items(), key=lambda item: -item[0][0])[:most]
    return tuple(Buffer(size, shape, n, origin) for (size, shape, origin), n in largest)


_VALUE = re.compile(r" value: <\d+ ([^\s{@]+)\S* @\d+> \(size=(\d+),offset=\d+\): (.*)")


def _short(op_name: str) -> str:
    """Without what all operations of a step have in common."""
    parts = [p for p in op_name.split("/") if p not in ("closed_call", "body", "checkpoint")]
    return "/".join(p for p in parts if not p.startswith("jit(train)")) or op_name
