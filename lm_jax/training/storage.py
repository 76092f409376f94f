"""How orbax is to write and read the items of a checkpoint."""

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.metadata import array_metadata_store  # it has no public name

# Replicas of an array save a part of it each, where the parts are at least so large: each shape of
# a part is a program of its own to compile, which stands in front of a run's first save.
_LEAST_PART_BYTES = 1 << 20
# Of what a process restores, what it may have in memory twice: as read, and on its devices.
_SHARE_READ_AT_A_TIME = 0.25

ARRAYS = ("parameters", "optimizer")  # the items that are trees of arrays
JSON = ("data", "sums")  # and those that are JSON


def writer(folder: str, keep: int, keep_every: int | None) -> ocp.CheckpointManager:
    """What saves checkpoints in `folder`, and removes old ones once a new one is there."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every,
        cleanup_tmp_directories=True,  # what a killed save left
    )
    return ocp.CheckpointManager(folder, options=options, item_handlers=_handlers())


def reader(folder: str, abstract: Iterable[jax.ShapeDtypeStruct] = ()) -> ocp.CheckpointManager:
    """What reads checkpoints from `folder`. Of several processes each reads for itself, so that one
    that cannot leaves none waiting.

    Args:
      abstract: what is going to be read, with its shardings. Parts of it are, one after the other,
        lest all of it be in memory twice.
    """
    arrays = list(abstract)
    gigabytes = None
    if arrays:
        # orbax refuses to read more of an array at once, and it may be stored as a whole.
        largest = max(x.size * x.dtype.itemsize for x in arrays)
        most = max(_SHARE_READ_AT_A_TIME * sum(map(_bytes_here, arrays)), largest + 1)
        gigabytes = most / 1e9
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, multiprocessing_options=alone
    )
    return ocp.CheckpointManager(folder, options=options, item_handlers=_handlers(gigabytes))


def shapes(item: Any) -> dict[str, tuple[int, ...]]:
    """Those of a tree of arrays by name, whatever else the checkpoint holds.

    Args:
      item: its folder, as a manager's `directory` names it.

    Raises:
      Exception: any; what orbax raises where it cannot be read.
    """
    found = _array_handler(None).metadata(item)
    return {name: tuple(x.shape) for name, x in getattr(found, "tree", found).items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what orbax leaves behind of a read that failed from printing tracebacks when it is
    collected, which whoever enters this sees to, inside it: it is told in one message."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def onto(abstract: Any, mesh: Mesh) -> ocp.args.PyTreeRestore:
    """How abstract arrays are to be restored: as their shardings say, on the devices of `mesh`."""

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec  # None: a constant, such as a count
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    wanted = jax.tree.map(placed, abstract)
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    return ocp.args.PyTreeRestore(wanted, restore_args=how)


def _handlers(gigabytes: float | None = None) -> dict[str, Any]:
    """What writes and reads each item.

    Args:
      gigabytes: read at a time, of each; None: orbax's 96.
    """
    arrays = {name: _array_handler(gigabytes) for name in ARRAYS}
    return arrays | {name: ocp.JsonCheckpointHandler() for name in JSON}


def _array_handler(gigabytes: float | None) -> ocp.PyTreeCheckpointHandler:
    """Writes and reads trees of arrays: not compressed, as weights hardly get smaller by it, and
    take longer to read than a disk takes."""
    types = ocp.type_handlers
    arrays = types.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_LEAST_PART_BYTES,
        # As orbax's own has it: each process notes what it wrote, and the first compares the notes.
        array_metadata_store=array_metadata_store.Store(),
    )
    others = [(t, types.get_type_handler(t)) for t in types.supported_types() if t is not jax.Array]
    registry = types.create_type_handler_registry(*others, (jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, restore_concurrent_gb=gigabytes
    )


def _bytes_here(x: jax.ShapeDtypeStruct) -> int:
    """Of the parts of an array that this process has, each of them once."""
    parts = {str(i) for i in x.sharding.addressable_devices_indices_map(x.shape).values()}
    return len(parts) * math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
