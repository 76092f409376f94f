"""The report of a run: python -m lm_jax.report --workdir=DIR [--output=FILE.html]

Writes one HTML file that shows how a run went, or goes: its curves and scores, where its time went,
what it had to skip or to do again, and what it wrote. A report that is there is replaced.
"""

import os

from absl import flags

from lm_jax import cli, paths
from lm_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "A file on this machine, .html; default: report.html in the run's folder."
)


def main(argv: list[str]) -> None:
    del argv
    workdir, output = _WORKDIR.value, _OUTPUT.value
    if not workdir:
        raise UserError("which run? give --workdir=DIR, the folder that training wrote")
    if not output and paths.remote(workdir):
        raise UserError("where is the page to go? give --output=FILE.html, on this machine")

    from lm_jax.reporting.page import check_replaceable, render
    from lm_jax.reporting.reading import read

    run = read(workdir)
    output = output or os.path.join(workdir, "report.html")
    check_replaceable(output)
    try:
        paths.write_whole(output, render(run))
    except OSError as e:
        raise UserError(
            f"'{output}' cannot be written: {e.strerror}: name another file with --output"
        ) from None
    print(f"wrote {output}: open it in a browser")


if __name__ == "__main__":
    cli.run(main)
