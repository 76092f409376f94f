"""FLOPs of a traced step: those of its matrix products, whatever is computed again included."""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of all devices together."""

    products: float = 0.0  # left to XLA
    kernels: float = 0.0  # inside of Pallas kernels
    attention: float = 0.0  # inside of those that are attention, as if every query saw every key
    experts: float = 0.0  # grouped products, which are kernels too, as if every row were used

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(a + b for a, b in pairs))

    def times(self, n: float) -> "Work":
        return Work(*(x * n for x in dataclasses.astuple(self)))

    def used(self, keys: float, rows: float) -> "Work":
        """With kernels that skip all but a share of the keys, and of the rows of experts."""
        return Work(self.products, self.kernels + self.attention * keys + self.experts * rows)


def work_of(jaxpr: core.Jaxpr) -> Work:
    """2 FLOPs for each multiplication and addition of matrix products; a loop's body counts as
    often as it runs, of branches the most expensive one, all else not at all."""
    total = Work()
    for equation in jaxpr.eqns:
        total += _of_equation(equation.primitive.name, equation)
    return total


def _of_equation(name: str, equation: Any) -> Work:
    params = equation.params
    if name == "dot_general":
        return Work(_product(equation))
    if name == "ragged_dot_general":
        out, left = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
        return Work(experts=2.0 * math.prod(left) * out[-1])
    if name == "pallas_call":
        name, flops = str(params["name"]), _kernel(equation)
        attention = any(part in name for part in ("splash", "flash", "attention"))
        return Work(attention=flops) if attention else Work(kernels=flops)
    inner = [work_of(j) for j in _jaxprs(params.get("branches", ()))]
    if name == "cond":
        return max(inner, key=lambda w: w.total)
    once = Work()
    for key, value in params.items():
        if key not in ("branches", "cond_jaxpr") and not key.startswith(("fwd", "bwd", "jvp")):
            for found in _jaxprs(value):
                once += work_of(found)
    if name == "scan":
        return once.times(params["length"])
    if name == "shard_map":
        mesh, manual = params["mesh"], params["newly_manual_axes"]
        return once.times(math.prod(mesh.shape[axis] for axis in manual))
    return once


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [found for v in value for found in _jaxprs(v)]
    return []


def _product(equation: Any) -> float:
    (contracting, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracting)


def _kernel(equation: Any) -> float:
    """What the kernel says of itself, else the products of its body, once for each grid point."""
    if (said := equation.params.get("cost_estimate")) is not None and said.flops:
        return float(said.flops)
    grid = equation.params["grid_mapping"].grid
    points = math.prod(n for n in grid if isinstance(n, int))
    return work_of(equation.params["jaxpr"]).total * points


def traced_work(traced: jax.stages.Traced) -> Work:
    """Of what is computed: of a block that is computed again, not what was kept of it."""
    jaxpr = traced.jaxpr.jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return work_of(used)
