"""What a run does with its task: answers the validation examples, and keeps the best checkpoint.

WORKDIR/predictions/STEP.jsonl has the answers, STEP.report.json beside it the scores with their
intervals. WORKDIR/best is a run of its own, of one checkpoint: `generate --model=WORKDIR/best`.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import jax

from lm_jax import json_text, paths
from lm_jax.config import CheckpointConfig, Config
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.metrics import METRICS, check_references
from lm_jax.evaluation.output import write_whole
from lm_jax.evaluation.tasks import Result, Stopped, metrics_of, run_task, settings_of
from lm_jax.model.transformer import Transformer
from lm_jax.progress import progress
from lm_jax.training import together
from lm_jax.training.checkpoint import Checkpoints, stored
from lm_jax.training.checkpoint_errors import Unsaved
from lm_jax.training.step import TrainState

PREDICTIONS, BEST = "predictions", "best"
SCORE = "score.json"  # in BEST
_ALL = 1_000  # checkpoints: which of them go is decided here


class Answering:
    """The task of one run. Of several processes, all do the same, and the first one writes."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        tokenizer: Tokenizer,
        settle: Callable[[str], None],
    ):
        """
        Args:
          settle: makes a folder a run like this one.

        Raises:
          UserError: the examples cannot be read, or scored.
        """
        self.config, self.tokenizer, self.settle = config, tokenizer, settle
        self.folder, self.workdir = os.path.join(workdir, BEST), workdir
        self.first = jax.process_index() == 0
        examples = documents(config.data, "validation")
        count = min(len(examples), config.task.examples or len(examples))
        self.examples = [examples[i] for i in range(count)]
        self.metrics = metrics_of(config.task, config.data.objective)
        check_references(self.metrics, [e.targets for e in self.examples if e.targets])
        self.settings = settings_of(config.data, config.task)

    def evaluate(
        self, model: Transformer, step: int, stop: Callable[[], bool] | None = None
    ) -> Result | None:
        """The scores; None where `stop` said, in between, that they are not wanted any more."""
        with progress("examples", len(self.examples), active=self.first) as on_done:
            try:
                result = run_task(
                    model,
                    self.tokenizer,
                    self.examples,
                    self.config.data,
                    self.config.task,
                    batch_size=self.config.task.rows,
                    on_done=on_done,
                    stop=stop,
                )
            except Stopped:
                return None
        if self.first:
            folder = os.path.join(self.workdir, PREDICTIONS)
            settings = {"step": step, "dtype": self.config.model.dtype} | self.settings
            path = os.path.join(folder, f"{step}.jsonl")
            try:
                paths.makedirs(folder)
                write_whole(path, result.records, settings, result.report())
            except OSError as e:  # the scores are known, and the other processes go on with them
                print(f"warning: {path} is not written: {e}", file=sys.stderr, flush=True)
        return result

    def keep(self, step: int, state: TrainState, result: Result) -> tuple[bool, str]:
        """Saves the model where it is the best so far: whether it is, and what there is to say. A
        score that is no number is never the best.

        The one before is removed when this one is there; what a kill left in between has no score.
        """
        metric = self.metrics[0]
        now = {
            "step": step,
            "metric": metric,
            "value": result.values()[metric],
            "examples": len(result.records),
            "settings": self.settings,
        }
        with Checkpoints(self.folder, CheckpointConfig(keep=_ALL)) as checkpoints:
            steps, note = checkpoints.steps(), ""
            before = together.said_by_first(self._score(steps) if self.first else None)
            if before and (changed := _differences(before, now)):
                note = f"the best so far was found otherwise ({changed}), and is not compared with"
                before = None
            if (
                before and before["step"] > step
            ):  # since when a run went back to an older checkpoint
                note = f"the best so far, of step {before['step']}, was of a run that is given up"
                before = None
            best = math.isfinite(now["value"]) and (
                before is None or (before["step"] != step and _better(metric, now, before))
            )
            if best:
                if together.said_by_first(step in steps):
                    checkpoints.delete(step)
                checkpoints.save_parameters(step, stored(state.all_parameters))
                checkpoints.wait()
                if why := together.said_by_first(self._write_score(now) if self.first else ""):
                    raise Unsaved(f"the best checkpoint, of step {step}, has no score: {why}")
            if best or before:  # a kill may have left others, which would be read as the newest
                kept = step if best else before["step"]
                for other in together.said_by_first(checkpoints.steps()):
                    if other != kept:
                        checkpoints.delete(other)
        return best, note

    def _write_score(self, score: dict[str, Any]) -> str:
        """Makes the folder of the best checkpoint a run with a score; why it cannot, or ''."""
        try:
            self.settle(self.folder)
            paths.write_whole(os.path.join(self.folder, SCORE), json.dumps(score) + "\n")
        except (OSError, UserError) as e:
            return str(e)
        return ""

    def _score(self, steps: list[int]) -> dict[str, Any] | None:
        """What is said of the best checkpoint so far; None where there is none of these steps."""
        path = os.path.join(self.folder, SCORE)
        if not paths.exists(path):
            return None
        try:
            score = json_text.loads(paths.read_bytes(path))
            _ = score["metric"], float(score["value"]), dict(score.get("settings", {}))
            return score if score["step"] in steps else None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{path}: damaged ({e}): remove '{self.folder}', and the next"
                " checkpoint is the best one so far"
            ) from None


def _better(metric: str, now: dict[str, Any], before: dict[str, Any]) -> bool:
    sign = -1 if METRICS[metric].less else 1
    return sign * now["value"] > sign * before["value"]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In what two scores cannot be compared, for a message; '' if in nothing."""

    def flat(score: dict[str, Any]) -> dict[str, Any]:
        return {k: score.get(k) for k in ("metric", "examples")} | score.get("settings", {})

    old, new = flat(before), flat(json.loads(json.dumps(now)))
    keys = [k for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
    return ", ".join(f"{k} {old.get(k)!r}, now {new.get(k)!r}" for k in keys)
