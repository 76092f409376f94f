"""Whether the answers that a run's folder holds are those that it is asked for now."""

import json
import os
from typing import Any

from lm_jax import json_text, paths
from lm_jax.evaluation.output import report_of
from lm_jax.training.answering import BEST, PREDICTIONS, SCORE, Answering


def has_best(workdir: str) -> bool:
    """Whether a run has kept its best model."""
    return paths.exists(os.path.join(workdir, BEST, SCORE))


def is_answered(answering: Answering, step: int) -> bool:
    """Whether the predictions of a step are there, of as many examples, asked and scored in the
    same way, and with `task.keep_best` a best model that was found so.
    """
    path = os.path.join(answering.workdir, PREDICTIONS, f"{step}.jsonl")
    found = _read(report_of(path))
    result = found.get("result") or {}
    count = result.get("examples", 0) + result.get("skipped", 0)
    if (
        not _holds(found, answering.settings)
        or list(result.get("scores", ())) != list(answering.metrics)
        or count != len(answering.examples)
    ):
        return False
    if not answering.config.task.keep_best:
        return True
    best = _read(os.path.join(answering.folder, SCORE))
    return _holds(best, answering.settings) and best.get("metric") == answering.metrics[0]


def _holds(found: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether the settings of what was found are these, beside others."""
    there = found.get("settings") or {}
    return all(there.get(key) == v for key, v in json.loads(json.dumps(settings)).items())


def _read(path: str) -> dict[str, Any]:
    """What a JSON file holds; {} where there is none, or one that is none."""
    if not paths.exists(path):
        return {}
    try:
        found = json_text.loads(paths.read_bytes(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
