"""Checkpoints: asynchronous, atomic and with sums by which damage is found, through orbax.

A checkpoint is a folder of four items: 'parameters' (a flat dict by name; of a model with adapters
the adapters alone), 'optimizer' (with the step), 'data' (JSON: the state of each lane of the input
stream, and what else a run goes on with) and 'sums' (JSON: by which the others are known again, see
`lm_jax.training.checksums`). Arrays are stored whole, whatever the mesh, and restored onto any
other. Older checkpoints have no sums, and of the data the lanes alone.

What a save does to the others: it removes those that are not to be kept, once it is there itself.
One that fails does nothing.
"""

import contextlib
import gc
import math
import os
import shutil
import sys
import tempfile
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lm_jax import paths
from lm_jax.config import CheckpointConfig
from lm_jax.errors import Interrupted, UserError
from lm_jax.model import parameters as params_lib
from lm_jax.model.lora import is_adapter
from lm_jax.model.parameters import Parameters
from lm_jax.model.transformer import Transformer, skeleton_of
from lm_jax.sharding.mesh import check_parameters
from lm_jax.training import storage, together
from lm_jax.training.checkpoint_errors import (
    STORE,
    Damaged,
    OtherModel,
    Unsaved,
    damaged,
    error_of,
    said,
    why_unreadable,
)
from lm_jax.training.checksums import differing, item_sums, json_sum
from lm_jax.training.step import TrainState

DAMAGED = "damaged"  # the folder of a workdir where a run puts what it could not read
Place = dict[str, Any]  # 'lanes': the state of each by its number; and whatever else is to be kept


class Checkpoints:
    """The checkpoints of one workdir. Use as a context: leaving it waits for the last save.

    Attributes:
      begun: the step whose save may not be finished.
    """

    def __init__(self, workdir: str, config: CheckpointConfig | None = None):
        """Opens them for reading, or for writing as well if `config` is given.

        Raises:
          UserError: there are none to read, or the folder cannot be one of checkpoints.
        """
        if paths.remote(workdir) and not workdir.startswith("gs://"):
            raise UserError(
                f"'{workdir}': checkpoints lie on a disk or in a bucket of Google's (gs://): copy"
                " them there, or name another workdir"
            )
        self.folder = os.path.join(paths.absolute(workdir), "checkpoints")
        self._config = config
        self.begun: int | None = None
        if config is None and not paths.isdir(self.folder):
            raise UserError(f"there is no checkpoint in '{workdir}'")
        self._open()

    def _open(self) -> None:
        if self._config is None:
            self._manager = storage.reader(self.folder)
            return
        paths.makedirs(self.folder)
        self._manager = storage.writer(self.folder, self._config.keep, self._config.keep_every)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            with contextlib.suppress(*STORE) if kind or self.begun else contextlib.nullcontext():
                self._manager.close()

    def steps(self) -> list[int]:
        """Those that are whole, the oldest first, and one that is being saved."""
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

    def save(self, step: int, state: TrainState, place: Place) -> None:
        """Starts a save; returns when the device's arrays may be overwritten.

        Args:
          place: fit for JSON; of several processes, each gives its own lanes, and all else alike.

        Raises:
          Unsaved: this one, or the one before; on all processes alike.
          Interrupted: of several processes this one alone could not do its part.
        """
        rest = {"step": state.step, "state": state.optimizer}
        data = {"lanes": {}} | place
        data["lanes"] = {k: v for lanes in together.of_all(data["lanes"]) for k, v in lanes.items()}
        self._save(step, stored(state.all_parameters), rest, data)

    def save_parameters(self, step: int, parameters: Parameters) -> None:
        """Saves a model to start from or to use, and nothing to go on with; returns when it is
        there.

        Raises:
          Unsaved: it could not be.
        """
        self._save(step, parameters, None, None)
        self.wait()

    @jax.transfer_guard("allow")
    def _save(self, step: int, parameters: Parameters, optimizer: Any, data: Any) -> None:
        failed = self._failure_before()
        arrays = {"parameters": parameters, "optimizer": optimizer}
        arrays = {name: tree for name, tree in arrays.items() if tree is not None}
        size = sum(x.nbytes for x in jax.tree.leaves(arrays))
        vanished, obstacle = together.said_by_first(self._obstacle(size))
        if vanished:
            self._reopen()
        if obstacle:
            raise Unsaved("\n".join(filter(None, [failed, _unsaved(step, obstacle)])))
        sums, strange = item_sums(arrays)
        if strange:
            some = ", ".join(strange[:3]) + (" and others" if strange[3:] else "")
            raise Unsaved(_unsaved(step, f"not every number in it is finite: {some}"))
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in arrays.items()}
        if data is not None:
            items["data"], sums["data"] = ocp.args.JsonSave(data), json_sum(data)
        items["sums"] = ocp.args.JsonSave(sums)
        self.begun = step
        try:
            # Else none before the newest is saved.
            self._manager.save(step, args=ocp.args.Composite(**items), force=data is None)
        except STORE as e:
            failed = "\n".join(filter(None, [failed, self._failed(said(e))]))
        if failed:
            raise Unsaved(failed)

    @jax.transfer_guard("allow")
    def delete(self, step: int) -> None:
        self._manager.delete(step)

    def wait(self) -> None:
        """Returns when what was begun is saved.

        Raises:
          Unsaved: it could not be.
        """
        if failed := self._failure_before():
            raise Unsaved(failed)

    @jax.transfer_guard("allow")
    def _failure_before(self) -> str:
        """Waits for the save that was begun; what is to be said of it if it failed, or ''."""
        if self.begun is None:
            return ""
        try:
            self._manager.wait_until_finished()
        except STORE as e:
            return self._failed(said(e))
        self.begun = None
        return ""

    def _failed(self, why: str) -> str:
        """What is to be said of the save that was begun.

        Raises:
          Interrupted: of several processes the others wait for this one's part of it; all are to be
            started again.
        """
        said = _unsaved(self.begun, why)
        if jax.process_count() > 1:
            raise Interrupted(f"{said} by process {jax.process_index()}; the same command goes on")
        self._reopen()
        return said

    def _reopen(self) -> None:
        """After a failure: what was left half is removed, and what is there is looked up again."""
        self.begun = None
        with contextlib.suppress(*STORE):
            self._manager.close()
        with contextlib.suppress(*STORE):  # it is tried again with the next save
            self._open()

    def _obstacle(self, size: int) -> tuple[bool, str]:
        """Whether the folder had vanished, and was made anew; and why nothing can be saved, as far
        as that is seen before, '' if nothing is in the way."""
        if paths.remote(self.folder) or jax.process_index():
            return False, ""
        vanished = not os.path.isdir(self.folder)
        try:
            os.makedirs(self.folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(b"is there room?")
            free = shutil.disk_usage(self.folder).free
        except OSError as e:
            return vanished, e.strerror or str(e)
        if free < size:
            return vanished, f"it has {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        return vanished, ""

    def restore(
        self, step: int, abstract: TrainState, mesh: Mesh, base: Parameters | None = None
    ) -> tuple[TrainState, Place]:
        """The state saved at `step`, sharded as `abstract` is, and the place in the data.

        Args:
          base: of a model with adapters, the parameters that are not saved with them.

        Raises:
          Damaged: it is not what was saved.
          UserError: it is of another model.
        """
        wanted = stored(abstract.all_parameters)
        got = self._restore(
            step,
            wanted,
            optimizer=storage.onto({"step": abstract.step, "state": abstract.optimizer}, mesh),
            parameters=storage.onto(wanted, mesh),
            data=ocp.args.JsonRestore(),
        )
        optimizer, whole = got["optimizer"], (base or {}) | got["parameters"]
        state = TrainState(
            step=optimizer["step"],
            parameters={name: whole[name] for name in abstract.parameters},
            optimizer=optimizer["state"],
            frozen={name: whole[name] for name in abstract.frozen},
        )
        return state, got["data"] if "lanes" in got["data"] else {"lanes": got["data"]}

    def restore_newest(
        self,
        abstract: TrainState,
        mesh: Mesh,
        base: Parameters | None = None,
        last: float = math.inf,
    ) -> tuple[int, TrainState, Place] | None:
        """As `restore`, of the newest that is as it was saved; None if there is none at all.

        Args:
          last: the step that it may be of at most.

        That newer ones are damaged is said, and they are moved to WORKDIR/damaged, as the run will
        come to their steps again.

        Raises:
          UserError: all of them are damaged, or of another model.
          Interrupted: they cannot be read now.
        """
        wrong: dict[int, str] = {}
        for step in reversed([s for s in together.said_by_first(self.steps()) if s <= last]):
            try:
                found = self.restore(step, abstract, mesh, base)
            except Damaged as e:
                wrong[step] = str(e)
                continue
            self._put_aside(wrong, step)
            return step, *found
        if not wrong:
            return None
        raise UserError("\n".join([*wrong.values(), "there is no other to go on from"]))

    @jax.transfer_guard("allow")
    def _put_aside(self, wrong: dict[int, str], instead: int) -> None:
        if not wrong:
            return
        target = os.path.join(os.path.dirname(self.folder), DAMAGED)
        if jax.process_index() == 0:
            lines = [*wrong.values(), f"what is damaged is moved to '{target}'"]
            for line in [*lines, f"the run goes on from step {instead}, the newest that is intact"]:
                print(f"warning: {line}", file=sys.stderr, flush=True)
            for step in wrong:
                paths.move(os.path.join(self.folder, str(step)), os.path.join(target, str(step)))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("lm_jax: damaged checkpoints are put aside")
        self._manager.reload()

    def restore_parameters(self, step: int, abstract: Parameters, mesh: Mesh) -> Parameters:
        """The parameters saved at `step`: of a model with adapters the adapters alone.

        Raises:
          Damaged: they are not what was saved.
          UserError: they are of another model.
        """
        abstract = stored(abstract)
        restore = storage.onto(abstract, mesh)
        return self._restore(step, abstract, parameters=restore)["parameters"]

    @jax.transfer_guard("allow")
    def _restore(self, step: int, expected: Parameters, **items: Any) -> Any:
        """The items, each of them as its sums say that it was. All processes get them, or the same
        error: what one of them cannot read, the others do not wait for."""
        got, wrong = None, None
        what = f"the checkpoint of step {step} in '{self.folder}'"
        with storage.quiet():
            try:
                self._check(step, expected)
                got = self._read(step, items)
            except UserError as e:
                wrong = [type(e).__name__, str(e)]
            except Exception as e:  # where bytes are wrong, anything may go wrong in who reads them
                wrong = why_unreadable(e, what)
            if wrong:
                gc.collect()
        if wrong := next(filter(None, together.of_all(wrong)), None):
            raise error_of(wrong)
        sums, _ = item_sums({name: got[name] for name in items if name in storage.ARRAYS})
        other = differing(sums, got.get("data"), got.get("sums"))
        if other := next(filter(None, together.of_all(other)), ""):
            raise damaged(what, f"{other} is not what was saved")
        return got

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        trees = [item.item for name, item in items.items() if name in storage.ARRAYS]
        if paths.isdir(os.path.join(self.folder, str(step), "sums")):
            items = items | {"sums": ocp.args.JsonRestore()}
        with storage.reader(self.folder, jax.tree.leaves(trees)) as reader:
            got = reader.restore(step, args=ocp.args.Composite(**items))
        return {name: got[name] for name in items}

    def _check(self, step: int, expected: Parameters) -> None:
        """Raises OtherModel naming each parameter that is missing, unknown or of another shape."""
        found = storage.shapes(self._manager.directory / str(step) / "parameters")
        wrong = [
            f"{name}: expected {expected[name].shape if name in expected else 'nothing'},"
            f" found {found.get(name, 'nothing')}"
            for name in sorted(expected.keys() | found.keys())
            if name not in found or name not in expected or found[name] != expected[name].shape
        ]
        if wrong:
            raise OtherModel(
                f"the checkpoint of step {step} in '{self.folder}' is of another model:\n  "
                + "\n  ".join(wrong)
            )


def _unsaved(step: int, why: str) -> str:
    return f"the checkpoint of step {step} could not be saved: {why}"


def stored(parameters: Parameters) -> Parameters:
    """What a checkpoint holds of a model's parameters: the adapters, if it has some, else all."""
    return {name: x for name, x in parameters.items() if is_adapter(name)} or parameters


def abstract_parameters(skeleton: Transformer, mesh: Mesh) -> Parameters:
    """Shapes and shardings of a model's parameters, checked against the mesh.

    Raises:
      UserError: the mesh does not divide them.
    """
    shapes = {name: x.shape for name, x in params_lib.split(skeleton).items()}
    check_parameters(shapes, params_lib.logical_axes(skeleton), mesh)
    with jax.set_mesh(mesh):
        return params_lib.split(skeleton_of(skeleton.config))
