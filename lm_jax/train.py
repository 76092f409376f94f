"""python -m lm_jax.train --config=configs/FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]

Trains a model from text, or goes on where the run in DIR stopped.

python -m lm_jax.train --workdir=DIR --replay=STEP

Does a step of that run once more, from the checkpoint before it: its loss, its gradient's norm and
what it was given, as JSON.
"""

import json
import sys
import time

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError, ended_by
from lm_jax.validation import validate

_BEGAN = time.time()
_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder: made if it is not there, gone on with if it is."
)
_JOB = cli.define_job_flags("train")
_VALIDATE_ONLY = flags.DEFINE_bool(
    "validate_only", False, "Check the arguments, as far as that needs no text, and end."
)
_REPLAY = flags.DEFINE_integer(
    "replay", None, "A step to do once more, as it was; changes nothing.", 1
)


def main(argv: list[str]) -> None:
    del argv
    if _REPLAY.value is not None:
        return _replay(_REPLAY.value)
    config = cli.config_of(_CONFIG)
    if not config.init_from:  # else it is not known yet what the model is
        config = validate(config)
    if not _WORKDIR.value:
        raise UserError("where to? give --workdir=DIR")
    if _VALIDATE_ONLY.value:
        return

    with cli.importing():
        from lm_jax.training.signals import StopSignal

    with StopSignal(worth_saving=False):  # until the loop has its own
        with cli.importing():
            from lm_jax import runtime
            from lm_jax.training.loop import train
        runtime.configure(*_JOB())

        caught = train(config, _WORKDIR.value, cli.overridden(_CONFIG), _BEGAN)
    if caught:
        sys.exit(ended_by(caught))


def _replay(step: int) -> None:
    if _CONFIG.value is not None:
        raise UserError("--replay: the run's own config is used: leave --config out")
    if not _WORKDIR.value:
        raise UserError("--replay: of which run? give --workdir=DIR")

    with cli.importing():
        from lm_jax import runtime
        from lm_jax.training.replay import replay
    runtime.configure(*_JOB())

    print(json.dumps(replay(_WORKDIR.value, step)))


if __name__ == "__main__":
    cli.run(main)
