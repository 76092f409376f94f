"""Checkpoints: asynchronous and atomic, through orbax; parameters, optimizer and place in the data.

A checkpoint is a folder of three items: 'parameters' (a flat dict by name; of a model with adapters
the adapters alone), 'optimizer' (with the step) and 'data' (JSON: the state of each lane of the
input stream). Arrays are stored whole, whatever the mesh, and restored onto any other.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.metadata import array_metadata_store  # it has no public name

from lm_jax import paths
from lm_jax.config import CheckpointConfig
from lm_jax.errors import UserError
from lm_jax.model import parameters as params_lib
from lm_jax.model.lora import is_adapter
from lm_jax.model.parameters import Parameters
from lm_jax.model.transformer import Transformer, skeleton_of
from lm_jax.sharding.mesh import check_parameters
from lm_jax.training.step import TrainState

# Replicas of an array save a part of it each, where the parts are at least so large: each shape of
# a part is a program of its own to compile, which stands in front of a run's first save.
_LEAST_PART_BYTES = 1 << 20
# Of what a process restores, what it may have in memory twice: as read, and on its devices.
_SHARE_READ_AT_A_TIME = 0.25


def _handlers(gigabytes: float | None = None) -> dict[str, Any]:
    """What writes and reads each item.

    Args:
      gigabytes: read at a time, of each; None: orbax's 96.
    """
    arrays = _array_handler(gigabytes), _array_handler(gigabytes)
    return dict(zip(("parameters", "optimizer"), arrays)) | {"data": ocp.JsonCheckpointHandler()}


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


class Checkpoints:
    """The checkpoints of one workdir. Use as a context: leaving it waits for the last save."""

    def __init__(self, workdir: str, config: CheckpointConfig | None = None):
        """Opens them for reading, or for writing as well if `config` is given."""
        if paths.remote(workdir) and not workdir.startswith("gs://"):
            raise UserError(
                f"'{workdir}': checkpoints lie on a disk or in a bucket of Google's (gs://): copy"
                " them there, or name another workdir"
            )
        self.folder = os.path.join(paths.absolute(workdir), "checkpoints")
        options = (
            ocp.CheckpointManagerOptions(read_only=True)
            if config is None
            else ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                keep_period=config.keep_every,
                cleanup_tmp_directories=True,  # what a killed save left
            )
        )
        if config is not None:
            paths.makedirs(self.folder)
        elif not paths.isdir(self.folder):
            raise UserError(f"there is no checkpoint in '{workdir}'")
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=_handlers()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def choose(self, step: int | None) -> int:
        """`step`, or the newest.

        Raises:
          UserError: it is not there; the message lists those that are.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no finished checkpoint in '{self.folder}' yet")
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"no checkpoint of step {step} in '{self.folder}'; there are {there}")
        return steps[-1] if step is None else step

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Starts a save; returns when the device's arrays may be overwritten."""
        rest = {"step": state.step, "state": state.optimizer}
        with jax.transfer_guard("allow"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    parameters=ocp.args.PyTreeSave(stored(state.all_parameters)),
                    optimizer=ocp.args.PyTreeSave(rest),
                    data=ocp.args.JsonSave(_gather(data)),
                ),
            )

    def save_parameters(self, step: int, parameters: Parameters) -> None:
        """Saves a model to start from or to use, and nothing to go on with."""
        args = ocp.args.Composite(parameters=ocp.args.PyTreeSave(parameters))
        self._manager.save(step, args=args, force=True)  # else none before the newest is saved

    def delete(self, step: int) -> None:
        self._manager.delete(step)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(
        self, step: int, abstract: TrainState, mesh: Mesh, base: Parameters | None = None
    ) -> tuple[TrainState, dict]:
        """The state saved at `step`, sharded as `abstract` is, and the place in the data.

        Args:
          base: of a model with adapters, the parameters that are not saved with them.
        """
        wanted = stored(abstract.all_parameters)
        self._check(step, wanted)
        rest = {"step": abstract.step, "state": abstract.optimizer}
        got = self._restore(
            step,
            parameters=_restored_onto(wanted, mesh),
            optimizer=_restored_onto(rest, mesh),
            data=ocp.args.JsonRestore(),
        )
        optimizer, whole = got["optimizer"], (base or {}) | got["parameters"]
        state = TrainState(
            step=optimizer["step"],
            parameters={name: whole[name] for name in abstract.parameters},
            optimizer=optimizer["state"],
            frozen={name: whole[name] for name in abstract.frozen},
        )
        return state, got["data"]

    def restore_parameters(self, step: int, abstract: Parameters, mesh: Mesh) -> Parameters:
        """The parameters saved at `step`: of a model with adapters the adapters alone."""
        abstract = stored(abstract)
        self._check(step, abstract)
        restore = _restored_onto(abstract, mesh)
        return self._restore(step, parameters=restore)["parameters"]

    def _restore(self, step: int, **items: Any) -> Any:
        arrays = jax.tree.leaves([item.item for item in items.values()])
        # orbax refuses to read more of an array at once, and it may be stored as a whole.
        largest = max(x.size * x.dtype.itemsize for x in arrays)
        most = max(_SHARE_READ_AT_A_TIME * sum(map(_bytes_here, arrays)), largest + 1) / 1e9
        how = {
            "options": ocp.CheckpointManagerOptions(read_only=True),
            "item_handlers": _handlers(most),
        }
        with self._readable(step), ocp.CheckpointManager(self.folder, **how) as reader:
            return reader.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Says which checkpoint it is that cannot be read."""
        try:
            yield
        except (ValueError, KeyError, OSError, RuntimeError) as e:
            said = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise UserError(
                f"the checkpoint of step {step} in '{self.folder}' cannot be restored: it is"
                f" damaged, or of another optimizer ({said[:200]}); use another step, or remove"
                " that folder to go on from the one before"
            ) from None

    def _check(self, step: int, expected: Parameters) -> None:
        """Raises UserError naming each parameter that is missing, unknown or of another shape."""
        with self._readable(step):
            found = self._manager.item_metadata(step)["parameters"]
        found = {k: tuple(v.shape) for k, v in getattr(found, "tree", found).items()}
        wrong = [
            f"{name}: expected {expected[name].shape if name in expected else 'nothing'},"
            f" found {found.get(name, 'nothing')}"
            for name in sorted(expected.keys() | found.keys())
            if name not in found or name not in expected or found[name] != expected[name].shape
        ]
        if wrong:
            raise UserError(
                f"the checkpoint of step {step} in '{self.folder}' is of another model:\n  "
                + "\n  ".join(wrong)
            )


def _bytes_here(x: jax.ShapeDtypeStruct) -> int:
    """Of the parts of an array that this process has, each of them once."""
    parts = {str(i) for i in x.sharding.addressable_devices_indices_map(x.shape).values()}
    return len(parts) * math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def stored(parameters: Parameters) -> Parameters:
    """What a checkpoint holds of a model's parameters: the adapters, if it has some, else all."""
    return {name: x for name, x in parameters.items() if is_adapter(name)} or parameters


def _restored_onto(abstract: Any, mesh: Mesh) -> ocp.args.PyTreeRestore:
    """How orbax is to restore abstract arrays."""

    def onto(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec  # None: a constant, such as a count
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    placed = jax.tree.map(onto, abstract)
    how = ocp.checkpoint_utils.construct_restore_args(placed)
    return ocp.args.PyTreeRestore(placed, restore_args=how)


def _gather(states: dict[str, Any]) -> dict[str, Any]:
    """The lanes of all processes in one dict."""
    if jax.process_count() == 1:
        return states
    mine = np.frombuffer(json.dumps(states).encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.array(mine.size)).max())
    parts = multihost_utils.process_allgather(np.pad(mine, (0, size - mine.size)))
    merged: dict[str, Any] = {}
    for part in np.asarray(parts):
        merged |= json.loads(bytes(part).rstrip(b"\0"))
    return merged


def abstract_parameters(skeleton: Transformer, mesh: Mesh) -> Parameters:
    """Shapes and shardings of a model's parameters, checked against the mesh.

    Raises:
      UserError: the mesh does not divide them.
    """
    shapes = {name: x.shape for name, x in params_lib.split(skeleton).items()}
    check_parameters(shapes, params_lib.logical_axes(skeleton), mesh)
    with jax.set_mesh(mesh):
        return params_lib.split(skeleton_of(skeleton.config))
