"""What a run does at intervals beside its steps: validates, answers its task, writes samples."""

import itertools
import os
from collections.abc import Callable

import jax
import numpy as np

from lm_jax import paths
from lm_jax.config import OWN_HEADS, Config
from lm_jax.data.held_out import validation_batches
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.evaluation.loss import byte_lengths, evaluate_loss
from lm_jax.model import parameters as params_lib
from lm_jax.sharding.mesh import to_devices
from lm_jax.training import together
from lm_jax.training.answered import is_answered
from lm_jax.training.answering import Answering
from lm_jax.training.checkpoint_errors import Unsaved
from lm_jax.training.goodput import Ledger
from lm_jax.training.metrics import Metrics
from lm_jax.training.program import rows_here
from lm_jax.training.samples import sample
from lm_jax.training.step import Step, TrainState
from lm_jax.training.steplog import StepLog


class Occasions:
    """The occasions of one life of a run; what was done at a step is not done there again."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        step: Step,
        answering: Answering | None,
    ):
        self._config, self._workdir, self._mesh = config, workdir, mesh
        self._tokenizer, self._step, self._answering = tokenizer, step, answering
        self._evaluate_step = jax.jit(step.evaluate)
        lengths = byte_lengths(tokenizer, config.model.vocab_size)
        self._byte_lengths = to_devices(lengths, mesh)
        self._done: set[tuple[str, int]] = set()

    def begin(
        self, start: int, metrics: Metrics, log: StepLog, ledger: Ledger, stop: Callable[[], bool]
    ) -> None:
        """Goes on from step `start`.

        Args:
          stop: whether to drop what can be done later; of several processes, each gets the same
            answer when it asks as often as the others.
        """
        self._metrics, self._log, self._ledger, self._stop = metrics, log, ledger, stop
        measured = together.said_by_first(sorted(metrics.measured))
        self._done = {(kind, at) for kind, at in measured} | {("sample", start)}
        if self._answering and not together.said_by_first(is_answered(self._answering, start)):
            self._done.discard(("task", start))  # later ones are not there yet

    def at_the_start(self, state: TrainState) -> None:
        """Shows what a model writes that has learned nothing."""
        with self._log.paused(), self._ledger.spent("sample"):
            self._do(self.sample, state, 0)

    def at(self, state: TrainState, step: int) -> None:
        """Does what is due at a step in the middle of the run."""
        training = self._config.training
        for kind, action, every in (
            ("validation", self._evaluate, training.evaluate_every),
            ("task", self._answer, self._config.task.every),
            ("sample", self.sample, training.sample_every),
        ):
            due = every and step % every == 0 and step != training.steps
            if due and (kind, step) not in self._done:
                if self._stop():
                    return  # what is left is done when the run goes on
                with self._log.paused(), self._ledger.spent(_CAUSES[kind]):
                    self._do(action, state, step)

    def at_the_end(self, state: TrainState, step: int) -> None:
        """Does what is due at the last step. What a run that was stopped here did not come to is
        done when it is started again."""
        for kind, action, wanted in (
            ("validation", self._evaluate, self._config.training.evaluate_every),
            ("task", self._answer, True),
            ("sample", self.sample, True),
        ):
            if self._stop():
                return
            if wanted and (kind, step) not in self._done:
                with self._ledger.spent(_CAUSES[kind]):
                    self._do(action, state, step)

    def _do(self, action: Callable[[TrainState, int], None], state: TrainState, step: int) -> None:
        """That the disk does not take what comes of it ends no run."""
        try:
            action(state, step)
        except (OSError, Unsaved) as e:
            self._metrics.say(f"warning: step {step}: not written: {e}")

    def _evaluate(self, state: TrainState, step: int) -> None:
        training = self._config.training
        batches = validation_batches(
            self._config.data,
            self._tokenizer,
            batch_size=training.evaluate_batch_size,
            max_batches=training.evaluate_batches,
            **rows_here(self._mesh),
        )
        values = evaluate_loss(
            lambda batch, i: self._evaluate_step(
                state.all_parameters,
                to_devices(batch, self._mesh),
                to_devices(np.int32(i), self._mesh),
                self._byte_lengths,
            ),
            itertools.takewhile(lambda _: not self._stop(), batches),
        )
        if self._stop():
            return  # a signal leaves no time for the rest, and a part is another measure
        self._done.add(("validation", step))
        self._metrics.write("validation", step, values)
        parts = [f"validation loss {values['loss']:.4f}"]
        if self._config.data.objective in OWN_HEADS:
            parts.append(f"{values['accuracy']:.1%} right")
        else:
            parts.append(f"perplexity {values['perplexity']:.2f}")
        if "bits_per_byte" in values:
            parts.append(f"{values['bits_per_byte']:.3f} bits per byte")
        if self._step.masking is not None:
            parts.append(f"{values['accuracy']:.1%} of the masked tokens right")
        self._metrics.say(f"step {step}: " + ", ".join(parts))

    def _answer(self, state: TrainState, step: int) -> None:
        if self._answering is None:
            return
        model = params_lib.bind(self._step.in_use, state.all_parameters)
        with jax.transfer_guard("allow"):
            result = self._answering.evaluate(model, step, self._stop)
            if result is None:
                return
            best, note = False, ""
            if self._config.task.keep_best:
                best, note = self._answering.keep(step, state, result)
        self._done.add(("task", step))
        self._metrics.write("task", step, result.values())
        said = [
            f"{name} {s.value:.2f} ({s.low:.2f} to {s.high:.2f})"
            for name, s in result.scores.items()
        ]
        said += [f"{n} {what}" for what, n in result.notes().items()]
        self._metrics.say(f"step {step}: {', '.join(said)}" + (", the best so far" if best else ""))
        if note:
            self._metrics.say(f"note: {note}")

    def sample(self, state: TrainState, step: int) -> None:
        training = self._config.training
        if not training.sample_tokens or jax.process_count() > 1:
            return
        model = params_lib.bind(self._step.in_use, state.all_parameters)
        with jax.transfer_guard("allow"):
            text = sample(model, self._tokenizer, training)
        samples = os.path.join(self._workdir, "samples.txt")
        paths.append(samples, f"=== step {step} ===\n{text}\n")
        self._metrics.say(f"--- sample at step {step} ---\n{text}\n---")


_CAUSES = {"validation": "evaluate", "task": "evaluate", "sample": "sample"}  # of a ledger
