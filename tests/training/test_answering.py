"""The best model of a run is kept whatever happens, and compared with its like alone."""

import json
import math
import os

import jax.numpy as jnp
import pytest

from lm_jax.config import Config
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError
from lm_jax.evaluation.metrics import Score
from lm_jax.evaluation.output import write_whole
from lm_jax.evaluation.tasks import Result
from lm_jax.training.answered import is_answered
from lm_jax.training.answering import Answering
from lm_jax.training.checkpoint import Checkpoints
from lm_jax.training.farewell import farewell
from lm_jax.training.step import TrainState


@pytest.fixture
def answering(tmp_path):
    """Makes one, of a run in `tmp_path` with this task."""
    source = tmp_path / "examples.jsonl"
    source.write_text('{"q": "a", "a": "b"}\n' * 4)

    def make(**task) -> Answering:
        config = Config()
        config.data.objective, config.data.prompt, config.data.target = "complete", "{q}", "{a}"
        config.data.validation_sources = (str(source),)
        for key, value in ({"name": "translate"} | task).items():
            setattr(config.task, key, value)
        return Answering(config, str(tmp_path), BytesTokenizer(), lambda folder: None)

    return make


def keep(answering: Answering, step: int, value: float) -> tuple[bool, str]:
    """Offers a model whose parameters are all `value`."""
    state = TrainState(jnp.int32(step), {"x": jnp.full(3, value)}, {}, None)
    metric = answering.metrics[0]
    score = Score(value, value, value, 4, "")
    return answering.keep(step, state, Result({metric: score}, [{}] * 4))


def kept(tmp_path) -> list[int]:
    return sorted(map(int, os.listdir(tmp_path / "best" / "checkpoints")))


def best(tmp_path) -> tuple[int, float]:
    """The step and the score that are told."""
    score = json.loads((tmp_path / "best" / "score.json").read_text())
    assert score["step"] in kept(tmp_path)
    return score["step"], score["value"]


def test_only_the_best_is_kept(answering, tmp_path):
    task = answering()
    offered = [(2, 5.0), (4, 7.0), (6, 6.0), (8, 7.0), (10, 8.0)]
    assert [keep(task, *o)[0] for o in offered] == [True, True, False, False, True]
    assert best(tmp_path) == (10, 8.0) and kept(tmp_path) == [10]
    assert keep(task, 10, 9.0) == (False, "")  # it is that one


@pytest.mark.parametrize("killed", ["save_parameters", "settle", "delete"])
def test_a_kill_at_any_time_leaves_the_best_so_far(killed, answering, tmp_path, monkeypatch):
    def kill(*_, **__):
        raise KeyboardInterrupt

    task = answering()
    keep(task, 2, 5.0)
    with monkeypatch.context() as patch:
        patch.setattr(*((task, "settle") if killed == "settle" else (Checkpoints, killed)), kill)
        with pytest.raises(KeyboardInterrupt):
            keep(task, 4, 7.0)
    now = (4, 7.0) if killed == "delete" else (2, 5.0)
    assert best(tmp_path) == now
    task = answering()
    assert keep(task, 4, 7.0)[0] == (killed != "delete")  # the run goes on from before
    assert best(tmp_path) == (4, 7.0)
    assert not keep(task, 5, 6.0)[0] and kept(tmp_path) == [4]  # and nothing that a kill left
    assert keep(task, 6, 8.0)[0] and kept(tmp_path) == [6]


def test_scores_are_compared_with_their_like(answering, tmp_path):
    keep(answering(), 8, 50.0)
    # Even before the other one.
    best_now, note = keep(answering(beams=4), 4, 3.0)
    assert best_now and "beams 1, now 4" in note
    assert best(tmp_path) == (4, 3.0) and kept(tmp_path) == [4]
    best_now, note = keep(answering(beams=4, metrics=("chrf",)), 6, 2.0)
    assert best_now and "metric 'bleu', now 'chrf'" in note and best(tmp_path) == (6, 2.0)
    assert keep(answering(beams=4, metrics=("chrf",)), 8, 1.0) == (False, "")


def test_a_run_that_went_back_is_not_compared_with_what_it_gave_up(answering, tmp_path):
    keep(answering(), 8, 50.0)
    best_now, note = keep(answering(), 4, 3.0)
    assert best_now and "of step 8" in note and kept(tmp_path) == [4]


def test_a_score_that_is_no_number_is_never_the_best(answering, tmp_path):
    task = answering()
    assert keep(task, 2, math.nan) == (False, "")
    assert keep(task, 4, 3.0)[0] and not keep(task, 6, math.nan)[0]
    assert best(tmp_path) == (4, 3.0) and kept(tmp_path) == [4]


def test_less_perplexity_is_better(answering, tmp_path):
    task = answering(metrics=("perplexity", "bleu"))
    offered = [(2, 5.0), (4, 7.0), (6, 4.0)]
    assert [keep(task, *o)[0] for o in offered] == [True, False, True]
    assert best(tmp_path) == (6, 4.0)


def test_a_score_without_its_checkpoint_is_none(answering, tmp_path):
    task = answering()
    keep(task, 2, 50.0)
    (tmp_path / "best" / "checkpoints" / "2").rename(tmp_path / "gone")
    assert keep(task, 4, 3.0)[0] and best(tmp_path) == (4, 3.0)


def test_what_was_answered_otherwise_is_not_there(answering, tmp_path):
    def write(task: Answering, step: int) -> Result:
        metrics = {name: Score(5.0, 5.0, 5.0, 3, "") for name in task.metrics}
        result = Result(metrics, [{}] * 3, skipped=1)
        os.makedirs(tmp_path / "predictions", exist_ok=True)
        path = str(tmp_path / "predictions" / f"{step}.jsonl")
        write_whole(path, result.records, {"step": step} | task.settings, result.report())
        return result

    task = answering()
    assert not is_answered(task, 2)
    write(task, 2)
    assert is_answered(task, 2) and not is_answered(task, 4)
    for changes in ({"beams": 4}, {"metrics": ("perplexity",)}, {"metrics": ("chrf",)},
                    {"examples": 2}, {"max_tokens": 3}):  # fmt: skip
        assert not is_answered(answering(**changes), 2), changes
    # The best model was not kept, and then it is.
    best = answering(keep_best=True)
    assert not is_answered(best, 2) and "/best" not in farewell(best.config, str(tmp_path), 2, 0)
    keep(best, 2, 5.0)
    assert is_answered(best, 2) and "/best" in farewell(best.config, str(tmp_path), 2, 0)
    (tmp_path / "predictions" / "2.report.json").write_text("{")
    assert not is_answered(best, 2)


def test_metrics_that_cannot_score_are_told_before_the_run(answering, tmp_path):
    (tmp_path / "examples.jsonl").write_text('{"q": "a", "a": "\u732b"}\n')
    with pytest.raises(UserError, match="rougeL sees the letters a to z"):
        answering(metrics=("rougeL",))
