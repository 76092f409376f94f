"""From a config and a topology to what `python -m lm_jax.plan` prints."""

import json
import sys
import time
from collections.abc import Collection

from lm_jax.config import Config
from lm_jax.planning import report as report_lib
from lm_jax.planning.environment import quiet
from lm_jax.planning.program import compile_step
from lm_jax.planning.recipe import resolve
from lm_jax.planning.search import AS_IT_IS, Found, search
from lm_jax.planning.suggest import SECONDS, suggest
from lm_jax.planning.topology import Topology, devices_of, parse_topology
from lm_jax.sharding.mesh import make_mesh


def plan(
    config: Config,
    topology: str,
    *,
    slices: int = 1,
    overridden: Collection[str] = (),
    as_json: bool = False,
    search_minutes: float | None = None,
) -> int:
    """Prints the report of a plan, or with `search_minutes` a table of plans.

    Returns:
      0, or 1 if it does not fit (of a search: if nothing does).

    Raises:
      UserError: something in the config or the topology cannot be.
    """
    wanted = parse_topology(topology, slices)
    config, masking = resolve(config, overridden)
    with quiet():
        devices = devices_of(wanted)
    if search_minutes is not None:
        found = search(config, wanted, devices, masking, minutes=search_minutes, say=_say)
        print(json.dumps(found.to_json()) if as_json else table(found, wanted, search_minutes))
        return 0 if found.rows else 1
    begun = time.monotonic()
    program = compile_step(config, make_mesh(config.mesh, devices), masking)
    report = report_lib.make_report(config, wanted, program)
    if not report.fits:
        say = _say if sys.stderr.isatty() else _ignore  # a file needs no signs of life
        left = max(SECONDS - (time.monotonic() - begun), SECONDS / 4)
        say(f"does not fit {wanted}; looking for what does, for about {left:.0f} s at most")
        report = suggest(report, masking, devices, left, say)
    if as_json:
        print(json.dumps(report_lib.to_json(report)))
    else:
        print(report_lib.to_text(report))
    return 0 if report.fits else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ignore(line: str) -> None:
    pass


def table(found: Found, topology: Topology, minutes: float) -> str:
    """A search's rows for a person, and how much of what there is was tried."""
    many = f"{found.tried} of {found.candidates} tried"
    if found.tried < found.candidates:
        many += f" in {minutes:g} minute{'s' * (minutes != 1)}; --search_minutes gives more"
    if not found.rows:
        return f"nothing that was tried fits {topology}: {many}"
    lines = ["   MFU, estimated   step, s           GiB   flags"]
    for row in found.rows:
        low, high = row.mfu
        lines.append(
            f"   {low:>4.0%} to {high:>4.0%}     {row.fast:.3g} to {row.slow:.3g}".ljust(37)
            + f"{row.total / 2**30:>6.2f}   {' '.join(row.flags) or AS_IT_IS}"
        )
    return "\n".join([*lines, many])
