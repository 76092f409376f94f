"""What a run does with its task: answers the validation examples, and keeps the best checkpoint.

WORKDIR/best is a run of its own, of one checkpoint: `generate --model=WORKDIR/best`.
"""

import json
import os
import shutil
from collections.abc import Callable

from lm_jax import paths
from lm_jax.config import CheckpointConfig, Config
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.evaluation.tasks import metrics_of, run_task
from lm_jax.model.transformer import Transformer
from lm_jax.progress import progress
from lm_jax.training.checkpoint import Checkpoints, stored
from lm_jax.training.step import TrainState

BEST = "best"
_SCORE = "score.json"


class Answering:
    """The task of one run, in one process."""

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
        """
        self.config, self.tokenizer, self.settle = config, tokenizer, settle
        self.folder = os.path.join(workdir, BEST)
        examples = documents(config.data, "validation")
        count = min(len(examples), config.task.examples or len(examples))
        self.examples = [examples[i] for i in range(count)]
        self.metric = metrics_of(config.task)[0]

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """The score of each metric."""
        with progress("examples", len(self.examples)) as on_done:
            result = run_task(
                model,
                self.tokenizer,
                self.examples,
                self.config.data,
                self.config.task,
                batch_size=self.config.task.rows,
                on_done=on_done,
            )
        return result.values()

    def keep(self, step: int, state: TrainState, values: dict[str, float]) -> bool:
        """Saves the model where it is the best so far; whether it is."""
        path = os.path.join(self.folder, _SCORE)
        value, best = values[self.metric], None
        if paths.exists(path):
            best = json.loads(paths.read_text(path))
        if best is not None and (best["value"] >= value or best["step"] == step):
            return False
        if not paths.remote(self.folder):  # a save that a kill cut short left no score
            shutil.rmtree(os.path.join(self.folder, "checkpoints"), ignore_errors=True)
        with Checkpoints(self.folder, CheckpointConfig(keep=1)) as checkpoints:
            checkpoints.save_parameters(step, stored(state.all_parameters))
        self.settle(self.folder)
        score = {"step": step, "metric": self.metric, "value": value}
        paths.write_whole(path, json.dumps(score) + "\n")
        return True
