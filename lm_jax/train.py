"""python -m lm_jax.train --config=configs/FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]

Trains a model from text, or goes on where the run in DIR stopped.
"""

import sys

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError
from lm_jax.validation import validate

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder: made if it is not there, gone on with if it is."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of several processes: HOST:PORT, the host of process 0 and a free port."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes train together.", 1)
_VALIDATE_ONLY = flags.DEFINE_bool(
    "validate_only", False, "Check the arguments, as far as that needs no text, and end."
)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0 on.", 0)


def main(argv: list[str]) -> None:
    del argv
    config = cli.config_of(_CONFIG)
    if not config.init_from:  # else it is not known yet what the model is
        config = validate(config)
    if not _WORKDIR.value:
        raise UserError("where to? give --workdir=DIR")
    if _VALIDATE_ONLY.value:
        return

    from lm_jax import runtime

    runtime.configure(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)

    from lm_jax.training.loop import train

    caught = train(config, _WORKDIR.value, cli.overridden(_CONFIG))
    if caught:
        sys.exit(128 + caught)


if __name__ == "__main__":
    cli.run(main)
