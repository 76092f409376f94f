"""The collectives of a compiled module: which, how many, how large, over which mesh axes.

Bytes are those of the whole array that a group works on: what an all-gather gives, what a
reduce-scatter takes, what an all-reduce, an all-to-all or a permute passes on.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from lm_jax.planning.hlo import Instruction, Module

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_PERMUTE = "collective-permute"


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int
    groups: np.ndarray | None  # device numbers [groups, members]; None: between slices
    times: int  # a step
    asynchronous: bool
    op_name: str


def collectives(module: Module, devices: int) -> list[Collective]:
    """Each one of the program, once, whatever the number of instructions that it is spread over:
    one that runs inside of products begins, goes on and ends in fusions of the same channel.

    Args:
      devices: of the job; of several slices, those of one.
    """
    out, parts, begun = [], {}, set()
    for place in module.places():
        outer = place.instruction
        if outer.opcode != "fusion":
            if kind := kind_of(outer):
                hidden = place.asynchronous or outer.opcode.endswith("-start")
                hidden |= outer.opcode == "send"
                out.append(_collective(outer, kind, place.times, hidden, devices))
            continue
        inside = list(module.inside(outer))
        targets = {_target(i) or "" for _, i in inside}
        hidden = any(t.startswith("AsyncCollective") for t in targets)
        hidden |= any("async_collective" in c.name for c, _ in inside)
        for computation, instruction in inside:
            kind = kind_of(instruction)
            if kind is None:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
                kind = "reduce-scatter"
            found = _collective(
                instruction, kind, place.times, hidden or place.asynchronous, devices
            )
            channel = instruction.attribute("channel_id")
            if not hidden or "AsyncCollectiveStart" in targets:
                out.append(found)
                begun.add(channel)
            else:  # goes on or ends here
                parts.setdefault((channel, kind, place.computation.name), found)
    return out + [found for (channel, *_), found in parts.items() if channel not in begun]


def _collective(
    instruction: Instruction, kind: str, times: int, hidden: bool, devices: int
) -> Collective:
    groups = _groups(instruction, devices)
    size = _bytes(instruction, kind, 1 if groups is None else groups.shape[1])
    return Collective(kind, size, groups, times, hidden, instruction.op_name)


def _target(instruction: Instruction) -> str | None:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return found[1] if found else None


def kind_of(instruction: Instruction) -> str | None:
    """'all-gather' of all-gather and all-gather-start; None of what is no collective's beginning.

    A 'send' to the runtime that connects slices is what its transfer says.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in KINDS:
        return opcode
    if instruction.opcode == "send":
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
        kind = found[1].lower().replace("_", "-") if found else ""
        return kind if kind in KINDS else (_PERMUTE if found else None)
    return None


def _bytes(instruction: Instruction, kind: str, members: int) -> int:
    arrays, total = instruction.arrays, instruction.bytes
    if instruction.opcode in ("send", f"{_PERMUTE}-start", f"{_PERMUTE}"):
        return arrays[0].bytes if arrays else 0
    if instruction.opcode == "all-gather-start":  # what goes in stands beside what comes out
        return total * members // (members + 1)
    if kind == "reduce-scatter" and instruction.opcode != "all-reduce":
        return total * members
    if instruction.opcode == "all-to-all-start":
        return total // 2
    return total


def _groups(instruction: Instruction, devices: int) -> np.ndarray | None:
    if instruction.opcode == "send":
        return None
    pairs = re.search(r"source_target_pairs=(\{\{.*?\}\}|\{\})", instruction.rest)
    if pairs:
        ids = [int(n) for n in re.findall(r"\d+", pairs[1])]
        return np.array(ids, int).reshape(-1, 2)
    found = re.search(
        r"replica_groups=(mesh\[.*?\](?:, ?device_ids=\(.*?\)\)?)? ?\{.*?\}|\{\{.*?\}\}|\{\}"
        r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)",
        instruction.rest,
    )
    return replica_groups(found[1] if found else "{}", devices)


def replica_groups(text: str, devices: int) -> np.ndarray:
    """Device numbers [groups, members] of any form that XLA writes.

      {{0,1},{2,3}}             listed; {} is one group of all
      [2,2]<=[2,2]T(1,0)        numbers 0, 1, ... in the shape on the right, transposed, reshaped
      mesh['a'=2,'b'=2] {'b'}   the axes of a mesh, of which 'b':(1)2 is a part of one; with
                                device_ids=([2,2]T(1,0)) its devices are in this order

    Raises:
      ValueError: another form.
    """
    if text == "{}":
        return np.arange(devices)[None]
    if text.startswith("{{"):
        groups = [[int(n) for n in part.split(",")] for part in re.findall(r"[\d,]+\d|\d", text)]
        return np.array(groups)
    if match := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, tiles, order = (_numbers(part) for part in match.groups())
        ids = np.arange(np.prod(tiles)).reshape(tiles)
        return ids.transpose(order or range(ids.ndim)).reshape(shape)
    if match := re.fullmatch(
        r"mesh\[(.*?)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{(.*?)\}", text
    ):
        axes, tiles, order, over = match.groups()
        groups = _mesh_groups(re.findall(r"'([^']+)'=(\d+)", axes), over)
        if tiles is None:
            return groups
        ids = np.arange(np.prod(_numbers(tiles))).reshape(_numbers(tiles))
        return ids.transpose(_numbers(order) or range(ids.ndim)).ravel()[groups]
    raise ValueError(f"replica groups of a form that is not known: {text}")


def _mesh_groups(axes: Sequence[tuple[str, str]], over: str) -> np.ndarray:
    """Groups along some axes of a mesh, or along parts 'name':(before)size of them."""
    dims: list[tuple[str, int, int]] = [(name, 1, int(n)) for name, n in axes]  # before, size
    chosen = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        if size:
            at = next(i for i, d in enumerate(dims) if d[0] == name)
            whole = dims[at][2]
            parts = [(name, 1, int(before)), (name, int(before), int(size))]
            parts.append((name, -1, whole // int(before) // int(size)))
            dims[at : at + 1] = parts
            chosen.append((name, int(before), int(size)))
        else:
            chosen.append((name, 1, int(dict(axes)[name])))
    ids = np.arange(np.prod([d[2] for d in dims])).reshape([d[2] for d in dims])
    inner = [dims.index(c) for c in chosen]
    outer = [i for i in range(len(dims)) if i not in inner]
    members = int(np.prod([dims[i][2] for i in inner]))
    return ids.transpose(outer + inner).reshape(-1, members)


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def axes_of(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(sizes.values())), axis=-1)  # [G, M, axes]
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, d in zip(sizes, differ) if d)
