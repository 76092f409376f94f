"""The collectives of a compiled module: which, how many, how large, over which mesh axes.

Bytes are those of the whole array that a group works on: what an all-gather gives, what a
reduce-scatter takes, what an all-reduce, an all-to-all or a permute passes on.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from lm_jax.planning.hlo import Instruction, Module, arrays_of

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
    """Each one of the program, once, whatever the number of instructions that it is spread over.

    The parts of one have the same channel: the fusions in which it begins, goes on and ends, say.

    Args:
      devices: of the job; of several slices, those of one.
    """
    found: dict[tuple, list[tuple[Instruction, int, bool, bool]]] = {}
    for place in module.places():
        outer = place.instruction
        if outer.opcode == "fusion":
            inside = list(module.inside(outer))
            targets = {i.attribute("custom_call_target") or _target(i) for _, i in inside}
            hidden = any(t and t.startswith("AsyncCollective") for t in targets)
            hidden |= any("async_collective" in c.name for c, _ in inside)
            # A part that does not begin it is not one more.
            begins = not hidden or "AsyncCollectiveStart" in targets
            scatters = any("all-reduce-scatter" in c.name for c, _ in inside)
            candidates = [(i, hidden, begins, scatters) for _, i in inside]
        else:
            candidates = [(outer, False, True, False)]
        for instruction, hidden, begins, scatters in candidates:
            kind = kind_of(instruction)
            if kind is None:
                continue
            kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
            hidden |= place.asynchronous or instruction.opcode.endswith("-start")
            hidden |= instruction.opcode == "send"
            channel = _channel(instruction) or f"{place.computation.name}/{instruction.name}"
            where = (place.computation.name, place.times, channel, kind)
            found.setdefault(where, []).append((instruction, place.times, hidden, begins))
    begun = {key[2] for key, parts in found.items() if any(begins for *_, begins in parts)}
    out = []
    for (_, _, channel, kind), parts in found.items():
        starts = [part for part in parts if part[3]]
        if not starts and channel in begun:
            continue  # begun elsewhere: the end of one that a loop carries over
        instruction, times, _, _ = (starts or parts)[0]
        groups = _groups(instruction, devices)
        size = _bytes(instruction, kind, 1 if groups is None else groups.shape[1])
        hidden = all(hidden for _, _, hidden, _ in parts)
        out.append(Collective(kind, size, groups, times, hidden, instruction.op_name))
    return out


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


def _channel(instruction: Instruction) -> str | None:
    return instruction.attribute("channel_id")


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
        r"replica_groups=(mesh\[.*?\] ?\{.*?\}(?:, ?device_ids=\S+)?|\{\{.*?\}\}|\{\}"
        r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)",
        instruction.rest,
    )
    return replica_groups(found[1] if found else "{}", devices)


def replica_groups(text: str, devices: int) -> np.ndarray:
    """Device numbers [groups, members] of any form that XLA writes.

      {{0,1},{2,3}}             listed; {} is one group of all
      [2,2]<=[2,2]T(1,0)        numbers 0, 1, ... in the shape on the right, transposed, reshaped
      mesh['a'=2,'b'=2] {'b'}   the axes of a mesh, of which 'b':(1)2 is a part of one

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
    if match := re.fullmatch(r"mesh\[(.*?)\] ?\{(.*?)\}.*", text):
        return _mesh_groups(re.findall(r"'([^']+)'=(\d+)", match[1]), match[2])
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


def bytes_of_shape(shape: str) -> int:
    return sum(a.bytes for a in arrays_of(shape))
