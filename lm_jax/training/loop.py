"""A training run from config to finished workdir.

In order: claim the workdir; tokenizer; data; mesh; state; then, a step at a time,
batch -> update -> (log, evaluate, sample, save).

Where the state comes from, the first that applies: the newest checkpoint of the workdir (the same
command again goes on bit for bit); the weights of another run or a published model (`init_from`);
the seed. The weights that adapters belong to are in no checkpoint: they always come from there.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Collection

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm_jax import paths, rendezvous
from lm_jax.config import OWN_HEADS, Config
from lm_jax.data.held_out import validation_batches
from lm_jax.data.loader import Stream, train_stream
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.loss import byte_lengths, evaluate_loss
from lm_jax.model import parameters as params_lib
from lm_jax.model.flops import peak_flops, training_flops_per_token
from lm_jax.model.lora import base_config
from lm_jax.sharding.mesh import batch_block, make_mesh, to_devices
from lm_jax.training import together, trainable, weights
from lm_jax.training import workdir as workdir_lib
from lm_jax.training.answered import is_answered
from lm_jax.training.answering import Answering
from lm_jax.training.checkpoint import Checkpoints, abstract_parameters
from lm_jax.training.farewell import farewell
from lm_jax.training.greeting import greeting
from lm_jax.training.masking import make_masking
from lm_jax.training.metrics import Metrics, Stopwatch, speed
from lm_jax.training.optimizer import check_rules
from lm_jax.training.program import check_batch, jit_train_step
from lm_jax.training.samples import sample
from lm_jax.training.signals import StopSignal
from lm_jax.training.step import Step, TrainState, make_step, skeleton_of


def train(config: Config, workdir: str, overridden: Collection[str] = ()) -> int:
    """Trains until `training.steps`, the end of the data, or a signal; resumes what is there.

    Args:
      overridden: keys of the config that the command line set, and no recipe; of the model and the
        tokenizer, none that come with the weights of `init_from` may be among them.

    Returns:
      0, or the number of the signal that ended the run (after a checkpoint).

    Raises:
      UserError: something in the config, the data, the mesh or the workdir does not fit.
    """
    config = weights.resolved(config, workdir, overridden)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    together.check_same_config(config)
    workdir_lib.check(workdir, config)
    together.check_one_folder(workdir)
    with workdir_lib.locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        return _train(config, workdir, mesh)


def _train(config: Config, workdir: str, mesh: jax.sharding.Mesh) -> int:
    tokenizer = together.made_once(lambda: workdir_lib.obtain_tokenizer(workdir, config))
    asked, config = config, workdir_lib.with_vocabulary(config, tokenizer)
    # All parameters fit the mesh, and have a rule.
    check_rules(list(abstract_parameters(skeleton_of(config.model), mesh)))
    with (
        jax.set_mesh(mesh),
        train_stream(
            config.data, tokenizer, seed=config.training.seed, **_rows_here(mesh)
        ) as stream,
        Checkpoints(workdir, config.checkpoint) as checkpoints,
    ):
        run = _Run(config, workdir, mesh, tokenizer, stream, checkpoints)
        state, start = run.restore_or_begin()

        def settle(folder: str) -> None:
            if config.model.lora.rank:
                weights.pin(folder, run.source)
            workdir_lib.settle(folder, asked, tokenizer)

        if jax.process_index() == 0:
            settle(workdir)
        if config.task.name != "none":
            run.answering = Answering(config, workdir, tokenizer, settle)
        return run.go(state, start)


class _Run:
    """One process's part of a run, once data and devices are there."""

    answering: Answering | None = None  # the task, if there is one

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        stream: Stream,
        checkpoints: Checkpoints,
    ):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.tokenizer, self.stream, self.checkpoints = tokenizer, stream, checkpoints
        masking = make_masking(config.data, tokenizer, config.model.vocab_size)
        self.step: Step = make_step(config, masking)
        self.train_step = jit_train_step(self.step, mesh)
        self.evaluate_step = jax.jit(self.step.evaluate)
        self.parts = batch_block(mesh)[1]
        lengths = byte_lengths(tokenizer, config.model.vocab_size)
        self.byte_lengths = to_devices(lengths, mesh)
        frozen = trainable.frozen_in_products(
            params_lib.split(self.step.skeleton), self.step.rates, config.model
        )
        self.flops_per_token = training_flops_per_token(
            config.model, config.data.length, config.data.predictions, frozen
        )
        self.watch, self.saved_at = Stopwatch(), -1
        self.tracing, self.finite, self.traces = False, True, contextlib.ExitStack()
        self.tokens = self.tokens_logged = 0.0  # real tokens dispatched, and those of logged steps
        self.start = self.logged_at = 0
        self.waiting: tuple | None = None  # (step, metrics, tokens) to be logged
        self.newest: dict[str, jax.Array] | None = None  # metrics of the step done last

    def go(self, state: TrainState, start: int) -> int:
        """From step `start` to the end; returns the signal that ended it, or 0."""
        config, logging = self.config.training, self.config.logging
        self.metrics = Metrics(self.workdir, self.config, start, active=jax.process_index() == 0)
        for line in greeting(self.config, self.mesh, self.tokenizer, state, self.step.rates):
            self.metrics.say(line)
        self.metrics.say(f"state: {self.origin}")
        if start >= config.steps:
            self.metrics.say(
                f"step {start} of {config.steps} is done: nothing left to train; more steps go on"
                " from here"
            )
        elif start == 0:
            self._sample(state, 0)
        # (kind, step) of what is there, and not to be done again.
        measured = together.said_by_first(sorted(self.metrics.measured))
        self.measured = {(kind, at) for kind, at in measured} | {("sample", start)}
        if self.answering and not together.said_by_first(is_answered(self.answering, start)):
            self.measured.discard(("task", start))  # later ones are not there yet
        step = self.start = self.logged_at = start
        with StopSignal(self.mesh) as self.stop, jax.transfer_guard("disallow"):
            self.watch.lap()
            try:
                if 0 < start < config.steps:
                    self._at_intervals(state, start)  # what a kill left undone
                while step < config.steps and not self.stop.noticed():
                    batch = self._next_batch()
                    if batch is None:
                        if not self.stop.number:
                            self.metrics.say(f"the data ended after {step} steps")
                        break
                    self._profile(step + 1)
                    state, self.newest = self.train_step(state, batch)
                    step += 1
                    self._log_waiting()  # the step before: the device never waits for the log
                    if step % logging.every == 0 or step in (start + 1, config.steps):
                        self.waiting = step, self.newest, self.tokens
                    self._at_intervals(state, step)
                if self.newest is not None and self.logged_at < step:
                    self.waiting = step, self.newest, self.tokens
                self._log_waiting()
            except UserError:  # a record that cannot be read, say: keep what was learned so far
                # Of several processes the others wait elsewhere; this one's end ends them.
                if step > start and self.finite and jax.process_count() == 1:
                    self._save(state, step)
                raise
            finally:
                self._profile(None)
            if not (caught := self.stop.agreed()):
                self._finish(state, step)
                caught = self.stop.agreed()
            else:
                self._save(state, step)
        self.metrics.say(farewell(self.config, self.workdir, step, caught))
        self.metrics.close()
        return caught

    def _profile(self, step: int | None) -> None:
        """Starts or ends the trace before a step, or (None) at the end of the run."""
        first, last = self.config.logging.profile_steps or (0, 0)
        wanted = step is not None and first <= step <= last
        if wanted and not self.tracing:
            folder = paths.folder_for_writing(os.path.join(self.workdir, "profile"))
            jax.profiler.start_trace(self.traces.enter_context(folder))
        elif self.tracing and not wanted:
            jax.block_until_ready(self.newest)
            jax.profiler.stop_trace()
            self.traces.close()
        self.tracing = wanted

    def restore_or_begin(self) -> tuple[TrainState, int]:
        """The state, from the first place that has one, and the step it stands at."""
        newest = together.said_by_first(self.checkpoints.latest())
        model, given = self.config.model, {}
        self.origin = f"starts afresh, seed {self.config.training.seed}"
        if model.lora.rank or (newest is None and self.config.init_from):
            self.source = weights.source_of(self.workdir, self.config)
            self.origin = f"starts from the weights of {self.source}"
            given = weights.load_start(self.source, base_config(model), self.mesh)
            if self.config.data.objective in OWN_HEADS and "head" not in given:
                of = f" for {model.labels} classes" if model.labels else ""
                self.origin += f", with a new head{of}"
        self.saved_at = -1 if newest is None else newest
        if newest is None:
            return jax.jit(self.step.init_from, donate_argnums=0)(given), 0
        abstract = jax.eval_shape(self.step.init)
        state, data = self.checkpoints.restore(newest, abstract, self.mesh, given)
        self.stream.set_state(data)
        self.origin = f"goes on from step {newest} of {self.workdir}"
        if rendezvous.current:
            rendezvous.current.saved = newest
        return state, newest

    def _next_batch(self) -> dict[str, jax.Array] | None:
        """The next global batch, on the devices; None when every process is at its end."""
        try:
            local = next(self.stream, None)
        except RuntimeError:
            if self.stop.number:  # it ended the workers that read ahead as well
                return None
            raise
        if local is None or self._all_exhausted():
            return None
        # Exact where this process reads all rows; of several parts, each is packed as densely.
        self.tokens += float(np.count_nonzero(local["segments"])) * self.parts
        return to_devices(local, self.mesh)

    def _all_exhausted(self) -> bool:
        if self.config.data.epochs is None or jax.process_count() == 1:
            return False  # endless, or the iterator itself stops
        with jax.transfer_guard("allow"):
            all_of_them = multihost_utils.process_allgather(np.array(self.stream.exhausted))
        return bool(all_of_them.all())

    def _at_intervals(self, state: TrainState, step: int) -> None:
        """Evaluates, samples and saves where the step asks for it; the last step is `_finish`'s."""
        training = self.config.training
        for kind, action, every in (
            ("checkpoint", self._save, self.config.checkpoint.every),
            ("validation", self._evaluate, training.evaluate_every),
            ("task", self._answer, self.config.task.every),
            ("sample", self._sample, training.sample_every),
        ):
            due = every and step % every == 0 and step != training.steps
            if due and (kind, step) not in self.measured:
                if kind != "checkpoint" and self._stop_now():
                    return  # the loop saves, and what is left is done when the run goes on
                self._log_waiting()
                with self.watch:
                    action(state, step)

    def _finish(self, state: TrainState, step: int) -> None:
        """The last save comes first: a signal leaves little time. What a run that was stopped here
        did not come to is done when it is started again."""
        self._save(state, step)
        self.checkpoints.wait()
        for kind, action, wanted in (
            ("validation", self._evaluate, self.config.training.evaluate_every),
            ("task", self._answer, True),
            ("sample", self._sample, True),
        ):
            if self._stop_now():
                return
            if wanted and (kind, step) not in self.measured:
                action(state, step)

    def _save(self, state: TrainState, step: int) -> None:
        if self.saved_at != step:
            if self.newest is not None:
                self._check_finite(step, self.newest)
            self.metrics.flush()
            self.checkpoints.save(step, state, self.stream.get_state())
            if rendezvous.current and self.saved_at >= 0:  # the one before is finished
                rendezvous.current.saved = self.saved_at
            self.saved_at = step

    def _check_finite(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """The metrics as numbers, once loss and gradient are known to be numbers too."""
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        wrong = [k for k in ("loss", "gradient_norm") if not math.isfinite(values[k])]
        if wrong:
            self.finite = False
            self.metrics.close()
            saved = self.checkpoints.latest()
            raise UserError(
                f"the {wrong[0].replace('_', ' ')} is {values[wrong[0]]} at step {step}: lower"
                " optimizer.learning_rate or lengthen the warm-up; "
                + ("nothing was saved yet" if saved is None else f"step {saved} is saved")
            )
        return values

    def _log_waiting(self) -> None:
        if self.waiting is None:
            return
        (step, metrics, tokens), self.waiting = self.waiting, None
        values = self._check_finite(step, metrics)
        seconds, steps = self.watch.lap(), step - self.logged_at
        values["seconds_per_step"] = seconds / steps
        note = f"first step in {seconds:.1f} s, compilation included"
        if step > self.start + 1:  # of the first, the time says nothing about the next
            rate = (tokens - self.tokens_logged) / seconds
            flops = rate * self.flops_per_token
            values |= {"tokens_per_second": rate, "model_flops_per_second": flops}
            peak = peak_flops(self.mesh.devices.flat[0].device_kind) * self.mesh.size
            if not math.isnan(peak):
                values["mfu"] = flops / peak
            left = (self.config.training.steps - step) * seconds / steps
            note = speed(values, left)
        self.tokens_logged, self.logged_at = tokens, step
        self.metrics.write("train", step, values)
        self.metrics.progress(step, f"loss {values['loss']:.4f} | {note}")

    def _evaluate(self, state: TrainState, step: int) -> None:
        training = self.config.training
        batches = validation_batches(
            self.config.data,
            self.tokenizer,
            batch_size=training.evaluate_batch_size,
            max_batches=training.evaluate_batches,
            **_rows_here(self.mesh),
        )
        values = evaluate_loss(
            lambda batch, i: self.evaluate_step(
                state.all_parameters,
                to_devices(batch, self.mesh),
                to_devices(np.int32(i), self.mesh),
                self.byte_lengths,
            ),
            itertools.takewhile(lambda _: not self._stop_now(), batches),
        )
        if self._stop_now():
            return  # a signal leaves no time for the rest, and a part is another measure
        self.measured.add(("validation", step))
        self.metrics.write("validation", step, values)
        parts = [f"validation loss {values['loss']:.4f}"]
        if self.config.data.objective in OWN_HEADS:
            parts.append(f"{values['accuracy']:.1%} right")
        else:
            parts.append(f"perplexity {values['perplexity']:.2f}")
        if "bits_per_byte" in values:
            parts.append(f"{values['bits_per_byte']:.3f} bits per byte")
        if self.step.masking is not None:
            parts.append(f"{values['accuracy']:.1%} of the masked tokens right")
        self.metrics.say(f"step {step}: " + ", ".join(parts))

    def _answer(self, state: TrainState, step: int) -> None:
        if self.answering is None:
            return
        model = params_lib.bind(self.step.in_use, state.all_parameters)
        with jax.transfer_guard("allow"):
            result = self.answering.evaluate(model, step, self._stop_now)
            if result is None:
                return
            best, note = False, ""
            if self.config.task.keep_best:
                best, note = self.answering.keep(step, state, result)
        self.measured.add(("task", step))
        self.metrics.write("task", step, result.values())
        said = [
            f"{name} {s.value:.2f} ({s.low:.2f} to {s.high:.2f})"
            for name, s in result.scores.items()
        ]
        said += [f"{n} {what}" for what, n in result.notes().items()]
        self.metrics.say(f"step {step}: {', '.join(said)}" + (", the best so far" if best else ""))
        if note:
            self.metrics.say(f"note: {note}")

    def _stop_now(self) -> bool:
        """Whether to drop what can be done later; of several processes, each gets this answer when
        it asks as often as the others."""
        return self.stop.noticed() > 0

    def _sample(self, state: TrainState, step: int) -> None:
        training = self.config.training
        if not training.sample_tokens or jax.process_count() > 1:
            return
        model = params_lib.bind(self.step.in_use, state.all_parameters)
        with jax.transfer_guard("allow"):
            text = sample(model, self.tokenizer, training)
        samples = os.path.join(self.workdir, "samples.txt")
        paths.append(samples, f"=== step {step} ===\n{text}\n")
        self.metrics.say(f"--- sample at step {step} ---\n{text}\n---")


def _rows_here(mesh: jax.sharding.Mesh) -> dict[str, int]:
    index, count = batch_block(mesh)
    return {"process_index": index, "process_count": count}
