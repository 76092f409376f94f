"""python -m lm_jax.plan --config=configs/FILE.py[:ARG] --topology=v5p:4x4x4 [--slices=2] [...]

Compiles the step that lm_jax.train would run, for TPUs or GPUs that you do not have, and says
whether it fits, what it sends over the network and how fast it may be. Nothing is run.
"""

import sys

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "What to compile for: v4:2x2x2, v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2, h100:8 (a node) or"
    " h100:8x4 (four of them).",
)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that shape, joined by the network.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object on stdout, and nothing else.")
_SEARCH = flags.DEFINE_bool(
    "search", False, "Try meshes, rematerialization and parts of the batch, and rank what fits."
)
_MINUTES = flags.DEFINE_float("search_minutes", 10.0, "How long to search, about.")


def main(argv: list[str]) -> None:
    del argv
    config = cli.config_of(_CONFIG)
    if not _TOPOLOGY.value:
        raise UserError("for what? give --topology=v5e:4x4, say (--help names the chips)")

    if not _MINUTES.value > 0:
        raise UserError(f"--search_minutes: must be above 0, not {_MINUTES.value:g}")

    from lm_jax.planning import environment

    environment.prepare()

    with cli.importing():
        from lm_jax.planning.command import plan

    code = plan(
        config,
        _TOPOLOGY.value,
        slices=_SLICES.value,
        overridden=cli.overridden(_CONFIG),
        as_json=_JSON.value,
        search_minutes=_MINUTES.value if _SEARCH.value else None,
    )
    sys.exit(code)


if __name__ == "__main__":
    cli.run(main)
