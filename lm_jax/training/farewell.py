"""What a run says when it ends: how to go on, or what to do with the model."""

import os
import shlex
import shutil
import sys

from lm_jax.config import Config
from lm_jax.training.answered import has_best
from lm_jax.training.answering import BEST


def farewell(config: Config, workdir: str, step: int, caught: int) -> str:
    """
    Args:
      step: the last one that is done.
      caught: the number of the signal that ended the run, or 0.
    """
    steps, done = config.training.steps, f"done: step {step} in {workdir}"
    if caught:
        return f"stopped after step {step} of {steps}; the same command goes on"
    use, what = "generate", "generate from it"
    if config.model.head != "linear":
        use, what = "evaluate", "evaluate it"
    if config.task.name != "none":
        use, what = f"evaluate --task={config.task.name}", "evaluate it"
        if config.task.keep_best and has_best(workdir):
            workdir, what = os.path.join(workdir, BEST), "evaluate the best of it"
    command = f"{_python()} -m lm_jax.{use} --workdir={shlex.quote(workdir)}"
    return f"{done}\n{what}: {command}"


def _python() -> str:
    """How the user calls this interpreter: by its path where 'python' is another one, or none."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if path.startswith("..") else path)
