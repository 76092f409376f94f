"""Does a step of a run once more, from the checkpoint before it, and says what comes out.

Nothing of the run is changed: what the step was given is written to WORKDIR/faults.
"""

import json
import os
from typing import Any

import jax
import numpy as np

from lm_jax import paths
from lm_jax.config import Config
from lm_jax.data.loader import train_stream
from lm_jax.errors import UserError
from lm_jax.progress import progress
from lm_jax.sharding.mesh import make_mesh, to_devices
from lm_jax.training import weights
from lm_jax.training import workdir as workdir_lib
from lm_jax.training.checkpoint import Checkpoints
from lm_jax.training.evidence import Exhibit, write_down
from lm_jax.training.masking import make_masking
from lm_jax.training.program import check_batch, jit_train_step, rows_here
from lm_jax.training.step import make_step


def replay(workdir: str, step: int) -> dict[str, Any]:
    """Steps `from` + 1 to `step`, of which the last is reported.

    On the same devices the numbers are those of the run, bit for bit.

    Returns:
      step, from (the checkpoint's step; 0: the start), loss, gradient_norm, learning_rate, logged
      (what the run's metrics say of that step, or None), same (whether loss and norm are what was
      logged; None: it was not), batch (the file that says what the step was given) and, where it
      applies, note.

    Raises:
      UserError: there is no run, no such step, or what there is of it is damaged.
    """
    config = workdir_lib.read_config(workdir)
    if not 1 <= step <= config.training.steps:
        raise UserError(f"--replay={step}: the run has steps 1 to {config.training.steps}")
    if jax.process_count() > 1:
        raise UserError("--replay: one process replays a step, on the devices that it has")
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    tokenizer = workdir_lib.obtain_tokenizer(workdir, config)
    config = workdir_lib.with_vocabulary(config, tokenizer)
    update = make_step(config, make_masking(config.data, tokenizer, config.model.vocab_size))
    with (
        jax.set_mesh(mesh),
        train_stream(
            config.data, tokenizer, seed=config.training.seed, **rows_here(mesh)
        ) as stream,
    ):
        state, start = _state_before(config, workdir, step, update, mesh, stream)
        train_step = jit_train_step(update, mesh)
        with progress("steps", step - start) as done:
            for i in range(start, step):
                batch = next(stream, None)
                if batch is None:
                    raise UserError(f"--replay={step}: the data ends before that step")
                state, metrics = train_step(state, to_devices(batch, mesh))
                done(i + 1 - start)
    values = {key: float(x) for key, x in jax.device_get(metrics).items()}
    found = {k: values[k] for k in ("loss", "gradient_norm", "learning_rate")}
    exhibit = Exhibit(step, found["loss"], found["gradient_norm"], batch)
    logged, back = _logged(workdir, step, start)
    report = {"step": step, "from": start} | found
    report |= {"logged": logged, "same": None}
    if logged is not None:
        report["same"] = all(
            np.float32(logged[k]) == np.float32(found[k]) for k in ("loss", "gradient_norm")
        )
    report["batch"] = write_down(workdir, f"step-{step}", [exhibit], tokenizer)
    if back:
        report["note"] = (
            f"the run went back to step {back} and past some of the text; these are the steps that"
            " it gave up"
        )
    return report


def _state_before(config: Config, workdir: str, step: int, update, mesh, stream):
    """The state at the newest checkpoint before `step`, to which the stream is set; else a fresh
    one, as the run began with."""
    steps = []
    if paths.isdir(os.path.join(workdir, "checkpoints")):
        with Checkpoints(workdir) as checkpoints:
            steps = [s for s in checkpoints.steps() if s < step]
    _, given = weights.begun_with(config, workdir, mesh, bool(steps))
    if not steps:
        return jax.jit(update.init_from, donate_argnums=0)(given), 0
    with Checkpoints(workdir) as checkpoints:
        abstract = jax.eval_shape(update.init)
        state, place = checkpoints.restore(steps[-1], abstract, mesh, given)
    stream.set_state(place["lanes"])
    return state, steps[-1]


def _logged(workdir: str, step: int, start: int) -> tuple[dict[str, float] | None, int | None]:
    """What metrics.jsonl says of a step, and whether the run went back to `start` or later, and
    before the step, meanwhile."""
    path, found, back = os.path.join(workdir, "metrics.jsonl"), None, None
    for line in paths.read_text(path).splitlines() if paths.exists(path) else ():
        try:
            record = json.loads(line)
            if record["kind"] == "train" and record["step"] == step:
                found = {k: record[k] for k in ("loss", "gradient_norm", "learning_rate")}
            elif record["kind"] == "rewound" and start <= record["to"] < step:
                back = record["to"]
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            continue
    return found, back
