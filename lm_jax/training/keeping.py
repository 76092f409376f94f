"""A run's state between two of its lives: begun, saved, restored, and taken back."""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lm_jax import paths, rendezvous
from lm_jax.config import OWN_HEADS, Config
from lm_jax.data.corpus import changes, fingerprint
from lm_jax.data.loader import Stream
from lm_jax.errors import UserError
from lm_jax.training import together, weights
from lm_jax.training.checkpoint import Checkpoints
from lm_jax.training.checkpoint_errors import Unsaved
from lm_jax.training.health import Health
from lm_jax.training.step import Step, TrainState

# A checkpoint of so few steps before a spike may have what led to it.
_CLEAR = 10
_PAUSES = (0.0, 2.0, 10.0)  # seconds before each try to save what would be lost


# The loss and the norm of the gradient of the step done last, where nothing was made of them yet.
Unjudged = tuple[float, float] | None


class Keeper:
    """What a run keeps: its state, its place in the data and what it knows of its losses.

    Attributes:
      unjudged: what was saved with the state.
      health: what is known of the losses.
      source: whose weights the run started from, if it is known.
      saved: the step whose save was begun last; -1: none was.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: Mesh,
        step: Step,
        stream: Stream,
        checkpoints: Checkpoints,
        settle: Callable[[str], None],
    ):
        """
        Args:
          settle: makes a folder one of this run.
        """
        self._config, self._workdir, self._mesh, self._step = config, workdir, mesh, step
        self._stream, self._checkpoints, self._settle = stream, checkpoints, settle
        self.health, self.unjudged = Health(config.faults), None
        self._corpus = functools.cache(lambda: fingerprint(stream.sources))
        self.source: weights.Source | None = None
        self.saved = -1

    def begin(self) -> tuple[TrainState, int, str]:
        """The state, from the first place that has one; the step it stands at; and where it is
        from, for a reader."""
        model = self._config.model
        begun = together.said_by_first(self._checkpoints.latest()) is not None
        origin = f"starts afresh, seed {self._config.training.seed}"
        self.source, given = weights.begun_with(self._config, self._workdir, self._mesh, begun)
        if self.source:
            origin = f"starts from the weights of {self.source}"
            if self._config.data.objective in OWN_HEADS and "head" not in given:
                of = f" for {model.labels} classes" if model.labels else ""
                origin += f", with a new head{of}"
        if not begun:
            return jax.jit(self._step.init_from, donate_argnums=0)(given), 0, origin
        abstract = jax.eval_shape(self._step.init)
        step, state, place = self._checkpoints.restore_newest(abstract, self._mesh, given)
        self._stream.set_state(place["lanes"])
        self._recall(step, place)
        origin = f"goes on from step {step} of {self._workdir}"
        if changed := changes(place.get("corpus"), self._corpus()):
            origin += (
                f"\nwarning: {changed} since that step was saved: from here on other documents are"
                " read than an unbroken run would have read"
            )
        return state, step, origin

    def save(self, step: int, state: TrainState, unjudged: Unjudged) -> str:
        """Begins to save the state at a step, unless that was done.

        Returns:
          What is to be said of saves that failed, of this step or the one before; ''.
        """
        if self.saved == step:
            return ""
        place = {
            "lanes": self._stream.get_state(),
            "health": self.health.noted(),
            "unjudged": unjudged,
            "corpus": self._corpus(),
        }
        said = self._settled()
        try:
            self._checkpoints.save(step, state, place)
        except Unsaved as e:
            said += f"warning: {e}\n"
        if self._checkpoints.begun == step:
            if rendezvous.current and self.saved >= 0 and not said:  # the one before is finished
                rendezvous.current.saved = self.saved
            self.saved = step
        return said.rstrip()

    def save_for_good(
        self, step: int, state: TrainState, unjudged: Unjudged, say: Callable[[str], None]
    ) -> None:
        """Saves the state at the last step; what is in the way may go while it is tried again.

        Raises:
          Unsaved: it could not be.
        """
        for pause in _PAUSES:
            time.sleep(pause)
            if said := self.save(step, state, unjudged):
                say(said)
            if self.saved == step:
                try:
                    return self._checkpoints.wait()
                except Unsaved as e:
                    self.saved, said = -1, str(e)
        raise Unsaved(
            f"{said.removeprefix('warning: ')}\nthe run's last state is not saved; the same command"
            " goes on from the newest checkpoint, if there is one"
        )

    def rewind(self, step: int, state: TrainState) -> tuple[TrainState, int] | None:
        """The state before a spike at a step, as it was saved, and its step; None if there is none.
        The input goes on where it is, past what led to the spike.

        Args:
          state: is given up, but for what is frozen: devices may have no room for two.

        Raises:
          UserError: what there is of checkpoints is damaged.
        """
        last = step - _CLEAR
        with contextlib.suppress(Unsaved):
            self._checkpoints.wait()
        steps = together.said_by_first(self._checkpoints.steps())
        if not steps or steps[0] > last:
            return None
        rewinds, abstract = self.health.rewinds + 1, jax.eval_shape(self._step.init)
        for x in jax.tree.leaves((state.parameters, state.optimizer)):
            x.delete()
        target, state, place = self._checkpoints.restore_newest(
            abstract, self._mesh, state.frozen, last
        )
        for later in steps:
            if later > last:
                self._checkpoints.delete(later)
        self._recall(target, place)
        self.health.rewinds = rewinds
        return state, target

    def finished(self) -> str:
        """Which checkpoint there is, for a reader."""
        with contextlib.suppress(Unsaved):
            self._checkpoints.wait()
        newest = self._checkpoints.latest()
        return "nothing is saved" if newest is None else f"step {newest} is saved"

    def _recall(self, step: int, place: dict[str, Any]) -> None:
        self.saved = step
        self.health = self.health.recalled(place.get("health", {}))
        unjudged = place.get("unjudged")
        self.unjudged = tuple(unjudged) if unjudged else None
        if rendezvous.current:
            rendezvous.current.saved = step

    def _settled(self) -> str:
        """Makes the workdir one of this run again, if it has vanished; what is to be said of it."""
        if jax.process_index() or paths.exists(os.path.join(self._workdir, "config.json")):
            return ""
        try:
            paths.makedirs(self._workdir)
            self._settle(self._workdir)
        except (OSError, UserError) as e:
            return f"warning: '{self._workdir}' has vanished, and cannot be made anew: {e}\n"
        return f"warning: '{self._workdir}' had vanished, and was made anew\n"
