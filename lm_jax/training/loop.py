"""A training run from config to finished workdir.

In order: claim the workdir; tokenizer; data; mesh; state; then, a step at a time,
batch -> update -> (log, evaluate, sample, save).

Where the state comes from, the first that applies: the newest checkpoint of the workdir (the same
command again goes on bit for bit); the weights of another run or a published model (`init_from`);
the seed. The weights that adapters belong to are in no checkpoint: they always come from there.
"""

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Collection

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm_jax.config import Config
from lm_jax.data.loader import Stream, train_stream
from lm_jax.data.packing import Batch
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.model import parameters as params_lib
from lm_jax.model.flops import training_flops_per_token
from lm_jax.sharding.mesh import batch_block, make_mesh, to_devices
from lm_jax.training import together, trainable, weights
from lm_jax.training import workdir as workdir_lib
from lm_jax.training.answering import Answering
from lm_jax.training.checkpoint import Checkpoints, abstract_parameters
from lm_jax.training.checkpoint_errors import Unsaved
from lm_jax.training.evidence import Exhibit, write_down
from lm_jax.training.farewell import farewell
from lm_jax.training.goodput import Ledger
from lm_jax.training.greeting import greeting
from lm_jax.training.health import Verdict
from lm_jax.training.keeping import Keeper, Unjudged
from lm_jax.training.masking import make_masking
from lm_jax.training.metrics import Metrics
from lm_jax.training.occasions import Occasions
from lm_jax.training.optimizer import check_rules
from lm_jax.training.program import check_batch, jit_train_step, rows_here
from lm_jax.training.signals import StopSignal
from lm_jax.training.starts import counted
from lm_jax.training.step import Step, TrainState, make_step, skeleton_of
from lm_jax.training.steplog import Done, StepLog
from lm_jax.training.tracing import Tracing
from lm_jax.training.watchdog import Watchdog, watchdog_of


def train(
    config: Config,
    workdir: str,
    overridden: Collection[str] = (),
    began: float | None = None,
) -> int:
    """Trains until `training.steps`, the end of the data, or a signal; resumes what is there.

    Args:
      overridden: keys of the config that the command line set, and no recipe; of the model and the
        tokenizer, none that come with the weights of `init_from` may be among them.
      began: `time.time()` when the process started; None: now.

    Returns:
      0, or the number of the signal that ended the run (after a checkpoint).

    Raises:
      UserError: something in the config, the data, the mesh or the workdir does not fit.
    """
    began = time.time() if began is None else began
    config = weights.resolved(config, workdir, overridden)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    together.check_same_config(config)
    workdir_lib.check(workdir, config)
    together.check_one_folder(workdir)
    with workdir_lib.locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        return _train(config, workdir, mesh, began)


def _train(config: Config, workdir: str, mesh: jax.sharding.Mesh, began: float) -> int:
    ledger = Ledger(workdir, active=jax.process_index() == 0, began=began)
    tokenizer = together.made_once(lambda: workdir_lib.obtain_tokenizer(workdir, config))
    asked, config = config, workdir_lib.with_vocabulary(config, tokenizer)
    # All parameters fit the mesh, and have a rule.
    check_rules(list(abstract_parameters(skeleton_of(config.model), mesh)))
    step = make_step(config, make_masking(config.data, tokenizer, config.model.vocab_size))
    with (
        watchdog_of(config, workdir) as dog,
        jax.set_mesh(mesh),
        train_stream(
            config.data, tokenizer, seed=config.training.seed, **rows_here(mesh)
        ) as stream,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
        counted(workdir, together.said_by_first(checkpoints.latest())) as this_start,
    ):

        def settle(folder: str) -> None:
            if config.model.lora.rank:
                weights.pin(folder, keeper.source)
            workdir_lib.settle(folder, asked, tokenizer)

        keeper = Keeper(config, workdir, mesh, step, stream, checkpoints, settle)
        with ledger.spent("restore"):
            state, start, origin = keeper.begin()
        if jax.process_index() == 0:
            settle(workdir)
        answering = None
        if config.task.name != "none":
            answering = Answering(config, workdir, tokenizer, settle)
        occasions = Occasions(config, workdir, mesh, tokenizer, step, answering)
        run = _Run(config, workdir, mesh, tokenizer, step, stream, keeper, occasions, ledger, dog)
        caught = run.go(state, start, origin)
        if caught:
            this_start.ended = signal.Signals(caught).name
        return caught


class _GivenUp(UserError):
    """The state that the run has come to is not one to go on from."""


class _Run:
    """One process's part of one life of a run, once data and devices are there."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        step: Step,
        stream: Stream,
        keeper: Keeper,
        occasions: Occasions,
        ledger: Ledger,
        dog: Watchdog,
    ):
        self.dog = dog
        self.config, self.workdir, self.mesh, self.tokenizer = config, workdir, mesh, tokenizer
        self.stream, self.keeper, self.occasions, self.ledger = stream, keeper, occasions, ledger
        self.step = step
        self.train_step = jit_train_step(step, mesh)
        self.tracing = Tracing(workdir, config.logging.profile_steps)
        frozen = trainable.frozen_in_products(
            params_lib.split(step.skeleton), step.rates, config.model
        )
        self.flops_per_token = training_flops_per_token(
            config.model, config.data.length, config.data.predictions, frozen
        )
        self.parts = batch_block(mesh)[1]
        self.tokens = 0.0  # real ones that were dispatched
        self.metrics: Metrics | None = None
        self.newest: Done | None = None  # the step that was dispatched last
        self.batches: deque[Batch] = deque(maxlen=2)  # this process's, of it and the one before
        # Of steps that were left out, since the last one that was not.
        self.exhibits: deque[Exhibit] = deque(maxlen=config.faults.skips)

    def go(self, state: TrainState, start: int, origin: str) -> int:
        """From step `start` to the end; returns the signal that ended it, or 0."""
        try:
            caught = self._go(state, start, origin)
        except BaseException:
            self.ledger.end(start if self.newest is None else self.newest.step)
            if self.metrics is not None:
                self.metrics.close()
            raise
        return caught

    def _go(self, state: TrainState, start: int, origin: str) -> int:
        steps = self.config.training.steps
        self.metrics = Metrics(self.workdir, self.config, start, active=jax.process_index() == 0)
        self._begin_log(start)
        for line in greeting(self.config, self.mesh, self.tokenizer, state, self.step.rates):
            self.metrics.say(line)
        self.metrics.say(f"state: {origin}")
        if start >= steps:
            self.metrics.say(
                f"step {start} of {steps} is done: nothing left to train; more steps go on from"
                " here"
            )
        step, stop = start, StopSignal(self.mesh, worth_saving=False)
        self.ledger.resumed(start)
        with stop as self.stop, jax.transfer_guard("disallow"):
            self.occasions.begin(start, self.metrics, self.log, self.ledger, self._stop_now)
            if start == 0 < steps:
                self.occasions.at_the_start(state)
            try:
                if 0 < start < steps:
                    self.occasions.at(state, start)  # what a kill left undone
                while step < steps and not self.stop.noticed():
                    with self.ledger.spent("data"):
                        batch = self._next_batch(step)
                    if batch is None:
                        break
                    self.dog.alive(f"step {step + 1}")
                    self.tracing.before(step + 1, self.newest and self.newest.metrics)
                    with self.ledger.spent("compile" if step == start else "step"):
                        state, metrics = self.train_step(state, batch)
                    step, stop.worth_saving = step + 1, True
                    before, self.newest = self.newest, Done(step, metrics, self.tokens)
                    if (back := self._look_at(before, state)) is not None:
                        state, step = back
                        continue
                    self.log.add(self.newest)
                    self._at_intervals(state, step)
                self.log.end(self.newest)
                if step == steps and self.newest and not all(map(math.isfinite, self._unjudged())):
                    self._left_out(step, self._unjudged(), None)
            except _GivenUp:
                raise
            except UserError:  # a record that cannot be read, say: keep what was learned so far
                # Of several processes the others wait elsewhere; this one's end ends them.
                if self.newest is not None and jax.process_count() == 1:
                    self._save(state, step)
                raise
            finally:
                self.tracing.before(None, self.newest and self.newest.metrics)
            caught = self.stop.agreed()
            self._keep_for_good(state, step, caught)
            if not caught:
                self.dog.alive("what is due at the end")
                self.occasions.at_the_end(state, step)
                caught = self.stop.agreed()
        self.ledger.end(step)
        self._say(self.ledger.summary())
        self.metrics.say(farewell(self.config, self.workdir, step, caught))
        self.metrics.close()
        return caught

    def _begin_log(self, start: int) -> None:
        self.log = StepLog(self.config, self.mesh, self.metrics, start, self.flops_per_token)

    def _say(self, text: str) -> None:
        if text:
            self.metrics.say(text)

    def _stop_now(self) -> bool:
        return self.stop.noticed() > 0

    def _next_batch(self, step: int) -> dict[str, jax.Array] | None:
        """The next global batch, on the devices; None when every process is at its end."""
        self.dog.alive(f"the batch of step {step + 1}")
        try:
            local = next(self.stream, None)
        except RuntimeError:
            if self.stop.number:  # it ended the workers that read ahead as well
                return None
            raise
        if local is None or self._all_exhausted():
            if not self.stop.number:
                self.metrics.say(f"the data ended after {step} steps")
            return None
        self.batches.append(local)
        # Exact where this process reads all rows; of several parts, each is packed as densely.
        self.tokens += float(np.count_nonzero(local["segments"])) * self.parts
        return to_devices(local, self.mesh)

    def _all_exhausted(self) -> bool:
        if self.config.data.epochs is None or jax.process_count() == 1:
            return False  # endless, or the iterator itself stops
        with jax.transfer_guard("allow"):
            all_of_them = multihost_utils.process_allgather(np.array(self.stream.exhausted))
        return bool(all_of_them.all())

    def _look_at(self, done: Done | None, state: TrainState) -> tuple[TrainState, int] | None:
        """Judges the loss of the step before the newest, while that one runs.

        Args:
          done: the step; None: the one that this life went on from, if it was saved unjudged.

        Returns:
          The state and the step to go back to, if that is what follows.

        Raises:
          UserError: the run is not to go on.
        """
        values = self.keeper.unjudged if done is None else _values(done)
        if values is None:
            return None
        health, step = self.keeper.health, self.newest.step - 1
        match health.judge(*values):
            case Verdict.FINE:
                self.exhibits.clear()
            case Verdict.SPIKE:
                return self._go_back(step, values[0], state)
            case verdict:
                self._left_out(step, values, self.batches[0] if len(self.batches) == 2 else None)
                if verdict is Verdict.TOO_MANY_SKIPPED:
                    self._give_up(state)
        return None

    def _left_out(self, step: int, values: tuple[float, float], batch: Batch | None) -> None:
        """Tells of a step whose loss or gradient was no number.

        Args:
          batch: what it was given, if it is known.
        """
        named = dict(zip(("loss", "gradient_norm"), values))
        finite = {name: x for name, x in named.items() if math.isfinite(x)}
        self.metrics.write("skipped", step, finite)
        name, value = next(x for x in named.items() if x[0] not in finite)
        self.metrics.say(
            f"warning: the {name.replace('_', ' ')} is {value} at step {step}: the step is left out"
        )
        if batch is not None:
            self.exhibits.append(Exhibit(step, *values, batch))

    def _give_up(self, state: TrainState) -> None:
        """Ends a run whose last losses were no numbers, saved as it was before them."""
        step, health = self.newest.step, self.keeper.health
        first, last = step - health.in_a_row, step - 1
        # Whoever starts it again has seen to the cause.
        health.in_a_row, self.newest, self.keeper.unjudged = 0, None, None
        self._save(state, step)
        where = ""
        if self.exhibits:
            with contextlib.suppress(OSError):  # a full disk is not what is to be told here
                where = write_down(self.workdir, f"step-{last}", self.exhibits, self.tokenizer)
        raise _GivenUp(
            f"the loss or the gradient was no number at {last - first + 1} steps in a row, {first}"
            f" to {last}: lower optimizer.learning_rate or lengthen the warm-up;"
            f" {self.keeper.finished()}"
            + (f"; what they were given is in {where}" if where else "")
        )

    def _go_back(self, step: int, loss: float, state: TrainState) -> tuple[TrainState, int] | None:
        """Takes the run back to before a spike of the loss; None if it goes on as it is.

        Raises:
          UserError: it has been back as often as it may.
        """
        what = f"the loss {loss:.4f} at step {step} is far above those before"
        if self.keeper.health.rewinds >= self.config.faults.rewinds:
            raise _GivenUp(
                f"{what}, and the run has gone back {self.keeper.health.rewinds} times, as often as"
                f" faults.rewinds lets it: {self.keeper.finished()}"
            )
        self.ledger.record(self.newest.step)
        with self.ledger.spent("restore"):
            try:
                back = self.keeper.rewind(step, state)
            except UserError as e:
                raise _GivenUp(f"{what}, and there is nothing to go back to: {e}") from None
        if back is None:
            self.metrics.say(f"warning: {what}; there is no checkpoint to go back to")
            return None
        self.ledger.resumed(back[1])
        self.metrics.go_back(back[1])
        self._begin_log(back[1])
        self.metrics.write("rewound", step, {"to": back[1], "loss": loss})
        self.metrics.say(
            f"warning: {what}: the run goes back to step {back[1]}, and past the text that led"
            " there"
        )
        self.occasions.begin(back[1], self.metrics, self.log, self.ledger, self._stop_now)
        self.newest = None
        self.batches.clear()
        self.exhibits.clear()
        return back

    def _at_intervals(self, state: TrainState, step: int) -> None:
        """Saves, and does whatever else a step in the middle of the run asks for."""
        every = self.config.checkpoint.every
        due = every and step % every == 0 and step != self.config.training.steps
        if due:
            with self.log.paused():
                self._save(state, step)
        with self.dog.doing(f"what is due at step {step}"):
            self.occasions.at(state, step)
        if due or step % self.config.logging.every == 0:
            self.ledger.record(step)

    def _save(self, state: TrainState, step: int) -> None:
        with self.ledger.spent("save"), self.dog.doing(f"the checkpoint of step {step}"):
            self.metrics.flush()
            self._say(self.keeper.save(step, state, self._unjudged()))

    def _unjudged(self) -> Unjudged:
        return self.keeper.unjudged if self.newest is None else _values(self.newest)

    def _keep_for_good(self, state: TrainState, step: int, caught: int) -> None:
        """The last save, before anything else is done: a signal leaves little time."""
        with self.ledger.spent("save"), self.dog.doing(f"the checkpoint of step {step}"):
            self.metrics.flush()
            try:
                self.keeper.save_for_good(step, state, self._unjudged(), self.metrics.say)
            except Unsaved as e:
                if not caught:
                    raise
                self.metrics.say(f"warning: {e}")


def _values(done: Done) -> tuple[float, float]:
    """Loss and norm of the gradient."""
    loss, norm = jax.device_get((done.metrics["loss"], done.metrics["gradient_norm"]))
    return float(loss), float(norm)
